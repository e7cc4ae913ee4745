"""LoRA pre-training: adapters on frozen weights, after an optional full-rank warm start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.methods.adapter import adapter_parameters, redraw_all_, refresh_all_
from relora_ray.methods.base import Boundary, BoundaryReport, Method
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import (
    folded_state_dict,
    frozen_names,
    keep_effective_all_,
    low_rank_layers,
    take_adapters_,
    wrap_,
)
from relora_ray.modeling.optim import take_over_state_

if TYPE_CHECKING:
    from relora_ray.modeling.peft_export import LoraUpdate


class Lora(Method):
    """Its one boundary, if there is a warm start, is the switch at its end."""

    keeps_moments = True
    """Whether what stays trained keeps its optimizer state when the warm start ends."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.method, LoraConfig)
        self.lora: LoraConfig = cfg.method

    def adapt(self, model: nn.Module, step: int) -> None:
        if step >= self.lora.warm_start_steps:
            wrap_(model, self.lora, step)
            if self.lora.keeps_effective_weights(self.cfg.train):
                keep_effective_all_(model, torch.bfloat16 if self.cfg.train.precision == "bf16" else torch.float32)
            redraw_all_(model, seed=self.cfg.seed, boundary=self.last_boundary(step))

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(model)
        # With the optimizer and not with the loop, so that nobody who makes an update can forget it.
        optimizer.register_step_post_hook(lambda *_: refresh_all_(model))
        return optimizer

    def refresh(self, model: nn.Module) -> None:
        refresh_all_(model)

    def frozen_names(self, model: nn.Module) -> set[str]:
        return frozen_names(model)

    def fresh_names(self, model: nn.Module) -> set[str]:
        return {name for name, _ in adapter_parameters(model)}

    def on_boundary(self, boundary: Boundary) -> BoundaryReport:
        model, step = boundary.model, boundary.step
        assert step == self.lora.warm_start_steps, step
        self.adapt(model, step)
        switched = self.build_optimizer(model)
        if self.keeps_moments:
            take_over_state_(switched, boundary.optimizer)
        return BoundaryReport(step, "switch", len(low_rank_layers(model)), 1.0, switched, new_parameters=True)

    def why_no_adapter(self, step: int) -> str:
        if step >= self.lora.warm_start_steps:
            return ""
        return (
            f"trains the weights themselves until its warm start ends, after step {self.lora.warm_start_steps:,}, and "
            f"this is the state after step {step:,}"
        )

    def take_adapter_(self, model: nn.Module) -> LoraUpdate:
        return take_adapters_(model, self.lora)

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return folded_state_dict(model)
