"""Optuna's choice as a pure function of the records."""

from __future__ import annotations

from pathlib import Path

from relora_ray.sweep.results import Point
from relora_ray.sweep.space import Settings, SweepConfig
from relora_ray.sweep.tpe import suggest
from tests.sweep.test_results import point
from tests.sweep.test_space import sweep

SPACE = {
    "method.lora_rank": [2, 4, 8, 16],
    "optimizer.learning_rate": {"min": 1e-4, "max": 1e-1, "log": True},
}


def spec(tmp_path: Path, **more: object) -> SweepConfig:
    return sweep(tmp_path, space=SPACE, search="tpe", trials=60, **more).spec


def done(number: int, settings: Settings, loss: float) -> Point:
    made = point(number, loss)
    made.settings = settings
    return made


def loss(settings: Settings) -> float:
    """Best at rank 8 and 1e-2."""
    rate = float(settings["optimizer.learning_rate"])
    return abs(float(settings["method.lora_rank"]) - 8) / 8 + abs(rate - 1e-2) / 1e-2


def test_same_records_give_the_same_point(tmp_path: Path) -> None:
    points = [done(n, suggest(spec(tmp_path), n, []), 1.0 + n) for n in range(12)]
    first = suggest(spec(tmp_path), 12, points)
    assert first == suggest(spec(tmp_path), 12, list(reversed(points)))
    assert first != suggest(spec(tmp_path), 13, points)
    assert first["method.lora_rank"] in SPACE["method.lora_rank"]


def test_search_comes_near_the_best(tmp_path: Path) -> None:
    points: list[Point] = []
    for number in range(40):
        settings = suggest(spec(tmp_path), number, points)
        points.append(done(number, settings, loss(settings)))
    late = [p for p in points[25:] if p.settings["method.lora_rank"] == 8]
    assert len(late) > 5, "by chance it would be a quarter of 15"
    assert min(loss(p.settings) for p in points) < 0.3


def test_failed_points_say_nothing_and_diverged_ones_that_it_is_bad_there(tmp_path: Path) -> None:
    good = [done(n, suggest(spec(tmp_path), n, []), 1.0) for n in range(12)]
    failed = done(12, good[0].settings, 5.0)
    failed.state = "failed"
    assert suggest(spec(tmp_path), 20, [*good, failed]) == suggest(spec(tmp_path), 20, good)
    diverged = done(12, good[0].settings, 5.0)
    diverged.state = "diverged"
    suggest(spec(tmp_path), 20, [*good, diverged])


def test_two_objectives(tmp_path: Path) -> None:
    both = spec(tmp_path, objectives=["loss", "tokens_per_s"])
    points = [done(n, suggest(both, n, []), 1.0 + n) for n in range(12)]
    assert suggest(both, 12, points).keys() == SPACE.keys()
