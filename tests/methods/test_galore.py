"""GaLore: what its row of the methods says, on real matrices."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.config.file import load_config
from relora_ray.conformance.processes import run_ranks
from relora_ray.loop import run_attempt
from relora_ray.methods.base import build_method
from relora_ray.methods.projected import galore
from relora_ray.methods.projected.optimizer import ProjectedAdam, leading_basis, project, project_back
from relora_ray.modeling.model import build_model
from relora_ray.modeling.optim import state_bytes, trainable
from relora_ray.modeling.parallel import World
from relora_ray.runs.metrics import Record
from relora_ray.runs.setting import check_run
from tests.conftest import ROOT
from tests.tiny import live, losses, run, state_digest, tiny_config

PLAIN = {"kind": "cosine", "warmup_steps": 1}
GALORE = {"kind": "galore", "rank": 4, "refresh_every_steps": 3}


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(data, tmp_path, method=GALORE, schedule=PLAIN)


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8), (3, 12, 8), (3, 8, 12)])
def test_basis_is_that_of_the_smaller_side(shape: tuple[int, ...]) -> None:
    gradient = matrix(*shape)
    basis = leading_basis(gradient, 3)
    assert basis.shape == (*shape[:-2], 8, 3)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(*shape[:-2], 3, 3), rtol=0, atol=1e-5)
    u, s, vh = torch.linalg.svd(gradient)
    best = (u[..., :3] * s[..., None, :3]) @ vh[..., :3, :]
    torch.testing.assert_close(project_back(project(gradient, basis), basis, gradient.shape), best, rtol=0, atol=1e-4)
    assert torch.equal(basis, leading_basis(gradient * 2, 3)), "signs do not depend on the library's choice"


def test_one_step_is_that_of_the_equations() -> None:
    """Written from the equations alone, in double precision."""
    p, other = nn.Parameter(matrix(6, 4)), nn.Parameter(matrix(5, seed=1))
    w, b = p.detach().double(), other.detach().double()
    optimizer = ProjectedAdam(
        [{"params": [p], "rank": 2, "alpha": 0.25}, {"params": [other]}], lr=0.1, betas=(0.9, 0.999), eps=1e-6
    )
    m, v, mb, vb = 0.0, 0.0, 0.0, 0.0
    for step in range(1, 6):
        p.grad, other.grad = matrix(6, 4, seed=step), matrix(5, seed=10 + step)
        if step in (1, 4):
            basis = leading_basis(p.grad, 2)
            optimizer.state[p]["basis"].copy_(basis)
        low = p.grad.double() @ basis.double()
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        normed = m / (1 - 0.9**step) / (torch.sqrt(v / (1 - 0.999**step)) + 1e-6)
        w = w - 0.1 * 0.25 * normed @ basis.double().T
        mb, vb = 0.9 * mb + 0.1 * other.grad.double(), 0.999 * vb + 0.001 * other.grad.double() ** 2
        b = b - 0.1 * mb / (1 - 0.9**step) / (torch.sqrt(vb / (1 - 0.999**step)) + 1e-6)
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.detach().double(), b, rtol=0, atol=1e-6)


def test_with_the_identity_it_is_alpha_times_adam_bitwise() -> None:
    """A basis of all singular vectors is not that: Adam goes entry by entry, and they turn the entries."""
    p, zero = nn.Parameter(matrix(12, 8)), nn.Parameter(torch.zeros(12, 8))
    optimizer = ProjectedAdam([{"params": [p], "rank": 8, "alpha": 0.25}], lr=0.01, betas=(0.9, 0.999), eps=1e-6)
    adam = torch.optim.AdamW([zero], lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    optimizer.state[p]["basis"].copy_(torch.eye(8))
    expected = p.detach().clone()
    for step in range(5):
        p.grad = matrix(12, 8, seed=step)
        zero.grad = p.grad.clone()
        optimizer.step()
        adam.step()
        expected.add_(zero.detach(), alpha=0.25)
        with torch.no_grad():
            zero.zero_()
        assert torch.equal(p.detach(), expected)


def test_moments_are_carried_over_and_the_basis_is_due_by_the_parameters_own_updates(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = galore.leading_basis

    def counted(gradient: torch.Tensor, rank: int) -> torch.Tensor:
        seen.append(1)
        return original(gradient, rank)

    monkeypatch.setattr(galore, "leading_basis", counted)
    # The update that is left out is none of a parameter's: bases are due at its updates 0, 3, 6, 9.
    skipping = cfg.model_copy(update={"train": cfg.train.model_copy(update={"skip_steps": (4,)})})
    state, records = run(skipping)
    assert len(seen) == 14 * 4
    assert [r["step"] - 1 for r in records if "svd_s" in r] == [0, 3, 7, 10]
    projected = [p for p in state.optimizer.state if "basis" in state.optimizer.state[p]]
    assert len(projected) == 14
    assert all(int(state.optimizer.state[p]["step"]) == 11 for p in projected)


def test_it_learns_and_its_update_lies_in_the_span(cfg: RunConfig) -> None:
    _, records = run(cfg.model_copy(update={"optimizer": cfg.optimizer.model_copy(update={"learning_rate": 1e-2})}))
    found = losses(records)
    assert found[12] < found[1] - 0.05
    p = nn.Parameter(matrix(16, 12))
    optimizer = ProjectedAdam([{"params": [p], "rank": 3, "alpha": 0.25}], lr=0.1, betas=(0.9, 0.999), eps=1e-6)
    p.grad = matrix(16, 12, seed=1)
    optimizer.state[p]["basis"].copy_(leading_basis(p.grad, 3))
    before = p.detach().clone()
    optimizer.step()
    assert int(torch.linalg.matrix_rank(p.detach() - before, rtol=1e-4)) == 3


def test_gradient_that_is_not_finite_leaves_the_basis_as_it_was(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SVD of it would fail."""
    from relora_ray import loop

    original = loop._accumulate_gradients

    def spoiled(*args: object) -> tuple[float, bool]:
        loss, wish = original(*args)
        return (math.nan if args[4] == 0 else loss), wish

    monkeypatch.setattr(loop, "_accumulate_gradients", spoiled)
    _, records = run(cfg)
    assert [r["step"] - 1 for r in records if "svd_s" in r] == [1, 4, 7, 10]


def test_state_bytes_at_60m_are_those_of_the_shapes() -> None:
    """By count on the meta device: r of the larger side twice, r of the smaller once, in fp32."""
    cfg = load_config(ROOT / "configs/galore/60m.yaml")
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=0, device="meta")
    method = build_method(cfg)
    method.adapt(model, 0)
    counted = state_bytes(model, method.build_optimizer(model))
    hidden, inner, blocks, vocabulary, rank = 512, 1376, 8, 32100, 128
    projected = blocks * (4 * (2 * hidden + hidden) + 3 * (2 * inner + hidden)) * rank
    plain = 2 * (2 * vocabulary * hidden + (2 * blocks + 1) * hidden)
    steps = len(trainable(model))
    assert counted["optimizer"] == 4 * (projected + plain + steps)
    weights = 2 * vocabulary * hidden + (2 * blocks + 1) * hidden + blocks * (4 * hidden**2 + 3 * hidden * inner)
    assert counted["weights"] == counted["gradients"] == 4 * weights
    assert counted["optimizer"] < 0.8 * 8 * weights, "Adam keeps 8 bytes a weight"


def whole(cfg: RunConfig) -> tuple[int, dict[int, float], int]:
    """On one of several ranks: digest of the last state, losses, SVDs done here."""
    records: list[dict[str, float]] = []
    done: list[int] = []
    original = galore.leading_basis
    galore.leading_basis = lambda g, r: done.append(1) or original(g, r)
    state = run_attempt(check_run(cfg), World.current(), on_record=records.append)
    return state_digest(state), losses(records), len(done)


@pytest.mark.parametrize("ranks", [2, 3])
def test_svds_are_spread_over_ranks_and_all_have_the_same(ranks: int, cfg: RunConfig) -> None:
    _, alone = run(cfg.model_copy(update={"name": "alone"}))
    told = run_ranks(ranks, whole, cfg)
    assert len({digest for digest, _, _ in told}) == 1
    assert sum(done for _, _, done in told) == 14 * 4
    assert max(done for _, _, done in told) <= math.ceil(14 / ranks) * 4
    assert told[0][1] == pytest.approx(losses(alone), rel=1e-5)


def interrupted_at_every_step(cfg: RunConfig) -> tuple[bool, list[dict[int, float]], dict[int, float]]:
    """On one of several ranks: whether the end is the same bits, the losses of every life, and those of a whole run."""
    records: list[Record] = []
    whole = run_attempt(check_run(cfg.model_copy(update={"name": "whole"})), World.current(), on_record=records.append)
    found = []
    for phase in ("train", "checkpoint"):
        broken = check_run(cfg.model_copy(update={"name": phase}))
        for step in [*(r["step"] for r in records if r["kind"] == phase), None]:
            attempt = partial(run_attempt, broken, World.current())
            state, life = live(lambda on_record, attempt=attempt: attempt(on_record=on_record), step, phase)
            found.append(losses(life))
    return state_digest(state) == state_digest(whole), found, losses(records)


@pytest.mark.parametrize("ranks", [2, 3])
def test_interrupted_is_uninterrupted_on_several_ranks(ranks: int, cfg: RunConfig) -> None:
    for same, lives, expected in run_ranks(ranks, interrupted_at_every_step, cfg):
        assert same
        for life in lives:
            assert life.items() <= expected.items()
        assert len(lives) > 15


KINDS = ("bool", "int8", "int16", "int64", "bfloat16", "float32", "float64")


def shared() -> dict[str, list[torch.Tensor]]:
    """Of works that give every type, several tensors, none, a scalar, an empty one and one in another order."""
    works: dict[str, Any] = {kind: lambda kind=kind: [torch.arange(3).to(getattr(torch, kind))] for kind in KINDS}
    works |= {"nothing": list, "scalar": lambda: [torch.tensor(2.0)], "empty": lambda: [torch.zeros(0, 3)]}
    works["turned"] = lambda: [torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3)]
    return World.current().shared(works)


@pytest.mark.slow
def test_all_that_a_work_can_give_comes_to_every_rank() -> None:
    alone = shared()
    assert alone["turned"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    for told in run_ranks(2, shared):
        assert told.keys() == alone.keys()
        for name, tensors in told.items():
            assert [(t.dtype, t.tolist()) for t in tensors] == [(t.dtype, t.tolist()) for t in alone[name]]
