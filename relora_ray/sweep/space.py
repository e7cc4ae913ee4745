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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import count, product
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from relora_ray.config import RunConfig, Section, nearest
from relora_ray.config_file import check, parse_mapping, read_text
from relora_ray.errors import ConfigError
from relora_ray.keyed import key

Value = int | float | str | bool
Settings = dict[str, Value]
"""One point: values by dotted key."""

MAX_POINTS = 10_000
DECIDED = (
    "name", "storage", "storage_options", "seed", "train.stop_after_steps", "train.eval_", "cluster.", "checkpoint.",
    "data.path", "data.fingerprint",
)  # fmt: skip
"""Keys that a sweep sets itself, that make no difference to a result, or that decide how points are compared."""


class Range(Section):
    min: float
    max: float
    log: bool = False
    """Uniform in the logarithm."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.min < self.max:
            raise ValueError(f"min={self.min:g} is not less than max={self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"min={self.min:g} with log: true must be above 0")
        if self.whole and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError(f"min={self.min:g} and max={self.max:g} with whole: true must be whole numbers")
        return self

    def at(self, share: float) -> int | float:
        """From `min` at 0 to `max` at 1."""
        if self.log:
            value = math.exp(math.log(self.min) + share * (math.log(self.max) - math.log(self.min)))
        else:
            value = self.min + share * (self.max - self.min)
            if self.whole:  # each equally often, the ends too
                value = math.floor(self.min + share * (self.max - self.min + 1))
        return self.nearest(value)

    def nearest(self, value: float) -> int | float:
        """What is in the range; with six digits."""
        value = min(max(value, self.min), self.max)
        return round(value) if self.whole else float(f"{value:.6g}")


Dimension = Annotated[tuple[Value, ...], Field(min_length=1)] | Range


class Halving(Section):
    """Asynchronous successive halving (ASHA, Li et al. 2018): of the points that have come to a rung only the best
    1 / `factor` go on. Rungs are cycle ends that all points have in common, the first, and then every `factor` times as
    many cycles."""

    factor: int = Field(2, ge=2)
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


class SweepConfig(Section):
    space: dict[str, Dimension] = Field(min_length=1)
    """By dotted key of the run's config: a list of values, or {min, max, log, whole}."""
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
        for name, values in (("seeds", self.seeds), *((f"space.{k}", v) for k, v in self.space.items())):
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"sweep.{name}={list(values)} has a value twice: every run counts once. Remove one.")
        for name in self.space:
            if name.startswith(DECIDED):
                raise ValueError(f"sweep.space.{name} is not for a sweep to search. Remove it.")
        ranges = [name for name, dimension in self.space.items() if isinstance(dimension, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"sweep.space.{ranges[0]} is a range, and sweep.search=grid needs lists. List its values, or set "
                f"sweep.search to random or tpe."
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
        values = [d if isinstance(d, tuple) else range(int(d.min), int(d.max) + 1) for d in self.space.values()]
        for point in product(*values):
            yield dict(zip(self.space, point, strict=True))

    def _combinations(self) -> float:
        return math.prod(
            len(d) if isinstance(d, tuple) else d.max - d.min + 1 if d.whole else math.inf for d in self.space.values()
        )


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

    def plan(self) -> Iterator[str]:
        """What will be trained, as lines of text."""
        spec = self.spec
        seeds = ", ".join(map(str, spec.seeds))
        yield f"sweep {self.name}: {spec.num_points} points of {spec.search} search, seeds {seeds}"
        for name, dimension in spec.space.items():
            yield f"  {name}: {_described(dimension)}"
        rungs = ", ".join(f"{step:,}" for _, step in self.stops)
        yield f"  compared after {rungs} updates, {spec.concurrent} point(s) at a time"

    def config(self, number: int, settings: Settings, seed: int) -> RunConfig:
        """Of one run. ConfigError, naming the point, if the settings do not fit."""
        return _config(self.base, number, settings, seed)


def is_sweep(path: str) -> bool:
    return "sweep" in parse_mapping(read_text(path), source=path)


def load_sweep(path: str, overrides: list[str] | None = None) -> Sweep:
    """Raises ConfigError: for a mistake in the space, and for every point that is none."""
    raw = parse_mapping(read_text(path), overrides, source=path)
    spec = _spec(raw.pop("sweep"))
    for name in (override.partition("=")[0] for override in overrides or []):
        if name in spec.space:
            raise ConfigError(
                f"{name} is searched by the sweep: sweep.space gives its values, and {name}=... has no effect."
            )
    plain = check(raw)  # what every point starts from must itself be a run
    configs = {json.dumps(s): _config(raw, n, s, spec.seeds[0]) for n, s in enumerate(_possible_points(spec))}
    rungs = _rungs(list(configs.values()))
    if spec.max_gpu_hours and not plain.cluster.gpus_per_worker:
        raise ConfigError(
            f"sweep.max_gpu_hours={spec.max_gpu_hours:g} with cluster.gpus_per_worker=0 would never end the sweep. Use "
            f"sweep.max_hours or sweep.max_tokens."
        )
    needed = {"halving.first_rung": spec.halving and spec.halving.first_rung,
              "population.every_rungs": spec.population and spec.population.every_rungs}  # fmt: skip
    for name, first in needed.items():
        if first and len(rungs) < first + 1:
            raise ConfigError(
                f"sweep.{name}={first} needs more cycle ends that all points have in common; they have "
                f"{', '.join(map(str, rungs))}. Use cycle lengths that are multiples of each other."
            )
    return Sweep(plain.name, f"{plain.storage}/{plain.name}", spec, raw, rungs)


def _spec(raw: Any) -> SweepConfig:
    try:
        return SweepConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            dotted = ".".join(["sweep", *map(str, detail["loc"])])
            if detail["type"] == "extra_forbidden":
                hint = nearest(str(detail["loc"][-1]), list(SweepConfig.model_fields))
                lines.append(f"unknown key {dotted}={detail['input']!r}.{hint}")
            elif detail["type"] == "value_error" and len(detail["loc"]) == 0:
                lines.append(detail["msg"].removeprefix("Value error, "))
            else:
                lines.append(f"{dotted}={detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _points(spec: SweepConfig) -> list[Settings]:
    if spec.search == "grid":
        return _combinations(spec, [_listed(dimension) for dimension in spec.space.values()])
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
    corners = _combinations(spec, [d if isinstance(d, tuple) else (d.at(0.0), d.at(1.0)) for d in spec.space.values()])
    between = [
        corners[0] | {name: value}
        for name, d in spec.space.items()
        if isinstance(d, Range) and d.whole
        for value in range(int(d.min) + 1, min(int(d.max), int(d.min) + MAX_POINTS))
    ]
    return list({json.dumps(point): point for point in points + corners + between}.values())


def _combinations(spec: SweepConfig, values: list[tuple[Value, ...]]) -> list[Settings]:
    if (number := math.prod(map(len, values))) > MAX_POINTS:
        raise ConfigError(f"sweep.space has {number:,} combinations, more than {MAX_POINTS:,}. Shorten its lists.")
    return [dict(zip(spec.space, point, strict=True)) for point in product(*values)]


def _listed(dimension: Dimension) -> tuple[Value, ...]:
    assert isinstance(dimension, tuple)
    return dimension


def drawn(spec: SweepConfig, number: int, attempt: int) -> Settings:
    """One of all there are, at random: a pure function."""
    point: Settings = {}
    for name, dimension in spec.space.items():
        generator = random.Random(key(spec.seed, "sweep", number, name, *([attempt] if attempt else [])))
        point[name] = generator.choice(dimension) if isinstance(dimension, tuple) else dimension.at(generator.random())
    return point


def _config(base: dict[str, Any], number: int, settings: Settings, seed: int) -> RunConfig:
    raw = with_settings(base, settings)
    raw |= {"seed": seed, "name": run_name(number, seed), "storage": f"{base.get('storage', 'runs')}/{base['name']}"}
    cluster = raw.get("cluster") or {}
    # All points at the same speed: none trains with fewer workers while it waits for others.
    raw["cluster"] = cluster | {"min_workers": cluster.get("workers", 1)}
    try:
        return check(raw)
    except ConfigError as error:
        raise ConfigError(f"the point {text(settings)} is no run: {error}") from error


def with_settings(base: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A copy of a run's config, as a mapping, with values put in by dotted key."""
    raw = copy.deepcopy(base)
    for dotted, value in settings.items():
        *sections, name = dotted.split(".")
        node = raw
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[name] = value
    return raw


def _described(dimension: Dimension) -> str:
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


def short_value(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rungs(configs: list[RunConfig]) -> tuple[int, ...]:
    """Cycle ends that all have in common, or the end alone."""
    lengths = sorted({(cfg.steps, cfg.tokens_per_step) for cfg in configs})
    if len(lengths) > 1:
        shown = ", ".join(f"{steps} updates of {tokens} tokens" for steps, tokens in lengths[:3])
        raise ConfigError(
            f"sweep.space gives runs of different lengths: {shown}. At unequal tokens they cannot be compared. Remove "
            f"from it what changes them."
        )
    common = reduce(lambda a, b: a & b, (set(_comparable(cfg)) for cfg in configs))
    return tuple(sorted(common))


def _comparable(cfg: RunConfig) -> Iterator[int]:
    yield cfg.steps
    yield from cfg.merges
