"""LoRA-FA (Zhang et al. 2023): y = W x + alpha / rank * B A x, of which B alone is trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ray.keyed import key
from relora_ray.methods.base import Method, dense_copy
from relora_ray.methods.targets import find_targets, put_


class LoraFaLinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight.requires_grad_(False), linear.bias, alpha / rank
        self.transposed = isinstance(linear, Conv1D)  # GPT-2's layers, whose weight is (in, out)
        rows, columns = self.plain().shape
        self.B = nn.Parameter(linear.weight.new_zeros(rows, rank))
        self.register_buffer("A", linear.weight.new_zeros(rank, columns))  # lives across steps, so it is a buffer

    def plain(self) -> torch.Tensor:
        """(out, in)"""
        return self.weight.T if self.transposed else self.weight

    def draw_(self, seed: int) -> None:
        bound = 1 / math.sqrt(self.A.shape[1])
        generator = torch.Generator().manual_seed(seed)
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.plain(), self.bias) + self.scale * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        weight = self.plain() + self.scale * self.B @ self.A
        return weight.T if self.transposed else weight


class LoraFa(Method):
    def adapt(self, model: nn.Module, step: int) -> None:
        settings = self.cfg.method
        targets = find_targets(model, settings, stacks=False)
        targets.say_what_is_left(type(model).__name__)
        for paths in targets.linears:
            layer = LoraFaLinear(model.get_submodule(paths[0]), settings.rank, settings.alpha)
            if not layer.A.is_meta:
                layer.draw_(key(self.cfg.seed, "lora_fa", paths[0]))  # the same on every rank, at every resume
            put_(model, paths, layer)

    def frozen_names(self, model: nn.Module) -> set[str]:
        return {f"{path}.{name}" for path in layers(model) for name in ("weight", "A")}

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        found = layers(model)
        dense = {}
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path not in found or leaf == "bias":
                dense[name] = dense_copy(tensor)
            elif leaf == "weight":
                dense[name] = dense_copy(found[path].dense())
        return dense


def layers(model: nn.Module) -> dict[str, LoraFaLinear]:
    return {
        path: module for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, LoraFaLinear)
    }
