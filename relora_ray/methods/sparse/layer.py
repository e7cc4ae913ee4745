"""A linear layer whose weight is scale * B A + S, with S sparse at fixed positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ray.errors import ConfigError
from relora_ray.methods.precision import compute_dtype, full_fp32, no_autocast


class SparseLowRankLinear(nn.Module):
    """In place of a linear layer (in -> out) with or without bias; its weight is dropped.

    `A` (rank, in), `B` (out, rank) and `values` (entries,) are trained; `positions` (entries,) are those of the entries
    in the flattened (out, in) matrix, ascending.
    """

    positions: torch.Tensor

    def __init__(self, linear: nn.Linear | Conv1D, *, rank: int, alpha: float, density: float, path: str = "") -> None:
        super().__init__()
        self._path = path
        self.transposed = isinstance(linear, Conv1D)
        rows, columns = linear.weight.shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.scale, device = alpha / rank, linear.weight.device
        entries = max(1, int(density * rows * columns))
        self.A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.values = nn.Parameter(torch.zeros(entries, device=device))
        self.values._of_a_matrix = True  # type: ignore[attr-defined]  # they decay as A and B do
        index = torch.int32 if rows * columns < 2**31 else torch.int64
        self.register_buffer("positions", torch.zeros(entries, dtype=index, device=device))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """Refused: a model that reads it, as Mamba does, would pass the layer by."""
        raise ConfigError(
            f"{self._path or 'a layer'} has no weight of its own with method.kind=sltrain, and the model reads it "
            f"without calling the layer. Set method.leave_out=[{self._path.rpartition('.')[2]}]: it is trained in full."
        )

    @torch.no_grad()
    def draw_(self, seed: int) -> None:
        """Positions at random, A and values uniform in +-1/sqrt(in), B zero. On the CPU: the same on any device."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(self.out_features * self.in_features, generator=generator)[: len(self.values)]
        self.positions.copy_(chosen.sort().values)
        bound = 1 / math.sqrt(self.in_features)
        for tensor in (self.A, self.values):
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """The weight in fp32 and in the replaced layer's layout: a new tensor."""
        with full_fp32(), no_autocast(self.A):
            weight = _dense(self.A, self.B, self.values, self.positions, self.scale)
        return weight.T.contiguous() if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        with no_autocast(x):
            y: torch.Tensor = _SparseLowRank.apply(x, self.A, self.B, self.values, self.positions, self.scale)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={len(self.A)}, entries={len(self.values)}"


def _dense(
    a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    weight = torch.mm(b, a).mul_(scale)
    weight.view(-1).index_add_(0, positions, values)
    return weight


class _SparseLowRank(torch.autograd.Function):
    """x W^T. W exists while this layer computes and is made again for the gradient, of which the dense (out, in) matrix
    exists for one layer at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, values, positions)
        ctx.scale = scale
        return F.linear(x, _dense(a, b, values, positions, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, a, b, values, positions = ctx.saved_tensors
        (grad,) = grads
        with no_autocast(x):
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _dense(a, b, values, positions, ctx.scale).to(x.dtype)
            grad_w = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(a.dtype)
            grad_a = torch.mm(b.T, grad_w).mul_(ctx.scale)
            grad_b = torch.mm(grad_w, a.T).mul_(ctx.scale)
            return grad_x, grad_a, grad_b, grad_w.view(-1)[positions], None, None
