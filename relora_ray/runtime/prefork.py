"""A process on each machine that has imported everything, and forks the processes that train: in a tenth of a second
instead of five. All agents on one machine share it, and it outlives them: after a loss Ray starts new agents, and what
they need is there. It ends by itself when nobody has used it for a while.

    agent                      server                         process that trains
    connects                   says hello
    sends a request            forks                          begins, with the agent's pipe, environment, folder and
                                                              output
    reads the exit code        writes it when that ended
    closes the connection      SIGKILL, if it has not ended

It listens at an abstract address, and from when it has imported everything. So the kernel tells who there is (bound and
not listening: it starts), lets one of many agents start it, and clears away the name; no file can be put in its place.
Everybody on the machine may try the address, so both ends ask the kernel who the other is: what is sent are pickles,
and the environment with its secrets. A server that hangs is ended, or left if processes live that it forked, and the
next address is taken. Needs Linux 5.3 or later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import logging
import os
import pickle
import re
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from relora_ray.verdict import in_words, verdict

logger = logging.getLogger(__name__)

IDLE_S = 120.0
"""Without agents for so long the server ends."""
END_S = 60.0
"""A process that was sent SIGKILL is gone within this."""
START_S = 120.0
"""The server has imported everything within this."""
HELLO_S = 5.0
"""A server that has imported everything answers within this, or it hangs."""
REQUEST_S = 2.0
"""A request that was begun is read within this: an agent that stops halfway must not make the server seem to hang."""
CHECK_S = 0.05
OF_ONE_ASKER = re.compile(
    r"RAY|\w+_VISIBLE_DEVICES$|OMP_NUM_THREADS$|GLOO_SOCKET_IFNAME$|TORCHINDUCTOR_CACHE_DIR$|(_|PWD|OLDPWD|SHLVL)$"
)
"""Variables in which those who share a server differ, and which do not decide what is imported. The server has none of
them; each forked process has those of its own agent."""
NUM_STARTS = 3
"""A server that ended so often before it was up will not be."""
NUM_ADDRESSES = 16
OUTPUT = (1, 2)
RAISED = "raised"
"""A process whose function raised says (0, RAISED, (what, verdict)) on its pipe, as its last words."""

_left: set[str] = set()
"""Addresses that this process does not ask again: the server hangs, or is not this user's."""


class Child:
    """A forked process, as its agent sees it."""

    def __init__(self, control: socket.socket, pid: int, pidfd: int) -> None:
        self._control, self.pid, self._pidfd = control, pid, pidfd
        self._code: int | None = None
        weakref.finalize(self, os.close, pidfd)  # not in kill(): end() in a thread could meet another's of this number

    def wait(self) -> int:
        """Its exit code, negative for a signal. TimeoutError if it does not end (a driver hangs)."""
        if self._code is None and connection.wait([self._control, self._pidfd], END_S):
            self._code = self._learn()
        if self._code is None or not connection.wait([self._pidfd], END_S):
            raise TimeoutError(
                f"process {self.pid} has not ended within {END_S} s: does it hang in a driver or storage?"
            )
        return self._code

    def end(self) -> None:
        """Have it ended, if it still lives. Asks no server, which may hang."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def kill(self) -> None:
        """End it, if it still lives. Returns when it is gone; TimeoutError if it cannot be ended."""
        self.end()
        self.wait()
        self._control.close()

    def _learn(self) -> int:
        self._control.settimeout(HELLO_S)
        try:
            if data := self._control.recv(16):
                return int(data)
        except ConnectionError:
            pass
        except TimeoutError:  # the server hangs: the kernel keeps the code of a child that it has not waited for
            status = int(Path(f"/proc/{self.pid}/stat").read_text().split()[-1])
            _end_hung(self._control)
            return os.waitstatus_to_exitcode(status)
        self.end()  # the server is gone
        return -signal.SIGKILL


def spawn(key: str, preload: Sequence[str], pipe: Connection, target: str, *args: Any, first: str = "") -> Child:
    """Fork a process that calls `target(pipe, *args)`, from the server for `key`, which is started if there is none.
    It has this process's environment, folder, stdout and stderr.

    `target`: "module:function", looked up in the new process. `pipe` is handed over: it is closed here. `first`: the
    address of a server that is asked before any other, if it is there.
    """
    request = pickle.dumps((target, args, dict(os.environ), _folder()))
    with pipe, _connect(key, preload, first) as control:
        control.settimeout(START_S)
        socket.send_fds(control, [len(request).to_bytes(8, "big")], [pipe.fileno(), *OUTPUT])
        control.sendall(request)
        pid, fds, _, _ = socket.recv_fds(control, 8, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise ConnectionError(f"the server for {key!r} could not fork a process: see what it wrote to stderr")
        return Child(socket.socket(fileno=control.detach()), int.from_bytes(pid, "big"), fds[0])


def _folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return "/"


def warm(key: str, preload: Sequence[str]) -> None:
    """Start the server for `key` if there is none; returns when it has imported everything."""
    _connect(key, preload).close()


def begin(key: str, preload: Sequence[str]) -> str:
    """Have the server for `key` start, if there is none, and do not wait for it. Its address, for `first`."""
    address = _addresses(key, preload)[0]
    with socket.socket(socket.AF_UNIX) as control:
        try:
            control.connect(address)
        except ConnectionRefusedError:  # a process of a pipeline, whose pipes the server must not hold open
            _start(address, preload, output=subprocess.DEVNULL)
    return address


def _connect(key: str, preload: Sequence[str], first: str = "") -> socket.socket:
    """A connection to the server for `key`, or to that at `first`, which has said hello."""
    if first and first not in _left:
        if control := _reach(first, None):
            return control
        _left.add(first)
    for address in (addresses := _addresses(key, preload)):
        if address in _left:
            continue
        if control := _reach(address, preload):
            return control
        logger.warning("the server at @%s hangs or is not this user's: the next address is tried", address[1:])
        _left.add(address)
    raise TimeoutError(
        f"no server at @{addresses[0][1:]} to -{NUM_ADDRESSES - 1} answers: they hang, or are other users' "
        "(/proc/net/unix lists them, `ss -xlp` their processes); end those"
    )


def _addresses(key: str, preload: Sequence[str]) -> list[str]:
    given = [key, os.geteuid(), sys.executable, *_import_path(), *preload]
    # `key` stands for an environment that may hold secrets, and all users of a machine see the names of its sockets:
    # a slow hash (some 40 ms) of this machine's boot makes guessing dear.
    salt = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    name = hashlib.scrypt(repr(given).encode(), salt=salt, n=2**14, r=8, p=1, dklen=8).hex()
    return [f"\0relora-ray-{name}-{number}" for number in range(NUM_ADDRESSES)]


def _import_path() -> list[str]:
    """Where this process imports from, whatever folder another one is in."""
    return [os.path.join(_folder(), path) for path in sys.path]


def _reach(address: str, preload: Sequence[str] | None) -> socket.socket | None:
    """A connection to the server at `address`, which is started if there is none and has said hello. None if it hangs,
    or is another user's, or is not there and not to be started (no `preload`)."""
    until, num_starts = time.monotonic() + START_S, 0
    while time.monotonic() < until:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(HELLO_S)
            try:
                control.connect(address)
                if not _peer(control):
                    return None
                if control.recv(1):
                    return socket.socket(fileno=control.detach())
            except ConnectionRefusedError:  # it is not up
                if preload is None and not _is_bound(address):
                    return None
                num_starts += preload is not None and _start(address, preload)
                if num_starts > NUM_STARTS:
                    raise ChildProcessError(
                        f"the server ended {NUM_STARTS} times at its start: see its stderr"
                    ) from None
                time.sleep(CHECK_S)
            except ConnectionError:  # it ended just then
                pass
            except (TimeoutError, BlockingIOError):
                if not _end_hung(control):
                    return None
    return None


def _is_bound(address: str) -> bool:
    """Whether a server is there, though it may not be up."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _start(address: str, preload: Sequence[str], output: int | None = None) -> bool:
    """Start the server, with a session and a parent of its own, so that it stays when this process goes. False if it is
    starting."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        code = f"import sys; sys.path[:] = {_import_path()!r}; from relora_ray.runtime.prefork import main; main()"
        command = [sys.executable, "-c", code, str(listener.fileno()), ",".join(preload)]
        # A shell in between ends at once: its child is nobody's.
        command = ["/bin/sh", "-c", '"$@" &', "sh", *command]
        shared = {name: value for name, value in os.environ.items() if not OF_ONE_ASKER.match(name)}
        subprocess.run(
            command,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            check=True,
            env=shared,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return True


def _end_hung(control: socket.socket) -> bool:
    """End the server at the other end, which does not answer. False if it is left, as processes live that it forked
    and that would end with it, though they need it for nothing; or if it cannot be ended."""
    server = _peer(control)
    control.setblocking(False)
    try:
        with os.fdopen(os.pidfd_open(server), "rb", buffering=0) as process:
            with contextlib.suppress(BlockingIOError):  # still connected, so that this is the server's process
                control.recv(1, socket.MSG_PEEK)
                return True  # it answers, or has ended
            if any(map(_lives, Path(f"/proc/{server}/task/{server}/children").read_text().split())):
                return False
            logger.warning("the server that forks processes hangs, and has none: process %d is ended", server)
            signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
            return bool(connection.wait([process.fileno()], HELLO_S))
    except OSError as error:
        return isinstance(error, (ProcessLookupError, ConnectionError))


def _lives(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def _peer(control: socket.socket) -> int:
    """The process at the other end, which connected or listens: 0 if it is another user's, or in another container that
    shares this one's network."""
    pid, uid, _ = struct.unpack("iII", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) if uid == os.geteuid() else 0


def main() -> None:
    """The process that `_start` starts."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    os.chdir("/")  # the folder of who started it may be removed
    for name in sys.argv[2].split(","):
        with contextlib.suppress(Exception):  # the process that trains will say what is wrong
            importlib.import_module(name)
    _let_go_of_pipes()
    _serve(listener)


def _let_go_of_pipes() -> None:
    """What reads the output of a command sees its end when the command ends, not when this process does. Until here a
    pipe says why a start failed."""
    for fd in OUTPUT:
        if stat.S_ISFIFO(mode := os.fstat(fd).st_mode) or stat.S_ISSOCK(mode):
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), fd)


def _serve(listener: socket.socket) -> None:
    """Until no process that was forked lives, and nobody has asked for a while."""
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(woken, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    listener.listen(4096)  # here and not in _start: agents see that it is up, and that this process is the server
    agents: dict[socket.socket, int] = {}
    """The process that was forked for each, 0 before that."""

    def drop(control: socket.socket) -> None:
        selector.unregister(control)
        del agents[control]
        control.close()

    used = time.monotonic()
    while any(agents.values()) or time.monotonic() - used < IDLE_S:
        for key, _ in selector.select(timeout=IDLE_S / 10):
            control = key.fileobj
            assert isinstance(control, socket.socket)
            if control is woken:
                woken.recv(4096)
            elif control is listener:
                control, _ = listener.accept()
                if not _peer(control):
                    control.close()
                    continue
                agents[control] = 0
                selector.register(control, selectors.EVENT_READ)
                with contextlib.suppress(OSError):
                    control.send(b"!")
            elif agents[control]:  # the agent is gone
                os.kill(agents[control], signal.SIGKILL)
                drop(control)
            else:
                try:
                    agents[control] = _fork(control, [selector, listener, woken, wake, *agents])
                except Exception as error:
                    if not isinstance(error, EOFError):  # the agent only wanted to know
                        with contextlib.suppress(OSError):  # the file of whoever started it may be full or gone
                            traceback.print_exc()
                    drop(control)
            used = time.monotonic()
        for pid, status in _ended():
            for control in [agent for agent in agents if agents[agent] == pid]:  # none if it was gone
                with contextlib.suppress(OSError):
                    control.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                drop(control)


def _ended() -> Iterator[tuple[int, int]]:
    """Ids and statuses of the processes that have ended since the last call."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def _fork(control: socket.socket, inherited: Sequence[socket.socket | selectors.BaseSelector]) -> int:
    """Read one request and fork its process, which closes what is `inherited`. EOFError if there is no request."""
    control.settimeout(REQUEST_S)
    length, fds, _, _ = socket.recv_fds(control, 8, 1 + len(OUTPUT))
    try:
        if len(length) < 8 or len(fds) < 1 + len(OUTPUT):
            raise EOFError
        request = _receive(control, int.from_bytes(length, "big"))
        pid = os.fork()
        if pid == 0:
            _become(inherited, fds, request)
    finally:
        for fd in fds:
            os.close(fd)
    try:
        with os.fdopen(os.pidfd_open(pid), "rb", buffering=0) as process:  # nobody but this process can free that id
            socket.send_fds(control, [pid.to_bytes(8, "big")], [process.fileno()])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    return pid


def _become(inherited: Sequence[socket.socket | selectors.BaseSelector], fds: Sequence[int], request: bytes) -> None:
    """In the new process, with the agent's pipe and output. Does not return."""
    code, pipe = 1, Connection(fds[0])
    try:
        for given, own in zip(fds[1:], OUTPUT, strict=True):
            os.dup2(given, own)
            os.close(given)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in inherited:
            each.close()
        target, args, environment, folder = pickle.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        with contextlib.suppress(OSError):  # it may have been removed since
            os.chdir(folder)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(pipe, *args)
        code = 0
    except SystemExit:  # it has said why
        traceback.print_exc()
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send((0, RAISED, (in_words(error), verdict(error))))
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
