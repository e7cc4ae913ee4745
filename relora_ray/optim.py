"""AdamW over a model's trainable parameters, and the surgery ReLoRA does on its state.

The state of every trainable parameter exists from the start (zeros), so what a checkpoint can hold is a
function of the model alone and a resume restores into tensors that are already there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from relora_ray.config import OptimizerConfig, ResetConfig
from relora_ray.keyed import key

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) over `model`'s trainable parameters.

    Matrices decay; tensors of one dimension or none do not (norms, biases, scalars), and neither do biases of more
    (of experts, of heads), what state space models call A_log and D, what an architecture marks, and norms of several
    heads. The learning rate is set by the loop at every step.
    """
    spared = _without_decay(model)
    groups = [
        {"params": [p for p in trainable(model) if p not in spared], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable(model) if p in spared], "weight_decay": 0.0},
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


def _without_decay(model: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2
        or (parameter.ndim > 2 and sum(size > 1 for size in parameter.shape) < 2)  # a vector: RWKV's time_mix
        or "norm" in type(module).__name__.lower()
        or name in ("A_log", "D")
        or name.endswith("bias")
        or getattr(parameter, "_no_weight_decay", False)
    }


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that an optimizer keeps, sharing its memory: by `<parameter>.<key>`, in an order that is the model's.

    TypeError if it keeps what is no tensor, or anything of what is no parameter: a checkpoint would drop it.
    """
    found: dict[str, torch.Tensor] = {}
    kept = dict(optimizer.state)
    for name, parameter in model.named_parameters():
        state = kept.pop(parameter, {})
        for key_ in sorted(state, key=lambda key_: (key_ != "step", key_)):
            if not isinstance(state[key_], torch.Tensor) or "." in key_:
                raise TypeError(
                    f"the optimizer keeps {key_}={state[key_]!r} of {name}. A checkpoint holds tensors, under keys "
                    f"without a dot: make it one, such as torch.tensor(...)."
                )
            found[f"{name}.{key_}"] = state[key_]
    if kept:
        raise TypeError(
            f"the optimizer keeps {sorted(next(iter(kept.values())))} of what is no parameter of the model. A "
            f"checkpoint holds what is kept of parameters: keep it there."
        )
    return found


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of a training state on each worker, by role, counted from its tensors and each once.

    weights: parameters and persistent buffers. derived: buffers that no checkpoint holds, such as effective weights.
    gradients: of all that is trained, whether they are there at the moment or not. optimizer: all that it keeps.
    """
    held = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    buffers = {id(t): t for t in model.buffers() if id(t) not in held}
    kept = {id(t): t for t in state_tensors(model, optimizer).values()}
    return {
        "weights": sum(t.nbytes for t in held.values()),
        "derived": sum(t.nbytes for t in buffers.values()),
        "gradients": sum(p.nbytes for p in trainable(model)),
        "optimizer": sum(t.nbytes for t in kept.values()),
    }


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Of each parameter group, all settings but the learning rate: what has to stay as it was built, as no checkpoint
    holds it."""
    return [{k: repr(v) for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


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


def _fresh_state(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW itself would make at a parameter's first update (fused: step is an fp32 tensor)."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
    }
