"""Floating-point operations of training, counted from shapes, and what devices can do at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from relora_ray.config.sizes import LLAMA_LINEARS, LlamaSize

Order = Literal["full", "factored", "effective"]
"""How a linear layer is trained: all of it; B (A x) beside a frozen W; W + B A, which is built once an update."""

PEAK_BF16 = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Per second, in bf16 without sparsity, by a part of the name that CUDA gives; the first that fits counts. As their
makers publish it: a real product reaches less."""


def linear_flops(i: int, o: int, rank: int, tokens: int) -> dict[Order, float]:
    """Of forward and backward of one linear layer for one token. `tokens`: of an update."""
    return {
        "full": 6.0 * i * o,
        "factored": 4.0 * i * o + 6.0 * rank * (i + o),
        "effective": 4.0 * i * o + 4.0 * rank * (i + o) + 2.0 * rank * i * o / tokens,
    }


def llama_flops(llama: LlamaSize, vocab_size: int, seq_len: int, of_linear: Callable[[str, int, int], float]) -> float:
    """Of an update, forward and backward, for one token: linear layers, causal attention's products, the head.
    `of_linear`: of a layer by its name and its inputs and outputs, as `linear_flops` has it."""
    h, m = llama.hidden_size, llama.intermediate_size
    sides = {"gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h)}
    linear = sum(of_linear(name, *sides.get(name, (h, h))) for name in LLAMA_LINEARS)
    attention = 6.0 * seq_len * h
    return llama.num_layers * (linear + attention) + 6.0 * h * vocab_size


def peak_flops(device_name: str) -> float | None:
    """Per second, of bf16; None if nobody knows."""
    return next((peak for part, peak in PEAK_BF16.items() if part in device_name), None)
