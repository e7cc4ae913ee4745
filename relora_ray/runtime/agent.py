"""What Ray Train runs in every worker: an agent, which starts the process that trains and watches it.

It outlives that process. When a rank is lost, all agents end theirs and ask the coordinator for the next attempt, which
begins a second later in new processes: Ray need not start anything. Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import struct
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.util
from ray.train.backend import Backend, BackendConfig

import relora_ray
from relora_ray.config import ClusterConfig
from relora_ray.config.file import parse_config
from relora_ray.runtime import prefork, server
from relora_ray.runtime.messages import Kind, Member, Start
from relora_ray.runtime.orders import Order
from relora_ray.verdict import in_words, verdict

logger = logging.getLogger(__name__)

TRAIN = "relora_ray.runtime.trainer:train"
"""What the process that trains does."""
CHECK_S = 0.5
STACK_LINES = 30
MAX_STACKS = 10_000_000
WAITING = ("/torch/distributed/", "/torch/autograd/graph.py")
"""Innermost file of a process that stands still because another does: in a collective, or in a backward pass, where
gradients are reduced."""
CULPRIT_S = 5.0
"""It gives whoever it waits for so long to be found out first."""


class Rendezvous(BackendConfig):
    """The ranks meet in the processes that train, not in Ray's workers, so Ray sets nothing up for them. In place of a
    TorchConfig, with which every worker would import torch."""

    backend = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedDevices


class _SharedDevices(Backend):
    share_cuda_visible_devices = True  # or NCCL cannot use links between a machine's GPUs


def run_agent(job: dict[str, Any]) -> None:
    """`job`: "config" (the run's YAML), "coordinator" (its actor handle) and "server" (the address of one that forks
    processes, asked before this machine's own; or ""). Returns at the end of the run."""
    coordinator, train = job["coordinator"], ray.train.get_context()
    try:
        _serve(coordinator, job["config"], train, job.get("server", ""))
    except Exception as error:  # Ray would start the worker group again for ever, whatever it was
        told = in_words(error), verdict(error)
        with contextlib.suppress(ray.exceptions.RayError):
            group, node = ray.util.get_current_placement_group(), ray.get_runtime_context().get_node_id()
            rank = train.get_world_rank()
            ray.get(coordinator.agent_failed.remote(group.id.hex() if group else "", rank, node, *told))
        raise


def _serve(coordinator: Any, config: str, train: Any, at: str) -> None:
    """Join attempt after attempt, until the run ends."""
    cfg = parse_config(config)
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train starts its workers in a placement group"
    host, step = ray.util.get_node_ip_address(), 0
    if interface := _interface(host):  # inherited by the process that trains
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    while True:
        with _listen(host) as listener:
            member = Member(
                group=group.id.hex(),
                rank=train.get_world_rank(),
                size=train.get_world_size(),
                node=ray.get_runtime_context().get_node_id(),
                host=host,
                port=listener.getsockname()[1],
                step=step,
                code=_digest_of_code(),
            )
            start: Start | None = ray.get(coordinator.join.remote(member))
            if start is None:
                return
            watch = _Watch(coordinator, start, cfg.cluster, config, listener, at)
        if watch.run():
            return
        step = watch.step


class _Watch:
    """One attempt's process on this rank, from its start to its end."""

    def __init__(
        self,
        coordinator: Any,
        start: Start,
        cluster: ClusterConfig,
        config: str,
        listener: socket.socket,
        at: str = "",
    ) -> None:
        """`listener`: where the ranks meet if this is rank 0. The process gets it and a file for its stacks, which has
        no name, so that nothing stays behind. `at`: of a server, see `run_agent`."""
        self._coordinator, self._start = coordinator, start
        self._silence_s, self._stall_s = cluster.silence_timeout_s, cluster.stall_timeout_s
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115
        self._connection, theirs = multiprocessing.Pipe()
        device = _device(cluster.gpus_per_worker)
        self._process = server.spawn(theirs, TRAIN, config, start, device, first=at)
        with contextlib.suppress(OSError):  # it has ended already: that will be seen
            for given in (self._stacks, listener):
                reduction.send_handle(self._connection, given.fileno(), self._process.pid)
        self._sending = threading.Lock()
        self._news: queue.Queue[Order | None] = queue.Queue()
        """Orders, or None when the process has ended or failed."""
        self._alive = self._progress = time.monotonic()
        self.step = 0
        """The last that it saw done."""
        self._reason, self._done, self._failed = "", False, False
        self._kind: Kind = "died"
        self._tell({"kind": "worker", "rank": start.rank, "pid": self._process.pid, "agent_pid": os.getpid()})

    def run(self) -> bool:
        """True at the end of the run, False when the attempt is over and there will be another."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._follow, daemon=True).start()
        attempt, rank = self._start.attempt, self._start.rank
        try:
            while True:
                try:
                    news = self._news.get(timeout=CHECK_S)
                except queue.Empty:
                    self._end_if_stuck()
                    continue
                if news is None and self._done:
                    return bool(ray.get(self._coordinator.done.remote(attempt, rank)))
                if news is None:
                    if not self._failed:
                        reason = self._reason or _ended_how(self._process.wait())
                        ray.get(self._coordinator.lost.remote(attempt, rank, reason, self._kind))
                    return False
                if news.what == "stop":
                    return False
                self._send(0, news)
        finally:
            self._process.kill()
            self._connection.close()
            self._stacks.close()

    def _read(self) -> None:
        """In a thread: what the process says, until it ends."""
        with ThreadPoolExecutor(4, thread_name_prefix="relora-ray-agent") as pool:
            try:
                while True:
                    number, name, args = self._connection.recv()
                    self._alive = time.monotonic()
                    if name in ("record", "progress"):
                        self._progress = self._alive
                        self.step = max(self.step, args[0].get("step", 0))
                    if name == "record":
                        self._tell(args[0])
                    elif name == prefork.RAISED:  # before it could tell by itself
                        self._reason, self._kind = args
                    elif number:
                        pool.submit(self._answer, number, name, args)
            except (EOFError, OSError):
                pass
            finally:
                self._news.put(None)

    def _answer(self, number: int, name: str, args: tuple[Any, ...]) -> None:
        """In a thread: do what the process asks for."""
        try:
            self._send(number, self._do(name, args))
        except OSError:
            pass  # the process has ended meanwhile
        except Exception as error:  # the process would wait for ever
            logger.exception("%s failed", name)
            self._reason, self._kind = f"its agent could not {name}: {in_words(error)}", verdict(error)
            self._process.end()

    def _do(self, name: str, args: tuple[Any, ...]) -> Any:
        attempt, rank = self._start.attempt, self._start.rank
        if name == "done":
            self._done = True
        elif (
            name == "failed"
        ):  # what it has to say is said, and it may hang when it leaves the others: it is not awaited
            self._failed = True
            ray.get(self._coordinator.lost.remote(attempt, rank, *args))
            self._news.put(None)
        elif name == "begin_save":
            return ray.get(self._coordinator.begin_save.remote(attempt, *args))
        elif name == "pause":
            return ray.get(self._coordinator.pause.remote(attempt, rank, *args))
        else:
            assert name in ("arrive", "commit", "roll_back"), name
            return ray.get(getattr(self._coordinator, name).remote(*args))
        return None

    def _follow(self) -> None:
        """In a thread: the coordinator's orders, as they come."""
        seen = Order()
        while seen.what != "stop":
            try:
                seen = ray.get(self._coordinator.watch.remote(self._start.attempt, seen))
            except Exception as error:  # whatever it is, somebody must end the process
                logger.warning("no orders can be had: %s", error)
                seen = Order("stop")
            self._news.put(seen)

    def _send(self, number: int, value: Any) -> None:
        with self._sending:
            self._connection.send((number, value))

    def _tell(self, event: dict[str, Any]) -> None:
        self._coordinator.tell.remote(self._start.attempt, event)

    def _end_if_stuck(self) -> None:
        now = time.monotonic()
        silent_s, still_s = now - self._alive, now - self._progress
        if silent_s > self._silence_s:
            self._reason = f"its process gave no sign of life for {self._silence_s} s: stopped, or swapped out"
        elif still_s > self._stall_s:
            stack = self._stack()
            if still_s < self._stall_s + CULPRIT_S and any(path in stack.partition("\n")[0] for path in WAITING):
                return
            self._reason = f"no step, evaluation or checkpoint for {self._stall_s} s; it was in\n{stack}"
        else:
            return
        self._process.end()

    def _stack(self) -> str:
        """Where the process is, innermost call first."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        text = os.pread(self._stacks.fileno(), MAX_STACKS, 0).decode(errors="replace")
        before, _, main = text.rpartition("Current thread ")  # the one that trains takes signals
        return "\n".join((main or before).splitlines()[1:STACK_LINES])


def _digest_of_code() -> str:
    """Of what this package's files on this machine say."""
    digest, folder = hashlib.sha256(), Path(relora_ray.__file__).parent
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():  # an archive has one version for all
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _ended_how(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def _device(gpus: int) -> str:
    if not gpus:
        return "cpu"
    import ray.train.torch

    return str(ray.train.torch.get_device())


def _listen(host: str) -> socket.socket:
    """On a port that is kept from now on, on the machine's own address only."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def _interface(host: str) -> str:
    """The name of the network interface with that IPv4 address, for gloo, which would take the one that the machine's
    name stands for: on some systems that is 127.0.1.1. "" if it cannot be found (Linux only)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == host:
                    return name
    return ""
