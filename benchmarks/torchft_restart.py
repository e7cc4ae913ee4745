"""Seconds until training goes on after one of two replicas is killed, with torchft (needs pip install torchft==0.2.0).

python benchmarks/torchft_restart.py [--rounds 3] > benchmarks/results/torchft.md

Two replica groups of one process train the model of benchmarks/elasticity.py on gloo, with torchft's defaults. One is
killed; the other goes on with half of the global batch. Then the killed one is started again and takes the state over.
Gradients are reduced by hand: torchft's DistributedDataParallel asserts after a failed reduction (torch 2.13, CPU).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

LIMIT_S = 120.0


def replica(number: str, lighthouse: str) -> None:
    """Train for ever; a line per update: participants, seconds since 1970."""
    import torch
    import torch.distributed as dist
    from torchft import Manager, Optimizer
    from torchft.process_group import ProcessGroupGloo

    from relora_ray.config.file import parse_config
    from relora_ray.methods.base import build_method
    from relora_ray.modeling.model import build_model
    from relora_ray.modeling.optim import trainable
    from tests.tiny import TINY

    cfg = parse_config(TINY, ["method.warm_start_steps=0"])
    model = build_model(cfg.model, seq_len=256, seed=1)
    method = build_method(cfg)
    method.adapt(model, 0)
    adamw = method.build_optimizer(model)

    def load(state: dict) -> None:
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": adamw.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica-{number}-",
        init_sync=False,
    )
    optimizer, parameters = Optimizer(manager, adamw), trainable(model)
    ids = torch.randint(0, 2048, (8, 256))
    while True:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in parameters])
        manager.allreduce(gradients).wait()
        for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
        optimizer.step()
        print(manager.num_participants(), time.time(), flush=True)


class Replica:
    def __init__(self, number: int, lighthouse: str) -> None:
        command = [sys.executable, __file__, "--replica", str(number), lighthouse]
        self.began = time.time()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.updates: list[tuple[int, float]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            participants, at = line.split()
            self.updates.append((int(participants), float(at)))

    def first(self, participants: int, after: float) -> float | None:
        """When its first update after a time was made, by so many replicas."""
        return next((at for n, at in list(self.updates) if n == participants and at > after), None)


def wait(found: Callable[[], float | None]) -> float:
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        if (value := found()) is not None:
            return value
        time.sleep(0.01)
    raise TimeoutError(f"nothing after {LIMIT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replica", nargs=2, metavar=("NUMBER", "LIGHTHOUSE"))
    args = parser.parse_args()
    if args.replica:
        replica(*args.replica)
    from torchft.coordination import LighthouseServer

    from relora_ray.study.ablations import machine, version

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1)
    stays, goes = Replica(0, lighthouse.address()), Replica(1, lighthouse.address())
    survivor_s, newcomer_s = [], []
    try:
        for _ in range(args.rounds):
            wait(lambda began=goes.began: stays.first(2, began))
            time.sleep(5)
            killed_at = time.time()
            os.kill(goes.process.pid, signal.SIGKILL)
            survivor_s.append(wait(lambda at=killed_at: stays.first(1, at)) - killed_at)
            goes = Replica(1, lighthouse.address())
            newcomer_s.append(wait(lambda new=goes: new.first(2, new.began)) - goes.began)
    finally:
        for each in (stays, goes):
            each.process.kill()
    print(f"# torchft\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n")
    print(f"Machine: {machine()}. Version: {version()}. Command: `python benchmarks/torchft_restart.py`\n")
    print("| | median, s | all rounds |\n|---|---|---|")
    for what, seconds in (("the survivor's next update", survivor_s), ("the newcomer's first update", newcomer_s)):
        print(f"| {what} | {median(seconds):.1f} | {', '.join(f'{s:.1f}' for s in seconds)} |")


if __name__ == "__main__":
    main()
