"""AdamW over a model's trainable parameters, and the surgery ReLoRA does on its state.

The state of every trainable parameter exists from the start (zeros), so what a checkpoint can hold is a
function of the model alone and a resume restores into tensors that are already there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from relora_ray.config import OptimizerConfig, ResetConfig
from relora_ray.keyed import key

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_NAMES = ("step", *MOMENTS)


def build_adamw(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) over `model`'s trainable parameters.

    Matrices decay, tensors of one dimension or none (norms, biases, scalars) do not. The learning rate is set
    by the loop at every step.
    """
    groups = [
        {"params": [p for p in trainable(model) if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable(model) if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )
    for parameter in trainable(model):
        optimizer.state[parameter] = _fresh_state(parameter)
    return optimizer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def take_over_state_(optimizer: torch.optim.Optimizer, previous: torch.optim.Optimizer) -> int:
    """Move the state of parameters that both optimizers train from `previous`; returns how many there are.

    At the end of a warm start: embeddings, norms and head keep their moments, adapters begin without.
    """
    shared = [p for p in optimizer.state if p in previous.state]
    for parameter in shared:
        optimizer.state[parameter] = previous.state[parameter]
    return len(shared)


@torch.no_grad()
def prune_state_(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, nn.Parameter]],
    reset: ResetConfig,
    *,
    seed: int,
    boundary: int,
) -> float:
    """Prune m and v of the named parameters in place; returns the share of their entries that is zero now.

    m and v share one mask: an entry with m but v = 0 would be divided by eps (the reference masks them apart,
    `training_utils.py:optimizer_reset`, and its adapters jump after a merge). Masks of kind random are keyed by
    (seed, boundary, name), so all ranks draw the same ones. `step` follows `reset.adam_step`.
    """
    zeros = torch.zeros((), dtype=torch.int64)
    total = 0
    for name, parameter in named:
        state = optimizer.state[parameter]
        if reset.kind != "none":
            _prune_moments_(state, reset, key(seed, "prune", boundary, name))
            if reset.adam_step == "reset":
                state["step"].zero_()
        zeros += (state["exp_avg"] == 0).sum().cpu()
        total += parameter.numel()
    return zeros.item() / max(1, total)


def _prune_moments_(state: dict[str, torch.Tensor], reset: ResetConfig, seed: int) -> None:
    if reset.kind == "zero":
        for moment in MOMENTS:
            state[moment].zero_()
        return
    m = state["exp_avg"]
    if reset.kind == "magnitude":
        # kthvalue and not quantile, which torch refuses above 2**24 elements. Ties with the threshold go.
        magnitude = m.abs().flatten()
        pruned_count = max(1, round(reset.ratio * m.numel()))
        keep = m.abs() > magnitude.kthvalue(pruned_count).values
    else:
        generator = torch.Generator().manual_seed(seed)
        keep = (torch.rand(m.shape, generator=generator) >= reset.ratio).to(m.device)
    for moment in MOMENTS:
        # where and not mul: 0 * inf would be nan.
        state[moment].copy_(torch.where(keep, state[moment], 0.0))


def _fresh_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW itself would make at a parameter's first update (fused: step is an fp32 tensor)."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
    }
