"""Full-rank training: the baseline, and the warm start of the others."""

from __future__ import annotations

import torch
from torch import nn

from relora_ray.methods.base import BoundaryReport, Method


class Full(Method):
    def adapt(self, model: nn.Module, step: int) -> None:
        """What the architecture freezes stays so."""

    def frozen_names(self, model: nn.Module) -> set[str]:
        return set()

    def is_boundary(self, step: int) -> bool:
        return False

    def on_boundary(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> BoundaryReport:
        raise AssertionError("full-rank training has no boundaries")

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in model.state_dict().items()}
