"""Rows of a sweep's space: named choices of whole sections, and what is refused of them, by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from relora_ray.errors import ConfigError
from relora_ray.sweep.space import load_sweep
from relora_ray.sweep.tpe import suggest
from tests.conftest import ROOT
from tests.sweep.test_results import point
from tests.sweep.test_space import sweep

PLAIN = {"schedule.kind": "cosine", "schedule.restart_warmup_steps": None}
"""What a method without cycles needs where the config's own schedule restarts."""
METHODS = [{"kind": "full", **PLAIN}, {"kind": "lora", "lora_rank": [2, 8], **PLAIN}, {"kind": "relora", "cycles": 3}]


def test_grid_of_methods_with_spaces_of_their_own(tmp_path: Path) -> None:
    found = sweep(tmp_path, space={"method": METHODS, "optimizer.learning_rate": [0.01, 0.02]})
    assert Counter(str(p["method"]) for p in found.points) == {"full": 2, "lora": 4, "relora": 2}
    assert found.points[2] == {"method": "lora", "method.lora_rank": 2, "optimizer.learning_rate": 0.01}
    assert found.spec.num_points == 8
    full, lora, relora = (found.config(n, found.points[n], 1) for n in (0, 4, 6))
    assert [cfg.method.kind for cfg in (full, lora, relora)] == ["full", "lora", "relora"]
    assert lora.settings()["method.lora_rank"] == 8
    assert lora.settings()["method.alpha"] == relora.settings()["method.alpha"] == 8, (
        "the config's own, which both have"
    )
    assert lora.warm_start_steps == 3
    assert (full.schedule.kind, relora.schedule.kind) == ("cosine", "jagged_cosine")
    assert relora.merges == (6, 9, 12)
    assert {cfg.steps for cfg in (full, lora, relora)} == {12}
    assert (
        "    lora: kind=lora  schedule.kind=cosine  schedule.restart_warmup_steps=None  lora_rank: 2, 8" in found.plan()
    )


def test_kind_that_means_something_else_by_a_key_takes_its_own_default(tmp_path: Path) -> None:
    """LoRA's alpha is a scale of 8 / rank here, GaLore's a factor of the step."""
    found = sweep(tmp_path, space={"method": [{"kind": "galore", "rank": 4, **PLAIN}]})
    assert found.config(0, found.points[0], 1).settings()["method.alpha"] == 0.25


def test_rows_of_other_sections_are_crossed(tmp_path: Path) -> None:
    found = sweep(tmp_path, space={
        "optimizer": [{"name": "slow", "learning_rate": 1e-3}, {"learning_rate": 1e-2, "beta2": 0.95}],
        "model": [{"num_layers": 1}, {"num_layers": 2}],
        "schedule": [{"kind": "jagged_cosine"}, {"kind": "cosine", "restart_warmup_steps": None}],
    })  # fmt: skip
    assert len(found.points) == 8
    assert {p["optimizer"] for p in found.points} == {"slow", "learning_rate=0.01-beta2=0.95"}
    assert {p["model"] for p in found.points} == {"num_layers=1", "num_layers=2"}
    assert {p["schedule"] for p in found.points} == {"jagged_cosine", "cosine"}
    assert found.config(7, found.points[7], 1).optimizer.beta2 == 0.95
    resets = sweep(tmp_path, space={"method.reset": [{"kind": "zero"}, {"kind": "magnitude", "ratio": [0.8, 0.9]}]})
    assert resets.config(2, resets.points[2], 1).settings()["method.reset.ratio"] == 0.9


def test_names_follow_from_what_differs(tmp_path: Path) -> None:
    rows = [{"kind": "relora", "lora_rank": 2}, {"kind": "relora", "lora_rank": 4}, {"kind": "lora", **PLAIN}]
    found = sweep(tmp_path, space={"method": rows})
    assert [p["method"] for p in found.points] == ["relora-lora_rank=2", "relora-lora_rank=4", "lora"]


def test_random_search_draws_rows_and_from_their_ranges(tmp_path: Path) -> None:
    rows = [{"kind": "relora", "lora_rank": {"min": 2, "max": 31, "whole": True}}, {"kind": "full", **PLAIN}]
    space = {"method": rows, "optimizer.learning_rate": {"min": 1e-4, "max": 1e-2, "log": True}}
    points = sweep(tmp_path, space=space, search="random", trials=40).points
    assert len({str(p) for p in points}) == 40
    assert 5 < Counter(p["method"] for p in points)["full"] < 35
    assert all(("method.lora_rank" in p) == (p["method"] == "relora") for p in points)


def test_tpe_learns_which_row_is_best(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"method": METHODS, "optimizer.learning_rate": {"min": 1e-4, "max": 1e-1, "log": True}}
    spec = sweep(tmp_path, space=space, search="tpe", trials=60).spec
    points = []
    for number in range(36):
        settings = suggest(spec, number, points)
        assert settings is not None
        assert settings == suggest(spec, number, points), "a pure function"
        loss = {"full": 3.0, "relora": 2.0}.get(str(settings["method"]), 1.0) + abs(
            float(settings["optimizer.learning_rate"]) - 1e-2
        )
        made = point(number, loss)
        made.settings = settings
        points.append(made)
    assert Counter(p.settings["method"] for p in points[20:])["lora"] > 8, "by chance it would be a third of 16"


def test_halving_compares_methods_without_cycles_where_the_others_cycles_end(tmp_path: Path) -> None:
    found = sweep(tmp_path, space={"method": METHODS}, halving={})
    assert found.rungs == (6, 9, 12)
    assert sweep(tmp_path, space={"method": METHODS[:2]}).rungs == (12,)


R = r"^sweep\.space\.method row"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"kind": "full"}], rf"{R} 'full': schedule.kind=jagged_cosine restarts with each cycle, and"),
        ([{"kind": "full", "lora_rank": 2, **PLAIN}], rf"{R} 'full': unknown key method.lora_rank=2. It belongs"),
        ([{"kind": "relora", "lora_rank": [2, 64]}], rf"{R} 'relora', lora_rank=64: method.lora_rank=64 is more"),
        ([{"kind": "relora", "cycles": 2}], rf"{R} 'relora': method.cycles=2 does not divide the 9 updates"),
        ([{"kind": "relora", "cycles": 3, "merge_every_steps": 3}], rf"{R} 'relora': method.cycles=3 and method"),
        ([{"kind": "rellora"}], rf"{R} 'rellora': method.kind='rellora' is not a method.*Did you mean 'relora'\?"),
        ([{"kind": "relora", "lora_rnk": 2}], rf"{R} 'relora': unknown key method.lora_rnk=2. Did you mean"),
        ([{"kind": "relora", "lora_rank": "many"}], rf"{R} 'relora': method.lora_rank='many' must be a whole"),
        ([{"kind": "relora", "lora_rank": []}], rf"{R} 'relora', method.lora_rank=\[\] has no value"),
        ([{"kind": "relora", "lora_rank": [2, 2]}], rf"{R} 'relora', method.lora_rank=\[2, 2\] has a value"),
        ([{"kind": "relora", "lora_rank": {"min": 2}}], rf"{R} 'relora', method.lora_rank has a range whose max"),
        ([{"kind": "relora", "alpha": {"min": 2, "max": 3}}], rf"{R} 'relora', method.alpha, is a range, and"),
        ([{"kind": "relora"}, {"kind": "relora"}], r"^sweep\.space\.method rows 1 and 2 are both 'relora'\. Give each"),
        ([{"kind": "relora"}, "lora"], rf"{R} 2 is 'lora', and not keys and values. Write it as"),
        (["full", "lora"], r"^sweep\.space\.method=\['full', 'lora'\]: method is a section. Write its"),
        ("full", r"^sweep\.space\.method='full' is one value, and nothing to choose from"),
        ([{"name": "a b", "kind": "relora"}], rf"{R} 1 has name='a b'. A name is letters"),
        ([{"name": "x"}], rf"{R} 'x' has no key besides its name"),
        ([{"kind": "relora", "train.eval_rows": 2}], rf"{R} 'relora' sets train.eval_rows, which is not for"),
        ([{"kind": "relora", "cluster": {"workers": 2}}], rf"{R} 'relora' sets cluster, which is not for"),
        ([{"kind": "relora", "steps": 15}, {"kind": "lora", **PLAIN}], "different lengths"),
    ],
)  # fmt: skip
def test_mistake_is_named_by_its_row(tmp_path: Path, rows: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sweep(tmp_path, space={"method": rows})
    assert "Input should" not in str(caught.value)
    assert ".full." not in str(caught.value)


def test_first_mistake_of_every_row_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, space={"method": [{"kind": "relora", "lora_rank": 64}, {"kind": "lora", "rank": 2}]})
    lines = str(caught.value).splitlines()
    assert [line.split("'")[1] for line in lines] == ["relora", "lora"]


@pytest.mark.parametrize(
    ("space", "spec", "message"),
    [
        ({"method": METHODS, "method.lora_rank": [2]}, {}, "row 'lora' both decide method.lora_rank. Keep it in one"),
        ({"method": [{"kind": "relora", "optimizer.beta1": 0.8}], "optimizer": [{"beta1": 0.9}]}, {}, "both decide"),
        ({"method.merge_every_steps": [3, 9], "method.cycles": [1, 3]}, {}, "both decide method.merge_every_steps"),
        ({"method": METHODS}, {"population": {}}, "sweep.space.method has rows of whole sections. Remove sweep.popul"),
        ({"method.lora_rank": [{"a": 1}]}, {}, "such rows are for whole sections: method, optimizer"),
        ({"method.lora_rank": 2}, {}, r"lora_rank=2 is one value, and nothing to choose from. List values, \[2, ...\]"),
        ({"lora_rank": [2]}, {}, "unknown key lora_rank=2. It is method.lora_rank."),
        ({}, {}, "sweep.space must say what is tried"),
        (None, {}, "sweep.space must say what is tried"),
    ],
)  # fmt: skip
def test_space_that_makes_no_sense_is_refused(
    tmp_path: Path, space: object, spec: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, space=space, **spec)


def test_override_of_what_a_row_decides_is_refused(tmp_path: Path) -> None:
    for key in ("method.lora_rank=4", "method.cycles=1", "method.merge_every_steps=3", "method.kind=lora"):
        with pytest.raises(ConfigError, match=r"is searched by the sweep: (every row of )?sweep\.space\.method"):
            sweep(tmp_path, key, space={"method": METHODS})
    changed = sweep(tmp_path, "method.alpha=16", space={"method": METHODS})
    assert changed.config(1, changed.points[1], 1).settings()["method.alpha"] == 16


def test_space_may_be_given_on_the_command_line(tmp_path: Path) -> None:
    found = sweep(tmp_path, "sweep.space.method.merge_every_steps=[9]", space={"method.lora_rank": [2, 4]})
    assert found.points[1] == {"method.lora_rank": 4, "method.merge_every_steps": 9}


def test_shipped_comparison_is_fair() -> None:
    """The same model, rows, order, tokens, number of updates and of rates; what differs is the method and its rate."""
    found = load_sweep(str(ROOT / "configs/sweeps/methods.yaml"))
    configs = [found.config(n, p, found.spec.seeds[0]) for n, p in enumerate(found.points)]
    kinds = Counter(cfg.method.kind for cfg in configs)
    assert kinds == dict.fromkeys(("full", "lora", "relora", "galore", "sltrain"), 2)
    for name in ("model", "data", "steps", "global_batch_rows", "train", "cluster", "seed"):
        assert len({repr(getattr(cfg, name)) for cfg in configs}) == 1, name
