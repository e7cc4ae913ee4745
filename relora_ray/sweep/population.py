"""Population-based training (Jaderberg et al. 2017) at boundaries: who goes on, who is replaced, and by what.

At every rung the members of the population that are most behind are replaced by forks of those that are most ahead,
with settings moved a little. A fork takes over its parent's function and draws its own adapters, so rank, cycle length
and learning rate may change without losing a weight. All is a pure function of the config and the records.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from relora_ray.keyed import key
from relora_ray.sweep.dimension import Plain, Value, branches
from relora_ray.sweep.results import Point
from relora_ray.sweep.space import SweepConfig


def replacements(spec: SweepConfig, members: Sequence[Point], generation: int, rung: int) -> dict[int, Point]:
    """By position in `members`: the fork that takes a member's place after `rung` updates. Who did not come to the
    rung, because it diverged, say, is replaced besides; nobody is if nobody did."""
    assert spec.population is not None
    came = [point for point in members if rung in point.losses]
    ranked = sorted(came, key=lambda p: (p.loss_at(rung), p.number))
    count = max(1, int(len(members) * spec.population.share))
    ahead = ranked[:count]
    behind = ranked[count:][-count:]
    found = {}
    for position, member in enumerate(members):
        if not ahead or (member in came and member not in behind):
            continue
        number = len(members) * (generation + 1) + position
        generator = random.Random(key(spec.seed, "population", number))
        parent = generator.choice(ahead)
        settings = {
            name: _moved(dimension, parent.settings[name], spec.population.factor, generator)
            for plain in branches(spec.space)  # one: there are no rows
            for name, dimension in plain.items()
        }
        found[position] = Point(number, settings, parent=parent.number, forked_at=rung)
    return found


def _moved(dimension: Plain, value: Value, factor: float, generator: random.Random) -> Value:
    """A step up, a step down, or as it is."""
    direction = generator.choice((-1, 0, 1))
    if isinstance(dimension, tuple):
        return dimension[min(max(dimension.index(value) + direction, 0), len(dimension) - 1)]
    assert not isinstance(value, str)
    moved = value * factor**direction
    if dimension.whole and direction:
        moved = max(moved, value + 1) if direction > 0 else min(moved, value - 1)
    return dimension.nearest(moved)
