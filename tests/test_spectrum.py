"""Singular values of what a run has learned, on matrices of known rank and on real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.runs.places import run_storage
from relora_ray.study.spectrum import run_spectrum, spectrum, write
from tests.tiny import run, tiny_config

RELORA = {"kind": "relora", "lora_rank": 3, "alpha": 12, "merge_every_steps": 3, "warm_start_steps": 3}


def low_rank(singular_values: list[float], rows: int = 40, columns: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.zeros(columns, dtype=torch.float64)
    values[: len(singular_values)] = torch.tensor(singular_values, dtype=torch.float64)
    return left @ torch.diag(values) @ right.T


def test_measures_of_a_matrix_of_known_rank() -> None:
    torch.manual_seed(0)
    before = torch.randn(40, 30) * 0.02
    found = spectrum("x", before, (before.double() + low_rank([2.0, 2.0, 2.0, 2.0])).float())
    assert found.rank == 4, "the rounding of the sum to fp32 is not counted"
    assert found.effective_rank == pytest.approx(4, rel=1e-4)
    assert found.rank_90 == 4
    assert found.singular_values[:4] == pytest.approx([2.0] * 4, rel=1e-5)
    steep = spectrum("x", before, (before.double() + low_rank([3.0, 0.9, 0.1])).float())
    assert (steep.rank, steep.rank_90) == (3, 1)  # 9 of 9.82
    same = spectrum("x", before, before)
    assert (same.rank, same.effective_rank, same.rank_90) == (0, 0.0, 0)


@pytest.mark.slow
def test_rank_grows_beyond_r_with_every_merge_and_is_at_most_k_times_r(data: Path, tmp_path: Path) -> None:
    """The claim that the method is named for. Full-rank training has no such bound, LoRA never exceeds r."""
    cfg = tiny_config(data, tmp_path, method=RELORA)
    run(cfg)
    storage = run_storage(cfg)
    for merges, step in enumerate((6, 9, 12), start=1):
        for layer in run_spectrum(storage, step=step).layers:
            assert layer.rank <= 3 * merges, layer.path
            assert layer.rank > 3 * (merges - 1), layer.path
    lora = tiny_config(
        data, tmp_path, "name=lora", method={"kind": "lora", "lora_rank": 3, "alpha": 12, "warm_start_steps": 3},
        schedule={"kind": "cosine"},
    )  # fmt: skip
    full = tiny_config(data, tmp_path, "name=full", method={"kind": "full"}, schedule={"kind": "cosine"})
    for other in (lora, full):
        run(other)
    assert {layer.rank for layer in run_spectrum(run_storage(lora)).layers} == {3}
    assert min(layer.rank for layer in run_spectrum(run_storage(full), from_step=4).layers) > 16


@pytest.mark.parametrize(("frozen_weights", "most"), [("bf16_int8", 9), ("bf16", 9)])
def test_rounding_of_the_weights_is_not_counted_as_rank(
    frozen_weights: str, most: int, data: Path, tmp_path: Path
) -> None:
    cfg = tiny_config(data, tmp_path, method=RELORA | {"frozen_weights": frozen_weights})
    run(cfg)
    assert max(layer.rank for layer in run_spectrum(run_storage(cfg)).layers) <= most


def test_page_plot_and_numbers_are_written(cfg: RunConfig, tmp_path: Path) -> None:
    run(cfg)
    spectra = run_spectrum(run_storage(cfg))
    assert (spectra.from_step, spectra.step, len(spectra.layers)) == (3, 12, 14)
    write([spectra], tmp_path / "out")
    page = (tmp_path / "out/README.md").read_text()
    assert "| tiny | relora | 3 to 12 |" in page
    assert page.splitlines()[2].count("|") == 4 + 7
    assert (tmp_path / "out/spectrum.png").read_bytes().startswith(b"\x89PNG")
    recorded = json.loads((tmp_path / "out/spectrum.json").read_text())[0]["layers"]
    assert [layer["rank"] for layer in recorded] == [layer.rank for layer in spectra.layers]


def test_checkpoint_that_is_gone_and_empty_span_are_refused(cfg: RunConfig) -> None:
    run(cfg)
    storage = run_storage(cfg)
    with pytest.raises(CheckpointError, match="has no checkpoint at step 5"):
        run_spectrum(storage, from_step=5)
    with pytest.raises(ConfigError, match="no update between step 6 and step 6"):
        run_spectrum(storage, from_step=6, step=6)
