"""Faults at named places of a run on a real Ray cluster. Each is played once, and leaves a mark when it took place.

Faults inside a process that trains are carried out by that process itself, at the first time that it comes to the
place after a given step: agents have a function of this module forked (tests/hooks.py). The others are carried out by
whoever runs the driver.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every process of Ray imports this module: what is heavy is imported where it is needed
    from relora_ray.config import RunConfig
    from tests.s3 import Server

FOLDER = "RELORA_RAY_FAULTS"
"""Environment variable: where the plan and the marks are."""

HANG = "HANG"
FLIP = "flip"
"""A bit of an adapter is flipped."""
INSIDE = ("forward", "backward", "all-reduce", "merge", "reset", "copy", "upload", "commit")
OUTSIDE = ("agent killed", "machine lost", "coordinator killed", "storage down")


@dataclass(frozen=True)
class Fault:
    number: int
    where: str
    after_step: int
    rank: int = 0
    signal: str = "SIGKILL"
    """SIGSTOP: all of the process stands still instead of dying. HANG: the thread that trains does."""


def plan(seed: int, count: int, steps: int, kinds: tuple[str, ...] = (*INSIDE, *OUTSIDE, "stopped")) -> list[Fault]:
    """So many faults, of every kind as often, at random steps that are apart."""
    choose = random.Random(seed)
    wheres = [kinds[n % len(kinds)] for n in range(count)]
    choose.shuffle(wheres)
    gap = steps // (count + 1)
    faults = []
    for number, where in enumerate(wheres):
        stopped = where == "stopped"
        faults.append(
            Fault(
                number,
                choose.choice(INSIDE) if stopped else where,
                gap // 2 + number * gap + choose.randrange(gap // 2),
                choose.randrange(2),
                "SIGSTOP" if stopped else "SIGKILL",
            )
        )
    return faults


def train_with_faults(*args: Any) -> None:
    """In a process that trains: as `trainer.train`, but for what is planned."""
    import torch

    from relora_ray import loop
    from relora_ray.checkpoint import checkpointer
    from relora_ray.methods.lowrank import relora
    from relora_ray.modeling.parallel import World
    from relora_ray.runtime import trainer
    from relora_ray.storage import Storage

    folder = Path(os.environ[FOLDER])
    faults = [Fault(**fault) for fault in json.loads((folder / "plan.json").read_text())]
    rank, now = args[2].rank, {"step": 0}

    def reach(where: str) -> None:
        for fault in faults:
            if fault.where == where and fault.rank == rank and now["step"] >= fault.after_step and mark(folder, fault):
                if fault.signal == HANG:
                    hang()
                os.kill(os.getpid(), getattr(signal, fault.signal))

    def flip(model: Any) -> None:
        for fault in faults:
            if fault.where == FLIP and fault.rank == rank and now["step"] >= fault.after_step and mark(folder, fault):
                adapter = next(p for name, p in model.named_parameters() if name.endswith("lora_B"))
                adapter.data.view(torch.int32)[0, 0] ^= 1 << 20

    def before(owner: Any, name: str, where: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def announced(*args: Any, **kwargs: Any) -> Any:
            reach(where(*args, **kwargs))
            return original(*args, **kwargs)

        setattr(owner, name, announced)

    def multiplier(step: int, cfg: RunConfig) -> float:
        now["step"] = step
        return float(lr_multiplier(step, cfg))

    lr_multiplier, loop.lr_multiplier = loop.lr_multiplier, multiplier
    before(loop, "_loss_sum", lambda loss, batch: flip(loss) or "forward")
    before(torch.Tensor, "backward", lambda *_: "backward")
    before(World, "sum", lambda *_: "all-reduce")
    before(relora, "merge_all_", lambda *_: "merge")
    before(relora, "prune_state_", lambda *_, **__: "reset")
    before(checkpointer.HostCopies, "take", lambda *_: "copy")
    before(Storage, "put", lambda _, path, data: "upload" if path.startswith(("base/", "delta/")) else "")
    before(trainer._Agent, "commit", lambda *_: "commit")
    trainer.train(*args)


def hang() -> None:
    while True:
        time.sleep(1)


def mark(folder: Path, fault: Fault) -> bool:
    """Note that the fault takes place, now; False if it has taken place."""
    try:
        (folder / f"done-{fault.number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Play:
    """One run with its faults, on a cluster of its own. To be used on the main thread, where Ray adds machines."""

    def __init__(self, faults: list[Fault], server: Server | None = None, *, machines: int = 2) -> None:
        self._faults, self._server = faults, server
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        (self.folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))
        from tests.cluster import Machines

        env = {FOLDER: str(self.folder)}
        self._machines = Machines(machines, setup_hook="tests.hooks.have_faults", env=env)
        self._step, self._agents, self._ended = 0, {}, threading.Event()
        self._failures: list[BaseException] = []
        self.events: list[dict[str, Any]] = []

    def run(self, cfg: RunConfig) -> None:
        """Train `cfg` to its end, and end the cluster."""
        try:
            self._run(cfg)
        finally:
            self._machines.shutdown()

    def _run(self, cfg: RunConfig) -> None:
        driving = threading.Thread(target=self._drive, args=(cfg,), daemon=True)
        driving.start()
        todo = [fault for fault in self._faults if fault.where in OUTSIDE]
        while not self._ended.wait(0.05):
            for fault in [fault for fault in todo if self._step >= fault.after_step]:
                todo.remove(fault)
                mark(self.folder, fault)
                self._carry_out(fault)
        driving.join()
        if self._failures:
            raise self._failures[0]

    def took_place(self) -> set[int]:
        return {int(path.name.removeprefix("done-")) for path in self.folder.glob("done-*")}

    def _drive(self, cfg: RunConfig) -> None:
        from relora_ray.runtime import driver

        try:
            driver.run(cfg, on_event=self._on_event)
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._ended.set()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "worker":
            self._agents[event["rank"]] = event["agent_pid"]
        elif event["kind"] == "train":
            self._step = event["step"]

    def _carry_out(self, fault: Fault) -> None:
        if fault.where == "agent killed":
            os.kill(self._agents[fault.rank], signal.SIGKILL)
        elif fault.where == "machine lost":
            self._machines.lose(self._machines.nodes[fault.rank])
            self._machines.add()
        elif fault.where == "coordinator killed":
            os.kill(self._machines.pid_of("ray::Coordinator"), signal.SIGKILL)
        elif fault.where == "storage down":
            assert self._server is not None
            self._server.kill()
            time.sleep(3)
            self._server.start()
