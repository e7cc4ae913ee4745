"""A small actor that the driver owns: workers tell it what happens, the driver asks what is new.

It commits checkpoints: every rank hands in its share and waits, and when all are there the manifest is written, here
and not in a worker, so that it is known outside the workers which of them are missing. It also remembers the first
error that a restart cannot mend (a ReloraError), so that the attempt that Ray starts after it ends at once instead of
failing again until the failures are used up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from relora_ray.checkpoint import Commits, Outcome, Share
from relora_ray.checkpoint.manifest import attempt_number
from relora_ray.config_file import parse_config
from relora_ray.runs import run_storage

Event = dict[str, Any]


@ray.remote(num_cpus=0)
class Coordinator:
    def __init__(self, config: str) -> None:
        """`config`: the run's YAML."""
        cfg = parse_config(config)
        self._commits = Commits(run_storage(cfg), cfg.checkpoint)
        self._timeout_s = cfg.cluster.collective_timeout_s
        self._saves: dict[tuple[str, int], _Save] = {}
        self._events: list[Event] = []
        self._fatal = ""

    async def commit(self, share: Share) -> Outcome:
        """One rank's share of a save; returns when all ranks' are there and the manifest is stored, or is not."""
        manifest = share.manifest
        key = (manifest.attempt, manifest.step)
        number = attempt_number(manifest.attempt)
        for other in [k for k in self._saves if attempt_number(k[0]) < number]:  # of attempts that are over
            del self._saves[other]
        save = self._saves.setdefault(key, _Save())
        save.shares[share.rank] = share
        if len(save.shares) == manifest.world_size:
            shares = [save.shares[rank] for rank in sorted(save.shares)]
            save.outcome.set_result(await asyncio.to_thread(self._commits.commit, shares))
            self._saves.pop(key, None)
        try:
            return await asyncio.wait_for(asyncio.shield(save.outcome), self._timeout_s)
        except asyncio.TimeoutError:
            missing = sorted(set(range(manifest.world_size)) - save.shares.keys())
            return Outcome(manifest=None, error=f"no share from ranks {missing} in {self._timeout_s} s", fatal=True)

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
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
