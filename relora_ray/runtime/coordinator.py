"""A small actor that the driver owns: workers tell it what happens, the driver asks what is new.

It commits checkpoints: every rank hands in its share and waits, and when all are there the manifest is written, here
and not in a worker, so that it is known outside the workers which of them are missing. It also remembers the first
error that a restart cannot mend (a ReloraError), so that the attempt that Ray starts after it ends at once instead of
failing again until the failures are used up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray

from relora_ray.checkpoint import Commits, Manifest, Outcome, Share
from relora_ray.checkpoint.manifest import attempt_number
from relora_ray.config_file import parse_config
from relora_ray.runs import run_storage

Event = dict[str, Any]


@ray.remote(num_cpus=0, max_concurrency=10_000)  # all ranks may wait in `commit` at once
class Coordinator:
    def __init__(self, config: str) -> None:
        """`config`: the run's YAML."""
        cfg = parse_config(config)
        self._commits = Commits(run_storage(cfg), cfg.checkpoint)
        self._timeout_s = cfg.cluster.collective_timeout_s
        self._committing = asyncio.Lock()
        self._saves: dict[tuple[int, int, str], _Save] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: list[Event] = []
        self._fatal = ""
        logging.getLogger("relora_ray").addHandler(_Log(self._events_of_log))

    def _events_of_log(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._events.append({"kind": "log", "level": record.levelname, "rank": "coordinator", "message": message})

    async def settle(self) -> None:
        """Wait until no commit is under way: an attempt asks before it looks for the newest checkpoint."""
        async with self._committing:
            pass

    async def commit(self, share: Share) -> Outcome:
        """One rank's share of a save; returns when all ranks' are there and the manifest is stored, or is not: the same
        to every rank."""
        manifest = share.manifest
        key = (attempt_number(manifest.attempt), manifest.step, manifest.attempt)
        for over in [other for other in self._saves if other < key]:  # an attempt has one save under way
            del self._saves[over]
        save = self._saves.setdefault(key, _Save())
        if save.outcome.done():  # it was given up
            return save.outcome.result()
        save.shares[share.rank] = share
        if len(save.shares) == manifest.world_size:
            save.complete.set()
            async with self._committing:
                shares = [save.shares[rank] for rank in sorted(save.shares)]
                save.outcome.set_result(await asyncio.to_thread(self._commits.commit, shares))
            task = asyncio.create_task(self._prune(save.outcome.result().manifest))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:  # only the gathering has a time limit: a commit that has begun is waited for
            await asyncio.wait_for(save.complete.wait(), self._timeout_s)
        except asyncio.TimeoutError:
            missing = sorted(set(range(manifest.world_size)) - save.shares.keys())
            if not save.outcome.done():
                error = f"no share from ranks {missing} in {self._timeout_s} s"
                save.outcome.set_result(Outcome(manifest=None, error=error))
        return await asyncio.shield(save.outcome)

    async def _prune(self, committed: Manifest | None) -> None:
        if committed is not None:
            async with self._committing:
                await asyncio.to_thread(self._commits.prune, committed)

    def tell(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        """The events since the last call. Only the driver asks."""
        events, self._events = self._events, []
        return events

    def fail(self, message: str) -> None:
        """A worker's error that a restart cannot mend; the first counts."""
        self._fatal = self._fatal or message

    def fatal(self) -> str:
        return self._fatal


class _Save:
    """The shares of one save, and what became of it."""

    def __init__(self) -> None:
        self.shares: dict[int, Share] = {}
        self.complete = asyncio.Event()
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()


class _Log(logging.Handler):
    """Hands warnings on: what this process logs is seen by nobody."""

    def __init__(self, hand_on: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._hand_on = hand_on

    def emit(self, record: logging.LogRecord) -> None:
        self._hand_on(record)
