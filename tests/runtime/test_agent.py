"""An agent and real processes that it starts, which do not train. Ray is faked: its calls are answered here."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import relora_ray
from relora_ray.config import ClusterConfig
from relora_ray.errors import ConfigError
from relora_ray.runtime import agent, server
from relora_ray.runtime.messages import Cause, Start
from relora_ray.runtime.orders import Order


class Coordinator:
    """Notes what it is told. Its orders never come."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.ended = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            self.calls.append((name, args))
            if name == "watch":
                self.ended.wait(60)
            return Order("stop") if name == "watch" else None

        return type("Method", (), {"remote": staticmethod(remote)})

    def told(self, name: str) -> list[Any]:
        return [args for called, args in self.calls if called == name]


def test_agents_share_a_server_if_they_have_the_same_code_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever job they are of, and whatever Ray gives each of them."""
    key = server._key()
    for name in ("RAY_JOB_ID", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    assert server._key() == key
    with monkeypatch.context() as other:
        other.setenv("HF_HUB_OFFLINE", "7")
        assert server._key() != key
    package = Path(shutil.copytree(Path(relora_ray.__file__).parent, tmp_path / "relora_ray"))
    monkeypatch.setattr(relora_ray, "__file__", str(package / "__init__.py"))
    key = server._key()
    os.utime(package / "loop.py", ns=(0, 1))
    assert server._key() != key, "code that was edited is imported anew"
    dated = server._key()
    (package / "loop.py").write_text("")
    os.utime(package / "loop.py", ns=(0, 1))
    assert server._key() != dated, "whatever date it is given"
    (package / ".#loop.py").symlink_to("nowhere")
    server._key()


def in_another_process(change: Callable[[], None]) -> str:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_key_after, change).result()


def _key_after(change: Callable[[], None]) -> str:
    change()
    return server._key()


def test_no_server_is_shared_with_other_rights_or_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is forked has those of whoever started the server, and the run would not know."""
    changes = [
        partial(os.umask, 0o077),
        partial(os.nice, 3),
        partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))}),
        partial(resource.setrlimit, resource.RLIMIT_NOFILE, (512, 512)),
        partial(Path("/proc/self/oom_score_adj").write_text, "900"),
    ]
    os.umask(0o022)
    key = server._key()
    assert in_another_process(partial(os.umask, 0o022)) == key
    assert len({key, *map(in_another_process, changes)}) == 1 + len(changes)
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(tmp_path))
    key = server._key()
    (tmp_path / "conf.json").write_text('{"s3": {"endpoint_url": "http://new:9000"}}')
    assert server._key() != key, "fsspec reads its settings once"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Coordinator, float, int]]:
    """Have an agent run a process that does what a function of this module does, until it ends; returns what the
    coordinator was told, how long it took, and the process id."""

    def run(function: Callable[..., None], **cluster: int) -> tuple[Coordinator, float, int]:
        monkeypatch.setattr(agent.ray, "get", lambda answer: answer)
        monkeypatch.setattr(server, "_key", lambda: f"test {os.getpid()}")
        monkeypatch.setattr(server, "PRELOAD", (__name__,))
        monkeypatch.setattr(agent, "TRAIN", f"tests.runtime.test_agent:{function.__name__}")
        coordinator = Coordinator()
        start = Start("0001.0001-aa", 0, 2, "127.0.0.1", 1, Cause("start", "x"), "secret")
        with agent._listen("127.0.0.1") as listener:
            watched = agent._Watch(
                coordinator, start, ClusterConfig(**cluster), str(listener.getsockname()[1]), listener
            )
        began = time.monotonic()
        assert not watched.run()
        coordinator.ended.set()
        return coordinator, time.monotonic() - began, watched._process.pid

    return run


def fail_and_hang(connection: Connection, *_: Any) -> None:
    """As a rank whose process group cannot be left, because another rank does not answer. It shows that it lives."""
    receive(connection)
    connection.send((1, "failed", ("ValueError: no", "unknown")))
    while True:
        connection.send((0, "alive", ()))
        time.sleep(0.2)


def break_down(connection: Connection, *_: Any) -> None:
    """Before it could say anything."""
    importlib.import_module("not_installed")


def stand_still(connection: Connection, port: str, *_: Any) -> None:
    """Take over the agent's port, and then do nothing, but show that it lives."""
    stacks, listener = receive(connection)
    assert socket.socket(fileno=listener).getsockname() == ("127.0.0.1", int(port))
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    threading.Thread(target=show_life, args=(connection,), daemon=True).start()
    time.sleep(600)


def show_life(connection: Connection) -> None:
    while True:
        connection.send((0, "alive", ()))
        time.sleep(0.2)


def receive(connection: Connection) -> tuple[int, int]:
    return reduction.recv_handle(connection), reduction.recv_handle(connection)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_process_that_failed_is_not_waited_for(watch: Callable[..., tuple[Coordinator, float, int]]) -> None:
    """It could hang for as long as a collective may take."""
    coordinator, took_s, pid = watch(fail_and_hang)
    assert coordinator.told("lost") == [("0001.0001-aa", 0, "ValueError: no", "unknown")]
    assert took_s < 10
    assert not is_alive(pid)


def test_process_that_hangs_says_where(watch: Callable[..., tuple[Coordinator, float, int]]) -> None:
    coordinator, _, _ = watch(stand_still, stall_timeout_s=1)
    [(_, _, reason, _)] = coordinator.told("lost")
    assert reason.startswith("no step, evaluation or checkpoint for 1 s; it was in\n"), reason
    assert "in stand_still" in reason.splitlines()[1]


def test_process_that_cannot_begin_says_why(watch: Callable[..., tuple[Coordinator, float, int]]) -> None:
    """A module that is missing on one machine, say. What it writes to stderr is seen by nobody."""
    coordinator, _, _ = watch(break_down)
    [(_, _, reason, kind)] = coordinator.told("lost")
    assert reason.startswith("ModuleNotFoundError: No module named 'not_installed' (in break_down, "), reason
    assert kind == "lasting"


def test_agent_that_fails_tells_before_ray_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    context = SimpleNamespace(get_world_rank=lambda: 1)
    monkeypatch.setattr(agent.ray, "get", lambda answer: answer)
    monkeypatch.setattr(agent.ray.train, "get_context", lambda: context)
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: "group"))
    monkeypatch.setattr(agent.ray.util, "get_current_placement_group", lambda: group)
    monkeypatch.setattr(agent.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    with pytest.raises(ConfigError):
        agent.run_agent({"coordinator": coordinator, "config": "a_key_of_another_version: 1"})
    [(group_name, rank, node, reason, kind)] = coordinator.told("agent_failed")
    assert (group_name, rank, node, kind) == ("group", 1, "node", "lasting")
    assert "unknown key a_key_of_another_version" in reason
