"""The interface of a training method, and its rules.

A method keeps a run elastic by three promises. Every tensor that lives across steps is a parameter, a
persistent buffer or a tensor of the optimizer's state. Plans depend on the global step only, and random
numbers on (seed, tag, boundary) only. A boundary is a deterministic function of the state before it.

`step` counts finished updates everywhere: `adapt(model, step=300)` gives the structure that update 300 (the
301st) trains, and a boundary "after 300" lies between update 299 and update 300.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.optim import build_adamw


@dataclass(frozen=True)
class BoundaryReport:
    """What happened at a boundary."""

    step: int
    """Finished updates."""
    kind: str
    """"merge", or "switch" where the warm start ends."""
    num_layers: int
    """Layers whose frozen weights changed."""
    state_pruned: float
    """Share of the adapters' moments that is zero now."""
    optimizer: torch.optim.Optimizer
    """The optimizer to go on with: a new one if parameters are new, else the one passed in."""
    new_parameters: bool
    """Whether the set of trainable parameters changed, so that DDP must be built anew."""


class Method(ABC):
    """How weights are trained. One instance per attempt; it holds no state of its own."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    @abstractmethod
    def adapt(self, model: nn.Module, step: int) -> None:
        """Give `model` the structure it has after `step` updates: wrap, freeze; in place, every rank."""

    def refresh(self, model: nn.Module) -> None:  # noqa: B027 -- most methods derive nothing
        """Bring up to date what is derived from the model's weights, after a state was loaded into it."""

    @abstractmethod
    def frozen_names(self, model: nn.Module) -> set[str]:
        """Names of the state-dict entries that change only at boundaries: a checkpoint's base."""

    def fresh_names(self, model: nn.Module) -> set[str]:
        """Names of the parameters that a boundary draws anew, and that a fork may have in another shape."""
        return set()

    @abstractmethod
    def is_boundary(self, step: int) -> bool:
        """Whether a boundary follows update `step - 1`. Pure."""

    @abstractmethod
    def on_boundary(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> BoundaryReport:
        """Do the boundary after `step` updates, in place; every rank, at the same step."""

    @abstractmethod
    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The function of `model` as a plain state dict of the unwrapped architecture, fp32, on the CPU.

        Does not change the model."""

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_adamw(model, self.cfg.optimizer)

    def last_boundary(self, step: int) -> int:
        """The last boundary at or before `step`; 0, the start, counts as one."""
        while step > 0 and not self.is_boundary(step):
            step -= 1
        return step
