"""What agents, the coordinator and the driver say to each other. No torch here: an agent does without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Event = dict[str, Any]
"""Something to show: a metrics record, or of kind "log", "worker" or "restart"."""


def log_event(who: str | int, message: str, level: str = "WARNING") -> Event:
    """`who`: a rank, or a name."""
    return {"kind": "log", "level": level, "rank": who, "message": message}


@dataclass(frozen=True)
class Member:
    """One agent of a worker group, as it asks for something to do."""

    group: str
    """Name of the worker group; each start of one has another."""
    rank: int
    size: int
    node: str
    """Ray's id of the machine."""
    host: str
    port: int
    """Free on that machine a moment ago: where the ranks meet if this is rank 0."""


Change = Literal["start", "resize", "failure"]
"""What made a new attempt necessary."""


@dataclass(frozen=True)
class Cause:
    change: Change
    text: str


@dataclass(frozen=True)
class Start:
    """An attempt, as one rank is to begin it."""

    attempt: int
    """Counts the attempts that one coordinator began."""
    rank: int
    size: int
    host: str
    port: int
    cause: Cause


@dataclass(frozen=True)
class Orders:
    """What the ranks of an attempt are to do. `save` and `go_on` are times in ns, so that a later order is greater."""

    stop: bool = False
    """The attempt is over: end the process and ask again."""
    save: int = 0
    """When it was asked to store the state after the next step, and then to wait."""
    go_on: int = 0
    """Whoever was asked to wait up to then goes on."""


@dataclass(frozen=True)
class Arrival:
    """One rank at a boundary."""

    attempt: int
    rank: int
    size: int
    step: int
    when: str
    """before or after"""
    digest: int
    """Before: of the trained tensors. After: of all weights."""
