"""What a run did, from its storage alone.

python -m relora_ray.report RUN
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from relora_ray import metrics
from relora_ray.config import RunConfig
from relora_ray.errors import ReloraError
from relora_ray.metrics import size_text
from relora_ray.runs import read_config
from relora_ray.storage import Storage, add_options_argument, parse_options


def summary(storage: Storage) -> str:
    """A page of text: losses and perplexities, merges, checkpoint bytes by kind, where the model is."""
    cfg = read_config(storage)
    return "\n".join(_lines(cfg, storage))


def _lines(cfg: RunConfig, storage: Storage) -> Iterator[str]:
    evals = metrics.read(storage, "eval")
    yield f"run {cfg.name} ({cfg.method.kind}), {storage.url}"
    if evals:
        yield "  held-out text           loss    perplexity"
    for record in evals:
        numbers = f"{record['loss']:7.4f}  {record['perplexity']:12.2f}"
        yield f"    after step {record['step']:>7,}  {numbers}{_note(cfg, record['step'])}"
    trained = metrics.read(storage, "train")
    if trained:
        yield f"  trained   {trained[-1]['step']:,} of {cfg.steps:,} steps, {trained[-1]['tokens']:,} tokens"
    boundaries = metrics.read(storage, "boundary")
    merges = [b["step"] for b in boundaries if b["boundary_kind"] == "merge"]
    where = " after steps " + ", ".join(f"{step:,}" for step in merges) if 0 < len(merges) < 20 else ""
    yield f"  merges    {len(merges)}{where}"
    checkpoints = metrics.read(storage, "checkpoint")
    if checkpoints:
        base = [c["base_bytes"] for c in checkpoints if c["base_is_new"]]
        delta = [c["delta_bytes"] for c in checkpoints]
        yield (
            f"  saved     {len(checkpoints)} checkpoints: base {size_text(sum(base))} in {len(base)}, "
            f"delta {size_text(sum(delta))} in {len(delta)} (last: base {size_text(checkpoints[-1]['base_bytes'])}, "
            f"delta {size_text(delta[-1])})"
        )
    attempts = metrics.read_all(storage, "attempt")
    yield f"  attempts  {len(attempts)}, world size {', '.join(str(a['world_size']) for a in attempts[-8:])}"
    if storage.exists("model/config.json"):
        yield f"  model     {storage.url}/model (plain Hugging Face folder)"


def _note(cfg: RunConfig, step: int) -> str:
    notes = {0: "   before", cfg.warm_start_steps or -1: "   end of the warm start", cfg.steps: "   end"}
    return notes.get(step, "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", help="the run's folder or URL")
    add_options_argument(parser)
    args = parser.parse_args()
    try:
        print(summary(Storage(args.run, parse_options(args.storage_option))))
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
