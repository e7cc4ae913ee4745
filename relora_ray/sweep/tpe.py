"""Optuna's Tree-structured Parzen Estimator as a pure function: the next point from the ones that are done."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

from relora_ray.errors import ConfigError
from relora_ray.keyed import key
from relora_ray.sweep.dimension import Plain, Range, Settings, Value, walk
from relora_ray.sweep.results import Point
from relora_ray.sweep.space import SweepConfig, drawn

LARGER_IS_BETTER = ("tokens_per_s",)


def import_optuna() -> Any:
    """ConfigError if it is not installed: call it before anything is spent."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep.search=tpe needs Optuna: pip install 'relora-ray[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def suggest(spec: SweepConfig, number: int, points: Sequence[Point]) -> Settings | None:
    """The settings of point `number`, which no other has; None if all there are have been tried. `points`: the others,
    whatever has become of them.

    Those under way count as bad ones (the constant liar), or points that run beside each other would be much alike.
    Those that failed or were halved say nothing here, and those that diverged that their like is to be left alone.
    """
    tried = {json.dumps(p.settings, sort_keys=True) for p in points}

    def is_new(settings: Settings) -> bool:
        return json.dumps(settings, sort_keys=True) not in tried

    for attempt in range(_NUM_TRIES):
        settings = _asked(spec, (number, attempt) if attempt else (number,), points)
        if is_new(settings):
            return settings
    # It clings to one of the few values there are: any other is worth more than the same again.
    for attempt in range(_NUM_TRIES):
        if is_new(settings := drawn(spec, number, attempt)):
            return settings
    return next(filter(is_new, spec.all_points()), None)


_NUM_TRIES = 20


def _asked(spec: SweepConfig, parts: tuple[int, ...], points: Sequence[Point]) -> Settings:
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=key(spec.seed, "tpe", *parts) % 2**32, constant_liar=True)
    directions = ["maximize" if name in LARGER_IS_BETTER else "minimize" for name in spec.objectives]
    study = optuna.create_study(sampler=sampler, directions=directions)
    for point in sorted(points, key=lambda p: p.number):
        known = _as_trial(optuna, spec, point.settings)
        if point.state == "begun":
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, **known))
        elif values := _values(spec, point):
            study.add_trial(optuna.trial.create_trial(values=values, **known))
    asked = study.ask()

    def choose(identity: str, _: str, dimension: Plain) -> Value:
        return _plain(_suggested(asked, identity, dimension))

    return walk(spec.space, choose)


def _as_trial(optuna: Any, spec: SweepConfig, settings: Settings) -> dict[str, Any]:
    """A point's values, by the ids of what it has: a row's own keys are none of another's."""
    params, distributions = dict[str, Any](), dict[str, Any]()

    def known(identity: str, name: str, dimension: Plain) -> Value:
        params[identity], distributions[identity] = settings[name], _distribution(optuna, dimension)
        return settings[name]

    walk(spec.space, known)
    return {"params": params, "distributions": distributions}


def _suggested(trial: Any, identity: str, dimension: Plain) -> Any:
    if not isinstance(dimension, Range):
        return trial.suggest_categorical(identity, dimension)
    if dimension.whole:
        return trial.suggest_int(identity, int(dimension.min), int(dimension.max), log=dimension.log)
    return trial.suggest_float(identity, dimension.min, dimension.max, log=dimension.log)


def _values(spec: SweepConfig, point: Point) -> list[float]:
    if point.state == "diverged":
        return [0.0 if name in LARGER_IS_BETTER else 1e9 for name in spec.objectives]
    if point.state != "done":
        return []
    values = [point.loss() if name == "loss" else point.mean(name) for name in spec.objectives]
    return values if all(map(math.isfinite, values)) else []


def _distribution(optuna: Any, dimension: Plain) -> Any:
    if not isinstance(dimension, Range):
        return optuna.distributions.CategoricalDistribution(dimension)
    if dimension.whole:
        return optuna.distributions.IntDistribution(int(dimension.min), int(dimension.max), log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.min, dimension.max, log=dimension.log)


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
