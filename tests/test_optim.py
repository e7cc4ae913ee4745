"""AdamW against torch's own, and what a reset leaves of its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from relora_ray.config import OptimizerConfig
from relora_ray.methods.lowrank.config import ResetConfig
from relora_ray.methods.lowrank.reset import prune_state_
from relora_ray.modeling.optim import build_adamw, take_over_state_

CFG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    optimizer = build_adamw(model, CFG)
    for step in range(steps):
        model(torch.randn(7, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_materialised_state_steps_like_torchs_own_adamw() -> None:
    model, _ = trained()
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    matrices = [p for p in other.parameters() if p.ndim == 2]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8, foreach=False,
    )  # fmt: skip
    for step in range(3):
        other(torch.randn(7, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # fused and plain round differently


def test_frozen_parameters_get_no_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = build_adamw(model, CFG)
    assert set(optimizer.state) == set(model[1].parameters())


@pytest.mark.parametrize("adam_step", ["reset", "keep"])
@pytest.mark.parametrize("kind", ["zero", "magnitude", "random", "none"])
def test_reset_leaves_exactly_what_its_kind_says(kind: str, adam_step: str) -> None:
    model, optimizer = trained()
    reset = ResetConfig(kind=kind, ratio=0.7, adam_step=adam_step)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    named = [("first", model[0].weight), ("second", model[2].weight)]
    share = prune_state_(optimizer, named, reset, seed=1, boundary=9)
    after = optimizer.state_dict()["state"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    kept_entries, entries = 0, 0
    for number, parameter in enumerate(order):
        was, now = before[number], after[number]
        if not any(parameter is p for _, p in named):
            assert all(torch.equal(was[k], now[k]) for k in was)
            continue
        kept = now["exp_avg"] != 0
        assert torch.equal(kept, now["exp_avg_sq"] != 0), "m and v share one mask"
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[moment], torch.where(kept, was[moment], 0.0))
        assert now["step"] == (0 if kind != "none" and adam_step == "reset" else 3)
        if kind == "magnitude":
            assert int(kept.sum()) == kept.numel() - round(0.7 * kept.numel())
            assert was["exp_avg"][kept].abs().min() > was["exp_avg"][~kept].abs().max()
        kept_entries, entries = kept_entries + int(kept.sum()), entries + kept.numel()
    expected = {"zero": 0.0, "none": 1.0}.get(kind, 0.3)
    assert kept_entries / entries == pytest.approx(expected, abs=0.12)  # 50 entries: 2 standard deviations
    assert share == pytest.approx(1 - kept_entries / entries)


def test_random_mask_is_keyed_by_seed_boundary_and_name() -> None:
    def kept(name: str, seed: int, boundary: int) -> torch.Tensor:
        model, optimizer = trained()
        reset = ResetConfig(kind="random", ratio=0.5)
        prune_state_(optimizer, [(name, model[0].weight)], reset, seed=seed, boundary=boundary)
        return optimizer.state[model[0].weight]["exp_avg"] != 0

    assert torch.equal(kept("a", 1, 9), kept("a", 1, 9))
    for other in (kept("b", 1, 9), kept("a", 2, 9), kept("a", 1, 10)):
        assert not torch.equal(kept("a", 1, 9), other)


def test_magnitude_prunes_tensors_that_quantile_refuses() -> None:
    """torch.quantile, which the reference uses, fails above 2**24 elements."""
    parameter = nn.Parameter(torch.zeros(2**12, 2**12 + 1))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    m = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": torch.ones_like(m)}
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(m.flatten(), 0.95)
    share = prune_state_(optimizer, [("x", parameter)], ResetConfig(kind="magnitude"), seed=0, boundary=1)
    assert share == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("kind", ["zero", "magnitude", "random"])
def test_weights_move_at_most_twice_the_learning_rate_per_step_after_a_reset(kind: str, beta2: float) -> None:
    """The reference masks m and v apart and keeps Adam's step: its max abs(A) jumps 20-fold within two steps."""
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.rand(64, 32) * 0.1)
    lr = 1e-2
    optimizer = build_adamw(nn.ParameterList([parameter]), OptimizerConfig(learning_rate=lr, beta2=beta2))
    for step in range(200):
        parameter.grad = torch.randn(64, 32) * (10 if step < 190 else 0.01)  # a reset must not trust old scales
        optimizer.step()
    prune_state_(optimizer, [("x", parameter)], ResetConfig(kind=kind), seed=0, boundary=200)
    start = parameter.detach().clone()
    for step in range(1, 11):
        parameter.grad = torch.randn(64, 32) * 0.01
        optimizer.step()
        assert (parameter - start).abs().max() <= 2 * lr * step
        assert parameter.abs().max() <= start.abs().max() + 2 * lr * step


def test_taking_over_keeps_shared_moments_only() -> None:
    model, optimizer = trained()
    model[0].weight.requires_grad_(False)
    new = build_adamw(model, CFG)
    assert take_over_state_(new, optimizer) == 5
    assert model[0].weight not in new.state
    assert new.state[model[2].weight] is optimizer.state[model[2].weight]
    assert not math.isclose(float(new.state[model[2].weight]["exp_avg"].abs().sum()), 0)
