"""How large an update of a layer's weights is, and of which rank: what a boundary may say of what it added.

For a low-rank update B A all of it follows from two r x r matrices, so that a merge can say it in passing: with the QR
decompositions B = Q R and A^T = P S, the singular values of B A are those of R S^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

LARGEST = 8
"""So many singular values of a layer are recorded."""
MAX_LAYERS = 1000
"""So many layers, that a record stays below some 150 KB."""


@dataclass(frozen=True)
class LayerUpdate:
    """What was added to the matrix of one layer, or to those of a stack of experts."""

    norm: float
    """Frobenius norm; of a stack that of all its matrices together. NaN if there was none."""
    effective_rank: float
    """See `effective_rank`; of a stack the mean over its matrices."""
    singular_values: tuple[float, ...]
    """The `LARGEST` ones, the largest first; of a stack the means over its matrices, one by one."""


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007, "The effective rank: a
    measure of effective dimensionality", equation 6). 0 of a matrix of zeros. singular_values: (n,), not negative."""
    values = singular_values.double()
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


@torch.no_grad()
def product_singular_values(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Singular values of B A, in fp64, the largest first: (r,). b: (out, r); a: (r, in). NaN if there are none, as of
    a matrix that is not finite: a measurement must not end a run."""
    left, right = (torch.linalg.qr(m.double(), mode="r").R for m in (b, a.mT))
    product = left @ right.mT
    if product.isfinite().all():
        try:
            return torch.linalg.svdvals(product)
        except torch.linalg.LinAlgError:  # it did not converge
            pass
    return torch.full((min(product.shape),), math.nan, dtype=torch.float64, device=product.device)


def layer_update(singular_values: torch.Tensor) -> LayerUpdate:
    """Of a matrix's singular values, (n,), or those of a stack of matrices, (experts, n)."""
    values = singular_values.double().cpu()
    each = values.reshape(-1, values.shape[-1])
    if not values.isfinite().all():
        return LayerUpdate(math.nan, math.nan, ())
    ranks = [effective_rank(row) for row in each]
    return LayerUpdate(float(values.norm()), sum(ranks) / len(ranks), tuple(each.mean(0)[:LARGEST].tolist()))


def updates_record(updates: Mapping[str, LayerUpdate]) -> dict[str, Any]:
    """For the metrics, column by column: five digits of each number, null for one that is not finite."""
    shown = dict(list(updates.items())[:MAX_LAYERS])
    return {
        "layers": list(shown),
        "norms": [_rounded(u.norm) for u in shown.values()],
        "effective_ranks": [_rounded(u.effective_rank) for u in shown.values()],
        "singular_values": [[_rounded(s) for s in u.singular_values] for u in shown.values()],
        "layers_left_out": len(updates) - len(shown),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
