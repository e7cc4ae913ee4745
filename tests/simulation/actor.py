"""The real coordinator in the simulated world: asyncio on the world's clock, and an actor as Ray keeps one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from relora_ray.checkpoint.ownership import Term
from relora_ray.config import CheckpointConfig, ClusterConfig
from relora_ray.runtime import coordinator as module
from relora_ray.runtime.coordinator import Coordinator
from tests.simulation.world import Process, Signal, World, bucket_storage

AGAIN_S = 1.0
"""Ray starts an actor again so long after it died."""


class EventLoop(asyncio.BaseEventLoop):
    """Runs in a process; what it hands to threads runs in processes beside it."""

    def __init__(self, world: World, beside: Callable[[Callable[[], object]], object]) -> None:
        super().__init__()
        self._world, self._beside = world, beside
        self._clock_resolution = 1e-5  # the world's seconds are large numbers
        self._selector = self  # what it waits with
        self._turn = 0
        self._sleeper: Process | None = None

    def __del__(self, _warn: object = None) -> None:
        """There is nothing to close, and coroutines that are collected after it still call it."""

    def time(self) -> float:
        return self._world.time

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None or timeout > 0:
            self._sleeper = Process.current()
            if timeout is not None:
                self._world.at(self._world.time + timeout, partial(self._wake, self._turn))
            self._world.pause()
        return []

    def _wake(self, turn: int) -> None:
        if turn == self._turn and self._sleeper is not None:
            self._turn, sleeper, self._sleeper = turn + 1, self._sleeper, None
            sleeper.resume()

    def _write_to_self(self) -> None:
        self._world.at(self._world.time, partial(self._wake, self._turn))

    def _process_events(self, events: list[Any]) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        future = self.create_future()

        def tell(how: Callable[[Any], None], what: Any) -> None:
            if not future.done():
                how(what)

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:
                self.call_soon_threadsafe(tell, future.set_exception, error)
            else:
                self.call_soon_threadsafe(tell, future.set_result, result)

        self._beside(work)
        return future


class Actor:
    """A run's coordinator: started again when it has died, and calls to it made again."""

    def __init__(self, driver: Process, place: str, cfg: CheckpointConfig, term: Term) -> None:
        self._world, self._driver, self._term = driver.world, driver, term
        self._config: Any = SimpleNamespace(
            checkpoint=cfg, cluster=ClusterConfig(), storage=bucket_storage(self._world, place)
        )
        self._num_starts = 0
        self._start()

    def _start(self) -> None:
        if self._driver.over:
            return
        self._num_starts += 1
        self._ready, self._asking = Signal(self._world), dict[int, Signal]()
        self._process = self._driver.beside(f"coordinator{self._num_starts}", self._serve)
        self._loop = EventLoop(self._world, partial(self._process.beside, "thread"))
        self._loop.set_exception_handler(self._report)

    def _serve(self) -> None:
        _Progress.again = self._num_starts > 1
        self._instance = Coordinator(self._config, self._term)
        self._ready.give()
        self._loop.run_forever()

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if error := context.get("exception"):
            self._world.failures.append(error)

    def die(self) -> None:
        if self._process.over or self._driver.over or not self._ready.given or not self._world.strikes():
            return
        self._world.say(f"{self._process.name} dies")
        self._process.kill()
        asking = self._asking

        def start_again() -> None:
            self._start()
            for signal in asking.values():
                signal.give()

        self._world.at(self._world.time + AGAIN_S, start_again)

    def call(self, name: str, *args: Any) -> Any:
        """The answer of whichever instance gives one. By any process."""
        while True:
            self._world.message()
            self._ready.wait()
            ended, answers, asking = Signal(self._world), list[Any](), self._asking
            asking[id(ended)] = ended  # in the order of asking
            self._loop.call_soon_threadsafe(self._ask, self._loop, self._instance, name, args, answers, ended)
            ended.wait()
            del asking[id(ended)]
            if answers:
                self._world.message()
                return answers[0]

    def tell(self, name: str, *args: Any) -> None:
        """Without waiting for an answer; lost if the actor is dead."""
        if self._ready.given and not self._process.over:
            self._loop.call_soon_threadsafe(self._ask, self._loop, self._instance, name, args, [], None)

    @staticmethod
    def _ask(
        loop: EventLoop,
        instance: Coordinator,
        name: str,
        args: tuple[Any, ...],
        answers: list[Any],
        ended: Signal | None,
    ) -> None:
        found = getattr(instance, name)(*args)
        if not asyncio.iscoroutine(found):
            answers.append(found)
            if ended is not None:
                ended.give()
            return

        async def ask() -> None:
            answers.append(await found)
            if ended is not None:
                ended.give()

        task = loop.create_task(ask())
        tasks.add(task)  # a loop knows its tasks by weak references only
        task.add_done_callback(tasks.discard)


tasks: set[asyncio.Task[None]] = set()


class _Progress:
    """In place of ProgressLog, which decides nothing."""

    again = False
    """Whether the coordinator that is being made takes another's place."""

    def __init__(self, *_: object) -> None:
        pass

    def add(self, event: object) -> None:
        pass

    def committed(self, manifest: object) -> None:
        pass


@contextmanager
def coordinators() -> Iterator[None]:
    """Has them made here, without files and Ray."""
    logger = logging.getLogger("relora_ray")
    handlers = logger.handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "parse_config", lambda config: config)
        patch.setattr(module, "run_storage", lambda cfg: cfg.storage)
        patch.setattr(module, "_was_reconstructed", lambda: _Progress.again)
        patch.setattr(module, "ProgressLog", _Progress)
        yield
    logger.handlers[:] = handlers
    tasks.clear()
