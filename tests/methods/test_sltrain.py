"""SLTrain: what its row of the methods says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ray.config import RunConfig
from relora_ray.config.file import load_config
from relora_ray.errors import ConfigError
from relora_ray.methods.base import build_method
from relora_ray.methods.sparse.layer import SparseLowRankLinear
from relora_ray.modeling.model import build_model, num_parameters
from relora_ray.modeling.optim import decayed
from relora_ray.modeling.small import small_config
from relora_ray.runs.run import new_model
from relora_ray.runs.trial import try_architecture
from tests.conftest import ROOT
from tests.tiny import losses, run, tiny_config

PLAIN = {"kind": "cosine", "warmup_steps": 1}
SLTRAIN = {"kind": "sltrain", "rank": 4, "alpha": 8, "density": 0.1}


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(data, tmp_path, method=SLTRAIN, schedule=PLAIN)


def layer_of(linear: nn.Linear | Conv1D, seed: int = 0) -> SparseLowRankLinear:
    layer = SparseLowRankLinear(linear, rank=3, alpha=6.0, density=0.2)
    layer.draw_(seed)
    with torch.no_grad():
        layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def dense(layer: SparseLowRankLinear) -> torch.Tensor:
    """From the equation alone: alpha / rank B A, and the values where they belong."""
    weight = (6.0 / 3.0) * layer.B @ layer.A
    sparse = torch.zeros(weight.numel()).scatter(0, layer.positions.long(), layer.values)
    return weight + sparse.view_as(weight)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_dense_autograd(bias: bool) -> None:
    layer = layer_of(nn.Linear(12, 8, bias=bias))
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    target = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    trained = [x, *layer.parameters()]
    expected = torch.autograd.grad(((F.linear(x, dense(layer), layer.bias) - target) ** 2).sum(), trained)
    found = torch.autograd.grad(((layer(x) - target) ** 2).sum(), trained)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_bf16_and_its_gradients_are_fp32() -> None:
    layer = layer_of(nn.Linear(64, 48))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_layout_of_gpt2_is_kept() -> None:
    conv = Conv1D(8, 12)
    layer = layer_of(conv)
    assert layer.dense().shape == conv.weight.shape == (12, 8)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ layer.dense() + conv.bias)


def test_start_is_the_sparse_part_alone(cfg: RunConfig) -> None:
    model = new_model(cfg)
    build_method(cfg).adapt(model, 0)
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    assert len(layers) == 14
    for layer in layers:
        size = layer.in_features * layer.out_features
        assert len(layer.values) == int(0.1 * size) == len(set(layer.positions.tolist()))
        assert layer.values.abs().max() <= layer.in_features**-0.5
        weight = layer.dense().flatten()
        assert torch.equal(weight[layer.positions.long()], layer.values.detach())
        assert weight.count_nonzero() == layer.values.count_nonzero()
    assert not torch.equal(layers[0].positions, layers[1].positions), "each matrix has its own"


def test_60m_has_the_published_number_of_parameters() -> None:
    cfg = load_config(ROOT / "configs/sltrain/60m.yaml")
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=0, device="meta")
    build_method(cfg).adapt(model, 0)
    assert num_parameters(model) == pytest.approx(43.5e6, rel=0.01)
    assert num_parameters(model) == num_parameters(model, trainable_only=True)


def test_it_learns(cfg: RunConfig) -> None:
    _, records = run(cfg.model_copy(update={"optimizer": cfg.optimizer.model_copy(update={"learning_rate": 1e-2})}))
    found = losses(records)
    assert found[12] < found[1] - 0.05


def test_values_decay_as_the_matrix_that_they_are_of(cfg: RunConfig) -> None:
    model = new_model(cfg)
    build_method(cfg).adapt(model, 0)
    (decaying, _), (spared, _) = decayed(model, 0.01)
    layer = next(m for m in model.modules() if isinstance(m, SparseLowRankLinear))
    assert {id(p) for p in (layer.A, layer.B, layer.values)} <= {id(p) for p in decaying}
    assert not any(p is layer.values for p in spared)


def test_nothing_is_drawn_that_a_checkpoint_brings(cfg: RunConfig) -> None:
    model = new_model(cfg)
    build_method(cfg).adapt(model, 4)
    assert not any(m.positions.any() for m in model.modules() if isinstance(m, SparseLowRankLinear))


def test_weight_that_is_read_without_a_call_is_named(data: Path, tmp_path: Path) -> None:
    small_config(transformers.MambaConfig()).save_pretrained(tmp_path / "config")
    model = {"huggingface": str(tmp_path / "config")}
    with pytest.raises(ConfigError, match=r"with method.kind=sltrain.*Set method.leave_out=\[(dt|x)_proj\]"):
        try_architecture(tiny_config(data, tmp_path, model=model, method=SLTRAIN, schedule=PLAIN))


def test_dense_weights_cannot_be_taken_over(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_from='x' with method.kind=sltrain: a dense matrix is no sum"):
        tiny_config(data, tmp_path, "model.init_from=x", method=SLTRAIN, schedule=PLAIN)
