"""The low-rank layer on LLaMA, Pythia, Qwen and GPT-2: wrapping, merging, redrawing, folding."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from relora_ray.errors import ConfigError
from relora_ray.methods.adapter import adapter_parameters, merge_all_, redraw_all_
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import (
    LowRankLinear,
    folded_state_dict,
    join_bf16_int8,
    keep_effective_all_,
    low_rank_layers,
    split_bf16_int8,
    wrap_,
)
from relora_ray.methods.lowrank.lora import Lora
from tests.tiny import tiny_config

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}, 7),
    "pythia": (transformers.GPTNeoXConfig, {**SMALL, "intermediate_size": 48}, 4),
    "qwen": (transformers.Qwen2Config, {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}, 7),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, 4),
}


def build(name: str, tied: bool) -> nn.Module:
    config_class, settings, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = config_class(**settings, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def logits(model: nn.Module, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def shake_(model: nn.Module, scale: float = 0.3) -> None:
    """Give every adapter parameter values as after some training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * scale)


ALL = list(itertools.product(ARCHITECTURES, [False, True]))


@pytest.fixture(params=ALL, ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}")
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(*request.param)


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"lora_rank": 4, "alpha": 10.0, **settings})


def test_wrapping_leaves_the_function_unchanged_and_every_block_linear_wrapped(model: nn.Module) -> None:
    before = logits(model)
    names = wrap_(model, lora())
    redraw_all_(model, seed=1, boundary=0)
    expected = next(count for cls, _, count in ARCHITECTURES.values() if cls is type(model.config))
    assert len(names) == 2 * expected
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)  # Conv1D and F.linear round apart
    assert not isinstance(model.get_output_embeddings(), LowRankLinear)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{n}.weight" for n in names}


def test_first_step_gives_every_b_a_gradient(model: nn.Module) -> None:
    """The published code zeroes A as well when it wraps: no adapter learns before the first merge."""
    wrap_(model, lora())
    redraw_all_(model, seed=1, boundary=0)
    ids = torch.randint(0, 64, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    for path, layer in low_rank_layers(model).items():
        assert layer.lora_B.grad is not None, path
        assert layer.lora_B.grad.abs().max() > 0, path


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_merge_keeps_the_function(model: nn.Module, trainable_scaling: bool) -> None:
    wrap_(model, lora(trainable_scaling=trainable_scaling))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    before = logits(model)
    plain = copy.deepcopy(model)
    redraw_all_(plain, seed=1, boundary=0)
    assert (logits(plain) - before).abs().max() > 1e-2, "the adapters must matter, or this shows nothing"
    merge_all_(model)
    redraw_all_(model, seed=1, boundary=7)
    assert (logits(model) - before).abs().max() <= 1e-5 * before.abs().max()


def test_merge_uses_the_scale(model: nn.Module) -> None:
    wrap_(model, lora())
    shake_(model)
    layer = next(iter(low_rank_layers(model).values()))
    weight = layer.weight.detach().clone()
    expected = 2.5 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()  # alpha / rank = 10 / 4
    layer.merge_()
    change = (
        (layer.weight.double() - weight.double()).T if layer.transposed else layer.weight.double() - weight.double()
    )
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_folded_state_dict_loads_into_the_plain_architecture(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    wrap_(model, lora(trainable_scaling=True))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    plain.load_state_dict(folded_state_dict(model), strict=True)
    assert (logits(plain) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items()), "folding changes nothing"


def test_redraw_depends_on_seed_boundary_and_path_alone() -> None:
    first, second = build("llama", False), build("llama", False)
    for model in (first, second):
        wrap_(model, lora())
    torch.manual_seed(11)
    redraw_all_(first, seed=1, boundary=5)
    torch.manual_seed(99)
    torch.rand(1000)
    redraw_all_(second, seed=1, boundary=5)
    a = [p for n, p in adapter_parameters(first) if n.endswith("lora_A")]
    b = [p for n, p in adapter_parameters(second) if n.endswith("lora_A")]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
    for seed, boundary in ((2, 5), (1, 6)):
        redraw_all_(second, seed=seed, boundary=boundary)
        assert not torch.equal(a[0], b[0])


def test_a_is_kaiming_uniform() -> None:
    model = build("llama", False)
    wrap_(model, lora(lora_rank=16))
    redraw_all_(model, seed=1, boundary=0)
    for layer in low_rank_layers(model).values():
        reference = torch.empty(layer.lora_A.shape)
        nn.init.kaiming_uniform_(reference, a=5**0.5)
        assert layer.lora_A.abs().max() <= 1 / layer.lora_A.shape[1] ** 0.5
        assert float(layer.lora_A.detach().std()) == pytest.approx(float(reference.std()), rel=0.1)
        assert not layer.lora_B.any()


def test_trainable_scaling_stays_alive_after_a_merge() -> None:
    """The reference zeroes the scale and B together: from then on neither has a gradient."""
    model = build("llama", False)
    wrap_(model, lora(trainable_scaling=True))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    merge_all_(model)
    redraw_all_(model, seed=1, boundary=3)
    optimizer = torch.optim.SGD([p for _, p in adapter_parameters(model)], lr=0.5)
    ids = torch.randint(0, 64, (2, 9))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for path, layer in low_rank_layers(model).items():
        assert layer.lora_gain is not None
        assert layer.lora_gain.grad != 0, path
        assert layer.lora_A.grad is not None
        assert layer.lora_A.grad.abs().max() > 0, path


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    linear = nn.Linear(16, 16)
    assert LowRankLinear(copy.deepcopy(linear), lora(rslora=True)).scale == 10 / 4**0.5
    assert LowRankLinear(copy.deepcopy(linear), lora()).scale == 10 / 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merge_into_fp32_weights_changes_no_bit_of_the_function(model: nn.Module, precision: str) -> None:
    """Live layer and merge add up the same fp32 matrix before it is rounded to the dtype of the computation."""
    wrap_(model, lora(trainable_scaling=True))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        before = logits(model)
        merge_all_(model)
        redraw_all_(model, seed=1, boundary=7)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("frozen_weights", ["fp32", "bf16_int8", "bf16"])
@pytest.mark.parametrize("gain", [False, True])
def test_gradients_are_those_of_the_factored_layer(model: nn.Module, frozen_weights: str, gain: bool) -> None:
    """The merged matrix's own backward, against autograd through two branches (dropout so small that it drops none)."""
    wrap_(model, lora(frozen_weights=frozen_weights, trainable_scaling=gain))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    model.train()
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    gradients = []
    for dropout in (0.0, 1e-12):
        for layer in low_rank_layers(model).values():
            layer.dropout = dropout
        torch.manual_seed(0)  # GPT-2 has dropout of its own
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    merged, factored = gradients
    assert merged.keys() == factored.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in factored.items():
        if type(model).__name__ == "GPT2LMHeadModel":
            continue  # its own dropout draws after ours: other masks
        assert (merged[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name  # a gain sums what cancels


def test_int8_residual_keeps_24_bits() -> None:
    torch.manual_seed(0)
    values = torch.cat(
        [torch.randn(100_000) * 10.0**e for e in (-6, -2, 0, 3)] + [torch.tensor([0.0, -0.0, 1.0, -2.0])]
    )
    values = torch.cat([values, torch.nextafter(torch.tensor([1.0, 2.0, -4.0]), torch.tensor(0.0))])  # carries
    high, low = split_bf16_int8(values)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int8)
    restored = join_bf16_int8(high, low)
    assert ((restored - values).abs() <= values.abs() * 2**-16).all()
    assert ((high.float() - values).abs() <= values.abs() * 2**-8).all(), "alone it is the nearest bf16"
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -(2**23)], dtype=torch.int32).view(torch.float32)
    assert odd[:3].isnan().all()
    torch.testing.assert_close(join_bf16_int8(*split_bf16_int8(odd)), odd, equal_nan=True)  # nan must stay nan
    again = split_bf16_int8(restored)
    assert torch.equal(again[0].view(torch.int16), high.view(torch.int16))
    assert torch.equal(again[1], low)


@pytest.mark.parametrize(("frozen_weights", "bound"), [("fp32", 1e-3), ("bf16_int8", 2e-2), ("bf16", None)])
def test_merge_under_bf16_applies_the_exact_change(frozen_weights: str, bound: float | None) -> None:
    """Over 20 merges of realistic size. At rms 1e-5 16 bits of mantissa are 1.3 % off; plain bf16 loses nearly all."""
    for rms in (1e-3, 1e-4, 1e-5):
        torch.manual_seed(0)
        linear = nn.Linear(256, 192, bias=False)
        nn.init.normal_(linear.weight, std=0.02)
        layer = LowRankLinear(linear, lora(lora_rank=16, frozen_weights=frozen_weights))
        start, exact = layer.frozen().double(), torch.zeros(192, 256, dtype=torch.float64)
        for merge in range(20):
            layer.redraw_(merge)
            with torch.no_grad():
                layer.lora_B.normal_()
                layer.lora_B.mul_(rms / (layer.scale * layer.lora_B @ layer.lora_A).square().mean().sqrt())
            exact += layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
            with torch.autocast("cpu", torch.bfloat16):  # a merge inside autocast must not round either
                layer.merge_()
        error = float((layer.frozen().double() - start - exact).norm() / exact.norm())
        if bound is None:
            assert error > (0.01 if rms == 1e-3 else 0.1), f"rms {rms}: {error:.2e}"
        else:
            assert error < bound, f"rms {rms}: {error:.2e}"


def test_frozen_weights_hold_no_gradient() -> None:
    """It would be a view of the buckets that DDP had while all weights were trained."""
    model = build("llama", False)
    ids = torch.randint(0, 64, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    wrap_(model, lora())
    assert all(layer.weight.grad is None for layer in low_rank_layers(model).values())


def test_backward_inside_autocast_is_the_same() -> None:
    layer = LowRankLinear(nn.Linear(16, 8), lora())
    layer.redraw_(1)
    nn.init.normal_(layer.lora_B)
    gradients = []
    for inside in (False, True):
        x = torch.ones(3, 16, requires_grad=True)
        loss = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_name_that_matches_nothing_is_an_error() -> None:
    model = build("gpt2", True)
    with pytest.raises(ConfigError, match=r"'q_proj', which is the last path segment of no.*c_attn, c_fc, c_proj"):
        wrap_(model, lora(target_modules=("c_attn", "q_proj")))
    assert not low_rank_layers(model), "nothing is wrapped when one name is wrong"


def test_names_match_the_last_segment_only() -> None:
    model = build("pythia", False)
    assert {p.rpartition(".")[2] for p in wrap_(model, lora(target_modules=("dense",)))} == {"dense"}
    with pytest.raises(ConfigError, match="'attention'"):
        wrap_(build("pythia", False), lora(target_modules=("attention",)))


def test_layer_that_is_too_narrow_for_the_rank_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama", False)
    wrapped = wrap_(model, lora(lora_rank=17))
    assert wrapped
    assert not [path for path in wrapped if path.endswith(("k_proj", "v_proj"))]
    assert "self_attn.k_proj: their smaller side is less than method.lora_rank=17" in caplog.text
    assert model.get_submodule("model.layers.0.self_attn.k_proj").weight.requires_grad


def test_rank_above_the_smaller_side_of_all_or_of_one_that_is_named_is_an_error() -> None:
    model = build("llama", False)
    with pytest.raises(ConfigError, match=r"method.lora_rank=17 is more than 16, the smaller side of .*k_proj"):
        wrap_(model, lora(lora_rank=17, target_modules=["k_proj"]))
    with pytest.raises(ConfigError, match=r"no matrix in its blocks that can have adapters: their smaller side"):
        wrap_(model, lora(lora_rank=1000))
    assert not low_rank_layers(model)


def is_fresh(layer: LowRankLinear) -> bool:
    """Whether a layer that keeps its effective weight computes what one that rebuilds it does, forward and backward."""
    rebuilt = copy.deepcopy(layer)
    rebuilt.effective = None
    x = torch.randn(5, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for each in (layer, rebuilt):
        rows = x.clone().requires_grad_()
        y = each(rows)
        y.sum().backward()
        found.append((y, rows.grad, each.lora_A.grad, each.lora_B.grad))
        each.zero_grad()
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_kept_effective_weight_is_never_stale(transposed: bool, tmp_path: Path) -> None:
    """After an update by the fused optimizer, which raises no versions on the CPU, a merge, a draw, a load, a change by
    hand, and a change of rank."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.layers = nn.ModuleList([transformers.pytorch_utils.Conv1D(24, 16) if transposed else nn.Linear(16, 24)])
    cfg = LoraConfig(lora_rank=4, alpha=64)
    wrap_(holder, cfg)
    keep_effective_all_(holder, torch.bfloat16)
    redraw_all_(holder, seed=0, boundary=0)
    layer = holder.layers[0]
    assert isinstance(layer, LowRankLinear)
    assert layer.effective is not None
    before = layer.effective.clone()
    assert is_fresh(layer)
    optimizer = Lora(tiny_config(tmp_path, tmp_path)).build_optimizer(holder)
    for _ in range(3):
        layer(torch.randn(5, 16).bfloat16()).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert is_fresh(layer)
    assert not torch.equal(layer.effective, before), "it has moved"
    merge_all_(holder)
    redraw_all_(holder, seed=0, boundary=7)
    assert is_fresh(layer)
    assert layer._kept(torch.bfloat16) is layer.effective
    with torch.no_grad():
        layer.lora_B.add_(1.0)
    assert is_fresh(layer)
    layer.load_state_dict({name: tensor * 2 for name, tensor in layer.state_dict().items()})
    assert is_fresh(layer)
    layer.new_adapters_(LoraConfig(lora_rank=2), 0)
    layer.redraw_(3)
    assert is_fresh(layer)
    assert layer._kept(torch.bfloat16) is layer.effective
    assert layer._kept(torch.float32) is None, "another precision is computed from the weights"


def test_kept_effective_weight_belongs_to_no_checkpoint() -> None:
    holder = nn.Module()
    holder.layers = nn.ModuleList([nn.Linear(16, 24)])
    wrap_(holder, LoraConfig(lora_rank=4))
    names = set(holder.state_dict())
    keep_effective_all_(holder, torch.bfloat16)
    assert set(holder.state_dict()) == names
    assert holder.layers[0].effective.dtype == torch.bfloat16


def test_weight_that_changes_between_forward_and_backward_is_an_error() -> None:
    layer = LowRankLinear(nn.Linear(16, 24), LoraConfig(lora_rank=4))
    layer.keep_effective_(torch.float32)
    y = layer(torch.randn(5, 16, requires_grad=True))
    layer.redraw_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def together(model: nn.Module) -> list[set[str]]:
    """Names of the layers that are computed together, group by group."""
    groups: dict[int, set[str]] = {}
    for path, layer in low_rank_layers(model).items():
        if layer.together is not None:
            groups.setdefault(id(layer.together), set()).add(path.rpartition(".")[2])
    return list(groups.values())


def alone_(model: nn.Module) -> None:
    for layer in low_rank_layers(model).values():
        layer.together = None


@pytest.mark.parametrize(("name", "expected"), [
    ("llama", [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] * 2), ("pythia", []), ("gpt2", []),
])  # fmt: skip
def test_layers_with_one_input_are_put_together(name: str, expected: list[set[str]]) -> None:
    model = build(name, tied=False)
    wrap_(model, lora())
    assert together(model) == expected


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 6e-2)])
@pytest.mark.parametrize("kept", [False, True])
def test_together_is_as_alone(precision: str, bound: float, kept: bool) -> None:
    model = build("qwen", tied=False).train()  # it has biases, and fewer key heads than query heads
    wrap_(model, lora(trainable_scaling=True))
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    if kept:
        keep_effective_all_(model, torch.bfloat16 if precision == "bf16" else torch.float32)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    gradients, values = [], []
    for prepare in (lambda _: None, alone_):
        prepare(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert values[0] == pytest.approx(values[1], rel=bound / 10)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        if not name.endswith("k_proj.bias"):  # adds the same to all scores: its gradient is rounding
            slack = 10 if name.endswith("lora_gain") else 1  # a gain sums what cancels
            assert (gradients[0][name] - gradient).norm() <= slack * bound * gradient.norm() + 1e-6, name


def test_input_is_saved_once_for_all_that_share_it() -> None:
    model = build("llama", tied=False)
    wrap_(model, lora())
    attention = next(m for n, m in model.named_modules() if n.endswith("self_attn"))

    def saved() -> int:
        """Copies of the input that are kept for the backward pass."""
        kept: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape == x.shape:
                kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            outputs.append([attention.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj")])
        return len(kept)

    x = torch.randn(2, 9, 32)
    outputs: list[list[torch.Tensor]] = []
    assert saved() == 1
    alone_(model)
    assert saved() == 3
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_layers_with_inputs_of_their_own_are_computed_right() -> None:
    model = build("llama", tied=False)
    wrap_(model, lora())
    redraw_all_(model, seed=1, boundary=0)
    shake_(model)
    gate = next(layer for path, layer in low_rank_layers(model).items() if path.endswith("gate_proj"))
    assert gate.together is not None
    up = gate.together.layers[1]
    refreshed = copy.deepcopy(up)
    x, other = torch.randn(3, 32), torch.randn(3, 32)
    gate(x)
    with torch.no_grad():
        up.lora_B.add_(1.0)
        refreshed.lora_B.add_(1.0)
    gate.refresh_()  # as after every update: what was computed before it is dropped
    refreshed.together = None
    assert torch.equal(up(x), refreshed(x))
    assert torch.equal(up(other), refreshed(other)), "gate's was left over, and is for another input"
    assert gate.together is None
    assert up.together is None
