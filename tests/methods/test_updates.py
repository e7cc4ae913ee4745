"""Norm, effective rank and singular values of what a merge adds: against dense matrices, and in a run's log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from relora_ray.methods.lowrank import relora
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import LowRankLinear, LowRankStack
from relora_ray.methods.updates import (
    LARGEST,
    MAX_LAYERS,
    effective_rank,
    layer_update,
    product_singular_values,
    updates_record,
)
from relora_ray.runs.metrics import read
from relora_ray.runs.places import run_storage
from relora_ray.study.spectrum import run_spectrum
from tests.tiny import run, run_on, state_digest, tiny_config


def config(**settings: object) -> LoraConfig:
    return LoraConfig(lora_rank=5, alpha=15, **settings)


def drawn_(layer: LowRankLinear | LowRankStack) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in layer.trained():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("gain", [False, True])
def test_singular_values_are_those_of_the_dense_update(gain: bool) -> None:
    layer = LowRankLinear(nn.Linear(24, 40, bias=False), config(trainable_scaling=gain))
    drawn_(layer)
    factor = layer.scale * (float(layer.lora_gain) if gain else 1.0)
    dense = factor * layer.lora_B.detach().double() @ layer.lora_A.double()
    expected = torch.linalg.svdvals(dense)
    found = layer.update_singular_values()
    torch.testing.assert_close(found, expected[:5], rtol=1e-12, atol=0)
    assert layer_update(found).norm == pytest.approx(float(dense.norm()), rel=1e-12)
    assert len(expected) > 5
    assert expected[5:].max() < 1e-12 * expected[0]


def test_a_stack_of_experts_is_one_layer() -> None:
    stack = LowRankStack(nn.Parameter(torch.zeros(3, 24, 40)), config(), 0, transposed=True)
    drawn_(stack)
    found = stack.update_singular_values()
    dense = stack.scale * stack.lora_B.double() @ stack.lora_A.double()
    torch.testing.assert_close(found, torch.linalg.svdvals(dense)[:, :5], rtol=1e-12, atol=0)
    update = layer_update(found)
    assert update.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    assert update.singular_values == pytest.approx(found.mean(0).tolist())
    assert update.effective_rank == pytest.approx(sum(map(effective_rank, found)) / 3)


def test_effective_rank_counts_equal_values_and_hardly_any_small_ones() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0])) == pytest.approx(4)
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    assert effective_rank(torch.tensor([1.0, 1e-9])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.zeros(4)) == 0


def test_what_is_not_finite_is_said_and_ends_nothing() -> None:
    b, a = torch.ones(8, 2), torch.ones(2, 6)
    b[3, 1] = math.inf
    update = layer_update(product_singular_values(b, a))
    record = updates_record({"layer": update})
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "layers": ["layer"], "norms": [None], "effective_ranks": [None], "singular_values": [[]], "layers_left_out": 0,
    }  # fmt: skip


def test_a_record_is_bounded() -> None:
    update = layer_update(torch.rand(512))
    assert len(update.singular_values) == LARGEST
    record = updates_record({f"model.layers.{n}.block_sparse_moe.experts.7.down_proj": update for n in range(5000)})
    assert (len(record["layers"]), record["layers_left_out"]) == (MAX_LAYERS, 4000)
    assert len(json.dumps(record)) < 160_000


def test_every_merge_records_what_it_added(data: Path, tmp_path: Path) -> None:
    """The sum of merged updates is W's change, so that with one merge between two checkpoints they are the same; the
    checkpoints' own are from weights in fp32."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    records = read(run_storage(cfg), "updates")
    assert [record["step"] for record in records] == [6, 9, 12]
    for record in records:
        weights = run_spectrum(run_storage(cfg), from_step=record["step"] - 3, step=record["step"]).layers
        assert record["layers"] == [layer.path for layer in weights]
        for number, layer in enumerate(weights):
            values = torch.tensor(layer.singular_values)
            assert record["singular_values"][number] == pytest.approx(values[:4].tolist(), rel=1e-3)
            assert record["norms"][number] == pytest.approx(float(values.norm()), rel=1e-4)
            assert record["effective_ranks"][number] == pytest.approx(effective_rank(values[:4]), rel=1e-3)


def test_training_is_the_same_to_the_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _ = run(tiny_config(data, tmp_path, "name=measured"))
    monkeypatch.setattr(relora, "updates_all", lambda boundary: {})
    unmeasured, records = run(tiny_config(data, tmp_path, "name=unmeasured"))
    assert "updates" not in {record["kind"] for record in records}
    assert state_digest(measured) == state_digest(unmeasured)


@pytest.mark.slow
def test_two_ranks_share_the_work_and_say_the_same(data: Path, tmp_path: Path) -> None:
    one, two = (tiny_config(data, tmp_path, f"name={name}") for name in ("one", "two"))
    run(one)
    run_on(2, two)
    alone, shared = (read(run_storage(cfg), "updates") for cfg in (one, two))
    assert [r["layers"] for r in shared] == [r["layers"] for r in alone]
    for mine, theirs in zip(alone, shared, strict=True):
        assert theirs["norms"] == pytest.approx(mine["norms"], rel=1e-3)
