"""How long a user waits: from the command to the first update, and to the end of what has nothing to do.

python benchmarks/start.py [--rounds 5] [--against CHECKOUT] > benchmarks/results/start.md

The quickstart, two workers, on this machine, each round one after the other, in turns with an earlier version:

    cold       nothing of ours or Ray's runs
    again      the same command right after a run: what forks processes is up
    joined     a Ray that is up (RAY_ADDRESS), right after another run there
    finished   a run that has nothing left to do, to its end
    sweep      of two points: to the first update, of the warm start that they share
    point      of that sweep: from the end of the first point to an update of the second

"bare" is Ray Train alone, with nothing of ours: benchmarks/bare_ray_train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster.daemons import Head
from relora_ray.study.ablations import commit_of, machine, version

ROOT = Path(__file__).parent.parent
STEPS = 6
SETTINGS = (
    f"steps={STEPS}", "method.warm_start_steps=2", "method.merge_every_steps=2", "schedule.warmup_steps=1",
    "schedule.restart_warmup_steps=1", "train.log_every_steps=1", "train.eval_every_steps=1000",
)  # fmt: skip


def launch(root: Path, data: Path, folder: Path, **variables: str) -> tuple[float, float]:
    """Seconds to the first update's line, and to the end."""
    command = [
        "-m", "relora_ray.launch", str(root / "configs/quickstart.yaml"), f"data.path={data}", f"storage={folder}",
        *SETTINGS,
    ]  # fmt: skip
    return timed(command, root, folder, **variables)


def sweep(root: Path, data: Path, folder: Path) -> tuple[float, float]:
    """Seconds to the first update's line, and from the end of the first point to a line of the second."""
    raw = yaml.safe_load((root / "configs/quickstart.yaml").read_text())
    (folder / "sweep.yaml").write_text(yaml.safe_dump(raw | {"sweep": {"space": {"method.lora_rank": [8, 16]}}}))
    command = [
        "-m",
        "relora_ray.launch",
        "sweep.yaml",
        "name=sweep",
        f"data.path={data}",
        f"storage={folder}",
        *SETTINGS,
    ]
    lines = said(command, root, folder)
    first = next(at for at, line in lines if re.search(r"step +1/", line))
    done = next(at for at, line in lines if line.startswith("point 0 "))
    return first, next(at for at, line in lines if re.match(r" *0001-seed\d+ \| step ", line)) - done


def timed(command: list[str], root: Path, folder: Path, **variables: str) -> tuple[float, float]:
    """The same of Python with these arguments, in this folder, with our package from `root`."""
    lines = said(command, root, folder, **variables)
    return next((at for at, line in lines if re.search(r"step +1/", line)), float("nan")), lines[-1][0]


def said(command: list[str], root: Path, folder: Path, **variables: str) -> list[tuple[float, str]]:
    """The lines that it wrote, and its end, each with the seconds since its beginning."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(root)} | variables
    began, lines = time.monotonic(), list[tuple[float, str]]()
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=folder,
    ) as process:
        assert process.stdout is not None
        lines += [(time.monotonic() - began, line) for line in process.stdout]
    assert process.returncode == 0, "".join(line for _, line in lines)
    return [*lines, (time.monotonic() - began, "")]


def end_servers() -> None:
    """Processes that fork others outlive the runs that started them."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if b"relora_ray.runtime.prefork import main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


def measure(root: Path, data: Path, found: dict[str, list[float]]) -> None:
    """One round."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        end_servers()
        found["cold"].append(launch(root, data, folder)[0])
        found["finished"].append(launch(root, data, folder)[1])
        shutil.rmtree(folder / "quickstart")
        found["again"].append(launch(root, data, folder)[0])
        end_servers()
        for what, seconds in zip(("sweep", "point"), sweep(root, data, folder), strict=True):
            found[what].append(seconds)
        head = Head(2, env={"PYTHONPATH": str(root)})  # its workers import what is measured
        try:
            head.start()
            for _ in range(2):
                shutil.rmtree(folder / "quickstart")
                first, _ = launch(root, data, folder, RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
            found["joined"].append(first)
        finally:
            head.stop()


def measure_bare(found: dict[str, list[float]]) -> None:
    command = [str(ROOT / "benchmarks/bare_ray_train.py")]
    with tempfile.TemporaryDirectory() as name:
        found["cold"].append(timed(command, ROOT, Path(name))[0])
        head = Head(2)
        try:
            head.start()
            for _ in range(2):
                first, _ = timed(command, ROOT, Path(name), RAY_ADDRESS=head.address, RAY_AUTH_MODE="disabled")
            found["joined"].append(first)
        finally:
            head.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="an earlier version, in turns")
    parser.add_argument("--data", type=Path, default=ROOT / "data/quickstart", help="the prepared quickstart's")
    args = parser.parse_args()
    opponents = {"now": ROOT} | ({"before": args.against.resolve()} if args.against else {})
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in (*opponents, "bare")}
    for number in range(args.rounds):
        for name, root in opponents.items():
            measure(root, args.data.resolve(), found[name])
            print(f"round {number + 1}, {name}: {dict(found[name])}", file=sys.stderr)
        measure_bare(found["bare"])
        print(f"round {number + 1}, bare: {dict(found['bare'])}", file=sys.stderr)
    against = f" Before: {commit_of(args.against)}." if args.against else ""
    flag = " --against CHECKOUT" if args.against else ""
    print("# How long a start takes\n")
    print(f"Command: `python benchmarks/start.py --rounds {args.rounds}{flag}`{against}\n")
    print(f"{version()}, {machine()}. Medians of {args.rounds} rounds, least and most in brackets, in seconds.\n")
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for what in ("cold", "again", "joined", "finished", "sweep", "point"):
        cells = [
            f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if (times := found[name][what]) else ""
            for name in found
        ]
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
