"""The batch script for Slurm, with a played srun, scontrol, Ray and launcher: what is started where, what becomes of a
signal, and when the job is put into the queue again. No Slurm has been tried."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "cluster/slurm/run.sbatch"
PLAYED = {
    "srun": 'echo "srun $*" >> "$LOG"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$LOG"\n[ "$1" = show ] && printf "node1\\nnode2\\nnode3\\n"\nexit 0',
    "hostname": "echo 10.0.0.5 fe80::1",
    "python": """
case "$*" in
    *secrets*) echo a-token;;
    *health-check*) exit 0;;
    *scripts\\ start*)
        trap 'echo "ray ended" >> "$LOG"; exit 0' TERM
        echo "ray is up" >> "$LOG"
        while :; do sleep 0.05; done;;
    *relora_ray.launch*)
        trap 'sleep 0.2; echo "state stored" >> "$LOG"; exit 143' TERM
        echo "launch $* at $RAY_ADDRESS" >> "$LOG"
        until [ "$(grep -c "ray is up" "$LOG")" = 3 ]; do sleep 0.05; done
        echo "it trains" >> "$LOG"
        [ "${ENDS:-}" ] && exit "$ENDS"
        while :; do sleep 0.05; done;;
esac""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in PLAYED.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_run_over_all_nodes_that_is_told_to_stop_is_queued_again(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = start(environment, "run.yaml", "storage=/shared/runs", "steps=5")
    for _ in range(600):
        if log.exists() and "it trains" in log.read_text():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM does: the script alone has it
    assert job.wait(timeout=30) == 143, job.communicate()[1]
    lines = log.read_text().splitlines()
    started = [line for line in lines if " start " in line]
    heads = {line.partition("--nodelist=")[2].split()[0]: "--head" in line for line in started}
    assert heads == {"node1": True, "node2": False, "node3": False}
    assert all("--num-cpus=8" in line and "--num-gpus=2" in line for line in started)
    assert sum("--address=10.0.0.5:20077" in line for line in started) == 2
    assert not any("a-token" in line for line in lines), "others see command lines"
    (launch,) = (line for line in lines if line.startswith("launch"))
    assert "run.yaml cluster.min_workers=1 cluster.workers=6 cluster.gpus_per_worker=1 storage=/shared/runs" in launch
    assert launch.endswith("at 10.0.0.5:20077")
    end = [line for line in lines if line in ("state stored", "ray ended", "scontrol requeue 77")]
    assert end == ["state stored", "scontrol requeue 77", "ray ended", "ray ended", "ray ended"]


@pytest.mark.parametrize("code", [0, 1])
def test_run_that_ends_by_itself_is_not_queued_again(code: int, environment: dict[str, str], tmp_path: Path) -> None:
    job = start(environment | {"ENDS": str(code)}, "run.yaml")
    assert job.wait(timeout=30) == code, job.communicate()[1]
    text = (tmp_path / "log").read_text()
    assert "requeue" not in text
    assert text.count("ray ended") == 3


def test_nothing_given_is_said(environment: dict[str, str]) -> None:
    job = start(environment)
    assert job.wait(timeout=30) == 2
    assert "usage: sbatch" in job.communicate()[1]
