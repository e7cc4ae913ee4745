"""Which matrices get adapters: shared weights, layers that only look linear, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from relora_ray.errors import ConfigError
from relora_ray.methods.adapter import adapter_parameters, merge_all_, redraw_all_
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import (
    LowRankStack,
    folded_state_dict,
    frozen_names,
    low_rank_layers,
    new_adapters_all_,
    wrap_,
)

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 4, "alpha": 10.0, **settings})


class Blocks(nn.Module):
    """Layers of 16 features, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            x = torch.tanh(y[0] if isinstance(y, tuple) else y)
        return x


def train_(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)


def merged_and_exported(model: Blocks, plain: Blocks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a trained `model` computes, what it does after a merge, and what `plain` does with its exported weights."""
    redraw_all_(model, seed=0, boundary=0)
    train_(model)
    with torch.no_grad():
        live = model(X)
        merge_all_(model)
        redraw_all_(model, seed=0, boundary=1)
        plain.load_state_dict(folded_state_dict(model))
        return live, model(X), plain(X)


def one_weight_in_two_layers() -> Blocks:
    torch.manual_seed(0)
    model = Blocks(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model.layers[1].weight = model.layers[0].weight
    return model


def one_layer_in_two_places() -> Blocks:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    return Blocks(layer, nn.Linear(16, 16), layer)


@pytest.mark.parametrize("make", [one_weight_in_two_layers, one_layer_in_two_places])
def test_shared_weight_has_one_adapter_and_is_merged_once(make: Any) -> None:
    model = make()
    before = model(X)
    wrap_(model, lora())
    assert torch.equal(model(X), before)
    assert model.layers[-1] is model.layers[0]
    live, merged, exported = merged_and_exported(model, make())
    assert not torch.allclose(live, before, rtol=0.1)
    assert torch.equal(live, merged)
    assert torch.equal(live, exported)
    names = {name for name in model.state_dict() if name.endswith("weight")}
    assert frozen_names(model) == names


def test_shared_weight_that_is_used_in_two_ways_stays_trained_in_full(caplog: pytest.LogCaptureFixture) -> None:
    class Tied(Blocks):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
            self.layers[1].weight = self.layers[0].weight  # and another bias
            self.embedding = nn.Embedding(16, 16)
            self.layers[2].weight = self.embedding.weight
            self.layers.append(nn.Linear(16, 16))

    model = Tied()
    assert wrap_(model, lora()) == ["layers.3"]
    assert "share the weight and differ in their bias" in caplog.text
    assert "the weight is shared with embedding, which is no linear layer of a block" in caplog.text
    assert all(model.layers[n].weight.requires_grad for n in range(3))


class Tuple(nn.Linear):
    """As Llama 4's router."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Gated(nn.Linear):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Renamed(nn.Linear):
    """As fused or quantisable layers of libraries that compute the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("kind", "is_taken"), [(Tuple, False), (Doubled, False), (Gated, False), (Renamed, True)])
def test_subclass_of_linear_is_tried_out(
    kind: type[nn.Linear], is_taken: bool, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device(device):
        model = Blocks(nn.Linear(16, 16), kind(16, 16))
    assert wrap_(model, lora()) == ["layers.0"] + ["layers.1"] * is_taken
    assert (f"layers.1: {kind.__name__} computes something else" in caplog.text) == (not is_taken)


def test_layer_whose_forward_was_replaced_or_hooked_is_tried_out() -> None:
    model = Blocks(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model.layers[1].forward = lambda x: F.linear(x, -model.layers[1].weight, model.layers[1].bias)
    model.layers[2].register_forward_hook(lambda layer, args, out: out + 1)
    assert wrap_(model, lora()) == ["layers.0"]


def test_leave_out_takes_ends_of_paths_and_knows_no_others() -> None:
    def model() -> Blocks:
        return Blocks(
            nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}), nn.ModuleDict({"b": nn.Linear(16, 16)})
        )

    assert wrap_(model(), lora(leave_out=["b"])) == ["layers.0.a"]
    assert wrap_(model(), lora(leave_out=["1.b"])) == ["layers.0.a", "layers.0.b"]
    with pytest.raises(
        ConfigError, match=r"method.leave_out has 'c', which is the last path segment of no linear layer"
    ):
        wrap_(model(), lora(leave_out=["b", "c"]))


def test_frozen_layer_stays_as_it_is() -> None:
    model = Blocks(nn.Linear(16, 16), nn.Linear(16, 16))
    model.layers[0].requires_grad_(False)
    assert wrap_(model, lora()) == ["layers.1"]
    assert not model.layers[0].weight.requires_grad


# Experts.

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 3}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, {"num_experts": 3, "moe_intermediate_size": 24}),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 3}),
    "gpt-oss": (transformers.GptOssConfig, {"num_local_experts": 3, "head_dim": 8}),  # (experts, in, out)
}


def experts(kind: str) -> nn.Module:
    config_class, more = KINDS[kind]
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("frozen", ["fp32", "bf16_int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_has_adapters_of_its_own(kind: str, frozen: str) -> None:
    model = experts(kind)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model).detach()
    paths = wrap_(model, lora(frozen_weights=frozen, trainable_scaling=True))
    redraw_all_(model, seed=0, boundary=0)
    assert {path.rpartition(".")[2] for path in paths} >= {"gate_up_proj", "down_proj"}
    rounding = {"fp32": 0.0, "bf16_int8": 1e-3}[frozen]
    assert (logits(model) - before).abs().max() <= rounding * before.abs().max()
    stacks = {path: layer for path, layer in low_rank_layers(model).items() if isinstance(layer, LowRankStack)}
    assert len(stacks) == 4
    train_(model)
    dense = folded_state_dict(model)
    assert dense.keys() == plain.keys()
    for path, layer in stacks.items():
        changes = dense[path] - layer.frozen()
        assert changes.shape == plain[path].shape
        assert torch.linalg.matrix_rank(changes, rtol=1e-4).tolist() == [4, 4, 4], "rank 4 each"
        assert not torch.allclose(layer.lora_A[0], layer.lora_A[1])
    live = logits(model).detach()
    merge_all_(model)
    redraw_all_(model, seed=0, boundary=1)
    after = logits(model).detach()
    assert torch.equal(live, after) if frozen == "fp32" else (live - after).abs().max() <= rounding * live.abs().max()
    model.load_state_dict(model.state_dict())
    fresh = experts(kind)
    fresh.load_state_dict(folded_state_dict(model))
    assert (logits(fresh) - after).abs().max() <= max(rounding, 1e-6) * after.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_experts_are_those_of_the_sum(kind: str) -> None:
    """d/dB = s dW A^T and d/dA = s B^T dW, with the dense model's gradient of W at the effective weight."""
    model, dense = experts(kind), experts(kind)
    wrap_(model, lora())
    redraw_all_(model, seed=0, boundary=0)
    train_(model)
    dense.load_state_dict(folded_state_dict(model))
    for each in (model, dense):
        each.zero_grad()
        logits(each).logsumexp(-1).sum().backward()
    for path, layer in low_rank_layers(model).items():
        if not isinstance(layer, LowRankStack):
            continue
        gradient = dense.get_parameter(path).grad
        gradient = gradient.mT if layer.transposed else gradient
        torch.testing.assert_close(layer.lora_B.grad, layer.scale * gradient @ layer.lora_A.mT, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.lora_A.grad, layer.scale * layer.lora_B.mT @ gradient, rtol=1e-3, atol=1e-4)


def test_experts_can_be_left_out_named_alone_and_change_their_rank() -> None:
    left = wrap_(experts("mixtral"), lora(leave_out=["gate_up_proj", "down_proj"]))
    assert not [path for path in left if "experts" in path]
    model = experts("mixtral")
    assert {path.rpartition(".")[2] for path in wrap_(model, lora(target_modules=["gate_up_proj"]))} == {"gate_up_proj"}
    new_adapters_all_(model, lora(lora_rank=2), 0)
    redraw_all_(model, seed=0, boundary=0)
    assert {tuple(layer.lora_A.shape) for layer in low_rank_layers(model).values()} == {(3, 2, 32)}
    assert logits(model).isfinite().all()
