"""Optuna's choice as a pure function of the records."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from relora_ray.sweep.dimension import Settings
from relora_ray.sweep.results import Point
from relora_ray.sweep.space import SweepConfig
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


def listed(tmp_path: Path, ranks: list[int], **more: object) -> SweepConfig:
    space = {"method.lora_rank": ranks, "schedule.warmup_steps": {"min": 1, "max": 3, "whole": True}}
    return sweep(tmp_path, space=space, search="tpe", trials=60, **more).spec


def test_nothing_is_tried_twice_and_the_search_ends_when_all_is_tried(tmp_path: Path) -> None:
    one, points = listed(tmp_path, [2, 4, 8, 16]), list[Point]()
    while (settings := suggest(one, len(points), points)) is not None:
        points.append(done(len(points), settings, float(settings["method.lora_rank"])))
        points[-1].state = ("done", "failed", "halved", "diverged", "begun")[len(points) % 5]
        assert len(points) <= 12
    tried = {(p.settings["method.lora_rank"], p.settings["schedule.warmup_steps"]) for p in points}
    assert len(tried) == len(points) == one.num_points == 12


def test_points_under_way_keep_others_from_their_place(tmp_path: Path) -> None:
    """Twelve that were asked for at once, after the same records, against one after the other's end."""
    points = [done(n, suggest(spec(tmp_path), n, []) or {}, 0.0) for n in range(20)]
    for one in points:
        one.losses = {12: {1: loss(one.settings)}}

    def spread(state: str) -> float:
        found = list(points)
        for number in range(20, 32):
            found.append(done(number, suggest(spec(tmp_path), number, found) or {}, 0.0))
            found[-1].state = state
        rates = [math.log(float(p.settings["optimizer.learning_rate"])) for p in found[20:]]
        return statistics.stdev(rates)

    assert spread("begun") > 1.3 * spread("failed"), "failed ones say nothing, as those under way did"


def test_two_objectives(tmp_path: Path) -> None:
    both = spec(tmp_path, objectives=["loss", "tokens_per_s"])
    points = [done(n, suggest(both, n, []), 1.0 + n) for n in range(12)]
    assert suggest(both, 12, points).keys() == SPACE.keys()
