"""Learning rates as functions of the step, against the published formula written out in the conformance suite."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.conformance.layer_checks import published_jagged_cosine
from relora_ray.modeling.schedule import lr_multiplier, restart_step
from tests.tiny import TINY


def config(*overrides: str) -> RunConfig:
    return parse_config(TINY, list(overrides))


@pytest.mark.parametrize(
    ("every", "cycles", "warmup", "rewarm", "floor"), list(product((20, 50), (2, 5), (0, 7, 20), (1, 9), (0.0, 0.1)))
)
def test_jagged_cosine_is_the_published_one(every: int, cycles: int, warmup: int, rewarm: int, floor: float) -> None:
    total = every * cycles
    cfg = config(
        f"steps={total}", "method.warm_start_steps=0", f"method.merge_every_steps={every}",
        f"schedule.warmup_steps={warmup}", f"schedule.restart_warmup_steps={rewarm}", f"schedule.min_lr_ratio={floor}",
    )  # fmt: skip
    for step in range(total):
        expected = published_jagged_cosine(step, total, warmup, every, rewarm, floor)
        assert lr_multiplier(step, cfg) == pytest.approx(expected, abs=1e-12)


def test_restarts_fall_on_boundaries_after_a_warm_start() -> None:
    cfg = config("steps=50", "method.warm_start_steps=20", "method.merge_every_steps=10")
    assert [s for s in range(50) if restart_step(s, cfg) == s] == [0, 20, 30, 40]
    assert [s for s in range(50) if lr_multiplier(s, cfg) == 0] == [0, 20, 30, 40]


def test_restart_period_may_skip_merges() -> None:
    cfg = config(
        "steps=43", "method.warm_start_steps=3", "method.merge_every_steps=10", "schedule.restart_every_steps=20"
    )
    assert [s for s in range(43) if restart_step(s, cfg) == s] == [0, 3, 23]


def test_warm_start_has_its_own_level() -> None:
    plain, lower = config(), config("method.warm_start_lr_ratio=0.5")
    for step in range(12):
        factor = 0.5 if step < 3 else 1.0
        assert lr_multiplier(step, lower) == factor * lr_multiplier(step, plain)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_plain_schedules_warm_up_and_end_where_they_should(kind: str) -> None:
    cfg = config(
        f"schedule.kind={kind}", "steps=102", "schedule.warmup_steps=10", "schedule.restart_warmup_steps=0",
        f"schedule.min_lr_ratio={0.1 if kind == 'constant' else 0.2}",
    )  # fmt: skip
    values = [lr_multiplier(s, cfg) for s in range(103)]
    assert values[0] == 0
    assert values[5] == pytest.approx(0.5)
    assert values[10] == pytest.approx(1.0)
    assert values[102] == pytest.approx(1.0 if kind == "constant" else 0.2)
    middle = {"constant": 1.0, "linear": 0.6, "cosine": 0.6}[kind]
    assert values[56] == pytest.approx(middle)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_cosine_cycles_go_round_once_per_cycle() -> None:
    cfg = config(
        "schedule.kind=cosine_cycles", "steps=70", "method.warm_start_steps=10", "method.merge_every_steps=20",
        "schedule.warmup_steps=2", "schedule.restart_warmup_steps=4", "schedule.min_lr_ratio=0",
    )  # fmt: skip
    values = [lr_multiplier(s, cfg) for s in range(70)]
    assert [s for s in range(70) if values[s] == 0] == [0, 10, 30, 50]
    assert [s for s in range(70) if values[s] == 1] == [2, 14, 34, 54]
    assert values[30:50] == values[50:70]
    assert values[9] < 0.05


def test_cycles_may_change_their_length() -> None:
    cfg = config("steps=63", "method.warm_start_steps=3", "method.merge_every_steps={0: 10, 23: 20}")
    assert cfg.merges == (13, 23, 43, 63)
    assert [s for s in range(63) if restart_step(s, cfg) == s] == [0, 3, 13, 23, 43]
    assert [s for s in range(63) if lr_multiplier(s, cfg) == 0] == [0, 3, 13, 23, 43]
    around = config(
        "steps=63", "method.warm_start_steps=3", "method.merge_every_steps={0: 10, 23: 20}",
        "schedule.kind=cosine_cycles", "schedule.min_lr_ratio=0",
    )  # fmt: skip
    for start, end in ((3, 13), (23, 43)):
        halfway = start + 1 + (end - start - 1) / 2
        assert lr_multiplier(int(halfway), around) == pytest.approx(0.5, abs=0.1), (start, end)
        assert lr_multiplier(end - 1, around) < 0.05


def test_equal_cycles_are_the_same_however_they_are_written() -> None:
    plain, planned = config("steps=33"), config("steps=33", "method.merge_every_steps={0: 3}")
    assert plain.merges == planned.merges == tuple(range(6, 34, 3))
    assert [lr_multiplier(s, plain) for s in range(33)] == [lr_multiplier(s, planned) for s in range(33)]
