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
import signal
import threading
import time
import traceback
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from relora_ray.checkpoint import Outcome, Rollback, Share
from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.errors import RanksDisagreeError, ReloraError, RolledBackError
from relora_ray.loop import run_attempt
from relora_ray.modeling.parallel import World, keep_freed_memory
from relora_ray.runs.metrics import Record
from relora_ray.runtime.messages import Arrival, Kind, Start, log_event, waiting_event
from relora_ray.runtime.orders import Order
from relora_ray.verdict import in_words, verdict

PULSE_S = 1.0
"""A trainer says so often that it lives."""


def train(connection: Connection, config: str, start: Start, device: str) -> None:
    """What the process does: one attempt. Its agent sends two files first: one for the stacks of all threads, written
    at SIGUSR1, and where the ranks meet if this is rank 0."""
    _die_with_parent()  # the server that it was forked from
    stacks, listener = reduction.recv_handle(connection), reduction.recv_handle(connection)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    link = Link(connection)
    with contextlib.ExitStack() as at_the_end:
        try:
            cfg = parse_config(config)
            torch.set_num_threads(cfg.cluster.cpus_per_worker)
            if device == "cpu":
                keep_freed_memory()
            _forward_warnings(link, start.rank)
            if start.rank == 0:
                link.tell("record", waiting_event("the other ranks" if start.size > 1 else "the device"))
            world = at_the_end.enter_context(_process_group(cfg, start, torch.device(device), listener))
            supervisor = _Agent(link, start)
            if start.rank == 0:
                link.tell("record", waiting_event("the model, the data and the newest checkpoint"))
            run_attempt(
                cfg,
                world,
                attempt=start.attempt,
                on_record=supervisor.on_record,
                committer=supervisor,
                supervisor=supervisor,
                cause=start.cause.text,
            )
        except BaseException as error:  # told before the group ends, which the others would report first
            kind = _kind(error, start.rank)
            if kind == "lasting" and not isinstance(error, ReloraError):
                link.tell("record", log_event(start.rank, traceback.format_exc(), "ERROR"))
            link.call("failed", in_words(error), kind)
            raise SystemExit(1) from error
    link.call("done")


def _kind(error: BaseException, rank: int) -> Kind:
    if isinstance(error, RolledBackError):
        return "rollback"
    if isinstance(error, ReloraError) and error.rank not in (None, rank):
        return "follows"
    return verdict(error)


@contextlib.contextmanager
def _process_group(cfg: RunConfig, start: Start, device: torch.device, listener: int) -> Any:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if start.size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting(start, listener, timeout := timedelta(seconds=cfg.cluster.collective_timeout_s)),
            rank=start.rank,
            world_size=start.size,
            timeout=timeout,
        )
    try:
        yield World.current(device)
    finally:
        if start.size > 1:
            dist.destroy_process_group()


def meeting(start: Start, listener: int, timeout: timedelta) -> dist.Store:
    """Where the ranks of an attempt find each other: a store on the machine of rank 0, which took over its `listener`.
    Their keys carry the attempt and its secret: who has only the address, left over from another attempt say, meets
    nobody."""
    store = dist.TCPStore(
        start.host,
        start.port,
        is_master=start.rank == 0,
        timeout=timeout,
        wait_for_workers=False,  # anybody would count as one
        master_listen_fd=listener if start.rank == 0 else None,
    )
    return dist.PrefixStore(f"{start.attempt}-{start.secret}", store)


class Link:
    """The trainer's end of the pipe. A message is (number, name, arguments); one with a number is answered."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {}
        self.order = Order()
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
                else:
                    self.order = value
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
        self._obeyed = 0
        """The last wish that is fulfilled, or over."""

    def on_record(self, record: Record) -> None:
        self._link.tell("record" if self._start.rank == 0 else "progress", record)

    def commit(self, share: Share) -> Outcome:
        return Outcome.model_validate_json(self._link.call("commit", share.model_dump_json()))

    def roll_back(self, rollback: Rollback) -> Outcome:
        return Outcome.model_validate_json(self._link.call("roll_back", rollback.model_dump_json()))

    def agree(self, when: str, step: int, digest: int) -> None:
        start = self._start
        if error := self._link.call("arrive", Arrival(start.attempt, start.rank, start.size, step, when, digest)):
            raise RanksDisagreeError(error)

    def save_wanted(self) -> bool:
        order = self._link.order
        return order.what == "save" and order.wish > self._obeyed

    def begin_save(self, step: int) -> list[int]:
        found: list[int] = self._link.call("begin_save", step)
        return found

    def pause(self, step: int, stored: bool) -> None:
        # One rank's word was enough for all to save: one that has not been told yet must not save once more.
        self._obeyed = max(self._obeyed, self._link.call("pause", step, stored))


class _Forwarder(logging.Handler):
    def __init__(self, link: Link, rank: int) -> None:
        super().__init__(logging.INFO)
        self._link, self._rank = link, rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or self._rank == 0:
            with contextlib.suppress(OSError):
                text = logging.Formatter().format(record)  # with the traceback, if there is one
                self._link.tell("record", log_event(self._rank, text, record.levelname))


def _forward_warnings(link: Link, rank: int) -> None:
    """Show this process's log on the driver's console: rank 0's, and any rank's warnings."""
    ours = logging.getLogger("relora_ray")
    ours.setLevel(logging.INFO)
    ours.handlers = [_Forwarder(link, rank)]


def _die_with_parent() -> None:
    """A stopped process cannot see that its agent is gone; the kernel can (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
