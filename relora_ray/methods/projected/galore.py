"""GaLore (Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"; code
jiaweizzhao/GaLore at 2024-07, galore_torch/).

Of a matrix G of a gradient, (rows, columns), with rows >= columns: P = its leading right singular vectors (else the
left ones), R = G P, N = Adam(R), W <- W - lr * alpha * N P^T. P is taken anew every `refresh_every_steps` of the
parameter's updates, the first included, and Adam's moments are carried over unchanged. Norms, embeddings and head are
trained by plain Adam at the same rate. Where the published per-layer mode steps its hook twice, which doubles gap and
schedule, there is one step here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.methods.base import Method, Update
from relora_ray.methods.projected.config import GaloreConfig
from relora_ray.methods.projected.optimizer import ProjectedAdam, leading_basis
from relora_ray.methods.targets import find_targets
from relora_ray.modeling.optim import decayed


class Galore(Method):
    """All is trained, so that a checkpoint has no base, and there are no boundaries: the basis belongs to the
    optimizer's state."""

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__(cfg)
        assert isinstance(cfg.method, GaloreConfig)
        self.galore: GaloreConfig = cfg.method

    def adapt(self, model: nn.Module, step: int) -> None:
        find_targets(model, self.galore).say_what_is_left(type(model).__name__)

    def why_no_adapter(self, step: int) -> str:
        return "trains the weights themselves: low-rank are its gradients alone"

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.cfg.optimizer
        targets = find_targets(model, self.galore)
        names = [f"{paths[0]}.weight" for paths in targets.linears] + targets.stacks
        projected = {model.get_parameter(name) for name in names}
        groups = [
            {"params": [p for p in params if (p in projected) is is_projected], "weight_decay": decay}
            | ({"rank": self.galore.rank, "alpha": self.galore.alpha} if is_projected else {})
            for params, decay in decayed(model, settings.weight_decay)
            for is_projected in (True, False)
        ]
        return ProjectedAdam(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )

    def update(self, update: Update) -> None:
        update.backward()
        if update.clip():
            self._refresh_bases(update)
        update.apply()

    def _refresh_bases(self, update: Update) -> None:
        """Of all parameters that are due; they are due together, as they make the same updates."""
        state = update.optimizer.state
        projected = [group["params"] for group in update.optimizer.param_groups if group["rank"]]
        if int(state[projected[0][0]]["step"]) % self.galore.refresh_every_steps:
            return
        began, matrices = time.perf_counter(), {p for params in projected for p in params}
        named = {name: p for name, p in update.model.named_parameters() if p in matrices}

        def work(parameter: nn.Parameter) -> Sequence[torch.Tensor]:
            assert parameter.grad is not None
            return [leading_basis(parameter.grad, self.galore.rank)]

        works: dict[str, Callable[[], Sequence[torch.Tensor]]] = {n: partial(work, p) for n, p in named.items()}
        for name, (basis,) in update.owned(works).items():
            state[named[name]]["basis"].copy_(basis)
        update.notes["svd_s"] = time.perf_counter() - began
