"""Hold an implementation of ReLoRA to the conformance suite and print the table.

python -m relora_ray.conformance [--implementation MODULE:CLASS] [--only CHECK ...]
"""

from __future__ import annotations

import bz2
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ray import cli
from relora_ray.cli import command
from relora_ray.commands import shipped
from relora_ray.config import nearest
from relora_ray.errors import ConfigError

if TYPE_CHECKING:  # --help must not wait for torch
    from relora_ray.conformance.implementation import Implementation
    from relora_ray.conformance.suite import Result

# Bits depend on the number of threads, and two processes share a small machine.
THREADS = "1"


def make_data(text: Path, tokenizer: Path, out: Path) -> str:
    """The first 200,000 characters of `text`, a .bz2 file, as a dataset of a few shards."""
    from relora_ray.data.prepare import Request, prepare

    excerpt = out / "excerpt.txt"
    out.mkdir(parents=True, exist_ok=True)
    excerpt.write_text(bz2.decompress(text.read_bytes()).decode()[:200_000])
    request = Request(
        sources=(str(excerpt),),
        out=str(out / "tokens"),
        tokenizer=str(tokenizer),
        document_separator=r"<\|endoftext\|>|(?i:chapter [ivxlc0-9]+)",
        validation_fraction=0.2,
        shard_tokens=10_000,
        num_workers=1,
    )
    prepare(request, quiet=True)
    return request.out


def load(name: str, configs: Path) -> Implementation:
    if not name:
        from relora_ray.conformance.ours import Ours

        return Ours(configs)
    module, _, attribute = name.partition(":")
    try:
        loaded: Implementation = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--implementation {name}: {error}. Give MODULE:CLASS, importable from here.") from error
    return loaded


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        "conformance",
        (__doc__ or "").splitlines()[0],
        "",
        "--implementation my_package.mine:Mine",
        "--only merge_keeps_the_function",
    )
    parser.add_argument("--implementation", default="", metavar="MODULE:CLASS", help="default: relora_ray's own")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="default: all")
    parser.add_argument("--configs", type=Path, default=shipped.folder(), help="default: those of the package")
    args = parser.parse_args(argv)

    os.environ["OMP_NUM_THREADS"] = THREADS
    import torch

    from relora_ray.conformance.suite import CHECKS, markdown, run_suite

    known = [check.id for check in CHECKS]
    if unknown := [name for name in args.only if name not in known]:
        raise ConfigError(f"--only {unknown[0]} is no check.{nearest(unknown[0], known)} They are {', '.join(known)}.")
    torch.set_num_threads(int(THREADS))
    logging.disable(logging.WARNING)  # crashes and NaNs are the point here

    word = {True: "pass", False: "FAIL", None: "-"}

    def show(result: Result) -> None:
        print(f"{word[result.passed]:4}  {result.check.id:16} {result.value}  ({result.seconds:.1f} s)", flush=True)

    implementation = load(args.implementation, args.configs)
    with tempfile.TemporaryDirectory(prefix="relora-ray-conformance-") as folder:
        quickstart = args.configs / "quickstart"
        data = make_data(quickstart / "austen.txt.bz2", quickstart / "tokenizer", Path(folder, "data"))
        results = run_suite(implementation, data, Path(folder), only=args.only, on_result=show)
    print(f"\n{implementation.name}\n\n{markdown(results)}")
    return 1 if any(result.passed is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
