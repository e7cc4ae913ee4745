"""Activation recomputation (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): of each block only the
input is kept for the backward pass, which computes the rest again.

transformers knows what a block is and calls `torch.utils.checkpoint` there; this sets it on for all blocks of a model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from relora_ray.errors import ConfigError


def recompute_blocks_(model: nn.Module) -> int:
    """Have all blocks of a model of transformers recomputed while it trains; how many. Losses and gradients are the
    same bit for bit: the same operations in the same order, dropout's draws included. What `torch.compile` makes of
    them may round otherwise.

    ConfigError if its class has no blocks that transformers knows: nothing would be saved, in silence.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            f"train.recompute=true: {type(model).__name__} has no blocks that transformers can compute again, so that "
            f"nothing would be saved. Remove it, or lower train.micro_batch_rows."
        )
    # A parameter that is computed is computed once in a pass over the model, and so in a pass over a block.
    again = partial(checkpoint, use_reentrant=False)
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        again = partial(again, context_fn=_contexts)
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, again
    return len(blocks)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first computation, and around the second."""
    return nullcontext(), parametrize.cached()
