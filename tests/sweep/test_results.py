"""What a sweep's records say. Points are made up here."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from relora_ray.config.file import parse_config
from relora_ray.storage import Storage
from relora_ray.sweep.dimension import Value
from relora_ray.sweep.report import write_up
from relora_ray.sweep.results import (
    Importance,
    Point,
    best,
    importance,
    pareto,
    point_from_json,
    ranking,
    spent,
    to_csv,
)
from tests.conftest import ROOT
from tests.sweep.test_space import sweep

SEEDS = (1, 2)


def point(number: int, loss: float, *, state: str = "done", step: int = 12, **settings: float) -> Point:
    measured = {
        "steps": 9, "tokens": 1296, "forked_at": 3, "forked_from": "warm-x", "step_s": 0.1, "train_s": 0.9,
        "gpu_s": 0.0, "tokens_per_s": 1440.0 + number, "num_trainable": 100, "state_bytes": 1000 + 10 * number,
        "peak_memory_bytes": 5,
    }  # fmt: skip
    named = {f"method.{name}": value for name, value in settings.items()}
    return Point(number, named, state, "", {step: {s: loss + 0.01 * s for s in SEEDS}}, dict.fromkeys(SEEDS, measured))


def test_record_survives_json() -> None:
    one = point(3, 2.5, lora_rank=4)
    assert point_from_json(one.to_json()) == one


def test_best_is_of_those_that_came_to_the_end() -> None:
    points = [point(0, 3.0), point(1, 2.5), point(2, 1.0, state="halved", step=6), point(3, 0.5, state="diverged")]
    found = best(points)
    assert found is not None
    assert found.number == 1
    assert [p.number for p in ranking(points)] == [1, 0, 2, 3]
    assert best(points[2:]) is None


def test_shared_warm_start_is_spent_once() -> None:
    points = [point(0, 3.0), point(1, 2.5)]  # 4 runs of 9 updates with 1,296 tokens, and one warm start of 3
    for one in points:
        for run in one.runs.values():
            run["gpu_s"] = 18.0
    assert spent(points) == (4 * 1296 + 432, 4 * 18 + 6)
    assert spent([]) == (0, 0)


def test_pareto_front() -> None:
    points = [point(0, 3.0), point(1, 2.5), point(2, 2.7), point(3, 2.0)]
    assert [p.number for p in pareto(points, "state_bytes", larger=False)] == [3, 1, 0]
    assert [p.number for p in pareto(points, "tokens_per_s", larger=True)] == [3]


def grid(loss: Callable[[int, int], float], *, seeds: int = 3, seed_s: float = 0.0, noise: float = 0.02) -> list[Point]:
    """Ranks 2, 8, 32 by cycles of 3, 9; a seed adds up to `seed_s` to all of its runs."""
    generator, found = random.Random(0), []
    for n, (rank, every) in enumerate(product((2, 8, 32), (3, 9))):
        found.append(point(n, 0.0, lora_rank=rank, merge_every_steps=every))
        made = {s: loss(rank, every) + seed_s * s + generator.gauss(0, noise) for s in range(seeds)}
        found[-1].losses = {12: made}
    return found


def shares(points: list[Point]) -> dict[str, Importance]:
    return {i.name.replace("method.", ""): i for i in importance(points)}


def test_importance_finds_what_decides() -> None:
    first, *others = importance(grid(lambda rank, every: 0.5 * (rank == 8) + 0.1 * (every == 9)))
    assert first.name == "method.lora_rank"
    assert first.low <= first.share <= 1
    assert first.share > 0.9
    assert [i.name for i in others] == ["method.merge_every_steps", "method.lora_rank x method.merge_every_steps"]
    assert 0 < others[0].low <= others[0].share < 0.1
    assert others[1].share < 0.01


def test_what_a_seed_adds_to_all_points_is_no_noise() -> None:
    """In a run of one factor over three seeds that differ by 1.0 nothing could be seen otherwise."""
    plain, apart = (shares(grid(lambda rank, every: 0.1 * (every == 9), seed_s=s)) for s in (0.0, 1.0))
    assert plain["merge_every_steps"].share == pytest.approx(apart["merge_every_steps"].share)
    assert apart["merge_every_steps"].low > 0.5


def test_what_only_two_keys_together_do_is_seen() -> None:
    found = shares(grid(lambda rank, every: 0.5 * ((rank == 8) != (every == 9))))
    assert found["lora_rank x merge_every_steps"].share > 0.8
    assert found["merge_every_steps"].share + found["lora_rank"].share < 0.2


def test_importance_is_that_of_the_textbook() -> None:
    """Kirk's omega squared of a two-way layout whose blocks are seeds, by sums of squares written out."""
    points = grid(lambda rank, every: 0.01 * rank + 0.02 * every, seed_s=0.3)
    y = np.array([[p.losses[12][s] for s in range(3)] for p in points]).reshape(3, 2, 3)  # rank, cycle, seed
    mean = y.mean()
    rank = 6 * ((y.mean((1, 2)) - mean) ** 2).sum()
    cycle = 9 * ((y.mean((0, 2)) - mean) ** 2).sum()
    both = 3 * ((y.mean(2) - mean) ** 2).sum() - rank - cycle
    seeds = 6 * ((y.mean((0, 1)) - mean) ** 2).sum()
    total = ((y - mean) ** 2).sum() - seeds
    noise = (total - rank - cycle - both) / 10
    found = shares(points)
    assert found["lora_rank"].share == pytest.approx((rank - 2 * noise) / (total + noise))
    assert found["merge_every_steps"].share == pytest.approx((cycle - noise) / (total + noise))
    assert found["lora_rank x merge_every_steps"].share == pytest.approx(max(0, (both - 2 * noise) / (total + noise)))


def test_importance_with_one_seed_has_no_interval_and_no_pairs_it_cannot_judge() -> None:
    found = shares(grid(lambda rank, every: 0.5 * (rank == 8), seeds=1))
    assert found.keys() == {"lora_rank", "merge_every_steps"}
    assert found["lora_rank"].share > 0.9
    assert math.isnan(found["lora_rank"].low)


def test_importance_of_a_range_is_by_bins() -> None:
    points = [point(n, float(n >= 10), alpha=0.1 * n) for n in range(20)]
    (found,) = importance(points)
    assert found.share > 0.85


def test_table_and_page(tmp_path: Path) -> None:
    spec = sweep(tmp_path, seeds=list(SEEDS))
    points = [
        point(n, 2.0 + 0.1 * n, lora_rank=p["method.lora_rank"], merge_every_steps=p["method.merge_every_steps"])
        for n, p in enumerate(spec.points)
    ]
    points[3].state, points[3].why = "failed", "StorageError: the disk is full\nsecond line"
    rows = list(csv.DictReader(io.StringIO(to_csv(points))))
    assert [row["point"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["method.lora_rank"] == "2"
    assert float(rows[0]["loss"]) == pytest.approx(2.015)
    assert float(rows[0]["loss_seed2"]) == pytest.approx(2.02)
    assert rows[3]["why"] == "StorageError: the disk is full"
    out = Storage(f"{tmp_path}/out")
    write_up(spec, points, out)
    text = out.get("README.md").decode()
    for expected in (
        "4 points (3 done, 1 failed) of grid search, each with seeds 1, 2, 12 updates a run",
        "Best: lora_rank=2 merge_every_steps=3, held-out loss 2.0150",
        # 8 runs of 9 updates and one warm start of 3, instead of 8 runs of 12
        "75 updates were trained, 3 of them in 1 warm start(s) that 8 runs share; without sharing it would have been",
        " 96: 21.9% saved",
        "| 0 | 2 | 3 | 2.0150 ± 0.0071 | 2.0100, 2.0200 |",
        "Point 3 (lora_rank=8 merge_every_steps=9) failed: StorageError: the disk is full",
        "![heat maps](heat-maps.png)",
    ):  # fmt: skip
        assert expected in text, f"{expected!r} is not in\n{text}"
    for name in ("heat-maps.png", "parallel.png", "pareto-state-bytes.png", "pareto-tokens-per-s.png"):
        assert out.get(name).startswith(b"\x89PNG")
    found = parse_config(out.get("best.yaml").decode())
    assert found.name == "tiny-best"
    assert found.settings()["method.merge_every_steps"] == 3
    assert "sweep" not in yaml.safe_load(out.get("best.yaml"))


def test_committed_page_says_what_the_committed_table_does() -> None:
    """Importances, from the losses that the table has."""
    folder = ROOT / "benchmarks/results/sweep-books"
    points = []
    for row in csv.DictReader((folder / "table.csv").read_text().splitlines()):
        settings: dict[str, Value] = {k: int(v) for k, v in row.items() if k.startswith(("method.", "schedule."))}
        losses = {seed: float(row[f"loss_seed{seed}"]) for seed in (1, 2, 3)}
        points.append(Point(int(row["point"]), settings, "done", "", {1200: losses}))
    page = (folder / "README.md").read_text()
    for found in importance(points):
        assert f"| {found.name} | {found.share:.0%} | {found.low:.0%} to {found.high:.0%} |" in page
