"""What came of a sweep's points: records in its storage, and from them the best config, a table and what matters.

<storage>/<sweep>/sweep.yaml             what is searched, fixed by the first start
<storage>/<sweep>/points/0003.json       one record per point, written when it comes to a rung or ends
<storage>/<sweep>/0003-seed1/            its runs
<storage>/<sweep>/warm-<digest>/         warm starts that runs were forked from
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from relora_ray.checkpoint.history import read_origin
from relora_ray.config import RunConfig
from relora_ray.errors import DamagedError
from relora_ray.runs import metrics
from relora_ray.storage import Storage
from relora_ray.sweep.dimension import Settings, Value
from relora_ray.sweep.space import WARM

POINTS = "points"
STATES = ("begun", "done", "halved", "replaced", "diverged", "failed")
"""Begun: it goes on. Halved, replaced: ended at a rung, being behind. Diverged: one of its runs has. Failed: what
stopped it is no result of its settings, and it is tried again at the next start."""


@dataclass
class Point:
    """One point's record."""

    number: int
    settings: Settings
    state: str = "begun"
    why: str = ""
    """Of diverged and failed."""
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    """Held-out loss by rung (finished updates) and seed."""
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    """`measured` of each seed's run."""
    parent: int | None = None
    """Of a population: the point that it was forked from, ..."""
    forked_at: int = 0
    """... after so many updates."""
    passed: int = 0
    """The last rung, in updates, at which halving let it go on."""

    @property
    def last_rung(self) -> int:
        return max(self.losses, default=0)

    def loss(self) -> float:
        """At the last rung that it came to; inf if it diverged or came to none."""
        return math.inf if self.state == "diverged" else self.loss_at(self.last_rung)

    def loss_at(self, rung: int) -> float:
        """Mean over seeds; inf if it did not come there."""
        return statistics.fmean(self.losses[rung].values()) if rung in self.losses else math.inf

    def mean(self, name: str) -> float:
        """Of one of its runs' measurements, over seeds."""
        return statistics.fmean(run[name] for run in self.runs.values()) if self.runs else math.nan

    def to_json(self) -> bytes:
        return json.dumps(self.__dict__, indent=1).encode()


def point_from_json(text: bytes, where: str = "a point's record") -> Point:
    """DamagedError if it is none; `where` it was found."""
    try:
        raw = json.loads(text)
        losses = {int(rung): {int(seed): loss for seed, loss in by.items()} for rung, by in raw["losses"].items()}
        runs = {int(seed): run for seed, run in raw["runs"].items()}
        return Point(**raw | {"losses": losses, "runs": runs})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{where} is not a point's record ({type(error).__name__}: {error}). Restore it, or delete it to have the "
            f"point's runs looked at again."
        ) from error


def put_point(sweep: Storage, point: Point) -> None:
    sweep.put(f"{POINTS}/{point.number:04d}.json", point.to_json())


def read_point(sweep: Storage, number: int) -> Point:
    path = f"{POINTS}/{number:04d}.json"
    return point_from_json(sweep.get(path), f"{sweep.url}/{path}")


def read_points(sweep: Storage) -> list[Point]:
    """By number."""
    return [point_from_json(sweep.get(path), f"{sweep.url}/{path}") for path in sorted(sweep.list(POINTS))]


def held_out_loss(run: Storage, step: int) -> float | None:
    """After `step` updates, None if it was not finite. KeyError if it was not evaluated there."""
    return {record["step"]: record["loss"] for record in metrics.read(run, "eval")}[step]


def measured(cfg: RunConfig, run: Storage) -> dict[str, Any]:
    """What a run came to besides its loss: memory, speed, sizes."""
    records = metrics.read_kinds(run)
    steps, last = metrics.latest(records["train"]), metrics.structures(records)[-1]
    trainable = last["num_trainable"]
    # Versions that recorded none counted 16 bytes for what is trained.
    state = last.get("state_bytes") or {"by shape": 4 * last["num_parameters"] + 12 * trainable}
    origin = read_origin(run)
    step_s = statistics.median(record["step_s"] for record in steps)
    return {
        "steps": len(steps),
        "tokens": len(steps) * cfg.tokens_per_step,
        "forked_at": 0 if origin is None else origin.step,
        "forked_from": "" if origin is None else origin.parent,
        "step_s": step_s,
        "tokens_per_s": cfg.tokens_per_step / step_s,
        "train_s": sum(record["step_s"] for record in steps),
        "gpu_s": sum(record["step_s"] for record in steps) * cfg.cluster.workers * cfg.cluster.gpus_per_worker,
        "num_trainable": trainable,
        "state_bytes": sum(state.values()),
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in records["end"]), default=0),
    }


def spent(points: Sequence[Point]) -> tuple[float, float]:
    """Tokens and GPU seconds that these points have cost, a shared warm start counted once: its GPU seconds at the
    speed of the runs that were forked from it."""
    runs = [run for point in points for run in point.runs.values()]
    warm = {run["forked_from"]: run for run in runs if run["forked_from"].startswith(WARM)}
    tokens, gpu_s = (
        sum(run[name] for run in runs) + sum(run[name] * run["forked_at"] / run["steps"] for run in warm.values())
        for name in ("tokens", "gpu_s")
    )
    return tokens, gpu_s


def ranking(points: Sequence[Point]) -> list[Point]:
    """Those that came furthest first, among them by loss: a loss of half the tokens is no loss of all."""
    return sorted(points, key=lambda p: (-p.last_rung if p.state != "diverged" else 1, p.loss(), p.number))


def best(points: Sequence[Point]) -> Point | None:
    done = [point for point in points if point.state == "done"]
    return min(done, key=lambda p: (p.loss(), p.number)) if done else None


def pareto(points: Sequence[Point], name: str, *, larger: bool) -> list[Point]:
    """Points that no other beats in loss without being worse in `name`, by loss."""
    sign, front = -1.0 if larger else 1.0, []
    limit = math.inf
    for point in sorted((p for p in points if p.state == "done"), key=lambda p: (p.loss(), sign * p.mean(name))):
        if sign * point.mean(name) < limit:
            limit = sign * point.mean(name)
            front.append(point)
    return front


@dataclass(frozen=True)
class Importance:
    name: str
    """A key, or two, joined by " x ": what their values explain together beyond what each does alone."""
    share: float
    """Of the variance between runs, less what their seeds make: omega squared."""
    low: float
    high: float
    """90 % of resamples of the seeds lie between; NaN with one seed."""


def importance(points: Sequence[Point], *, resamples: int = 500, seed: int = 0) -> list[Importance]:
    """How much each key, and each pair of keys, matters, the most first. Values of a range are taken in four bins.

    Seeds are blocks: what a seed adds to all points' losses counts neither as noise nor as a difference. Noise is what
    seeds add to some points only. With one seed it cannot be told from differences within a key's values, which are
    taken for it, and pairs are given only where that leaves something to judge them by. Points of a random search
    differ in all keys at once: with few of them a key may take another's share. A key that only some rows have is left
    out.
    """
    done = [p for p in points if p.state == "done"]
    seeds = sorted(set.intersection(*(set(p.losses[p.last_rung]) for p in done))) if done else []
    names = list(dict.fromkeys(name for p in done for name in p.settings if all(name in q.settings for q in done)))
    groups = {name: _binned([p.settings[name] for p in done]) for name in names}
    groups = {name: values for name, values in groups.items() if len(set(values)) > 1}
    effects = [(name,) for name in groups] + list(combinations(groups, 2))
    losses = [[p.losses[p.last_rung][s] for s in seeds] for p in done]
    if not seeds or len(done) < 3:
        return []
    generator, drawn = random.Random(f"{seed} importance"), []
    noise = _noise(losses)
    if len(seeds) > 1:
        drawn = [generator.choices(range(len(seeds)), k=len(seeds)) for _ in range(resamples)]
    found = []
    for effect in effects:
        factors = [groups[name] for name in effect]
        if (share := _omega_squared(factors, losses, noise)) is None:
            continue
        shares = sorted(
            _omega_squared(factors, [[row[i] for i in picked] for row in losses], noise) or 0.0 for picked in drawn
        )
        low, high = (shares[int(q * (len(shares) - 1))] if shares else math.nan for q in (0.05, 0.95))
        found.append(Importance(" x ".join(effect), share, low, high))
    return sorted(found, key=lambda i: -i.share)


def _binned(values: list[Value]) -> list[Value]:
    if len(set(values)) <= 8:
        return values
    numbers = [value for value in values if not isinstance(value, str)]  # a range has no others
    ordered = sorted(numbers)
    edges = [ordered[len(ordered) * q // 4] for q in (1, 2, 3)]
    return [sum(value >= edge for edge in edges) for value in numbers]


def _noise(losses: list[list[float]]) -> float | None:
    """Variance of one run's loss, by what is left of points and seeds when both their means are taken away; None with
    one seed. `losses`: by point and seed."""
    num_points, num_seeds = len(losses), len(losses[0])
    if num_seeds < 2:
        return None
    of_points = [statistics.fmean(row) for row in losses]
    of_seeds = [statistics.fmean(row[s] for row in losses) for s in range(num_seeds)]
    mean = statistics.fmean(of_points)
    left = (row[s] - of_points[p] - of_seeds[s] + mean for p, row in enumerate(losses) for s in range(num_seeds))
    return sum(x * x for x in left) / ((num_points - 1) * (num_seeds - 1))


def _omega_squared(factors: list[list[Value]], losses: list[list[float]], noise: float | None) -> float | None:
    """The share of the variance that one factor explains, or that two explain beyond each alone, less what chance would
    explain. None if there is nothing to judge it by."""
    means, num_seeds = [statistics.fmean(row) for row in losses], len(losses[0])
    mean = statistics.fmean(means)
    of_seeds = [statistics.fmean(row[s] for row in losses) for s in range(num_seeds)]
    total = sum((row[s] - of_seeds[s]) ** 2 for row in losses for s in range(num_seeds))
    cells = list(zip(*factors, strict=True))
    together, num_cells = num_seeds * _between(cells, means, mean), len(set(cells))
    explained, freedom = together, num_cells - 1
    if len(factors) > 1:
        explained -= num_seeds * sum(_between(factor, means, mean) for factor in factors)
        freedom -= sum(len(set(factor)) - 1 for factor in factors)
    if noise is None:
        if len(means) == num_cells:
            return None
        noise = (total - together) / (len(means) - num_cells)
    if freedom <= 0 or total + noise == 0:
        return None
    return max(0.0, (explained - freedom * noise) / (total + noise))


def _between(groups: Sequence[Any], means: list[float], mean: float) -> float:
    by: dict[Any, list[float]] = defaultdict(list)
    for group, value in zip(groups, means, strict=True):
        by[group].append(value)
    return sum(len(members) * (statistics.fmean(members) - mean) ** 2 for members in by.values())


COLUMNS = ("tokens_per_s", "step_s", "num_trainable", "state_bytes", "peak_memory_bytes")


def to_csv(points: Sequence[Point]) -> str:
    """One line per point, the best first."""
    names = list(dict.fromkeys(name for point in points for name in point.settings))
    seeds = sorted({seed for point in points for by in point.losses.values() for seed in by})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["point", *names, "state", "updates", "loss", *(f"loss_seed{s}" for s in seeds), *COLUMNS, "why"])
    for point in ranking(points):
        by = point.losses.get(point.last_rung, {})
        writer.writerow(
            [
                point.number, *(point.settings.get(name, "") for name in names), point.state, point.last_rung,
                "" if math.isinf(point.loss()) else f"{point.loss():.6f}",
                *(f"{by[seed]:.6f}" if seed in by else "" for seed in seeds),
                *(f"{point.mean(name):.6g}" if point.runs else "" for name in COLUMNS),
                point.why.partition("\n")[0],
            ]
        )  # fmt: skip
    return out.getvalue()
