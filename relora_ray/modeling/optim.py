"""AdamW over a model's trainable parameters, and what there is of an optimizer's state.

The state of every trainable parameter exists from the start (zeros), so what a checkpoint can hold is a
function of the model alone and a resume restores into tensors that are already there.
"""

from __future__ import annotations

import torch
from torch import nn

from relora_ray.config import OptimizerConfig
from relora_ray.config.section import nearest

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) over `model`'s trainable parameters.

    Matrices decay; tensors of one dimension or none do not (norms, biases, scalars), and neither do biases of more
    (of experts, of heads), what state space models call A_log and D, what an architecture marks, and norms of several
    heads. The learning rate is set by the loop at every step.
    """
    groups = [{"params": params, "weight_decay": decay} for params, decay in decayed(model, cfg.weight_decay)]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        fused=True,
    )
    for parameter in trainable(model):
        optimizer.state[parameter] = fresh_state(parameter)
    return optimizer


def decayed(model: nn.Module, weight_decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """What is trained, in two parts with their decay: that which decays, and that which does not."""
    spared = _without_decay(model)
    return [
        ([p for p in trainable(model) if p not in spared], weight_decay),
        ([p for p in trainable(model) if p in spared], 0.0),
    ]


def _without_decay(model: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim < 2 and not getattr(parameter, "_of_a_matrix", False))
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


def refuse_unknown_options(optimizer: torch.optim.Optimizer) -> None:
    """TypeError if a parameter group has a setting that nobody reads, such as a misspelt `lr_ratio`."""
    known = optimizer.defaults.keys() | {"params", "param_names", "lr_ratio"}
    for group in optimizer.param_groups:
        for name in group.keys() - known:
            fix = nearest(name, sorted(known)) or " Remove it, or give it a default in the optimizer's class."
            raise TypeError(f"a parameter group has {name}={group[name]!r}, which no one reads.{fix}")


def take_over_state_(optimizer: torch.optim.Optimizer, previous: torch.optim.Optimizer) -> int:
    """Move the state of parameters that both optimizers train from `previous`; returns how many there are.

    At the end of a warm start: embeddings, norms and head keep their moments, adapters begin without.
    """
    shared = [p for p in optimizer.state if p in previous.state]
    for parameter in shared:
        optimizer.state[parameter] = previous.state[parameter]
    return len(shared)


def fresh_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What AdamW itself would make at a parameter's first update (fused: step is an fp32 tensor)."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
    }
