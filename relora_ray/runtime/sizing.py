"""Which size a worker group should have, and when its ranks are asked to make room for another: no Ray and no clock.

Callers look at the machines, say what they saw and when, and do what is decided (elastic.py on Ray; the simulation of a
month in tests). `now` is in seconds of a clock that only goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Literal, TypeVar

STEADY_S = 3.0
"""A larger size must have been possible for so long: machines that come together are taken in together."""
ASK_AGAIN_S = 10.0
"""Between a wish that came to nothing and the next."""

T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """The machines, as they are now."""

    room: int
    """Workers that fit on those that may be used, and no more than the run may have."""
    used: Set[str] = frozenset()
    """Those that the group is on. Empty if none of the following two is."""
    leaving: Set[str] = frozenset()
    """Those that are being drained."""
    left_out: Set[str] = frozenset()
    """Those that are done without, as attempts fail there again and again."""


@dataclass(frozen=True)
class Decision:
    """What to do with the group that trains."""

    do: Literal["nothing", "ask", "go on", "replace"] = "nothing"
    """ask: have the state stored. go on: call that off. replace: start another group, though not all have stored."""
    workers: int = 0
    """For so many."""
    wait: bool = False
    """After the state is stored nobody trains on until the group is replaced."""
    cause: str = ""


class Sizing:
    def __init__(self, minimum: int) -> None:
        """`minimum`: cluster.min_workers."""
        self._min = minimum
        self.size = 0
        """Workers of the group that was started last."""
        self.asked: int | None = None
        """The size that the ranks were asked to store their state for."""
        self._ask_again_at = 0.0
        self._told: Set[str] = frozenset()
        """Machines whose leaving the ranks of this group know of."""
        self._room, self._room_since = 0, 0.0

    def started(self, size: int) -> None:
        """Another group begins."""
        self.size, self.asked, self._told = size, None, frozenset()

    def decide(
        self, now: float, seen: Seen, is_asked: Callable[[], bool | None], are_warm: Callable[[], bool]
    ) -> Decision:
        """`is_asked`: whether the ranks have yet to store what they were asked to; None if nobody knows. `are_warm`:
        whether new machines could begin at once. If the ranks accept what they are asked, call `accepted`."""
        size = self.size
        enough = seen.room >= self._min
        off = (seen.left_out | seen.leaving) & seen.used if enough else set()
        """Machines to get off: the group is replaced even if its size stays."""
        if self.asked is not None and not (still := is_asked()):
            # The attempt ended, or nothing could be stored. On a bad machine it may never be: what is there is lost.
            if off & seen.left_out and still is False:
                return Decision("replace", self.asked)
            self.asked, self._ask_again_at, self._told = None, now + ASK_AGAIN_S, frozenset()
        if seen.room != self._room:
            self._room, self._room_since = seen.room, now
        wanted = seen.room if enough else size
        takes_in = wanted > size or (wanted == size and off)
        if takes_in and not (are_warm() and now - self._room_since >= STEADY_S):
            wanted, off = size, set()
        if now < self._ask_again_at:
            return Decision()
        if wanted != size or off:
            if wanted == self.asked:
                return Decision()
            why = "machines came or went"
            if off & seen.left_out:
                why = "attempts failed again and again on a machine"
            elif off or (seen.leaving and wanted < size):
                why = "machines are being drained"
            return Decision("ask", wanted, True, f"{why}: {size} -> {wanted} workers")
        if self.asked is not None:
            self.asked = None
            return Decision("go on")
        if seen.leaving - self._told:
            # Nobody can go on without them, or not yet: at least the state is stored.
            return Decision("ask", size, False, "machines are being drained")
        return Decision()

    def accepted(self, decision: Decision, seen: Seen) -> None:
        """The ranks will store their state, as was decided to ask."""
        self._told |= seen.leaving
        if decision.wait:
            self.asked = decision.workers


def without_bad(bad: Iterable[str], usable: dict[str, T], is_enough: Callable[[dict[str, T]], bool]) -> dict[str, T]:
    """The `usable` machines without the bad ones, the worst first, as long as enough are left."""
    for node in bad:
        others = {other: there for other, there in usable.items() if other != node}
        if is_enough(others):
            usable = others
    return usable
