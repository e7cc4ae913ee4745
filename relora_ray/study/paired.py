"""Differences between runs of equal seeds, and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086)  # fmt: skip
"""97.5 % points of Student's t by degrees of freedom, from 1."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least two values, by Student's t."""
    freedom = len(values) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else _T[-1]  # a little wide
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


@dataclass(frozen=True)
class Difference:
    """The mean difference of runs with the same seed, and its 95 % interval: NaN of one pair."""

    mean: float
    low: float
    high: float
    num_pairs: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def difference(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Mine less theirs, by seed; None if they have no seed in common."""
    found = [loss - theirs[seed] for seed, loss in mine.items() if seed in theirs]
    if not found:
        return None
    low, high = interval(found) if len(found) > 1 else (math.nan, math.nan)
    return Difference(statistics.fmean(found), low, high, len(found))
