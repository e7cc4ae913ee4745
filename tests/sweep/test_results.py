"""What a sweep's records say. Points are made up here."""

from __future__ import annotations

import csv
import io
import random
from itertools import product
from pathlib import Path

import pytest
import yaml

from relora_ray.config_file import parse_config
from relora_ray.storage import Storage
from relora_ray.sweep.report import write_up
from relora_ray.sweep.results import (
    Point,
    best,
    importance,
    pareto,
    point_from_json,
    ranking,
    spent,
    state_bytes,
    to_csv,
)
from tests.sweep.test_space import sweep
from tests.tiny import tiny_config

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


def test_importance_finds_what_decides() -> None:
    noise = random.Random(0)
    points = [
        point(n, 0.5 * (rank == 8) + 0.1 * (every == 9) + noise.gauss(0, 0.02), lora_rank=rank, merge_every_steps=every)
        for n, (rank, every) in enumerate(product((2, 8), (3, 9)))
    ]
    first, second = importance(points)
    assert (first.name, second.name) == ("method.lora_rank", "method.merge_every_steps")
    assert first.low <= first.share <= 1
    assert first.share > 0.8
    assert second.share < 0.2
    assert second.low < second.high


def test_importance_of_a_range_is_by_bins() -> None:
    points = [point(n, float(n >= 10), alpha=0.1 * n) for n in range(20)]
    (found,) = importance(points)
    assert found.share > 0.9


def test_state_bytes_are_by_shape(tmp_path: Path) -> None:
    fp32, int8 = (tiny_config(tmp_path, tmp_path, f"method.frozen_weights={kind}") for kind in ("fp32", "bf16_int8"))
    assert state_bytes(fp32, 100, 40) == 60 * 4 + 40 * 16
    assert state_bytes(int8, 100, 40) == 60 * 3 + 40 * 16


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
    assert found.merge_every_steps == 3
    assert "sweep" not in yaml.safe_load(out.get("best.yaml"))
