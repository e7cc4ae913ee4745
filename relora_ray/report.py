"""What a run did, from its storage alone.

python -m relora_ray.report RUN
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from relora_ray import metrics
from relora_ray.checkpoint.history import FORK
from relora_ray.config import RunConfig
from relora_ray.metrics import size_text
from relora_ray.runs import MODEL, print_about, read_config
from relora_ray.storage import Storage


def summary(storage: Storage) -> str:
    """A page of text: losses and perplexities, merges, checkpoint bytes by kind, where the model is."""
    cfg = read_config(storage)
    return "\n".join(_lines(cfg, storage))


def _lines(cfg: RunConfig, storage: Storage) -> Iterator[str]:
    records = metrics.read_kinds(storage)
    evals = metrics.latest(records["eval"])
    yield f"run {cfg.name} ({cfg.method.kind}), {storage.url}"
    if (fork := storage.find(FORK)) is not None:
        origin = json.loads(fork)
        yield f"  forked    from {origin['parent']} after step {origin['step']:,}"
    if evals:
        yield "  held-out text           loss    perplexity"
    for record in evals:
        numbers = f"{record['loss']:7.4f}  {record['perplexity']:12.2f}"
        yield f"    after step {record['step']:>7,}  {numbers}{_note(cfg, record['step'])}"
    trained = metrics.latest(records["train"])
    if trained:
        yield f"  trained   {trained[-1]['step']:,} of {cfg.steps:,} steps, {trained[-1]['tokens']:,} tokens"
    boundaries = metrics.latest(records["boundary"])
    merges = [b["step"] for b in boundaries if b["boundary_kind"] == "merge"]
    where = " after steps " + ", ".join(f"{step:,}" for step in merges) if 0 < len(merges) < 20 else ""
    yield f"  merges    {len(merges)}{where}"
    checkpoints = metrics.latest(records["checkpoint"])
    if checkpoints:
        base = [c["base_bytes"] for c in checkpoints if c["base_is_new"]]
        delta = [c["delta_bytes"] for c in checkpoints]
        yield (
            f"  saved     {len(checkpoints)} checkpoints: base {size_text(sum(base))} in {len(base)}, "
            f"delta {size_text(sum(delta))} in {len(delta)} (last: base {size_text(checkpoints[-1]['base_bytes'])}, "
            f"delta {size_text(delta[-1])})"
        )
    attempts = records["attempt"]
    yield f"  attempts  {len(attempts)}, world size {', '.join(str(a['world_size']) for a in attempts[-8:])}"
    if storage.exists(f"{MODEL}/config.json"):
        yield f"  model     {storage.url}/{MODEL} (plain Hugging Face folder)"


def _note(cfg: RunConfig, step: int) -> str:
    notes = {0: "   before", cfg.warm_start_steps or -1: "   end of the warm start", cfg.steps: "   end"}
    return notes.get(step, "")


def main() -> None:
    print_about("report", __doc__.splitlines()[0], summary)


if __name__ == "__main__":
    main()
