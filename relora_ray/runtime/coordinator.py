"""A small actor that the driver owns: workers tell it what happens, the driver asks what is new.

It also remembers the first error that a restart cannot mend (a ReloraError), so that the attempt that Ray
starts after it ends at once instead of failing again until the failures are used up.
"""

from __future__ import annotations

from typing import Any

import ray

Event = dict[str, Any]


@ray.remote(num_cpus=0)
class Coordinator:
    def __init__(self) -> None:
        self._events: list[Event] = []
        self._fatal = ""

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
