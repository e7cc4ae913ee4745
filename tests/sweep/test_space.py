"""Which runs a sweep is made of, and what is refused before any is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from relora_ray.errors import ConfigError
from relora_ray.sweep.dimension import Range
from relora_ray.sweep.space import Sweep, is_sweep, load_sweep
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent.parent


def sweep(tmp_path: Path, *overrides: str, **spec: object) -> Sweep:
    path = tmp_path / "sweep.yaml"
    space = {"method.lora_rank": [2, 8], "method.merge_every_steps": [3, 9]}
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"sweep": {"space": space} | spec}, sort_keys=False))
    return load_sweep(str(path), list(overrides))


def test_grid_is_all_combinations(tmp_path: Path) -> None:
    found = sweep(tmp_path, seeds=[1, 2])
    assert found.points == [
        {"method.lora_rank": rank, "method.merge_every_steps": every} for rank in (2, 8) for every in (3, 9)
    ]
    cfg = found.config(3, found.points[3], 2)
    assert (cfg.name, cfg.storage, cfg.seed) == ("0003-seed2", "runs/tiny", 2)
    assert cfg.merges == (12,)
    assert cfg.settings()["method.lora_rank"] == 8


def test_rungs_are_cycle_ends_that_all_points_have(tmp_path: Path) -> None:
    space = {"method.merge_every_steps": [3, 6, 12]}
    found = sweep(tmp_path, "steps=51", space=space, halving={"factor": 2})
    assert found.rungs == (15, 27, 39, 51)
    assert found.stops == [(1, 15), (2, 27), (4, 51)]
    assert sweep(tmp_path, "steps=51", space=space).stops == [(4, 51)]


def test_random_points_follow_from_seed_and_number(tmp_path: Path) -> None:
    space = {
        "method.lora_rank": [2, 4, 8],
        "optimizer.learning_rate": {"min": 1e-4, "max": 1e-1, "log": True},
        "schedule.warmup_steps": {"min": 1, "max": 3, "whole": True},
    }
    few, many, other = (
        sweep(tmp_path, space=space, search="random", trials=n, seed=seed).points
        for n, seed in ((5, 0), (40, 0), (40, 1))
    )
    assert many[:5] == few
    assert other != many
    assert {p["schedule.warmup_steps"] for p in many} == {1, 2, 3}
    rates = sorted(float(p["optimizer.learning_rate"]) for p in many)
    assert 1e-4 <= rates[0] < 1e-3 < rates[20] < rates[-1] <= 1e-1, "spread over the decades"


def test_random_search_tries_nothing_twice(tmp_path: Path) -> None:
    space = {"method.lora_rank": [2, 4, 8], "schedule.warmup_steps": {"min": 1, "max": 3, "whole": True}}
    points = sweep(tmp_path, space=space, search="random", trials=9).points
    assert sorted(tuple(point.values()) for point in points) == [(r, w) for r in (2, 4, 8) for w in (1, 2, 3)]


def test_whole_range_has_every_value_equally_often() -> None:
    drawn = [Range(min=1, max=3, whole=True).at((i + 0.5) / 300) for i in range(300)]
    assert [drawn.count(n) for n in (1, 2, 3)] == [100, 100, 100]
    assert Range(min=1, max=3, whole=True).at(1.0) == 3


def test_what_is_chosen_as_it_goes_is_checked_in_all_combinations(tmp_path: Path) -> None:
    space = {"method.lora_rank": [2, 4], "schedule.warmup_steps": {"min": 1, "max": 3, "whole": True}}
    found = sweep(tmp_path, space=space, search="tpe", trials=5)
    assert found.points == []
    possible = {tuple(point.values()) for point in found.possible_points}
    assert possible == {(2, 1), (2, 3), (4, 1), (4, 3), (2, 2)}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1e-4), (0.5, 1e-3), (1.0, 1e-2)])
def test_range_in_the_logarithm(share: float, value: float) -> None:
    assert Range(min=1e-4, max=1e-2, log=True).at(share) == pytest.approx(value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"space": {"method.lora_rnk": [1]}}, r"the point lora_rnk=1 is no run: unknown key method.lora_rnk=1"),
        ({"space": {"method.lora_rank": [4, 64]}}, r"the point lora_rank=64 is no run: .*=64 is more than 32"),
        (
            {"space": {"method.lora_rank": [2], "method.merge_every_steps": [3, 4]}},
            r"the point lora_rank=2 merge_every_steps=4 is no run: .*Cycles must be whole",
        ),
        ({"space": {"steps": [12, 15]}}, "different lengths: 12 updates of 144 tokens, 15 updates of 144 tokens"),
        ({"space": {"seed": [1, 2]}}, "sweep.space.seed is not for a sweep to search"),
        ({"space": {"method.lora_rank": [2, 2]}}, "has a value twice"),
        ({"space": {"method.lora_rank": {"min": 2, "max": 8}}}, "is a range, and sweep.search=grid needs lists"),
        ({"space": {"method.alpha": {"min": 8, "max": 2}}, "search": "random", "trials": 2}, "min=8 is not less than"),
        ({"search": "random"}, "sweep.trials is missing"),
        ({"trials": 3}, "a grid has its own number of points"),
        ({"serach": "grid"}, r"unknown key sweep.serach='grid'. Did you mean 'search'?"),
        ({"seeds": [1, 1]}, "sweep.seeds=.1, 1. has a value twice"),
        ({"seeds": []}, "sweep.seeds="),
        ({"search": "random", "trials": 1000000000}, "sweep.trials=1000000000"),
        ({"objectives": ["loss", "state_bytes"]}, "matter to sweep.search=tpe only"),
        ({"search": "tpe", "trials": 4, "objectives": ["state_bytes"]}, "must begin with loss"),
        ({"halving": {}}, "halving.first_rung=1 needs more cycle ends that all points have in common; they have 12"),
        ({"population": {}}, "sweep.population.every_rungs=1 needs more cycle ends"),
        ({"population": {}, "halving": {}}, "remove sweep.halving, or it"),
        ({"population": {}, "search": "tpe", "trials": 2}, "remove sweep.search=tpe, or it"),
        (
            {"space": {"method.lora_rank": {"min": 2, "max": 64, "whole": True}}, "search": "tpe", "trials": 4},
            "the point lora_rank=64 is no run",
        ),
        (
            {"space": {"method.lora_rank": [2, 64]}, "search": "random", "trials": 1, "seed": 2, "population": {},
             "share_warm_start": False},
            "the point lora_rank=64 is no run",
        ),
        ({"search": "random", "trials": 5}, "sweep.space has 4 combinations, and each is tried once. Use fewer"),
        ({"max_gpu_hours": 2.5}, "sweep.max_gpu_hours=2.5 with cluster.gpus_per_worker=0 would never end the sweep"),
        ({"space": {"train.eval_rows": [1, 2]}}, "sweep.space.train.eval_rows is not for a sweep to search"),
        ({"space": {"optimizer.learning_rate": list(range(1, 102)), "train.log_every_steps": list(range(1, 102))}},
         "10,201 combinations, more than 10,000"),
    ],
)  # fmt: skip
def test_mistake_is_refused_with_its_point(tmp_path: Path, spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, **spec)


def test_method_without_cycles_is_named_where_they_are_needed(tmp_path: Path) -> None:
    plain = ("method={kind: galore, rank: 4}", "schedule={kind: cosine, warmup_steps: 1}")
    for name in ("halving", "population"):
        with pytest.raises(ConfigError, match=rf"have 12\. Remove sweep\.{name}: method\.kind=galore has no cycles\."):
            sweep(tmp_path, *plain, space={"method.rank": [2, 4]}, **{name: {}})


def test_config_without_its_sweep_is_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^method.lora_rank=64 is more than 32"):
        sweep(tmp_path, "method.lora_rank=64", space={"method.alpha": [4, 8]})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweep_is_one(path: Path) -> None:
    assert is_sweep(str(path))
    found = load_sweep(str(path))
    if path.stem == "methods":
        assert found.spec.space.keys() == {"method"}
        return
    assert {"method.lora_rank", "method.merge_every_steps", "schedule.restart_warmup_steps"} <= found.spec.space.keys()
    assert "points of" in next(found.plan())


def test_override_of_what_is_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.lora_rank is searched by the sweep"):
        sweep(tmp_path, "method.lora_rank=8")
