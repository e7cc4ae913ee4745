"""Faults during runs of two workers on a real Ray: every loss is the uninterrupted run's, bit for bit.

One of each kind here, but of those inside a process only where tests/test_kills.py, without Ray, cannot be: what dies
elsewhere in it looks the same from outside. `python benchmarks/faults.py` plays all, and more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relora_ray.checkpoint import list_manifests
from relora_ray.commands.checkpoints import verify
from relora_ray.config import RunConfig
from relora_ray.runs.metrics import read_all, read_pages
from relora_ray.runs.places import run_storage
from relora_ray.runtime.preflight import preflight
from tests.faults import FLIP, HANG, OUTSIDE, Fault, Play, plan
from tests.s3 import BUCKET, Server
from tests.tiny import run_on, stored_losses, tiny_config

STEPS = 243
WITHIN = ("all-reduce", "merge", "commit")


def fault_config(data: Path, storage: str, name: str, *more: str) -> RunConfig:
    """A run on two workers that merges and saves often."""
    overrides = (
        f"name={name}", f"steps={STEPS}", "cluster.workers=2", "checkpoint.save_async=true", "checkpoint.keep_last=3",
        "method.merge_every_steps=15", "checkpoint.save_every_steps=5", "schedule.restart_warmup_steps=3",
        "cluster.silence_timeout_s=3", "train.eval_every_steps=40", "cluster.collective_timeout_s=60",
        "storage_retry_s=30", *more,
    )  # fmt: skip
    return preflight(tiny_config(data, Path("x"), *overrides).model_copy(update={"storage": storage}))


def bucket_config(data: Path, server: Server, name: str, *more: str) -> RunConfig:
    """The same in a folder of its own on S3."""
    folder = f"s3://{BUCKET}/faults-{os.urandom(3).hex()}"
    return fault_config(data, folder, name, f"storage_options={json.dumps(server.options)}", *more)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of updates and of evaluations, of two ranks without Ray. They do not depend on where and how often states
    are stored."""
    more = ("cluster.silence_timeout_s=60", "checkpoint.save_every_steps=300")
    cfg = fault_config(data, str(tmp_path_factory.mktemp("whole")), "whole", *more)
    run_on(2, cfg)
    assert len(read_all(run_storage(cfg), "attempt")) == 1
    assert sorted(stored_losses(cfg)) == list(range(1, STEPS + 1))
    return stored_losses(cfg), stored_losses(cfg, "eval")


def test_every_fault_takes_place_and_changes_nothing(
    data: Path, server: Callable[[str], Server], uninterrupted: tuple[dict[int, float], dict[int, float]]
) -> None:
    cfg = bucket_config(data, server("rclone"), "faults")
    kinds = (*WITHIN, *OUTSIDE, "stopped")
    faults = plan(seed=1, count=len(kinds), steps=STEPS, kinds=kinds)
    play = Play(faults, server("rclone"))
    play.run(cfg)
    assert play.took_place() == {fault.number for fault in faults}
    storage = run_storage(cfg)
    assert len(read_all(storage, "attempt")) > len(WITHIN)
    assert (stored_losses(cfg), stored_losses(cfg, "eval")) == uninterrupted
    assert list_manifests(storage)[-1] == STEPS
    assert [wrong for _, wrong in verify(storage, None) if wrong] == []
    pages = read_pages(storage, "restarts")
    assert [page["change"] for page in pages].count("start") == 1
    assert any(page["cause"].startswith("the coordinator died") for page in pages)
    assert any("ended by SIGKILL" in page["cause"] for page in pages)
    assert any("no sign of life for 3 s" in page["cause"] for page in pages)


@pytest.fixture(scope="module")
def three_workers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run in which a bit flips in an adapter of one rank, and later the thread that trains hangs on another."""
    more = ("steps=183", "cluster.workers=3", "checkpoint.save_every_steps=300", "cluster.stall_timeout_s=15")
    cfg = fault_config(data, str(tmp_path_factory.mktemp("three")), "three", *more)
    play = Play([Fault(0, FLIP, 100, 1), Fault(1, "forward", 140, 2, HANG)], machines=3)
    play.run(cfg)
    assert play.took_place() == {0, 1}
    return cfg


def test_flipped_bit_is_caught_at_the_next_boundary_and_never_stored(three_workers: RunConfig) -> None:
    """The rank is named, and the run goes on from the checkpoint before."""
    storage = run_storage(three_workers)
    pages = read_pages(storage, "restarts")  # on a slow machine a rank may be taken for silent before
    (page,) = [page for page in pages if "RanksDisagreeError" in page["cause"]]
    assert page["from_step"] == 93
    assert "RanksDisagreeError: before the boundary at step 108: rank(s) [1] hold other values" in page["cause"]
    again: dict[int, set[float]] = {}
    for record in read_all(storage, "train"):
        again.setdefault(record["step"], set()).add(record["loss"])
    assert sorted(again) == list(range(1, three_workers.steps + 1))
    differing = {step for step, found in again.items() if len(found) > 1}
    assert differing
    assert differing <= set(range(101, 109)), "all others were done again with the same bits"


def test_hang_is_noticed_and_the_rank_that_hangs_is_named(three_workers: RunConfig) -> None:
    """Not one of those that wait for it in a collective."""
    pages = read_pages(run_storage(three_workers), "restarts")
    assert len(pages) >= 3  # on a slow machine one may be taken for silent besides
    (cause,) = [page["cause"] for page in pages if "tests/faults.py" in page["cause"]]
    assert cause.startswith("rank 2: no step, evaluation or checkpoint for 15 s; it was in\n"), cause
    assert "tests/faults.py" in cause.splitlines()[1]
    assert " in hang" in cause.splitlines()[1]
