"""Settings that change during a run: `{0: 256, 20000: 128}` is 256 from the start and 128 after 20,000 updates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


class Plan(dict[int, int]):
    """Whole numbers above 0 by the finished updates from which they hold, ascending, the first at 0."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


Planned = int | dict[int, int]


def read_plan(given: dict[Any, Any]) -> Plan:
    """Raises ValueError, with the broken rule, for anything but a plan. Keys may be text, as in JSON."""
    try:
        pairs = sorted((int(str(step)), number) for step, number in given.items())
    except (TypeError, ValueError):
        pairs = []
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for _, number in pairs)
    if not pairs or not whole or len({step for step, _ in pairs}) < len(pairs):
        raise ValueError("must give whole numbers above 0, each by the step from which it holds: {0: 256, 20000: 128}.")
    if pairs[0][0] != 0:
        raise ValueError("must say first what holds at step 0, as in {0: 256, 20000: 128}.")
    return Plan(pairs)


def value_at(planned: Planned, step: int) -> int:
    """What holds after `step` updates."""
    return planned[max(s for s in planned if s <= step)] if isinstance(planned, dict) else planned


def all_values(planned: Planned) -> list[int]:
    return list(planned.values()) if isinstance(planned, dict) else [planned]


MAX_CYCLES = 1_000_000


@lru_cache
def cycle_ends(start: int, length: Planned, steps: int, key: str) -> tuple[int, ...]:
    """Finished updates at the ends of the cycles that follow `start`, up to the first at or after `steps`. A cycle is
    as long as `length`, the value of `key`, says where it begins. ValueError if there are too many."""
    shortest = min(all_values(length))
    if steps // shortest > MAX_CYCLES:
        raise ValueError(
            f"steps={steps} with {key}={length} is {steps // shortest:,} cycles, more than {MAX_CYCLES:,}. Is steps a "
            f"number of tokens? Those are given as tokens={steps}."
        )
    ends = [start + value_at(length, start)]
    while ends[-1] < steps:
        ends.append(ends[-1] + value_at(length, ends[-1]))
    return tuple(ends)
