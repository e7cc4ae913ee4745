"""ReLoRA (Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates").

After the warm start, every `merge_every_steps` updates: add scale * B A to W, draw A anew and zero B, prune
the adapters' Adam state. The learning rate's restart belongs to the schedule. As nothing of the adapters outlives a
merge, their rank and the length of the cycle may change there.
"""

from __future__ import annotations

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.config.planned import value_at
from relora_ray.methods.adapter import adapter_parameters, merge_all_, redraw_all_
from relora_ray.methods.base import Boundary, BoundaryReport
from relora_ray.methods.lowrank.config import ReloraConfig, ResetConfig
from relora_ray.methods.lowrank.layer import new_adapters_all_, updates_all
from relora_ray.methods.lowrank.lora import Lora
from relora_ray.methods.lowrank.reset import prune_state_
from relora_ray.modeling.optim import take_over_state_


class Relora(Lora):
    """Boundaries: the end of the warm start, then the end of every cycle, the last one included.

    With `compat: reference` merges follow one update after a cycle's end, the last cycle has none, and adapters are
    zero until the first merge.
    """

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.method, ReloraConfig)
        self.relora: ReloraConfig = cfg.method
        self.as_published = cfg.method.compat == "reference"
        self.keeps_moments = not self.as_published

    def adapt(self, model: nn.Module, step: int) -> None:
        super().adapt(model, step)
        if self.as_published:
            with torch.no_grad():
                for name, parameter in adapter_parameters(model):
                    if name.endswith("lora_A"):
                        parameter.zero_()

    def on_boundary(self, boundary: Boundary) -> BoundaryReport:
        model, optimizer, step = boundary.model, boundary.optimizer, boundary.step
        if step == self.relora.warm_start_steps:
            return super().on_boundary(boundary)
        updates = updates_all(boundary)
        num_layers = merge_all_(model)
        new_rank = value_at(self.relora.lora_rank, step) != value_at(self.relora.lora_rank, step - 1)
        if new_rank:
            new_adapters_all_(model, self.relora, step)
        redraw_all_(model, seed=self.cfg.seed, boundary=step)
        if new_rank:
            resized = self.build_optimizer(model)
            take_over_state_(resized, optimizer)
            return BoundaryReport(step, "merge", num_layers, 1.0, resized, new_parameters=True, updates=updates)
        pruned = prune_state_(
            optimizer,
            adapter_parameters(model),
            self._reset(step),
            seed=self.cfg.seed,
            boundary=step,
            as_published=self.as_published,
        )
        return BoundaryReport(step, "merge", num_layers, pruned, optimizer, new_parameters=False, updates=updates)

    def _reset(self, step: int) -> ResetConfig:
        """Every merge resets; in the published code only one after which the learning rate restarts."""
        if self.as_published and step - 1 not in self.cfg.restarts:
            return ResetConfig(kind="none")
        return self.relora.reset
