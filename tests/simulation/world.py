"""A clock and a bucket that a seed drives: what goes wrong between a process and object storage, thousands of times a
second, and again from the same seed.

Simulated: time, processes (greenlets), and the file system below `Storage`. Real: `Storage` itself with its retries,
and all code above it. Every request is a place where the others may go on, and where a process may stop or die.

What the bucket promises is what docs/storage.md asks of one: an object that was put is there, and creating one that
exists is refused. Besides, a read may be wrong: it says that an object is missing, or lists what was there some time
ago. But it is not wrong twice in a row when the same process asks the same again.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

from greenlet import GreenletExit, greenlet

from relora_ray import clock, storage
from relora_ray.storage import Storage

Wake = tuple[float, int, "greenlet", BaseException | None]


class Stuck(BaseException):
    """Something never ends."""


class World:
    """Runs processes until all have ended. One at a time exists in a Python process."""

    def __init__(self, seed: int, *, spared: Collection[int] = (), max_requests: int = 6_000) -> None:
        """`spared`: faults that do not take place, by their number."""
        self.random = random.Random(seed)
        self._spared = spared
        self.num_faults = 0
        self.time = 1e9
        self.bucket: dict[str, bytes] = {}
        self.faults = True
        self.log: list[str] = []
        self.failures: list[BaseException] = []
        """What processes ended with."""
        self.num_requests, self._max_requests = 0, max_requests
        self._past: list[tuple[float, frozenset[str]]] = []
        """What was there, for listings that are old."""
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._hub: greenlet | None = None
        self.processes: list[Process] = []
        """All that ever were."""

    # Processes.

    def start(self, process: Process, after_s: float = 0.0) -> None:
        self.at(self.time + after_s, lambda: process.resume())

    def at(self, when: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (when, next(self._count), action))

    def run(self) -> None:
        """Until nothing is left to happen."""
        self._hub = greenlet.getcurrent()
        before = clock.monotonic, clock.now, clock.sleep, storage.in_parallel, storage.masked
        clock.monotonic = clock.now = lambda: self.time
        clock.sleep = self.sleep
        storage.in_parallel, storage.masked = _one_by_one, str  # there are no secrets, and it takes time
        try:
            while self._queue and not self.failures:
                self.time, _, action = heapq.heappop(self._queue)
                action()
            if self.failures:
                raise self.failures[0]
            if self.num_requests > self._max_requests:
                raise Stuck(f"after {self.num_requests} requests there is no end")
        finally:
            clock.monotonic, clock.now, clock.sleep, storage.in_parallel, storage.masked = before

    def end(self) -> None:
        """End what waits for ever. Garbage collection does not see what a greenlet's stack holds, and would keep it."""
        self._hub = greenlet.getcurrent()
        for process in self.processes:
            process.doomed = True
            while process and not process.dead:  # it has begun; where it ends it may wait once more
                process.resume()

    def sleep(self, seconds: float) -> None:
        process, when = Process.current(), self.time + seconds
        if not process.doomed and not self.failures and (not self._queue or when < self._queue[0][0]):
            self.time = when  # nothing happens before: the others need not be asked
            return
        self.at(when, process.resume)
        self.pause()

    def message(self) -> None:
        """One arrives at, or leaves, the current process, if it is not cut off."""
        self.sleep(0.04 * self.random.random())
        while Process.current().is_cut_off:
            self.pause()

    def pause(self) -> None:
        """Let the others go on, until somebody resumes this process."""
        assert self._hub is not None
        loop = asyncio._get_running_loop()  # of the thread, which all processes share
        if loop is None:
            self._hub.switch()
            return
        asyncio._set_running_loop(None)
        self._hub.switch()
        asyncio._set_running_loop(loop)

    def say(self, text: str) -> None:
        self.log.append(f"{self.time - 1e9:9.2f}  {Process.name_of_current():12} {text}")

    # Requests.

    def request(self, kind: str, path: str, act: Callable[[], Any], *, changes: bool = False) -> Any:
        """Carry out one request of the current process, or have something go wrong with it."""
        self.num_requests += 1
        if self.num_requests > self._max_requests:
            self._queue.clear()
            raise Stuck(f"after {self.num_requests} requests there is no end")
        process, chance = Process.current(), self.random.random()
        self.sleep(0.1 * self.random.random())
        if not self.faults or process.calm:
            return act()
        if chance < process.stop_rate and self.strikes():  # swapped out, or its machine is
            self.say(f"stops before {kind} {path}")
            self.sleep(self.random.choice([20.0, 60.0, 200.0]))
        elif process.stop_rate <= chance < process.stop_rate + 0.01 and self.strikes():
            self.say(f"503 for {kind} {path}")
            raise OSError("503 Slow Down")
        if not changes:
            return act()
        chance = self.random.random()
        if not (chance < 0.03 or chance > 0.99) or not self.strikes():
            return act()
        if chance < 0.01:  # it is done, and nobody hears of it
            act()
            self.say(f"the answer to {kind} {path} is lost")
            raise OSError("the connection broke off")
        if chance < 0.02:  # it is held up on the way, and given up
            self.say(f"{kind} {path} is late")
            self.at(self.time + self.random.choice([5.0, 60.0, 200.0]), lambda: _quietly(act))
            self.sleep(30.0)
            raise OSError("timed out")
        if chance < 0.03:  # it is held up, and so is whoever waits for it
            self.say(f"{kind} {path} is held up")
            self.sleep(self.random.choice([10.0, 60.0, 200.0]))
        result = act()
        if chance > 0.99:
            self.say(f"{kind} {path} arrives twice")
            self.at(self.time + self.random.choice([1.0, 100.0]), lambda: _quietly(act))
        return result

    def wrong(self, question: str) -> bool:
        """Whether to answer a read wrongly now."""
        process = Process.current()
        is_told = process.misled == question
        process.misled = ""
        if not self.faults or process.calm or is_told or self.random.random() >= 0.01 or not self.strikes():
            return False
        process.misled = question
        return True

    def strikes(self) -> bool:
        """Whether the next fault takes place."""
        self.num_faults += 1
        return self.num_faults not in self._spared

    def listing(self) -> Iterable[str]:
        """What is there, or what was some time ago."""
        if self._past and self.wrong("list"):
            _, names = self.random.choice(self._past[-20:])
            self.say("a listing is old")
            return names
        return self.bucket

    def changed(self) -> None:
        self._past.append((self.time, frozenset(self.bucket)))
        del self._past[:-40]


class Process(greenlet):
    """One thread of a process that may stop or die at any request."""

    def __init__(
        self, world: World, name: str, work: Callable[[], object], *, stop_rate: float = 0.0, calm: bool = False
    ) -> None:
        super().__init__(self._run)
        self.world, self.name, self._work = world, name, work
        world.processes.append(self)
        self.stop_rate, self.calm = stop_rate, calm
        self.misled = ""
        self.children: list[Process] = []
        self.doomed = self.is_cut_off = False

    @classmethod
    def current(cls) -> Process:
        current = greenlet.getcurrent()
        assert isinstance(current, cls), "requests are made by processes"
        return current

    @classmethod
    def name_of_current(cls) -> str:
        current = greenlet.getcurrent()
        return current.name if isinstance(current, cls) else ""

    def _run(self) -> None:
        try:
            self._work()
        except GreenletExit:
            pass
        except BaseException as error:
            self.world.failures.append(error)

    def resume(self) -> None:
        if self.dead:
            return
        self.parent = greenlet.getcurrent()
        if self.doomed:
            self.throw(GreenletExit)
        else:
            self.switch()

    def kill(self) -> None:
        """It makes no request any more; those that are under way arrive."""
        self.doomed = True
        for child in self.children:
            child.kill()

    def cut_off(self) -> None:
        """It and its children reach storage, and no other process."""
        self.is_cut_off = True
        for child in self.children:
            child.cut_off()

    @property
    def over(self) -> bool:
        return self.dead or self.doomed

    def beside(self, name: str, work: Callable[[], object]) -> Process:
        """Start another thread or process that dies with this one."""
        made = Process(self.world, f"{self.name}/{name}", work, stop_rate=self.stop_rate, calm=self.calm)
        made.is_cut_off = self.is_cut_off
        if self.doomed:
            return made
        self.children.append(made)
        self.world.start(made)
        return made


class Signal:
    """Something that processes wait for."""

    def __init__(self, world: World) -> None:
        self._world, self.given = world, False
        self._waiting: list[Process] = []

    def give(self) -> None:
        self.given = True
        for process in self._waiting:
            self._world.at(self._world.time, process.resume)
        self._waiting.clear()

    def wait(self) -> None:
        while not self.given:
            self._waiting.append(Process.current())
            self._world.pause()


class _FileSystem:
    """The calls that `Storage` makes of fsspec."""

    def __init__(self, world: World) -> None:
        self._world = world

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        def act() -> None:
            if mode == "create" and path in self._world.bucket:
                raise FileExistsError(path)
            self._world.bucket[path] = data
            self._world.changed()

        self._world.request("create" if mode == "create" else "put", path, act, changes=True)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        def act() -> bytes:
            if path not in self._world.bucket or self._world.wrong(f"get {path}"):
                raise FileNotFoundError(path)
            return self._world.bucket[path][start:end]

        found: bytes = self._world.request("get", path, act)
        return found

    def size(self, path: str) -> int:
        return len(self.cat_file(path))

    def exists(self, path: str) -> bool:
        try:
            self.cat_file(path)
        except FileNotFoundError:
            return False
        return True

    def find(self, root: str) -> list[str]:
        return self._world.request(
            "list", root, lambda: [path for path in self._world.listing() if path.startswith(f"{root}/")]
        )

    def ls(self, root: str, detail: bool = False) -> list[str]:
        found = self.find(root)
        return sorted({f"{root}/{path[len(root) + 1 :].partition('/')[0]}" for path in found})

    def rm_file(self, path: str) -> None:
        def act() -> None:
            self._world.bucket.pop(path, None)
            self._world.changed()

        self._world.request("delete", path, act, changes=True)


def bucket_storage(world: World, path: str, *, retry_s: float = 60.0) -> Storage:
    """The real Storage, on the world's bucket."""
    made = Storage.__new__(Storage)
    made.is_local, made.url, made.retry_s = False, f"sim://{path}", retry_s
    made._options, made._call_s, made._fs, made._root = {}, 90.0, _FileSystem(world), path
    return made


def _one_by_one(action: Callable[[str], object], paths: Iterable[str]) -> None:
    for path in paths:
        action(path)


def _quietly(act: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        act()
