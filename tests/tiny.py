"""Configs of runs that take a second, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
import yaml

from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.conformance.ours import Crash, state_tensors
from relora_ray.conformance.processes import run_ranks
from relora_ray.loop import TrainState, run_attempt
from relora_ray.modeling.parallel import World, digest
from relora_ray.runs.metrics import Record, read
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run

T = TypeVar("T")

TINY = """
name: tiny
storage: runs
seed: 3
steps: 12
global_batch_rows: 6
model: {hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 2, vocab_size: 2048}
data: {path: data, seq_len: 24}
method: {kind: relora, lora_rank: 4, alpha: 8, warm_start_steps: 3, merge_every_steps: 3}
optimizer: {learning_rate: 1.0e-2, weight_decay: 0.01}
schedule: {kind: jagged_cosine, warmup_steps: 1, restart_warmup_steps: 1}
train: {micro_batch_rows: 3, eval_rows: 5}
checkpoint: {save_every_steps: 2, keep_last: 100, save_async: false}
"""


def tiny_config(data: Path, folder: Path, *overrides: str, **sections: Any) -> RunConfig:
    """The tiny run under `folder`; `sections` replace whole sections of the YAML."""
    raw = yaml.safe_load(TINY) | sections
    return parse_config(yaml.safe_dump(raw), [f"storage={folder}", f"data.path={data}", *overrides])


def crash_at(step: int, kind: str) -> Callable[[Record], None]:
    """Die at the record of this kind and step."""

    def on_record(record: Record) -> None:
        if record["kind"] == kind and record["step"] == step:
            raise Crash(f"{kind} {step}")

    return on_record


def run(cfg: RunConfig, on_record: Callable[[Record], None] | None = None) -> tuple[TrainState, list[Record]]:
    """One attempt in this process: its final state, and its records."""
    records: list[Record] = []

    def collect(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    return run_attempt(check_run(cfg), World(), on_record=collect), records


def run_on(num_ranks: int, cfg: RunConfig) -> None:
    """One attempt by so many processes, without Ray."""
    run_ranks(num_ranks, _attempt, cfg)


def _attempt(cfg: RunConfig) -> None:
    run_attempt(check_run(cfg), World.current())


def losses(records: list[Record]) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def stored_losses(cfg: RunConfig, kind: str = "train") -> dict[int, float]:
    """By step, from the run's log; of kind "eval" too."""
    return {r["step"]: r["loss"] for r in read(run_storage(cfg), kind)}


def state_digest(state: TrainState) -> int:
    """Of all weights and all optimizer state, bit by bit."""
    return digest(state_tensors(state))


def assert_loads_as_the_live_model(folder: str, state: TrainState, ids: torch.Tensor) -> None:
    """The exported folder, in plain transformers: no missing and no unexpected key, the live model's logits."""
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        ours, theirs = state.model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def live(
    attempt: Callable[[Callable[[Record], None]], T], step: int | None, kind: str
) -> tuple[T | None, list[Record]]:
    """One life of a run: what `attempt` returns, which is given an `on_record`, and its records. It ends at the record
    of this kind and step, and returns nothing then; with None it comes to its end."""
    life: list[Record] = []
    crash = crash_at(step, kind) if step is not None else lambda record: None

    def on_record(record: Record) -> None:
        life.append(record)
        crash(record)

    with pytest.raises(Crash) if step is not None else nullcontext():
        return attempt(on_record), life
    return None, life
