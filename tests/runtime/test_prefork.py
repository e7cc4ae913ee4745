"""The server that forks the processes that train."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from relora_ray.runtime import prefork

SOON_S = 4 * prefork.HELLO_S
"""For what takes a hello that does not come and a start; the machine may be busy. Far below START_S and END_S."""
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")


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


def test_server_does_not_hold_the_pipes_of_the_command_that_started_it(key: str) -> None:
    """`launch ... | tee log` ends with launch. A file is kept: it says why a later fork failed."""
    code = f"from relora_ray.runtime import prefork; prefork.warm({key!r}, ['json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=prefork.IDLE_S / 2, check=True)
    assert done.stderr == b""


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


def speak(pipe: Connection) -> None:
    print("out of", os.getcwd(), flush=True)
    print("err", file=sys.stderr, flush=True)
    pipe.send("said")


def test_process_has_its_agents_folder_and_output(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not those of who started the server, whose folder and log may be gone."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        with capfd.disabled(), open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            monkeypatch.setattr(prefork, "OUTPUT", (out.fileno(), err.fileno()))
            child, pipe = start(key, speak)
        assert pipe.recv() == "said"
        assert child.wait() == 0
    for folder in folders:
        assert (folder / "out").read_text() == f"out of {folder}\n"
        assert (folder / "err").read_text() == "err\n"


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


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


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
    other, pipe = start(key, obey, 0)
    child.end()  # late, from a thread: must not meet whatever came after
    pipe.send("exit")
    assert other.wait() == 0


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
    server = parent_of(pid)
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


def parent(key: str, preload: str = "json") -> int:
    """The server that a new process has."""
    ours, theirs = multiprocessing.Pipe()
    child = prefork.spawn(key, [preload], theirs, f"{__name__}:report")
    server: int = ours.recv()["parent"]
    assert child.wait() == 0
    return server


def test_agents_that_come_at_once_share_one_server(key: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(parent, [key] * 8))) == 1


@pytest.mark.slow
def test_server_that_hangs_is_replaced_and_ended(key: str) -> None:
    server = parent(key)
    os.kill(server, signal.SIGSTOP)
    began = time.monotonic()
    assert parent(key) != server
    assert time.monotonic() - began < SOON_S
    assert gone(server)


@pytest.mark.slow
def test_processes_of_a_server_that_hangs_go_on_and_their_agents_wait_for_no_answer(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefork, "HELLO_S", 1.0)
    (worker, to_worker), (killed, to_killed), (ended, _) = (start(key, obey, 7) for _ in range(3))
    server = parent_of(worker.pid)
    for pipe in (to_worker, to_killed):
        pipe.recv()
    os.kill(server, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert parent(key) != server
        assert alive(worker.pid)
        assert alive(server), "its end would be theirs"
        killed.kill()
        assert not alive(killed.pid)
        ended.end()
        assert ended.wait() == -signal.SIGKILL
        assert alive(server)
        to_worker.send("exit")
        assert worker.wait() == 7, "as the kernel says"
        worker.kill()
        assert time.monotonic() - began < SOON_S
        assert gone(server), "it had no process left"
    finally:
        if alive(server):
            os.kill(server, signal.SIGKILL)


def test_server_that_goes_on_after_it_hung_serves_its_agents_and_new_ones(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefork, "HELLO_S", 1.0)
    child, pipe = start(key, obey, 7)
    pipe.recv()
    server = parent_of(child.pid)
    os.kill(server, signal.SIGSTOP)
    second = parent(key)
    os.kill(server, signal.SIGCONT)
    assert parent(key) == second, "this agent asks it no more"
    monkeypatch.setattr(prefork, "_left", set())  # as in another
    assert parent(key) == server
    pipe.send("exit")
    assert child.wait() == 7
    for pid in (server, second):
        os.kill(pid, signal.SIGKILL)


def write_preload(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    """A module with `code`, which is the server's alone."""
    (folder / "late_module.py").write_text(f"import os, signal, time\n{code}\n")
    monkeypatch.syspath_prepend(folder)
    return "late_module"


def test_server_that_imports_for_long_does_not_count_as_hanging(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefork, "HELLO_S", 0.3)
    preload = write_preload(tmp_path, monkeypatch, "time.sleep(2)")
    with ThreadPoolExecutor(3) as pool:
        (server,) = set(pool.map(parent, [key] * 3, [preload] * 3))
    os.kill(server, signal.SIGKILL)


@pytest.mark.slow
def test_server_that_hangs_at_its_start_is_given_up_after_start_s(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefork, "START_S", 4.0)
    once = tmp_path / "pid"
    code = f"if not os.path.exists({str(once)!r}):\n    open({str(once)!r}, 'w').write(str(os.getpid()))\n"
    preload = write_preload(tmp_path, monkeypatch, code + "    os.kill(os.getpid(), signal.SIGSTOP)")
    server = parent(key, preload)
    assert server != int(once.read_text())
    for pid in (server, int(once.read_text())):
        os.kill(pid, signal.SIGKILL)


def test_server_that_cannot_start_is_an_error_at_once(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload = write_preload(tmp_path, monkeypatch, "os._exit(3)")
    with pytest.raises(ChildProcessError, match="ended 3 times at its start"):
        prefork.warm(key, [preload])


def test_agent_that_stops_halfway_does_not_make_the_server_seem_to_hang(key: str) -> None:
    server = parent(key)
    with prefork._connect(key, ["json"]) as control, open(os.devnull) as file:
        socket.send_fds(control, [(1000).to_bytes(8, "big")], [file.fileno()])
        while any(fcntl.ioctl(control, termios.TIOCOUTQ, bytes(4))):  # until the server reads it
            time.sleep(0.01)
        assert parent(key) == server


def play(target: Any, *args: Any) -> Any:
    """What `target` returns in a process of another user."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_play, args=(theirs, target, *args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _play(pipe: Connection, target: Any, *args: Any) -> None:
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    pipe.send(target(*args))


def request(address: str) -> bytes:
    """What the server answers to one that has no business there."""
    ours, _ = multiprocessing.Pipe()
    data = pickle.dumps((f"{__name__}:report", (), {}))
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(SOON_S)
        control.connect(address)
        try:
            socket.send_fds(control, [len(data).to_bytes(8, "big") + data], [ours.fileno()])
            return control.recv(1)
        except ConnectionError:
            return b""


@as_root
def test_server_answers_no_other_user(key: str) -> None:
    server = parent(key)
    address = prefork._addresses(key, ["json"])[0]
    assert request(address) == b"!"
    assert play(request, address) == b""
    assert parent(key) == server, "and serves its own"


def pose(address: str, listening: Connection, rest: Connection) -> bytes:
    """What is sent to a server that somebody else put where the agents look for theirs."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listening.send(True)
        control, _ = listener.accept()
        try:
            control.send(b"!")
            said = control.recv(1 << 20)
        except ConnectionError:  # gone before the hello
            said = b""
        rest.recv()
        return said


@as_root
def test_nothing_is_sent_to_another_users_server(key: str) -> None:
    address = prefork._addresses(key, ["json"])[0]
    listening, tell = multiprocessing.Pipe()
    finish, rest = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(play, pose, address, tell, rest)
        try:
            listening.recv()
            server = parent(key)
            assert Path(f"/proc/{server}").stat().st_uid == os.getuid()
        finally:
            finish.send(True)
        assert said.result() == b""


def test_uses_no_folder_that_another_user_could_have_made_and_leaves_nothing(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "trap").mkdir()
    trap = tmp_path / f"relora-ray-{os.getuid()}"  # the folder of versions before
    trap.symlink_to("trap")
    server = parent(key)
    assert not list(trap.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"trap", trap.name}
    address = prefork._addresses(key, ["json"])[0][1:]
    assert address in Path("/proc/net/unix").read_text()
    os.kill(server, signal.SIGKILL)
    assert gone(server)
    assert address not in Path("/proc/net/unix").read_text()
