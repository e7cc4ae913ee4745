"""What agents, the coordinator and the driver say to each other. No torch here: an agent does without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Event = dict[str, Any]
"""Something to show: a metrics record, or of kind "term", "begin", "worker", "lost", "restart" or "log"."""


def waiting_event(what: str) -> Event:
    """For whoever looks on: what is waited for from now on."""
    return {"kind": "waiting", "what": what}


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
    """The agent listens there: where the ranks meet if this is rank 0."""
    step: int = 0
    """The last that it saw done."""
    code: str = ""
    """Digest of this package's files on the machine."""


Change = Literal["start", "resize", "failure"]
"""What made a new attempt necessary."""


@dataclass(frozen=True)
class Cause:
    change: Change
    text: str


@dataclass(frozen=True)
class Start:
    """An attempt, as one rank is to begin it."""

    attempt: str
    """Its name: see ownership.py."""
    rank: int
    size: int
    host: str
    port: int
    cause: Cause
    secret: str = field(repr=False)
    """Who does not know it does not meet the others."""


Kind = Literal["passing", "follows", "lasting", "unknown", "rollback", "died"]
"""Of a failure: a verdict on the error that a rank met, as in verdict.py. rollback: the run goes back. died: its
process ended without a word."""


@dataclass(frozen=True)
class Arrival:
    """One rank at a boundary."""

    attempt: str
    rank: int
    size: int
    step: int
    when: str
    """before or after"""
    digest: int
    """Before: of the trained tensors. After: of all weights."""
