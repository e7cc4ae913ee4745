"""SLTrain (Han et al. 2024, "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining";
code andyjm3/SLTrain at 2024-06).

W = alpha/rank * B A + S. S has int(density * out * in) distinct random positions, drawn once; its values are trained
and not scaled. As B is zero at first, the model begins with the sparse part alone: the weights that the architecture
draws are not used. Norms, embeddings, head and what is no linear layer are trained in full.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.keyed import key
from relora_ray.methods.base import Method, dense_copy
from relora_ray.methods.sparse.config import SltrainConfig
from relora_ray.methods.sparse.layer import SparseLowRankLinear
from relora_ray.methods.targets import find_targets, put_


class Sltrain(Method):
    """No boundaries; the positions never change, and are a checkpoint's base."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.method, SltrainConfig)
        self.sltrain: SltrainConfig = cfg.method

    def adapt(self, model: nn.Module, step: int) -> None:
        targets = find_targets(model, self.sltrain, stacks=False)
        targets.say_what_is_left(type(model).__name__)
        settings = self.sltrain
        for paths in targets.linears:
            layer = SparseLowRankLinear(
                cast(nn.Linear, model.get_submodule(paths[0])),
                rank=settings.rank,
                alpha=settings.alpha,
                density=settings.density,
                path=paths[0],
            )
            if step == 0 and not layer.A.is_meta:  # later all of it comes from a checkpoint; at 1b it takes minutes
                layer.draw_(key(self.cfg.seed, "sltrain", paths[0]))
            put_(model, paths, layer)

    def frozen_names(self, model: nn.Module) -> set[str]:
        return {f"{path}.positions" for path in _layers(model)}

    def why_no_adapter(self, step: int) -> str:
        return "adds a sparse matrix to the low-rank one, which an adapter of peft cannot hold, and has no other base"

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        layers, dense = _layers(model), {}
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path not in layers or leaf == "bias":
                dense[name] = dense_copy(tensor)
            elif leaf == "A":
                dense[f"{path}.weight"] = layers[path].dense().cpu()
        return dense


def _layers(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """At every path."""
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if isinstance(module, SparseLowRankLinear)}
