"""What a sweep's trials train at the moment, as the sweep's driver knows it: so that whoever stops the sweep loses no
update of its runs, and does not wait for their ends, as Ray Tune would."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray

from relora_ray.checkpoint import list_manifests
from relora_ray.runtime.mailbox import Mailbox
from relora_ray.runtime.stopping import store
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

KIND = "under way"
"""Of the message in which a trial says it."""


@contextmanager
def telling(queue: Mailbox, run: str) -> Iterator[Callable[[Any], None]]:
    """In a trial: what is to be called with the coordinator of `run`, which is under way until the block ends."""

    told = False

    def tell(coordinator: Any) -> None:
        nonlocal told
        told = True
        trial = ray.get_runtime_context().current_actor
        queue.put((run, {"kind": KIND, "coordinator": coordinator, "trial": trial}))

    try:
        yield tell
    finally:
        if told:  # or another trial trains it. The driver's handle would keep the coordinator's process
            queue.put((run, {"kind": KIND, "coordinator": None}))


class UnderWay:
    def __init__(self, folder: Storage) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._live: dict[str, tuple[Any, Any]] = {}
        """By run: its coordinator, and its trial."""
        self._stored: list[str] = []

    def hear(self, run: str, event: dict[str, Any]) -> bool:
        """Whether this was such a message."""
        if event.get("kind") != KIND:
            return False
        with self._lock:
            self._live.pop(run, None)
            if event["coordinator"] is not None:
                self._live[run] = event["coordinator"], event["trial"]
        return True

    def store(self) -> bool:
        """Have all runs store their states, and end the trials. Whether all have stored them."""
        with self._lock:
            live = dict(self._live)
        try:
            with ThreadPoolExecutor(max(1, len(live))) as pool:
                done = list(pool.map(self._store, live.values()))
        finally:
            self.end()
        self._stored = [run for run, is_stored in zip(live, done, strict=True) if is_stored]
        return all(done)

    def _store(self, run: tuple[Any, Any]) -> bool:
        try:
            return store(run[0])
        except ray.exceptions.RayError as error:  # one that has just ended; the others are stored
            logger.warning("the state of a run could not be stored: %s", error)
            return False

    def end(self) -> None:
        """End the trials, and all that they have started."""
        with self._lock:
            for _, trial in self._live.values():
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(trial)

    def what_is_there(self, stored: bool) -> str:
        """For whoever has stopped the sweep."""
        with self._lock:
            runs = sorted(self._live)
        if not runs:
            return "no run was under way"
        return ", ".join(f"{run} is stored {self._newest(run)}" for run in runs)

    def _newest(self, run: str) -> str:
        steps = list_manifests(self._folder.child(run))
        rest = "" if run in self._stored else "; what it has trained since is not"
        return f"after step {steps[-1]}{rest}" if steps else "nowhere: it was starting"
