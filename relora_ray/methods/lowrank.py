"""The low-rank layer and what is done to it: wrap, merge, redraw, fold.

y = x W^T + b + scale * (x A^T) B^T with W (out, in) frozen, A (r, in) and B (out, r) trained, all fp32; under
autocast the products run in bf16. At wrap and after each merge A is Kaiming-uniform and B is zero (Hu et al.
2021), so the function does not change and B has a gradient from the first step. The published ReLoRA code
zeroes A too when it wraps (`relora.py:122`): neither gets a gradient until the first merge.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ray.config import LoraConfig
from relora_ray.errors import ConfigError
from relora_ray.keyed import key

logger = logging.getLogger(__name__)

ADAPTER_NAMES = ("lora_A", "lora_B", "lora_gain")


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trained low-rank update. Shares the parameters of the layer it replaces.

    `weight` keeps its name and layout: (out, in) from nn.Linear, (in, out) from GPT-2's Conv1D. A bias stays
    trainable. `lora_gain`, if there is one, is a learned factor on the scale.
    """

    def __init__(self, linear: nn.Linear | Conv1D, cfg: LoraConfig) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        self.transposed = isinstance(linear, Conv1D)
        in_features, out_features = self.weight.shape if self.transposed else reversed(self.weight.shape)
        self.scale = cfg.alpha / (math.sqrt(cfg.lora_rank) if cfg.rslora else cfg.lora_rank)
        self.dropout = cfg.dropout
        self.training = linear.training
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(cfg.lora_rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, cfg.lora_rank, device=device))
        self.lora_gain = nn.Parameter(torch.ones((), device=device)) if cfg.trainable_scaling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        base = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        h = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        scale = self.scale if self.lora_gain is None else self.scale * self.lora_gain
        return base + F.linear(h * scale, self.lora_B)  # scaled at r columns, not at out

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """scale * B @ A in fp32 and in `weight`'s layout."""
        with torch.autocast(self.weight.device.type, enabled=False), _full_fp32():
            update = self.lora_B.float() @ self.lora_A.float() * self.scale
        if self.lora_gain is not None:
            update *= self.lora_gain.float()
        return update.T if self.transposed else update

    @torch.no_grad()
    def merge_(self) -> None:
        """Add the update to `weight`. The adapters are stale until `redraw_`."""
        self.weight.add_(self.delta())

    @torch.no_grad()
    def redraw_(self, seed: int) -> None:
        """A anew from `seed`, B zero, gain one. A is drawn on the CPU, so it is the same on any device."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])  # kaiming_uniform_ with a = sqrt(5), as in LoRA's code
        generator = torch.Generator().manual_seed(seed)
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()
        if self.lora_gain is not None:
            self.lora_gain.fill_(1.0)

    def extra_repr(self) -> str:
        rank, in_features = self.lora_A.shape
        return f"{in_features} -> {self.lora_B.shape[0]}, lora_rank={rank}, scale={self.scale:g}"


@contextlib.contextmanager
def _full_fp32() -> Iterator[None]:
    """fp32 products with all their bits, also where TF32 (10 bits) was turned on for speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def wrap_(model: nn.Module, cfg: LoraConfig) -> list[str]:
    """Put adapters on the linear layers of `model`'s blocks that `cfg` names; returns their paths.

    The rest (embeddings, norms, head, biases) stays trainable. Adapters hold zeros until `redraw_all_`.
    Raises ConfigError for a name that matches nothing and a rank above a layer's smaller side.
    """
    linears = dict(_block_linears(model))
    wanted = None if cfg.target_modules == "all-linear" else set(cfg.target_modules)
    last_segments = {path.rpartition(".")[2] for path in linears}
    for name in sorted((wanted or set()) - last_segments):
        raise ConfigError(
            f"method.target_modules has {name!r}, which is the last path segment of no linear layer in the blocks of "
            f"{type(model).__name__}. Its linear layers are {', '.join(sorted(last_segments))}."
        )
    chosen = {path: m for path, m in linears.items() if wanted is None or path.rpartition(".")[2] in wanted}
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no linear layers inside its blocks: nothing to put adapters on.")
    for path, linear in chosen.items():
        if cfg.lora_rank > min(linear.weight.shape):
            raise ConfigError(
                f"method.lora_rank={cfg.lora_rank} is more than {min(linear.weight.shape)}, the smaller side of {path} "
                f"{tuple(linear.weight.shape)}. Use a rank of at most {min(linear.weight.shape)}."
            )
    if wanted is None:
        _warn_of_unwrapped_matrices(model, set(chosen))
    for path, linear in chosen.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LowRankLinear(linear, cfg))
    return list(chosen)


def _warn_of_unwrapped_matrices(model: nn.Module, wrapped: set[str]) -> None:
    """Experts and the like hold matrices that are no linear layers: they stay trained in full."""
    left = {
        name: parameter.numel()
        for block in _block_lists(model)
        for name, parameter in model.named_parameters()
        if name.startswith(f"{block}.") and parameter.ndim >= 2 and name.rpartition(".")[0] not in wrapped
    }
    if left:
        logger.warning(
            "%d matrices inside the blocks are no linear layers: they stay trained in full (%.1f M), such as %s",
            len(left),
            sum(left.values()) / 1e6,
            next(iter(left)),
        )


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors of all adapters' trained parameters."""
    for path, layer in low_rank_layers(model).items():
        for name in ADAPTER_NAMES:
            if (parameter := getattr(layer, name)) is not None:
                yield f"{path}.{name}", parameter


def merge_all_(model: nn.Module) -> int:
    """Merge every adapter into its weight; returns how many layers there are."""
    layers = low_rank_layers(model).values()
    for layer in layers:
        layer.merge_()
    return len(layers)


def redraw_all_(model: nn.Module, *, seed: int, boundary: int) -> None:
    """Draw every adapter anew, keyed by (seed, boundary, path): the same on every rank, with no broadcast.

    `boundary` is the number of finished updates where the cycle begins.
    """
    for path, layer in low_rank_layers(model).items():
        layer.redraw_(key(seed, "lora_A", boundary, path))


@torch.no_grad()
def folded_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the unwrapped architecture with every update added in: fp32, on the CPU, copies."""
    layers = low_rank_layers(model)
    dense = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path in layers and leaf in ADAPTER_NAMES:
            continue
        value = tensor.detach().to(torch.float32)
        if path in layers and leaf == "weight":
            value = value + layers[path].delta()
        dense[name] = value.to("cpu", copy=True)
    return dense


def _block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Linear layers inside the model's lists of blocks: not the head, not the embeddings."""
    blocks = _block_lists(model)
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and any(path.startswith(f"{block}.") for block in blocks):
            yield path, module


def _block_lists(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
