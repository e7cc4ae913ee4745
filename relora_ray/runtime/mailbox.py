"""What a sweep's trials tell its driver: an actor that holds messages until they are taken.

Ray's own queue raises `Empty` inside its actor whenever a wait ends without a message, and the dashboard shows each as
a failed task: several hundred in an hour in which all is well. Here a wait without a message returns none.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray


class _Box:
    """The actor: one thread of asyncio, so that no two calls run at once."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._some = asyncio.Event()

    async def put(self, message: Any) -> None:
        self._messages.append(message)
        self._some.set()

    async def take(self, wait_s: float) -> list[Any]:
        """All there are, in order; if there are none, those that come within the time."""
        if not self._messages:
            try:
                await asyncio.wait_for(self._some.wait(), wait_s)
            except TimeoutError:
                return []
        taken, self._messages = self._messages, []
        self._some.clear()
        return taken


class Mailbox:
    """May be sent to other processes."""

    def __init__(self) -> None:
        options = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        self._box = ray.remote(_Box).options(**options).remote()

    def put(self, message: Any) -> None:
        """Returns when it is held, so that messages of one process keep their order."""
        ray.get(self._box.put.remote(message))

    def take(self, wait_s: float) -> list[Any]:
        taken: list[Any] = ray.get(self._box.take.remote(wait_s))
        return taken

    def close(self) -> None:
        """What is held then is lost."""
        ray.kill(self._box)
