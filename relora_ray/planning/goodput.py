"""How often to save, and what share of the time counts, when machines fail.

Failures are independent and come at a constant rate: the time to the next of a group is exponential, with a mean of
one machine's over their number. All times are in seconds, and pure numbers go in and out; tests simulate the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class Costs:
    """What saves and failures cost."""

    blocked_s: float
    """Training waits so long for a save."""
    stored_s: float
    """From there until the save can be gone on from: behind training, if it is asynchronous."""
    restart_s: float
    """From a failure until the first new update begins."""


def mean_between_failures(failures_per_day: float, num_machines: int) -> float:
    """Seconds between two failures of a group, of whose machines each fails so often. inf without failures."""
    return DAY_S / (failures_per_day * num_machines) if failures_per_day > 0 else math.inf


def young(blocked_s: float, mean_s: float) -> float:
    """Seconds of work between two saves, to first order: sqrt(2 C M) (Young 1974, "A first order approximation to the
    optimum checkpoint interval", Communications of the ACM 17(9))."""
    return math.sqrt(2 * blocked_s * mean_s)


def daly(blocked_s: float, mean_s: float) -> float:
    """The same to higher order: sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, and M where C >= 2 M (Daly 2006,
    "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), equation 37)."""
    if mean_s == math.inf:
        return math.inf
    if blocked_s >= 2 * mean_s:
        return mean_s
    ratio = blocked_s / (2 * mean_s)
    return young(blocked_s, mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - blocked_s


def best_interval(costs: Costs, mean_s: float) -> float:
    """Seconds of work between two saves: Daly's, and no less than a save takes to be stored, as one that comes due
    before is left out."""
    return max(daly(costs.blocked_s, mean_s), costs.stored_s)


def goodput(every_s: float, costs: Costs, mean_s: float) -> float:
    """The share of the time that goes into updates that count: t / (M e^(R/M) (e^((t + C)/M) - 1)), with R the restart
    (Daly 2006, equation 13, per segment). A save that is stored behind training can be used later by the time that this
    takes, so that a failure loses so much work more: it is added to R. Failures during a restart are in it."""
    if mean_s == math.inf:
        return every_s / (every_s + costs.blocked_s)
    lost = (costs.restart_s + costs.stored_s) / mean_s
    segment = (every_s + costs.blocked_s) / mean_s
    if lost + segment > 500:  # e^500: nothing gets done
        return 0.0
    return (every_s / mean_s) / (math.exp(lost) * math.expm1(segment))


def longest_interval(costs: Costs, mean_s: float, update_s: float, give: float = 0.005) -> int:
    """The most updates between two saves that cost no more than `give` of the time beside the best interval: near its
    best goodput is flat, and rarer saves leave storage and network alone."""
    if mean_s == math.inf:
        return 2**31
    best = max(1, round(best_interval(costs, mean_s) / update_s))
    least, low, high = goodput(best * update_s, costs, mean_s) - give, best, best
    while goodput(2 * high * update_s, costs, mean_s) >= least > 0:
        high *= 2
    low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if goodput(middle * update_s, costs, mean_s) >= least else (low, middle)
    return low
