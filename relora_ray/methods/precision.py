"""What methods compute in: under autocast, and where every bit of fp32 counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a layer computes in that is given `x`: autocast's type, or its own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products with all their bits, also where TF32 (10 bits) was turned on for speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
