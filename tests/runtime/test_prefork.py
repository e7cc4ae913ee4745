"""The server that forks the processes that train."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from relora_ray.runtime import prefork


def report(pipe: Connection) -> None:
    """In the forked process."""
    pipe.send({"pid": os.getpid(), "parent": os.getppid(), "hue": os.environ.get("HUE"), "json": "json" in sys.modules})


def obey(pipe: Connection, code: int) -> None:
    pipe.send(os.getpid())
    if pipe.recv() == "exit":
        os._exit(code)
    time.sleep(60)


def break_down(pipe: Connection) -> None:
    raise RuntimeError("as it must")


@pytest.fixture
def key() -> Iterator[str]:
    """Of a server for this test alone."""
    name = uuid.uuid4().hex
    yield name
    child, ours = start(name, report)
    os.kill(ours.recv()["parent"], signal.SIGKILL)
    child.kill()


def start(key: str, target: Any, *args: Any) -> tuple[prefork.Child, Connection]:
    ours, theirs = multiprocessing.Pipe()
    return prefork.spawn(key, ["json"], theirs, f"{__name__}:{target.__name__}", *args), ours


def test_process_begins_with_imports_and_the_agents_environment(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefork.warm(key, ["json"])
    parents = set()
    for hue in ("red", "blue"):
        monkeypatch.setenv("HUE", hue)
        child, pipe = start(key, report)
        said = pipe.recv()
        assert (said["pid"], said["hue"], said["json"]) == (child.pid, hue, True)
        assert child.wait() == 0
        parents.add(said["parent"])
    assert len(parents) == 1, "one server for both"
    assert os.getpid() not in parents


def test_end_is_known_with_its_code(key: str, capfd: pytest.CaptureFixture[str]) -> None:
    child, pipe = start(key, obey, 7)
    pipe.recv()
    pipe.send("exit")
    assert child.wait() == 7
    child, pipe = start(key, obey, 7)
    os.kill(pipe.recv(), signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(EOFError):
        pipe.recv()
    assert start(key, break_down)[0].wait() == 1


def alive(pid: int) -> bool:
    """A process that has ended and was not waited for is not alive."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("stopped", [False, True])
def test_agent_that_kills_waits_until_it_is_gone(key: str, stopped: bool) -> None:
    child, pipe = start(key, obey, 0)
    pid = pipe.recv()
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    child.kill()
    assert not alive(pid)


def test_process_does_not_outlive_its_agent_and_the_server_does(key: str) -> None:
    """Also one that is stopped and cannot see that the pipe is closed."""
    code = (
        "import multiprocessing, os, signal, sys, time\n"
        "from tests.runtime.test_prefork import obey, start\n"
        "child, pipe = start(sys.argv[1], obey, 0)\n"
        "os.kill(pipe.recv(), signal.SIGSTOP)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, key], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert alive(pid)
    agent.kill()
    agent.wait()
    assert gone(pid)
    assert alive(server)


def test_server_that_was_killed_is_started_again(key: str) -> None:
    """Its agents see their processes end: those ask the kernel for it (trainer.py)."""
    child, pipe = start(key, report)
    server = pipe.recv()["parent"]
    child, pipe = start(key, obey, 0)
    pid = pipe.recv()
    os.kill(server, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    os.kill(pid, signal.SIGKILL)
    child, pipe = start(key, report)
    assert pipe.recv()["parent"] != server
    assert child.wait() == 0
