"""The table of runs: grid, seeds, resuming, write-up. Real runs, real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from relora_ray.ablations import Results, identity, load_table, run_table, write_up
from relora_ray.errors import ConfigError
from tests.conftest import ROOT
from tests.tiny import TINY

TINY_TABLE = {
    "title": "Tiny",
    "base": {k: v for k, v in yaml.safe_load(TINY).items() if k not in ("name", "seed")}
    | {"method": {"kind": "full"}, "schedule": {"kind": "cosine"}},
    "seeds": [1, 2],
    "grid": {"optimizer.learning_rate": [1e-2, 1e-4]},
    "warm_start_learning_rate": 5e-3,
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
    one, two = (runs[f"full-learning_rate0.01-seed{seed}"]["loss"] for seed in (1, 2))
    assert f"{(one + two) / 2:.4f} ± " in page
    assert f"{one:.4f}, {two:.4f} |" in page
    assert "| Broken | | | diverged | | |" in page
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


def test_warm_start_has_one_learning_rate_at_every_grid_point(table: Path) -> None:
    loaded = load_table(str(table))
    for point in loaded.points(loaded.rows[2]):
        cfg = loaded.config(loaded.rows[2], point | {"optimizer.learning_rate": 4e-2}, 1, [])
        assert cfg.optimizer.learning_rate * cfg.method.warm_start_lr_ratio == pytest.approx(5e-3)


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
