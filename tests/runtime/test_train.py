"""Real Ray: two workers through the driver; an error that a restart cannot mend; no failure allowed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from relora_ray.checkpoint import list_manifests
from relora_ray.config import RunConfig
from relora_ray.errors import RunFailedError
from relora_ray.runs.metrics import read_all
from relora_ray.runs.places import run_storage
from relora_ray.runs.rollback import read_rollbacks
from relora_ray.runtime import driver
from relora_ray.runtime.preflight import preflight
from tests.tiny import stored_losses, tiny_config


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this module's own, in a folder of its own (with a short name: its sockets' paths have a limit)."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


def config(data: Path, folder: Path, *overrides: str) -> RunConfig:
    return preflight(tiny_config(data, folder, "cluster.workers=2", "checkpoint.save_async=true", *overrides))


@pytest.fixture(scope="module")
def reference(data: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An undisturbed run on two workers."""
    cfg = config(data, tmp_path_factory.mktemp("reference"), "steps=93")
    driver.run(cfg, on_event=lambda event: None)
    return cfg


def test_run_reaches_its_end_and_exports(reference: RunConfig) -> None:
    storage = run_storage(reference)
    assert sorted(stored_losses(reference)) == list(range(1, 94))
    assert list_manifests(storage)[-1] == 93
    assert [a["world_size"] for a in read_all(storage, "attempt")] == [2]
    assert storage.exists("model/model.safetensors")
    assert stored_losses(reference)[93] < stored_losses(reference)[1] - 1


def test_error_that_a_restart_cannot_mend_ends_the_run_at_once(local_ray: None, data: Path, tmp_path: Path) -> None:
    cfg = config(
        data, tmp_path, "optimizer.learning_rate=1e30", "optimizer.grad_clip=0", "train.max_nonfinite_steps=1",
        "train.max_rollbacks=1",
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    with pytest.raises(
        RunFailedError, match=r"NonFiniteError: 2 steps in a row.*with a lower optimizer\.learning_rate"
    ):
        driver.run(cfg, on_event=events.append)
    assert len(read_all(run_storage(cfg), "attempt")) == 2, "no try but that of the one rollback"
    assert [r.number for r in read_rollbacks(run_storage(cfg))] == [1]
    assert any("RolledBackError" in e["message"] for e in events if e["kind"] == "log")
    assert [e for e in events if e["kind"] == "log" and "is not finite" in e["message"]]


def test_failure_more_than_allowed_ends_the_run(local_ray: None, data: Path, tmp_path: Path) -> None:
    """That the same command then goes on from storage: test_cli.py."""
    cfg = config(data, tmp_path, "steps=93", "cluster.max_failures=0")
    pids: list[int] = []

    def stop_at_8(event: dict[str, Any]) -> None:
        if event["kind"] == "worker":
            pids.append(event["pid"])
        if event["kind"] == "train" and event["step"] >= 8 and len(pids) == 2:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            pids.append(0)

    with pytest.raises(RunFailedError, match=r"cluster\.max_failures=0 allows no more; the last: rank .*SIGKILL"):
        driver.run(cfg, on_event=stop_at_8)
    assert list_manifests(run_storage(cfg))[-1] < 93
    assert len(read_all(run_storage(cfg), "attempt")) == 1
