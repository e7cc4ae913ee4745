"""Methods compared in one command, on a real head with its dashboard."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.daemons import Head
from relora_ray.storage import Storage
from relora_ray.sweep.results import read_points
from tests.conftest import ROOT
from tests.tiny import TINY, run, stored_losses, tiny_config

ROWS = [
    {"kind": "relora", "lora_rank": [2, 4]},
    {"kind": "full", "schedule": {"kind": "cosine", "restart_warmup_steps": None}},
]
LIST_TASKS = """
import json, sys
from ray.util.state import list_tasks
print(json.dumps([(t.name, t.state) for t in list_tasks(address=sys.argv[1], limit=10000, timeout=60)]))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = Head(2)
    head.start()
    yield head
    head.stop()


def test_healthy_comparison_shows_no_failed_task(head: Head, data: Path, tmp_path: Path) -> None:
    """And a point's losses are those of the run that its row describes."""
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"sweep": {"space": {"method": ROWS}}}, sort_keys=False))
    command = [sys.executable, "-m", "relora_ray.launch", str(path), f"storage={tmp_path}", f"data.path={data}"]
    env = {**head.env, "RAY_ADDRESS": head.address}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    asked = subprocess.run(
        [sys.executable, "-c", LIST_TASKS, head.dashboard], env=env, capture_output=True, text=True, timeout=120
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    tasks = Counter(tuple(task) for task in json.loads(asked.stdout))
    assert tasks["Coordinator.drain", "FINISHED"] > 0, "what is asked for is told"
    assert {task: number for task, number in tasks.items() if task[1] == "FAILED"} == {}
    points = read_points(Storage(f"{tmp_path}/tiny"))
    assert [p.settings for p in points] == [
        {"method": "relora", "method.lora_rank": 2}, {"method": "relora", "method.lora_rank": 4}, {"method": "full"}
    ]  # fmt: skip
    alone = tiny_config(
        data, tmp_path / "alone", "seed=1", method={"kind": "full"}, schedule={"kind": "cosine", "warmup_steps": 1}
    )
    run(alone)
    assert points[2].losses == {12: {1: stored_losses(alone, "eval")[12]}}
    for expected in ("| full | 1 | as it is |", "| relora | 2 | lora_rank=", "against relora, seed by seed"):
        assert expected in done.stdout
