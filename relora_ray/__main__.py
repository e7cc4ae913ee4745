"""relora-ray COMMAND ...: all that is run by hand. `python -m relora_ray` is the same."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from relora_ray import __version__

COMMANDS = {
    "plan": ("relora_ray.commands.plan", "what a run will take, before anything is spent"),
    "launch": ("relora_ray.launch", "train a run or a sweep; the same command continues it"),
    "prepare": ("relora_ray.data.prepare", "text to token shards"),
    "tokenizer": ("relora_ray.data.tokenizer", "train a tokenizer on your own text"),
    "configs": ("relora_ray.commands.shipped", "the configs that come with the package; copy one out"),
    "status": ("relora_ray.commands.status", "how a run is doing"),
    "watch": ("relora_ray.commands.watch", "a run while it runs, in a terminal or a browser"),
    "report": ("relora_ray.commands.report", "what runs did, as text or as a page to look at"),
    "export": ("relora_ray.commands.export", "a run's model as a plain Hugging Face folder"),
    "evaluate": ("relora_ray.commands.evaluate", "how good a model is: perplexity, samples, GLUE, lm-eval"),
    "checkpoints": (
        "relora_ray.commands.checkpoints",
        "list, verify, copy, prune and delete what a run has stored",
    ),
    "spectrum": ("relora_ray.study.spectrum", "the rank of what a run has learned, layer by layer"),
    "ablations": ("relora_ray.study.ablations", "a table of runs over grids and seeds, with intervals"),
    "conformance": ("relora_ray.conformance.__main__", "hold an implementation of ReLoRA to the suite"),
    "notice": ("relora_ray.runtime.notice", "tell Ray that this machine will soon be gone"),
}
"""By name, the module whose `main` it is, which is imported when it is called, and what it is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else "--help"
    if name in ("-h", "--help", "help"):
        print("\n".join(_help()))
        return 0
    if name in ("-V", "--version"):
        print(f"relora-ray {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"relora-ray: {name!r} is no command.{hint} They are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    called: int = import_module(COMMANDS[name][0]).main(given[1:])
    return called


def _help() -> list[str]:
    from relora_ray.cli import EXIT_CODES

    width = max(map(len, COMMANDS))
    return [
        "usage: relora-ray COMMAND ...",
        "",
        "ReLoRA and other low-rank pre-training on Ray, on machines that come and go.",
        "",
        *(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "relora-ray COMMAND --help says more, with examples; relora-ray --version says which this is.",
        EXIT_CODES,
    ]


if __name__ == "__main__":
    sys.exit(main())
