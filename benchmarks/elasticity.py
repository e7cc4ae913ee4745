"""Seconds from a fault to the first new step, here and with stock Ray Train, on a real Ray cluster on this machine.

python benchmarks/elasticity.py [--rounds 3] [--faults killed lost drained added] > benchmarks/results/elasticity.md
python benchmarks/elasticity.py --against CHECKOUT    an earlier version of this project in place of stock Ray Train

Both train the same small model by the same loop and save every 20 steps; every case has a cluster of its own, and the
two opponents take turns. Stock is TorchTrainer with elastic workers and its default settings, whose workers call
`run_attempt`. killed: SIGKILL of one of two training processes. lost: SIGKILL of all daemons of one of two machines.
drained: a notice of 30 s for one of two machines, which is then lost. added: a second machine. Medians, with the steps
that were done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relora_ray.config.file import parse_config, to_yaml
from relora_ray.conformance.__main__ import make_data
from relora_ray.loop import run_attempt
from relora_ray.modeling.parallel import World
from relora_ray.runtime import driver

try:
    from relora_ray.runtime.preflight import preflight
except ImportError:  # an earlier version
    preflight = driver.preflight  # type: ignore[attr-defined]
from relora_ray.study.ablations import commit_of, machine, version
from tests.cluster import Machines
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
FAULTS = ("killed", "lost", "drained", "added")
NOTICE_S = 30.0
LIMIT_S = 240.0


@ray.remote(num_cpus=0, max_concurrency=4)
class Events:
    """What a stock run's workers say."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def tell(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def stock_worker(job: dict[str, Any]) -> None:
    events, cfg = job["events"], parse_config(job["config"])
    world = World.current(ray.train.torch.get_device())
    events.tell.remote({"kind": "worker", "rank": world.rank, "pid": os.getpid()})
    run_attempt(cfg, world, on_record=events.tell.remote if world.is_first else None)


def run_stock(cfg: Any, *, on_event: Any, folder: str) -> None:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Events.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for event in ray.get(events.drain.remote()):
                on_event(event)

    threading.Thread(target=watch, daemon=True).start()
    TorchTrainer(
        stock_worker,
        train_loop_config={"config": to_yaml(cfg), "events": events},
        scaling_config=ScalingConfig(num_workers=(cfg.min_workers, cfg.cluster.workers)),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="stock", storage_path=folder, failure_config=FailureConfig(max_failures=100)),
    ).fit()
    ended.set()


def one(opponent: str, fault: str, data: Path) -> tuple[float, int]:
    """Seconds from the fault to the first step of the next attempt, and how many steps that had been done before."""
    for name in driver.elastic.SETTINGS:
        os.environ.pop(name, None)
    machines = Machines(1 if fault == "added" else 2, apart=True)
    folder = tempfile.mkdtemp()
    takes_away = threading.Timer(NOTICE_S, lambda: machines.lose(machines.nodes[1]))
    try:
        overrides = (
            "steps=100000", "cluster.workers=2", "cluster.min_workers=1", "checkpoint.save_async=true",
            "method.warm_start_steps=100", "method.merge_every_steps=100", "checkpoint.save_every_steps=20",
            "checkpoint.keep_last=3", "data.seq_len=256", "global_batch_rows=16", "train.micro_batch_rows=8",
        )  # fmt: skip
        cfg = preflight(tiny_config(data, Path(folder), *overrides))
        seen: list[tuple[float, dict[str, Any]]] = []

        def on_event(event: dict[str, Any]) -> None:
            seen.append((time.time(), event))

        run = driver.run if opponent == "here" else partial(run_stock, folder=folder)
        threading.Thread(target=partial(run, cfg, on_event=on_event), daemon=True).start()
        wait(lambda: any(e["kind"] == "train" and e["step"] >= 30 for _, e in list(seen)))
        time.sleep(3)  # whatever a new attempt still does
        before = [e["pid"] for _, e in seen if e["kind"] == "worker"]
        at = time.time()
        if fault == "killed":
            os.kill(before[-1], signal.SIGKILL)
        elif fault == "lost":
            machines.lose(machines.nodes[1])
        elif fault == "drained":
            machines.drain(machines.nodes[1], NOTICE_S)
            takes_away.start()
        else:
            machines.add()

        def new_attempt() -> int | None:
            numbers = [n for n, (when, e) in enumerate(list(seen)) if e["kind"] == "attempt" and when > at]
            return numbers[0] if numbers else None

        def first_step() -> float | None:
            number = new_attempt()
            if number is None:
                return None
            return next((when for when, e in list(seen)[number:] if e["kind"] == "train"), None)

        wait(lambda: first_step() is not None)
        number, trained_at = new_attempt(), first_step()
        assert number is not None
        assert trained_at is not None
        reached = max(e["step"] for _, e in seen[:number] if e["kind"] == "train")
        return trained_at - at, max(0, reached - seen[number][1]["step"])
    finally:
        takes_away.cancel()
        machines.kill()


def wait(done: Any) -> None:
    until = time.monotonic() + LIMIT_S
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing after {LIMIT_S} s")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--only", choices=("here", "stock"))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="measure this version in place of stock")
    parser.add_argument("--case", nargs=3, metavar=("OPPONENT", "FAULT", "DATA"), help="one measurement, as JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(one(args.case[0], args.case[1], Path(args.case[2]))), flush=True)
        os._exit(0)  # the trainer's thread is still at work
    logging.disable(logging.WARNING)
    quickstart = ROOT / "configs/quickstart"
    data = Path(make_data(quickstart / "austen.txt.bz2", quickstart / "tokenizer", Path(tempfile.mkdtemp())))
    other = "before" if args.against else "stock"
    opponents = [args.only] if args.only else ["here", other]
    print(f"# From a fault to the next step\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n")
    print(f"Machine: {machine()}; Ray {ray.__version__}. Version: {version()}.")
    against = f" Before: {commit_of(args.against)}." if args.against else ""
    flag = " --against CHECKOUT" if args.against else ""
    print(f"Command: `python benchmarks/elasticity.py --rounds {args.rounds}{flag}`{against}\n")
    print(f"| fault | here, s | steps again | {other}, s | steps again | {other} / here | all rounds |")
    print("|---|---|---|---|---|---|---|")
    for fault in args.faults:
        found: dict[str, list[tuple[float, int]]] = {opponent: [] for opponent in opponents}
        for _ in range(args.rounds):
            for opponent in opponents:
                root, what = (args.against, "here") if opponent == "before" else (ROOT, opponent)
                command = [sys.executable, str(root / "benchmarks/elasticity.py"), "--case", what, fault, str(data)]
                env = os.environ | {"PYTHONPATH": str(root)}
                said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env, cwd=root).stdout
                found[opponent].append(tuple(json.loads(said.splitlines()[-1])))
                print(fault, opponent, found[opponent][-1], file=sys.stderr, flush=True)
        seconds = {opponent: median(s for s, _ in values) for opponent, values in found.items()}
        cells = [f"{seconds[o]:.1f} | {median(n for _, n in found[o]):.0f}" for o in opponents]
        ratio = f"{seconds[other] / seconds['here']:.1f}" if len(opponents) == 2 else ""
        rounds = "; ".join(f"{o} " + ", ".join(f"{s:.1f}" for s, _ in found[o]) for o in opponents)
        print(f"| {fault} | {' | '.join(cells)} | {ratio} | {rounds} |", flush=True)


if __name__ == "__main__":
    main()
