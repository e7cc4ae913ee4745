"""A process on each machine that has imported everything, and forks the processes that train: in a tenth of a second
instead of five. All agents of a job on one machine share it, and it outlives them: after a loss Ray starts new agents,
and what they need is there. It ends by itself when nobody has used it for a while.

    agent                      server                         process that trains
    connects, sends a request  forks                          begins, with the agent's pipe and environment
    reads the exit code        writes it when that ended
    closes the connection      SIGKILL, if it has not ended

The request is a pickle from a socket that only this user can open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IDLE_S = 120.0
"""Without agents for so long the server ends."""
END_S = 60.0
"""A process that was sent SIGKILL is gone within this."""
START_S = 120.0
"""The server has imported everything within this."""


class Child:
    """A forked process, as its agent sees it."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control, self.pid = control, pid

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        self._control.settimeout(END_S)
        data = self._control.recv(16)
        return int(data) if data else -signal.SIGKILL  # the server is gone, and took it along

    def end(self) -> None:
        """Have it ended, if it still lives."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it, if it still lives. Returns when it is gone; TimeoutError if it cannot be ended (a driver hangs)."""
        self.end()
        self._control.settimeout(END_S)
        with contextlib.suppress(ConnectionError):
            self._control.recv(16)
        self._control.close()


def spawn(key: str, preload: Sequence[str], pipe: Connection, target: str, *args: Any) -> Child:
    """Fork a process that calls `target(pipe, *args)`, from the server for `key`, which is started if there is none.

    `target`: "module:function", looked up in the new process. `pipe` is handed over: it is closed here.
    """
    request = pickle.dumps((target, args, dict(os.environ)))
    for last in (False, True):
        control = _connect(key, preload)
        control.settimeout(START_S)
        try:
            socket.send_fds(control, [len(request).to_bytes(8, "big")], [pipe.fileno()])
            control.sendall(request)
            child = Child(control, int.from_bytes(_receive(control, 8), "big"))
        except (OSError, EOFError):  # the server ended just then: it had not been used for long
            control.close()
            if last:
                pipe.close()
                raise
        else:
            break
    pipe.close()
    return child


def warm(key: str, preload: Sequence[str]) -> None:
    """Start the server for `key` if there is none; returns when it has imported everything."""
    control = _connect(key, preload)
    control.shutdown(socket.SHUT_WR)
    control.recv(1)  # the end of the connection: it took no request from it
    control.close()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"relora-ray-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    return folder


def _connect(key: str, preload: Sequence[str]) -> socket.socket:
    given = [key, sys.executable, *sys.path, *preload]
    address = _folder() / f"{hashlib.sha256(repr(given).encode()).hexdigest()[:16]}.sock"
    until = time.monotonic() + START_S
    with open(address.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one agent of many starts it
        while True:
            control = socket.socket(socket.AF_UNIX)
            try:
                control.connect(str(address))
                return control
            except (FileNotFoundError, ConnectionRefusedError):
                control.close()
            if time.monotonic() > until:
                raise TimeoutError(f"{address} cannot be started")
            _start(address, preload)


def _start(address: Path, preload: Sequence[str]) -> None:
    """Start the server, with a session and a parent of its own, so that it stays when this process goes."""
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)  # requests may come before the imports are done
    code = f"import sys; sys.path[:] = {sys.path!r}; from relora_ray.runtime.prefork import main; main()"
    command = [sys.executable, "-c", code, str(listener.fileno()), str(address), ",".join(preload)]
    # A shell in between ends at once: its child is nobody's.
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", *command], pass_fds=[listener.fileno()], start_new_session=True, check=True
    )
    listener.close()


def main() -> None:
    """The server's loop."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[3].split(","):
        with contextlib.suppress(ImportError):  # the process that trains will say what is wrong
            importlib.import_module(name)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    """By process id: the agent's connection."""
    used = time.monotonic()
    while children or time.monotonic() - used < IDLE_S:
        for key, _ in selector.select(timeout=IDLE_S / 10):
            used = time.monotonic()
            if key.fileobj is listener:
                control, _ = listener.accept()
                try:
                    _fork(control, [listener, woken, wake], children)
                    selector.register(control, selectors.EVENT_READ)
                except Exception as error:
                    if not isinstance(error, (OSError, EOFError)):  # the agent died, or only wanted to know
                        traceback.print_exc()
                    control.close()
            elif key.fileobj is woken:
                woken.recv(4096)
            else:  # the agent is gone, or wants it ended
                selector.unregister(key.fileobj)
                for pid, held in children.items():
                    if held is key.fileobj:
                        os.kill(pid, signal.SIGKILL)
        for pid, status in _ended():
            if pid not in children:  # its agent was gone before it began
                continue
            control = children.pop(pid)
            with contextlib.suppress(KeyError, ValueError):
                selector.unregister(control)
            with contextlib.suppress(OSError):
                control.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            control.close()
    Path(sys.argv[2]).unlink(missing_ok=True)


def _ended() -> Iterator[tuple[int, int]]:
    """Ids and statuses of the processes that have ended since the last call."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def _fork(control: socket.socket, others: Sequence[socket.socket], children: dict[int, socket.socket]) -> None:
    """Read one request and fork its process, which is added to `children`; its agent may be gone by then."""
    control.settimeout(10)
    length, fds, _, _ = socket.recv_fds(control, 8, 1)
    if len(length) < 8 or not fds:
        raise EOFError
    try:
        request = _receive(control, int.from_bytes(length, "big"))
        pid = os.fork()
        if pid == 0:
            _become([control, *others, *children.values()], Connection(fds[0]), request)
    finally:
        os.close(fds[0])
    try:
        control.sendall(pid.to_bytes(8, "big"))
    except OSError:
        os.kill(pid, signal.SIGKILL)
        raise
    children[pid] = control
    control.settimeout(None)


def _become(connections: Sequence[socket.socket], pipe: Connection, request: bytes) -> None:
    """In the new process. Does not return."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for connection in connections:
            connection.close()
        target, args, environment = pickle.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(pipe, *args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
            sys.stdout.flush()
        finally:
            os._exit(code)


def _receive(control: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := control.recv(size - len(data))):
            raise EOFError
        data += more
    return data
