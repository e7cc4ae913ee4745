"""What a run did, from its storage alone.

python -m relora_ray.report RUN
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from relora_ray import metrics
from relora_ray.checkpoint.history import read_origin
from relora_ray.cli import print_about
from relora_ray.config import RunConfig
from relora_ray.metrics import Record, size_text
from relora_ray.rollback import read_rollbacks, skipped
from relora_ray.runs import MODEL, read_config
from relora_ray.storage import Storage

NEEDED: dict[str, set[str]] = {
    "attempt": {"world_size"},
    "train": {"step", "loss", "tokens"},
    "eval": {"step", "loss", "perplexity"},
    "boundary": {"step", "boundary_kind"},
    "checkpoint": {"step", "delta_bytes", "base_bytes", "base_is_new"},
}
"""By kind, what is shown of a record: one without it is not ours."""
SHOWN = 8
"""Runs of steps that are listed."""


def summary(storage: Storage) -> str:
    """A page of text: losses and perplexities, merges, checkpoint bytes by kind, where the model is."""
    cfg = read_config(storage)
    return "\n".join(_lines(cfg, storage))


def _lines(cfg: RunConfig, storage: Storage) -> Iterator[str]:
    kinds = metrics.read_kinds(storage)
    records = {kind: [record for record in kinds[kind] if record.keys() >= needed] for kind, needed in NEEDED.items()}
    evals = metrics.latest(records["eval"])
    yield f"run {cfg.name} ({cfg.method.kind}), {storage.url}"
    if (origin := read_origin(storage)) is not None:
        yield f"  forked    from {origin.parent} after step {origin.step:,}"
    if evals:
        yield "  held-out text           loss    perplexity"
    for record in evals:
        numbers = f"{_number(record['loss'], 7, 4)}  {_number(record['perplexity'], 12, 2)}"
        yield f"    after step {record['step']:>7,}  {numbers}{_note(cfg, record['step'])}"
    trained = metrics.latest(records["train"])
    if trained:
        yield f"  trained   {trained[-1]['step']:,} of {cfg.steps:,} steps, {trained[-1]['tokens']:,} tokens"
    yield from _not_made(cfg, storage, trained)
    boundaries = metrics.latest(records["boundary"])
    merges = [b["step"] for b in boundaries if b["boundary_kind"] == "merge"]
    where = " after steps " + ", ".join(f"{step:,}" for step in merges) if 0 < len(merges) < 20 else ""
    yield f"  merges    {len(merges)}{where}"
    if state := _state(records["attempt"][-1:] + records["boundary"]):
        yield f"  state     {state}"
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


def _state(shapes: Sequence[Record]) -> str:
    """Bytes on each worker as they were last; "" if the run's version did not record them."""
    last = max(shapes, key=lambda record: record["step"], default={})
    by_role: dict[str, int] = last.get("state_bytes") or {}
    parts = ", ".join(f"{role} {size_text(num_bytes)}" for role, num_bytes in by_role.items() if num_bytes)
    return f"{size_text(sum(by_role.values()))} on each worker: {parts}" if by_role else ""


def _not_made(cfg: RunConfig, storage: Storage, trained: Sequence[Record]) -> Iterator[str]:
    """Updates among the steps that count that were not made, and why; counted from 0, as train.skip_steps is."""
    nothing = {r["step"] - 1 for r in trained if r["loss"] is None or r.get("grad_norm", 0.0) is None}
    left_out = nothing & skipped(read_rollbacks(storage), cfg.steps).union(cfg.train.skip_steps)
    for name, steps, why in (
        ("skipped", nothing - left_out, "loss or gradient was not finite"),
        ("left out", left_out, "by train.skip_steps, or after going back"),
    ):
        if steps:
            yield f"  {name:9} {len(steps):,} of {len(trained):,} updates, {why}: {_spans(sorted(steps))}"


def _spans(steps: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` -> `3 to 5, 9`, no more than `SHOWN` of them."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    text = ", ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in spans[:SHOWN])
    return f"{text} and more" if len(spans) > SHOWN else text


def _number(value: float | None, width: int, digits: int) -> str:
    """One that is not finite is null in the log."""
    return f"{value:{width}.{digits}f}" if value is not None else f"{'n/a':>{width}}"


def _note(cfg: RunConfig, step: int) -> str:
    notes = {0: "   before", cfg.warm_start_steps or -1: "   end of the warm start", cfg.steps: "   end"}
    return notes.get(step, "")


main = print_about("report", __doc__.splitlines()[0], summary)


if __name__ == "__main__":
    sys.exit(main())
