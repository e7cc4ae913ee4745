"""What a merge does to the Adam state of the adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from relora_ray.keyed import key
from relora_ray.methods.lowrank.config import ResetConfig
from relora_ray.modeling.optim import MOMENTS


@torch.no_grad()
def prune_state_(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    reset: ResetConfig,
    *,
    seed: int,
    boundary: int,
    as_published: bool = False,
) -> float:
    """Prune m and v of the named parameters in place; returns the share of their entries that is zero now.

    m and v share one mask: an entry with m but v = 0 would be divided by eps, and weights would jump. Masks of kind
    random are keyed by (seed, boundary, name), so all ranks draw the same ones. `step` follows `reset.adam_step`.

    `as_published`: masks apart, and zero is random at 0.999 (reference `training_utils.py:optimizer_reset`).
    """
    zeros = torch.zeros((), dtype=torch.int64)
    total = 0
    for name, parameter in named:
        state = optimizer.state[parameter]
        if reset.kind != "none":
            shared = None if as_published else _kept(state["exp_avg"], reset, key(seed, "prune", boundary, name))
            for moment in MOMENTS:
                keep = shared
                if keep is None:
                    keep = _kept_as_published(state[moment], reset, key(seed, "prune", boundary, name, moment))
                # where and not mul: 0 * inf would be nan.
                state[moment].copy_(torch.where(keep, state[moment], 0.0))
            if reset.adam_step == "reset":
                state["step"].zero_()
        zeros += sum((state[moment] == 0).sum() for moment in MOMENTS).cpu()
        total += 2 * parameter.numel()
    return zeros.item() / max(1, total)


def _kept(m: torch.Tensor, reset: ResetConfig, seed: int) -> torch.Tensor:
    """Mask of the entries that survive, chosen by the first moment."""
    if reset.kind == "zero":
        return torch.zeros_like(m, dtype=torch.bool)
    if reset.kind == "random":
        return _kept_at_random(m, reset.ratio, seed)
    return _kept_by_magnitude(m, max(1, round(reset.ratio * m.numel())))


def _kept_as_published(moment: torch.Tensor, reset: ResetConfig, seed: int) -> torch.Tensor:
    if reset.kind != "magnitude":
        return _kept_at_random(moment, 0.999 if reset.kind == "zero" else reset.ratio, seed)
    # torch.quantile's threshold lies between the entries at floor(q (n - 1)) and the next: the first is pruned.
    return _kept_by_magnitude(moment, math.floor(reset.ratio * (moment.numel() - 1)) + 1)


def _kept_at_random(moment: torch.Tensor, ratio: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(moment.shape, generator=generator) >= ratio).to(moment.device)


def _kept_by_magnitude(moment: torch.Tensor, num_pruned: int) -> torch.Tensor:
    # kthvalue and not quantile, which torch refuses above 2**24 elements. Ties with the threshold go.
    magnitude = moment.abs()
    return magnitude > magnitude.flatten().kthvalue(num_pruned).values
