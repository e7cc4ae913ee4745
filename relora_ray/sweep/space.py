"""What a sweep tries: a config with a `sweep:` section, and from it the config of every run.

    name: rank-and-reset
    ...                                                   a run's config, which every point starts from
    sweep:
      space:
        method.lora_rank: [4, 16, 64]                     a list of values
        optimizer.learning_rate: {min: 1.0e-4, max: 1.0e-2, log: true}
      search: random
      trials: 20
      seeds: [1, 2, 3]

A *point* gives every key of the space a value and has a number; it is trained once with every seed. Points of a grid
and random ones follow from the config alone. All are checked before the first is trained.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from relora_ray.config import ClusterConfig, RunConfig, Section, nearest
from relora_ray.config.edit import drop, put
from relora_ray.config.explain import explain
from relora_ray.config.file import check, parse_mapping, read_text
from relora_ray.config.lengths import SHORT
from relora_ray.errors import ConfigError
from relora_ray.keyed import key
from relora_ray.sweep.dimension import (
    Dimension,
    Plain,
    Range,
    Row,
    Settings,
    Value,
    branches,
    is_rows,
    num_combinations,
    read_space,
    row_of,
    walk,
)

MAX_POINTS = 10_000


class Halving(Section):
    """Asynchronous successive halving (ASHA, Li et al. 2018): of the points that have come to a rung only the best
    1 / `factor` go on. Rungs are cycle ends that all points have in common, the first, and then every `factor` times as
    many cycles."""

    factor: int = Field(2, ge=2)
    """One in so many goes on."""
    first_rung: int = Field(1, gt=0)
    """In common cycle ends: nobody is ended before this one."""


class Population(Section):
    """Population-based training (Jaderberg et al. 2017): at rungs, which are cycle ends that all points have in common,
    the points that are most behind are replaced by forks of those most ahead, with settings a step away."""

    share: float = Field(0.25, gt=0, le=0.5)
    """Of the points: so many are replaced at a rung, one at least."""
    factor: float = Field(1.25, gt=1)
    """A step in a range is a value times or over this; in a list it is to a neighbour, so give lists in order."""
    every_rungs: int = Field(1, gt=0)
    """In common cycle ends: points are compared at every so many."""


class SweepConfig(Section):
    space: dict[str, Dimension] = Field(min_length=1)
    """By dotted key of the run's config: a list of values, or {min, max, log, whole}; by section: rows, which are lists
    of keys and values with names (dimension.py)."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid: all combinations of the lists. random: `trials` points drawn by `seed`. tpe: `trials` points, each chosen
    by what those before came to (Optuna's Tree-structured Parzen Estimator)."""
    trials: int | None = Field(None, gt=0, le=MAX_POINTS)
    """How many points, of random and tpe."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((1,), min_length=1)
    """Every point is trained with each; it counts by the mean."""
    seed: int = Field(0, ge=0)
    """Of random and tpe."""
    objectives: tuple[Literal["loss", "state_bytes", "tokens_per_s"], ...] = ("loss",)
    """What tpe improves, held-out loss always; several: towards a Pareto front."""
    halving: Halving | None = None
    population: Population | None = None
    concurrent: int = Field(1, gt=0)
    """Points trained at a time, each with `cluster.workers` workers."""
    share_warm_start: bool = True
    """Train warm starts that are the same, update by update, once, and fork the points from them."""
    max_tokens: int | None = Field(None, gt=0)
    """No point begins when so many tokens have been trained, those of forks counted once."""
    max_hours: float | None = Field(None, gt=0)
    """No point begins so many hours after the sweep's first start."""
    max_gpu_hours: float | None = Field(None, gt=0)
    """No point begins when training has taken so many hours of GPUs."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sweep.seeds={list(self.seeds)} has a value twice: every run counts once. Remove one.")
        ranges = [where for where, dimension in _named(self.space) if isinstance(dimension, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"{ranges[0]} is a range, and sweep.search=grid needs lists. List its values, or set sweep.search to "
                f"random or tpe."
            )
        if self.search == "grid" and self.trials is not None:
            raise ValueError(f"sweep.trials={self.trials} with sweep.search=grid: a grid has its own number of points.")
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"sweep.trials is missing: sweep.search={self.search} has no end of its own. Set it.")
        if self.search == "random" and self.trials and self.trials > (number := self._combinations()):
            raise ValueError(
                f"sweep.trials={self.trials} with sweep.search=random: sweep.space has {number:.0f} combinations, and "
                f"each is tried once. Use fewer trials, or sweep.search=grid."
            )
        if self.objectives[0] != "loss" or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"sweep.objectives={list(self.objectives)} must begin with loss and name each once.")
        if len(self.objectives) > 1 and self.search != "tpe":
            raise ValueError(f"sweep.objectives={list(self.objectives)} matter to sweep.search=tpe only. Remove it.")
        if self.population and (rows := [name for name, d in self.space.items() if is_rows(d)]):
            raise ValueError(
                f"sweep.population moves single settings a step, and sweep.space.{rows[0]} has rows of whole sections. "
                f"Remove sweep.population, or give lists and ranges in place of rows."
            )
        if self.population and (self.halving or self.search == "tpe"):
            raise ValueError(
                "sweep.population chooses who goes on by itself, from points of grid or random search: remove "
                f"{'sweep.halving' if self.halving else 'sweep.search=tpe'}, or it."
            )
        if len(self.objectives) > 1 and self.halving:
            raise ValueError("sweep.halving compares by loss alone: give one objective, or remove it.")
        return self

    @property
    def num_points(self) -> int:
        """How many will be tried, unless a budget ends the sweep before."""
        return int(min(self._combinations(), self.trials or math.inf))

    def all_points(self) -> Iterator[Settings]:
        """All there are, of lists and whole numbers; nothing if a range has values without end."""
        if math.isinf(self._combinations()):
            return
        for plain in branches(self.space):
            values = [d if isinstance(d, tuple) else range(int(d.min), int(d.max) + 1) for d in plain.values()]
            for point in product(*values):
                yield dict(zip(plain, point, strict=True))

    def _combinations(self) -> float:
        return sum(num_combinations(plain) for plain in branches(self.space))

    def rows(self, settings: Settings) -> dict[str, Row]:
        """By section: those that a point has chosen."""
        return {name: row_of(d, settings[name]) for name, d in self.space.items() if is_rows(d)}


def _named(space: dict[str, Dimension]) -> Iterator[tuple[str, Plain]]:
    """All lists and ranges, those of rows too, with where they are."""
    for name, dimension in space.items():
        if is_rows(dimension):
            yield from ((f"sweep.space.{name} row {r.name!r}, {k},", d) for r in dimension for k, d in r.space.items())
        else:
            yield f"sweep.space.{name}", dimension


@dataclass(frozen=True)
class Sweep:
    name: str
    storage: str
    """Its folder: <storage of the config>/<name>. Its runs lie in it."""
    spec: SweepConfig
    base: dict[str, Any]
    """A run's config, as a mapping."""
    rungs: tuple[int, ...]
    """Finished updates at which points can be compared: cycle ends that all have in common. The last is the end."""

    @property
    def points(self) -> list[Settings]:
        """All of a grid or of a random search, by number; none of a search that chooses as it goes."""
        return _points(self.spec)

    @property
    def possible_points(self) -> list[Settings]:
        """The points; where points are chosen as it goes, what they may come to besides: lists and ends of ranges in
        all combinations, and every value of a range of whole numbers with one of them."""
        return _possible_points(self.spec)

    @property
    def stops(self) -> list[tuple[int, int]]:
        """Rungs, from 1, where points are compared while the sweep goes on, and their steps; the last is the end."""
        wanted = len(self.rungs)
        numbers = {wanted}
        if self.spec.halving:
            number = self.spec.halving.first_rung
            while number < wanted:
                numbers.add(number)
                number *= self.spec.halving.factor
        if self.spec.population:
            numbers |= set(range(self.spec.population.every_rungs, wanted, self.spec.population.every_rungs))
        return [(number, self.rungs[number - 1]) for number in sorted(numbers)]

    @property
    def first_run(self) -> RunConfig:
        """One of its runs: they need the same machines, data and storage."""
        return self.config(0, self.possible_points[0], self.spec.seeds[0])

    @property
    def cluster(self) -> ClusterConfig:
        """A run's, with the workers of as many points as are trained at a time."""
        run = self.first_run.cluster
        return run.model_copy(update={"workers": run.workers * self.spec.concurrent})

    def plan(self) -> Iterator[str]:
        """What will be trained, as lines of text."""
        spec = self.spec
        seeds = ", ".join(map(str, spec.seeds))
        yield f"sweep {self.name}: {spec.num_points} points of {spec.search} search, seeds {seeds}"
        for name, dimension in spec.space.items():
            yield f"  {name}: {_described(dimension)}"
            for row in dimension if is_rows(dimension) else ():
                parts = [f"{k.removeprefix(f'{name}.')}={short_value(v)}" for k, v in row.set.items()]
                parts += [f"{k.removeprefix(f'{name}.')}: {_described(d)}" for k, d in row.space.items()]
                yield f"    {row.name}: {'  '.join(parts)}"
        rungs = ", ".join(f"{step:,}" for _, step in self.stops)
        yield f"  compared after {rungs} updates, {spec.concurrent} point(s) at a time"

    def config(self, number: int, settings: Settings, seed: int) -> RunConfig:
        """Of one run. ConfigError, naming the point, if the settings do not fit."""
        return _config(self.spec, self.base, number, settings, seed)

    def settled(self, settings: Settings) -> dict[str, Any]:
        """The config, as a mapping, that a point's settings make of the sweep's own."""
        return settled(self.spec, self.base, settings)


def is_sweep(path: str) -> bool:
    return "sweep" in parse_mapping(read_text(path), source=path)


def load_sweep(path: str, overrides: list[str] | None = None) -> Sweep:
    """Raises ConfigError: for a mistake in the space, and for every point that is none."""
    raw = parse_mapping(read_text(path), overrides, source=path)
    spec = _spec(raw.pop("sweep"))
    for name in (override.partition("=")[0].lstrip("~") for override in overrides or []):
        if where := _decided_by(spec, name):
            raise ConfigError(
                f"{name} is searched by the sweep: {where} gives its values, and {name}=... has no effect."
            )
    possible = _possible_points(spec)
    # What every point starts from must itself be a run; with rows of a section it need not be one without them.
    plain = None if spec.rows(possible[0]) else check(raw)
    configs = _all_configs(spec, raw, possible)
    plain = plain or _checked(spec, raw, possible[0])
    rungs = _rungs(configs)
    if spec.max_gpu_hours and not plain.cluster.gpus_per_worker:
        raise ConfigError(
            f"sweep.max_gpu_hours={spec.max_gpu_hours:g} with cluster.gpus_per_worker=0 would never end the sweep. Use "
            f"sweep.max_hours or sweep.max_tokens."
        )
    needed = {"halving.first_rung": spec.halving and spec.halving.first_rung,
              "population.every_rungs": spec.population and spec.population.every_rungs}  # fmt: skip
    for name, first in needed.items():
        if first and len(rungs) < first + 1:
            without = next((c.method.kind for c in configs if not c.method.cycles(c.steps)), None)
            fix = "Use cycle lengths that are multiples of each other"
            if without:
                fix = f"Remove sweep.{name.partition('.')[0]}: method.kind={without} has no cycles"
            raise ConfigError(
                f"sweep.{name}={first} needs more cycle ends that all points have in common; they have "
                f"{', '.join(map(str, rungs))}. {fix}."
            )
    return Sweep(plain.name, f"{plain.storage}/{plain.name}", spec, raw, rungs)


def _decided_by(spec: SweepConfig, name: str) -> str:
    """Which part of the space gives a key its values, if one does, whatever the config says of it; or ""."""
    name = SHORT.get(name, name)
    for section, dimension in spec.space.items():
        if not is_rows(dimension):
            if SHORT.get(section, section) == name:
                return "sweep.space"
            continue
        givers = [row for row in dimension if name in {SHORT.get(key, key) for key in (*row.set, *row.space)}]
        if len(givers) == len(dimension):
            return f"every row of sweep.space.{section}"
        if givers:  # it would count for some rows only, which nobody sees
            return f"sweep.space.{section} row {givers[0].name!r}"
    return ""


def _all_configs(spec: SweepConfig, raw: dict[str, Any], points: Sequence[Settings]) -> list[RunConfig]:
    """Of all points. ConfigError: with rows the first mistake in each combination of them, else the first of all."""
    found, problems = [], dict[str, ConfigError]()
    for number, settings in enumerate(points):
        try:
            found.append(_config(spec, raw, number, settings, spec.seeds[0]))
        except ConfigError as error:
            rows = {name: row.name for name, row in spec.rows(settings).items()}
            if not rows:
                raise
            problems.setdefault(json.dumps(rows), error)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(str(error) for error in problems.values())))
    return found


def _spec(raw: Any) -> SweepConfig:
    if not isinstance(raw, dict):
        raise ConfigError("sweep is no section. Write it as sweep: {space: {method.lora_rank: [4, 16]}}.")
    unknown = [
        f"unknown key sweep.{key}={value!r}.{nearest(str(key), list(SweepConfig.model_fields))}"
        for key, value in raw.items()
        if key not in SweepConfig.model_fields
    ]
    if "space" not in raw:
        raise ConfigError("\n".join([*unknown, "sweep.space is missing: it says what is tried, by key."]))
    try:
        raw = raw | {"space": read_space(raw["space"])}
    except ConfigError as error:
        raise ConfigError("\n".join([*unknown, str(error)])) from None
    lines = list(unknown)
    try:
        spec = SweepConfig.model_validate({k: v for k, v in raw.items() if k in SweepConfig.model_fields})
    except ValidationError as error:
        lines += [line for detail in error.errors() for line in explain(detail, at=SweepConfig, prefix="sweep")]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return spec


def _points(spec: SweepConfig) -> list[Settings]:
    if spec.search == "grid":
        return _combinations([{n: _listed(d) for n, d in plain.items()} for plain in branches(spec.space)])
    if spec.search == "random":
        assert spec.trials is not None
        chosen: dict[str, Settings] = {}
        for number in range(spec.trials):
            attempts = (drawn(spec, number, attempt) for attempt in count())
            found = next(point for point in attempts if json.dumps(point) not in chosen)
            chosen[json.dumps(found)] = found
        return list(chosen.values())
    return []


def _possible_points(spec: SweepConfig) -> list[Settings]:
    points = _points(spec)
    if spec.search != "tpe" and not spec.population:
        return points
    parts = list(branches(spec.space))
    ends = [{n: d if isinstance(d, tuple) else (d.at(0.0), d.at(1.0)) for n, d in plain.items()} for plain in parts]
    between = [
        {n: values[0] for n, values in corner.items()} | {name: value}
        for plain, corner in zip(parts, ends, strict=True)
        for name, d in plain.items()
        if isinstance(d, Range) and d.whole
        for value in range(int(d.min) + 1, min(int(d.max), int(d.min) + MAX_POINTS))
    ]
    return list({json.dumps(point): point for point in points + _combinations(ends) + between}.values())


def _combinations(parts: Sequence[dict[str, tuple[Value, ...]]]) -> list[Settings]:
    if (number := sum(math.prod(map(len, values.values())) for values in parts)) > MAX_POINTS:
        raise ConfigError(f"sweep.space has {number:,} combinations, more than {MAX_POINTS:,}. Shorten its lists.")
    return [dict(zip(values, point, strict=True)) for values in parts for point in product(*values.values())]


def _listed(dimension: Plain) -> tuple[Value, ...]:
    assert isinstance(dimension, tuple)
    return dimension


def drawn(spec: SweepConfig, number: int, attempt: int) -> Settings:
    """One of all there are, at random: a pure function."""

    def draw(identity: str, _: str, dimension: Plain) -> Value:
        generator = random.Random(key(spec.seed, "sweep", number, identity, *([attempt] if attempt else [])))
        return generator.choice(dimension) if isinstance(dimension, tuple) else dimension.at(generator.random())

    return walk(spec.space, draw)


def _config(spec: SweepConfig, base: dict[str, Any], number: int, settings: Settings, seed: int) -> RunConfig:
    name, storage = base.get("name"), base.get("storage", "runs")
    cluster = base.get("cluster") or {}
    # All points at the same speed: none trains with fewer workers while it waits for others.
    own = {"seed": seed, "name": run_name(number, seed), "storage": f"{storage}/{name}"}
    return _checked(spec, base, settings, own | {"cluster": cluster | {"min_workers": cluster.get("workers", 1)}})


def _checked(
    spec: SweepConfig, base: dict[str, Any], settings: Settings, own: dict[str, Any] | None = None
) -> RunConfig:
    """The config of a point. ConfigError, behind the names of its rows or the point's settings."""
    rows = spec.rows(settings)
    try:
        return check(settled(spec, base, settings) | (own or {}))
    except (ConfigError, ValueError) as error:
        named = " with ".join(f"sweep.space.{name} row {row.name!r}" for name, row in rows.items())
        if not named:
            raise ConfigError(f"the point {text(settings)} is no run: {error}") from error
        others = {k: v for k, v in settings.items() if k not in rows}
        where = named + (f", {text(others)}" if others else "")
        raise ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error


def settled(spec: SweepConfig, base: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A copy of a run's config, as a mapping, with a point's rows and values put in. ValueError if one is put
    below what is no section."""
    raw, rows = copy.deepcopy(base), spec.rows(settings)
    for row in rows.values():
        put(raw, {name: value for name, value in row.set.items() if value is not None})
        for name in (name for name, value in row.set.items() if value is None):
            drop(raw, name)
    put(raw, {name: value for name, value in settings.items() if name not in rows})
    return raw


def _described(dimension: Dimension) -> str:
    if is_rows(dimension):
        return ", ".join(row.name for row in dimension)
    if isinstance(dimension, Range):
        kinds = [name for name in ("log", "whole") if getattr(dimension, name)]
        return f"{dimension.min:g} to {dimension.max:g}{' (' + ', '.join(kinds) + ')' if kinds else ''}"
    return ", ".join(map(short_value, dimension))


WARM = "warm-"
"""How the names of runs begin that train a warm start for others."""


def run_name(number: int, seed: int) -> str:
    return f"{number:04d}-seed{seed}"


def text(settings: Settings) -> str:
    """`lora_rank=4 learning_rate=0.001`."""
    return " ".join(f"{name.rpartition('.')[2]}={short_value(value)}" for name, value in settings.items())


def short_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rungs(configs: list[RunConfig]) -> tuple[int, ...]:
    """Cycle ends that all that have cycles have in common, or the end alone. What has none can be compared anywhere."""
    lengths = sorted({(cfg.steps, cfg.tokens_per_step) for cfg in configs})
    if len(lengths) > 1:
        shown = ", ".join(f"{steps} updates of {tokens} tokens" for steps, tokens in lengths[:3])
        raise ConfigError(
            f"sweep.space gives runs of different lengths: {shown}. At unequal tokens they cannot be compared. Remove "
            f"from it what changes them."
        )
    if not (cycles := [set(_comparable(cfg)) for cfg in configs if cfg.merges]):
        return (configs[0].steps,)
    return tuple(sorted(set.intersection(*cycles)))


def _comparable(cfg: RunConfig) -> Iterator[int]:
    yield cfg.steps
    yield from cfg.merges
