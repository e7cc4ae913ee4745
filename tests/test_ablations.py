"""The table of runs: grid, seeds, resuming, write-up. Real runs, real processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from relora_ray.data.loader import BatchSource
from relora_ray.data.tokens import TokenRows, read_index
from relora_ray.errors import ConfigError, DataError
from relora_ray.modeling.parallel import World
from relora_ray.storage import Storage
from relora_ray.study.ablations import (
    Point,
    Results,
    RowResults,
    Table,
    collect,
    identity,
    load_table,
    run_table,
    write_up,
)
from relora_ray.study.paired import interval
from tests.conftest import ROOT
from tests.tiny import TINY

TINY_TABLE = {
    "title": "Tiny",
    "base": {k: v for k, v in yaml.safe_load(TINY).items() if k not in ("name", "seed")}
    | {"method": {"kind": "full"}, "schedule": {"kind": "cosine"}},
    "seeds": [1, 2],
    "grid": {"optimizer.learning_rate": [1e-2, 1e-4]},
    "warm_start_learning_rate": 5e-3,
    "report_rows": 40,
    "against": "full",
    "rows": [
        {"name": "full", "label": "Full training"},
        {"name": "broken", "label": "Broken", "grid": {"optimizer.learning_rate": [1e30]},
         "set": {"optimizer.grad_clip": 0, "train.max_nonfinite_steps": 0, "schedule.warmup_steps": 0,
                 "method": {"kind": "lora", "lora_rank": 4, "warm_start_steps": 9}}},
        {"name": "relora", "label": "ReLoRA", "grid": {"optimizer.learning_rate": [1e-2], "method.alpha": [8, 16]},
         "set": {"method": {"kind": "relora", "lora_rank": 4, "warm_start_steps": 3, "merge_every_steps": 3}}},
    ],
}  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TINY_TABLE))
    return tmp_path / "table.yaml"


def test_table_is_tuned_repeated_and_written_up_and_goes_on_where_it_stopped(
    table: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"storage={tmp_path / 'runs'}", f"data.path={data}"]
    out = tmp_path / "out"
    run_table(load_table(str(table)), out, overrides, jobs=2)
    runs = {r["name"][:-7]: r for r in json.loads((out / "results.json").read_text())["runs"]}
    # Grid with seed 1, the best point again with seed 2; what diverged is not repeated.
    assert len(runs) == 2 + 1 + 1 + 2 + 1
    assert runs["broken-learning_rate1e30-seed1"]["loss"] is None
    assert runs["full-learning_rate0.01-seed1"]["loss"] < runs["full-learning_rate0.0001-seed1"]["loss"]
    assert "full-learning_rate0.01-seed2" in runs
    assert runs["full-learning_rate0.01-seed1"]["num_trainable"] > 140_000
    page = (out / "README.md").read_text()
    best = [runs[f"full-learning_rate0.01-seed{seed}"] for seed in (1, 2)]
    one, two = (run["reported"] for run in best)
    assert {run["report_rows"] for run in best} == {40}
    assert one != best[0]["loss"], "other text than what chose it"
    assert "reported" not in runs["full-learning_rate0.0001-seed1"]
    assert f"{(one + two) / 2:.4f} ± " in page
    assert f"{one:.4f}, {two:.4f} |" in page
    assert "| Broken | | | diverged | | | |" in page
    assert re.search(r"\| ReLoRA .*\| Full training: [+-]\d\.\d{4} ± \d+\.\d{4}", page)
    assert "learning_rate 0.0001: " in page
    assert "best at the edge of optimizer.learning_rate |" in page
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    capfd.readouterr()
    lost = next(name for name in runs if name.startswith("relora") and name.endswith("seed2"))
    kept = [r for name, r in runs.items() if name != lost]
    (out / "results.json").write_text(json.dumps({"runs": kept}))
    run_table(load_table(str(table)), out, overrides, jobs=1)
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines() if ": loss" in line] == [
        runs[lost]["name"]
    ]
    again = {r["name"][:-7]: r for r in json.loads((out / "results.json").read_text())["runs"]}
    assert again[lost]["evals"] == runs[lost]["evals"]


def made_up(table: Table, loss: Callable[[Point, int], float]) -> Callable[[], RowResults]:
    """A search over the first row as `run_table` does it, with losses by a formula. What became of it at each call."""
    results = Results(Path("/nonexistent"))

    def go_on() -> RowResults:
        found = collect(table, table.rows[0], results, [])
        wanted = found.untried or ([found.best] if found.best is not None else [])
        for point in wanted:
            for seed in table.seeds if not found.untried else table.seeds[:1]:
                cfg = table.config(table.rows[0], point, seed, [])
                record = {"identity": identity(cfg), "seed": seed, "loss": loss(point, seed)}
                results.records[identity(cfg)] = record | {"report_rows": 40, "reported": record["loss"] + 1.0}
        return found

    return go_on


@pytest.mark.parametrize(
    ("extend", "best", "at_edge"), [(8, 16e-2, []), (4, 8e-2, ["method.alpha", "optimizer.learning_rate"])]
)
def test_search_goes_on_until_both_neighbours_of_the_best_were_tried(
    table: Path, extend: int, best: float, at_edge: list[str]
) -> None:
    """From a grid of two values by two towards the best, at 16e-2 and 16."""
    raw = yaml.safe_load(table.read_text())
    raw |= {"extend": extend, "rows": raw["rows"][2:], "against": None}
    raw["rows"][0]["grid"] = {"optimizer.learning_rate": [2e-2, 4e-2], "method.alpha": [8, 16]}
    table.write_text(yaml.safe_dump(raw))
    rates = []

    def loss(point: Point, seed: int) -> float:
        rates.append(point["optimizer.learning_rate"])
        return abs(math.log(point["optimizer.learning_rate"] / 16e-2)) + abs(math.log(point["method.alpha"] / 16))

    go_on = made_up(load_table(str(table)), loss)
    found = [go_on() for _ in range(12)][-1]
    assert found.best == {"optimizer.learning_rate": best, "method.alpha": 16}
    assert found.open_keys == at_edge
    assert found.beyond <= extend
    assert len(found.seeds) == 2
    assert max(rates) == (32e-2 if extend == 8 else 8e-2)
    assert len(set(map(str, (point for point, _ in found.grid)))) == len(found.grid)


def test_interval_is_students() -> None:
    """Of five values with mean 4 and variance 12.5: 4 ± 2.776 times the root of 12.5 / 5."""
    assert interval([1.0, 2.0, 3.0, 4.0, 10.0]) == pytest.approx((4 - 2.776 * 2.5**0.5, 4 + 2.776 * 2.5**0.5))
    low, high = interval([0.5] * 3)
    assert low == high == 0.5


def test_row_is_judged_by_text_that_did_not_choose_it(data: Path) -> None:
    rows = TokenRows(Storage(str(data)), read_index(Storage(str(data))), "validation", 12)
    source = BatchSource(rows, World(), global_batch_rows=4, micro_batch_rows=4, seed=1)
    known = {tuple(row.tolist()) for batch in source.first_rows(8) for row in batch.inputs}
    behind = [tuple(row.tolist()) for batch in source.rows_behind(8, 20) for row in batch.inputs]
    assert len(behind) == 20
    assert not known & set(behind)
    everywhere = [tuple(rows.read(np.array([i]))[0, :-1].tolist()) for i in range(rows.num_rows)]
    places = [everywhere.index(row) for row in behind]
    assert places == sorted(places)
    assert places[-1] > rows.num_rows - 2 * rows.num_rows // 20, "from all of it"
    with pytest.raises(DataError, match=r"are wanted behind the first 8 of the validation rows"):
        list(source.rows_behind(8, rows.num_rows))


def test_warm_start_has_one_learning_rate_at_every_grid_point(table: Path) -> None:
    loaded = load_table(str(table))
    for point in loaded.points(loaded.rows[2]):
        cfg = loaded.config(loaded.rows[2], point | {"optimizer.learning_rate": 4e-2}, 1, [])
        assert cfg.optimizer.learning_rate * cfg.warm_start_lr_ratio == pytest.approx(5e-3)


def test_records_are_kept_apart_by_all_that_decides_them(table: Path) -> None:
    loaded = load_table(str(table))
    cfg = loaded.config(loaded.rows[0], {"optimizer.learning_rate": 1e-2}, 1, [])

    def changed(*overrides: str) -> str:
        return identity(loaded.config(loaded.rows[0], {"optimizer.learning_rate": 1e-2}, 1, list(overrides)))

    decisive = ["model.init_from=x", "train.eval_rows=8", "train.micro_batch_rows=1", "train.skip_steps=[3]"]
    assert len({identity(cfg), *(changed(override) for override in decisive)}) == 5
    assert changed("storage=elsewhere", "checkpoint.save_every_steps=3", "train.log_every_steps=7") == identity(cfg)


def test_nothing_is_trained_when_one_row_is_wrong(table: Path, data: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(table.read_text())
    raw["rows"][2]["set"]["method"]["merge_every_steps"] = 5
    table.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"method\.merge_every_steps=5 has cycles end at"):
        run_table(load_table(str(table)), tmp_path / "out", [f"data.path={data}"], jobs=1)
    assert not (tmp_path / "out").exists()
    for key in ("seed", "optimizer.learning_rate"):
        with pytest.raises(ConfigError, match=f"{key} is decided by the table"):
            run_table(load_table(str(table)), tmp_path / "out", [f"data.path={data}", f"{key}=1"], jobs=1)
    for change, message in (
        ({"seeds": [1, 1]}, "seeds has twice 1"),
        ({"rows": raw["rows"] + raw["rows"][:1]}, "two rows have the name full"),
        ({"grid": {"method.alpha": [8, 8]}}, "grid has twice for method.alpha 8"),
        ({"grid": {"method.alpha": []}}, "grid has no value for method.alpha"),
        ({"against": "lora"}, "against=lora is no row. There are full, broken, relora"),
    ):
        table.write_text(yaml.safe_dump(raw | change))
        with pytest.raises(ConfigError, match=message):
            load_table(str(table))
    raw["rowz"] = 1
    table.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="rowz"):
        load_table(str(table))


TABLES = sorted((ROOT / "configs/ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_shipped_tables_are_valid(path: Path) -> None:
    """Every row at every grid point and seed is a run that the config accepts, and no two are the same."""
    table = load_table(str(path))
    configs = [table.config(row, p, seed, []) for row in table.rows for p in table.points(row) for seed in table.seeds]
    assert len({identity(cfg) for cfg in configs}) == len(configs)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_committed_page_is_what_the_committed_numbers_say(path: Path, tmp_path: Path) -> None:
    out = ROOT / "benchmarks/results" / f"ablations-{path.stem}"
    results = Results(out)
    fingerprint = next(iter(results.records.values()))["data_fingerprint"]
    write_up(load_table(str(path)), results, tmp_path, [f"data.fingerprint={fingerprint}"])
    assert (tmp_path / "README.md").read_text() == (out / "README.md").read_text()
