"""A run on a cluster that grows by itself: Ray's autoscaler and its fake provider, whose machines are Ray daemons."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cluster.daemons import Head
from relora_ray.runs.metrics import read_all, read_pages
from relora_ray.runtime.notice import drain, nodes_of
from relora_ray.storage import Storage
from tests.tiny import TINY, losses, run, tiny_config

ROOT = Path(__file__).parent.parent.parent
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_TYPE = "ray.head.default"
"""The fake provider knows no other."""


def autoscaling(address: str, max_workers: int) -> dict[str, Any]:
    """A head without CPUs, and up to `max_workers` machines of one CPU."""
    nothing_to_set_up = {
        name: []
        for name in (
            "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
            "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        )
    }  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        "provider": {
            "type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": max_workers},
        },
        "head_node_type": HEAD_TYPE,
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, **nothing_to_set_up,
    }  # fmt: skip


@pytest.fixture
def head() -> Iterator[Head]:
    env = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    head = Head(0, autoscaling=lambda address: autoscaling(address, 2), env=env)
    head.start()
    yield head
    head.stop()


def test_run_grows_with_the_cluster_and_leaves_a_drained_machine(head: Head, data: Path, tmp_path: Path) -> None:
    """It asks for up to two machines where there is none, is given them, and loses one on the way."""
    overrides = (
        "steps=300", "method.warm_start_steps=75", "method.merge_every_steps=75", "checkpoint.save_every_steps=50",
        "schedule.warmup_steps=20", "schedule.restart_warmup_steps=20", "optimizer.learning_rate=1e-3",
        "data.seq_len=128", "global_batch_rows=12", "checkpoint.save_async=true",
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(TINY)
    command = [
        sys.executable, "-m", "relora_ray.launch", str(config), f"data.path={data}", f"storage={tmp_path}/a",
        "cluster.workers=2", "cluster.min_workers=1", *overrides,
    ]  # fmt: skip
    env = {**os.environ, "RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
    launched = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    there = Storage(f"{tmp_path}/a/tiny")

    def sizes() -> list[int]:
        assert launched.poll() is None, launched.communicate()[0][-3000:]
        return [attempt["world_size"] for attempt in read_all(there, "attempt")]

    try:
        wait_for(lambda: sizes()[-1:] == [2], 300)
        machines = [node for node in nodes_of(head.address) if node != FAKE_HEAD_NODE_ID]
        drain(head.address, machines[0], time.time() + 60, "a notice")
        grown = len(sizes())
        wait_for(lambda: len(sizes()) > grown, 200)
        said, _ = launched.communicate(timeout=400)
    finally:
        launched.kill()
    assert launched.returncode == 0, said[-3000:]
    found = [attempt["world_size"] for attempt in read_all(there, "attempt")]
    assert found[grown] in (1, 2), (
        f"after the notice it goes on with the other machine, and a new one if it is there: {found}"
    )
    assert [restart["steps_lost"] for restart in read_pages(there, "restarts")] == [0] * len(found)
    _, expected = run(tiny_config(data, tmp_path / "b", *overrides))
    assert {r["step"] for r in read_all(there, "train")} == losses(expected).keys()
    assert {r["step"]: r["loss"] for r in read_all(there, "train")} == pytest.approx(losses(expected), rel=1e-5)


def wait_for(found: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, f"nothing came in {seconds} s"
        time.sleep(0.5)
