"""Adam on projected gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from relora_ray.methods.precision import full_fp32
from relora_ray.modeling.optim import fresh_state


def is_right(shape: torch.Size) -> bool:
    """Whether a gradient of this shape, (..., rows, columns), is projected from the right: the smaller side is."""
    return shape[-2] >= shape[-1]


def projected_shape(shape: torch.Size, rank: int) -> tuple[int, ...]:
    *stack, rows, columns = shape
    return (*stack, rows, rank) if is_right(shape) else (*stack, rank, columns)


def basis_shape(shape: torch.Size, rank: int) -> tuple[int, ...]:
    *stack, rows, columns = shape
    return (*stack, min(rows, columns), rank)


def project(gradient: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`gradient` on `basis`, (..., smaller side, rank), whose columns are orthonormal."""
    low = gradient @ basis if is_right(gradient.shape) else basis.mT @ gradient
    return low.contiguous()  # as the moments are: a fused step goes by memory


def project_back(low: torch.Tensor, basis: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """To the shape of the gradient."""
    return low @ basis.mT if is_right(shape) else basis @ low


@torch.no_grad()
def leading_basis(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading singular vectors of the gradient's smaller side as columns, (..., smaller side, rank), in fp32. The
    sign of each, which is arbitrary, is that in which its largest entry is positive."""
    with full_fp32():
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors = (vh.mT if is_right(gradient.shape) else u)[..., :rank]
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).contiguous()


class ProjectedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), in groups with a `rank` on projected gradients: the step is projected back
    and scaled by the group's `alpha`.

    The basis of each parameter lies in `state[p]["basis"]` and is not this class's to choose. All state is there from
    the start.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "rank": 0, "alpha": 1.0})
        for group in self.param_groups:
            for p in group["params"]:
                rank = group["rank"]
                if not rank:
                    self.state[p] = fresh_state(p)
                    continue
                self.state[p] = fresh_state(p.new_zeros(projected_shape(p.shape, rank)))
                self.state[p]["basis"] = torch.zeros(basis_shape(p.shape, rank), dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if not group["rank"]:
                self._adam(group, params, [p.grad for p in params], params, group["weight_decay"])
                continue
            low = [project(p.grad, self.state[p]["basis"]) for p in params]
            moves = [torch.zeros_like(gradient) for gradient in low]
            self._adam(group, params, low, moves, 0.0)
            for p, move in zip(params, moves, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(project_back(move, self.state[p]["basis"], p.shape), alpha=group["alpha"])

    def _adam(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        moved: list[torch.Tensor],
        weight_decay: float,
    ) -> None:
        """Move `moved` as torch's fused AdamW moves parameters, by the state of `params`."""
        states = [self.state[p] for p in params]
        adamw(
            moved,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )
