"""Rows of a sweep held against each other. Points are made up here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from relora_ray.config.file import parse_config
from relora_ray.storage import Storage
from relora_ray.sweep.compare import comparison, paired
from relora_ray.sweep.report import write_up
from relora_ray.sweep.results import Point
from tests.sweep.test_dimension import METHODS
from tests.sweep.test_results import point
from tests.sweep.test_space import sweep


def made(number: int, loss: float, state: str = "done", **settings: float | str) -> Point:
    found = point(number, loss, state=state)
    found.settings = {name.replace("__", "."): value for name, value in settings.items()}
    return found


def test_best_points_of_rows_are_paired_by_seed(tmp_path: Path) -> None:
    spec = sweep(tmp_path, space={"method": METHODS}, seeds=[1, 2])
    points = [
        made(0, 2.0, method="full"),
        made(1, 2.5, method="lora", method__lora_rank=2),
        made(2, 2.25, method="lora", method__lora_rank=8),
        made(3, 9.0, "diverged", method="relora"),
    ]
    points[2].losses[12][2] += 0.01
    found = paired(points[2], points[0])
    assert found is not None
    assert (found.mean, found.num_pairs) == (pytest.approx(0.255), 2)
    page = "\n".join(comparison(spec, points))
    assert "| full | 1 | as it is | 2.0150 ± 0.0071 | 7.50 |  | 0.00 M | 1 KB | 1,440 |" in page
    assert "| lora | 2 | lora_rank=8 | 2.2700 ± 0.0141 | 9.68 | +0.2550 ± 0.0635 | " in page
    assert "| relora | 1 | diverged | | | | | | |" in page
    assert "below 0 is better than full. ± is the 95 % interval (t)" in page
    assert "which favours rows with more points" in page


def test_one_seed_has_no_interval_and_equals_include_zero(tmp_path: Path) -> None:
    spec = sweep(tmp_path, space={"optimizer": [{"name": "a", "beta1": 0.8}, {"name": "b", "beta1": 0.9}]})
    a, b = made(0, 2.0, optimizer="a"), made(1, 2.0, optimizer="b")
    a.losses[12], b.losses[12] = {1: 2.0, 2: 2.1}, {1: 2.05, 2: 2.04}
    assert "includes zero |" in "\n".join(comparison(spec, [a, b]))
    a.losses[12], b.losses[12] = {1: 2.0}, {1: 2.5}
    page = "\n".join(comparison(spec, [a, b]))
    assert "| b | 1 | as it is | 2.5000 | 12.18 | +0.5000 |" in page
    assert "One seed has no interval: give sweep.seeds several" in page


def test_page_table_and_best_config_name_the_rows(tmp_path: Path) -> None:
    spec = sweep(tmp_path, space={"method": METHODS, "optimizer.weight_decay": [0.0, 0.1]}, seeds=[1, 2])
    points = [made(n, 2.0 - n / 100) for n in range(len(spec.points))]
    for one, settings in zip(points, spec.points, strict=True):
        one.settings = settings
    out = Storage(f"{tmp_path}/out")
    write_up(spec, points, out)
    page = out.get("README.md").decode()
    assert "| point | method | method.lora_rank | optimizer.weight_decay | loss |" in page
    assert "| 7 | relora |  | 0.1 |" in page
    assert "Best: method=relora weight_decay=0.1" in page
    assert "| method | " in page.partition("## What matters")[2], "what the choice of a row explains"
    assert (
        out.get("table.csv").decode().splitlines()[0].startswith("point,method,optimizer.weight_decay,method.lora_rank")
    )
    found = parse_config(out.get("best.yaml").decode())
    assert (found.method.kind, found.merges) == ("relora", (6, 9, 12))
    assert "sweep" not in yaml.safe_load(out.get("best.yaml"))


def test_sweep_without_rows_has_no_comparison(tmp_path: Path) -> None:
    assert list(comparison(sweep(tmp_path), [])) == []
