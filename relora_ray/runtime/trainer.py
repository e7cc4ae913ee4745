"""The process that trains, and the pipe between it and the agent that started it. Ray is not used here.

Why a process of its own: one that dies, hangs or is stopped is seen at once by its agent, which is none of these, and
the next one is forked in a tenth of a second from a server that has imported everything, while Ray keeps its workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import logging
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from relora_ray.checkpoint import Outcome, Share
from relora_ray.config import RunConfig
from relora_ray.config_file import parse_config
from relora_ray.errors import RanksDisagreeError, ReloraError
from relora_ray.loop import run_attempt
from relora_ray.metrics import Record
from relora_ray.parallel import World
from relora_ray.runtime.messages import Arrival, Orders, Start, log_event

PULSE_S = 1.0
"""A trainer says so often that it lives."""
PAUSE_S = 60.0
"""A resize that was announced and has not happened for so long is not waited for."""


def train(connection: Connection, config: str, start: Start, device: str, stacks: str) -> None:
    """What the process does: one attempt. `stacks`: a file for the stacks of all threads, written at SIGUSR1."""
    _die_with_parent()  # the server that it was forked from
    faulthandler.register(signal.SIGUSR1, open(stacks, "w"), all_threads=True)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    link = Link(connection)
    cfg = parse_config(config)
    torch.set_num_threads(cfg.cluster.cpus_per_worker)
    _forward_warnings(link, start.rank)
    with _process_group(cfg, start, torch.device(device)) as world:
        supervisor = _Agent(link, start)
        try:
            run_attempt(
                cfg,
                world,
                on_record=supervisor.on_record,
                committer=supervisor.commit,
                supervisor=supervisor,
                cause=start.cause.text,
            )
        except BaseException as error:  # told before the group ends, which the others would report first
            lasting = isinstance(error, ReloraError) and not error.restart_helps
            link.call("failed", f"{type(error).__name__}: {error}", lasting)
            raise
    link.call("done")


@contextlib.contextmanager
def _process_group(cfg: RunConfig, start: Start, device: torch.device) -> Any:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if start.size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{start.host}:{start.port}",
            rank=start.rank,
            world_size=start.size,
            timeout=timedelta(seconds=cfg.cluster.collective_timeout_s),
        )
    try:
        yield World.current(device)
    finally:
        if start.size > 1:
            dist.destroy_process_group()


class Link:
    """The trainer's end of the pipe. A message is (number, name, arguments); one with a number is answered."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self.orders = Orders()
        self.ordered = threading.Condition()
        for work in (self._listen, self._live):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, name: str, *args: Any) -> None:
        with self._sending:
            self._connection.send((0, name, args))

    def call(self, name: str, *args: Any) -> Any:
        """The agent's answer."""
        number, answer = next(self._numbers), Future[Any]()
        self._answers[number] = answer
        with self._sending:
            self._connection.send((number, name, args))
        return answer.result()

    def _listen(self) -> None:
        try:
            while True:
                number, value = self._connection.recv()
                if number:
                    self._answers.pop(number).set_result(value)
                    continue
                with self.ordered:
                    self.orders = value
                    self.ordered.notify_all()
        except (EOFError, OSError):
            os._exit(1)  # without an agent there is nobody to train for

    def _live(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.tell("alive")
                time.sleep(PULSE_S)


class _Agent:
    """The agent as the loop sees it: a Supervisor, a Committer, and where records go."""

    def __init__(self, link: Link, start: Start) -> None:
        self._link, self._start = link, start
        self._saved_for = 0
        """The order to save that was obeyed last."""

    def on_record(self, record: Record) -> None:
        self._link.tell("record" if self._start.rank == 0 else "progress", record)

    def commit(self, share: Share) -> Outcome:
        # As bytes: the agent hands them on without knowing what a Share is.
        outcome = pickle.loads(self._link.call("commit", pickle.dumps(share)))
        assert isinstance(outcome, Outcome)
        return outcome

    def agree(self, when: str, step: int, digest: int) -> None:
        start = self._start
        if error := self._link.call("arrive", Arrival(start.attempt, start.rank, start.size, step, when, digest)):
            raise RanksDisagreeError(error)

    def save_wanted(self) -> bool:
        return self._link.orders.save > self._saved_for

    def leaving(self) -> list[int]:
        found: list[int] = self._link.call("leaving")
        return found

    def pause(self, step: int, stored: bool) -> None:
        # One rank's word was enough for all to save: one that has not been told yet must not save once more.
        orders: Orders = self._link.call("pause", step, stored)
        self._saved_for = max(orders.save, self._link.orders.save)
        if orders.go_on < self._saved_for:
            with self._link.ordered:
                told = self._link.ordered.wait_for(lambda: self._link.orders.go_on >= self._saved_for, PAUSE_S)
            if not told:
                self._link.call("resumed")


class _Forwarder(logging.Handler):
    def __init__(self, link: Link, rank: int) -> None:
        super().__init__(logging.INFO)
        self._link, self._rank = link, rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or self._rank == 0:
            with contextlib.suppress(OSError):
                self._link.tell("record", log_event(self._rank, record.getMessage(), record.levelname))


def _forward_warnings(link: Link, rank: int) -> None:
    """Show this process's log on the driver's console: rank 0's, and any rank's warnings."""
    ours = logging.getLogger("relora_ray")
    ours.setLevel(logging.INFO)
    ours.handlers = [_Forwarder(link, rank)]


def _die_with_parent() -> None:
    """A stopped process cannot see that its agent is gone; the kernel can (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
