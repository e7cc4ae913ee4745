"""Who is replaced in a population, and by what: pure functions of the records."""

from __future__ import annotations

import random
from pathlib import Path

from relora_ray.sweep.dimension import Range
from relora_ray.sweep.population import _moved, replacements
from relora_ray.sweep.results import Point
from relora_ray.sweep.space import SweepConfig
from tests.sweep.test_results import point
from tests.sweep.test_space import sweep

RANKS = [2, 4, 8, 16, 32]
SPACE = {"method.lora_rank": RANKS, "optimizer.learning_rate": {"min": 1e-3, "max": 1e-1, "log": True}}


def spec(tmp_path: Path) -> SweepConfig:
    return sweep(tmp_path, "method.merge_every_steps=3", space=SPACE, search="random", trials=8, population={}).spec


def member(number: int, loss: float) -> Point:
    made = point(number, loss, state="begun", step=6)
    made.settings = {"method.lora_rank": 8, "optimizer.learning_rate": 1e-2 + number * 1e-3}
    return made


def test_a_quarter_is_replaced_by_forks_of_the_best_quarter(tmp_path: Path) -> None:
    members = [member(n, loss) for n, loss in enumerate((3.0, 1.0, 2.0, 2.1, 9.0, 2.2, 1.1, 4.0))]
    found = replacements(spec(tmp_path), members, 0, 6)
    assert found.keys() == {4, 7}
    assert [found[n].number for n in (4, 7)] == [12, 15]
    for child in found.values():
        assert child.parent in (1, 6)
        assert child.forked_at == 6
        assert child.state == "begun"
        parent = members[child.parent].settings
        assert child.settings["method.lora_rank"] in (4, 8, 16)
        ratio = float(child.settings["optimizer.learning_rate"]) / float(parent["optimizer.learning_rate"])
        assert min(abs(ratio - r) for r in (0.8, 1.0, 1.25)) < 1e-4
    assert replacements(spec(tmp_path), members, 0, 6) == found
    assert {p.number for p in replacements(spec(tmp_path), members, 1, 6).values()} == {20, 23}


def test_who_diverged_is_replaced_besides(tmp_path: Path) -> None:
    members = [member(n, float(n + 1)) for n in range(8)]
    members[0].losses, members[0].state = {}, "diverged"
    assert replacements(spec(tmp_path), members, 0, 6).keys() == {0, 6, 7}
    for each in members:
        each.losses = {}
    assert replacements(spec(tmp_path), members, 0, 6) == {}


def test_what_became_of_a_member_later_does_not_change_the_decision(tmp_path: Path) -> None:
    members = [member(n, float(n + 1)) for n in range(8)]
    before = replacements(spec(tmp_path), members, 0, 6)
    members[0].losses[9], members[0].state = {1: 0.5, 2: 0.5}, "diverged"
    members[7].state = "replaced"
    assert replacements(spec(tmp_path), members, 0, 6) == before


def test_who_failed_is_replaced_besides(tmp_path: Path) -> None:
    """It came to no rung, and no later start may find its place empty."""
    members = [member(n, float(n + 1)) for n in range(8)]
    members[2].losses, members[2].state = {}, "failed"
    assert replacements(spec(tmp_path), members, 0, 6).keys() == {2, 6, 7}


def test_whole_number_moves_though_the_factor_is_small() -> None:
    moved = {_moved(Range(min=1, max=8, whole=True), 2, 1.1, random.Random(n)) for n in range(40)}
    assert moved == {1, 2, 3}


def test_every_rung_counts(tmp_path: Path) -> None:
    found = sweep(tmp_path, "method.merge_every_steps=3", space=SPACE, search="random", trials=8, population={})
    assert found.stops == [(1, 6), (2, 9), (3, 12)]
