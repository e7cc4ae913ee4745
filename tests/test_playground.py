"""`python -m cluster.local` as someone at its prompt would use it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.local import TOUR, Playground, Refused, compare
from relora_ray.runs.metrics import MetricsLog
from relora_ray.storage import Storage

ROOT = Path(__file__).parent.parent
SHORT = (
    "steps=603 method.warm_start_steps=3 method.merge_every_steps=300 schedule.warmup_steps=1 "
    "schedule.restart_warmup_steps=1 train.eval_rows=4 train.log_every_steps=1 checkpoint.save_every_steps=1000"
)


def test_machines_and_a_run_at_the_prompt(data: Path) -> None:
    """A run trains on two machines and is stopped; machines come and go; nothing outlives the prompt, not even of a run
    that goes on."""
    commands = (
        "machines", "frobnicate", "kill m9", f"run x {SHORT}", "wait x workers 2", "run x", "wait x 5", "stop x",
        "wait x 50", "status x", "compare x x", "kill m2", "machines", "add m2", "add m3", "drain m3 1",
        f"run y {SHORT}", "wait y 5", "quit",
    )  # fmt: skip
    command = [sys.executable, "-m", "cluster.local", "--data", str(data)]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(commands), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    said = done.stdout
    for expected in (
        "m1 has joined", "m2 has joined", "> m1 m2\n", "there is no command 'frobnicate'", "there is no machine 'm9'",
        "  x | attempt", "starting, 2 worker(s)", "run x goes on already", "told to stop by SIGTERM", "its job ended",
        "run x ended before", "run x: no driver", "largest relative difference of two losses: 0.0e+00",
        "m2 is gone", "> m1\n", "'m2' is in use, was in use", "m3 will be taken away in 1 s, and has been told",
    ):  # fmt: skip
        assert expected in said, f"{expected!r} is not in\n{said}"
    folder = said.partition("RAY_AUTH_TOKEN_PATH=")[2].partition("/auth_token")[0]
    assert not Path(folder).exists()
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if folder in " ".join([*process.cmdline(), *process.environ().values()]):
                left.append(process.cmdline())
    assert not left


def test_comparison_takes_the_last_attempt_of_a_step(tmp_path: Path) -> None:
    runs = {}
    for name, attempts in {"calm": [(0, 1, range(1, 21), 2.0)], "stormy": [
        (0, 1, range(1, 19), 3.0), (10, 2, range(11, 20), 2.5), (19, 3, range(20, 21), 2.0),
    ]}.items():  # fmt: skip
        runs[name] = Storage(f"{tmp_path}/{name}")
        for number, (begin, world_size, steps, loss) in enumerate(attempts):
            log = MetricsLog(runs[name], f"{number:04d}")
            log.write({"kind": "attempt", "step": begin, "world_size": world_size})
            for step in steps:
                log.write({"kind": "train", "step": step, "loss": loss})
            log.close()
    header, *rows, last = compare(list(runs.items()), every=10)
    assert header.split() == ["step", "calm", "(workers)", "stormy", "(workers)"]
    assert [row.split() for row in rows] == [
        ["10", "2.000000", "(1)", "3.000000", "(1)"],
        ["20", "2.000000", "(1)", "2.000000", "(3)"],
    ]
    assert last == "20 steps; largest relative difference of two losses: 5.0e-01"
    with pytest.raises(Refused, match="no step that both"):
        list(compare([("calm", runs["calm"]), ("new", Storage(f"{tmp_path}/new"))]))


def test_tour_has_known_commands_only() -> None:
    assert all(hasattr(Playground, f"do_{command.split()[0]}") for command in TOUR)
