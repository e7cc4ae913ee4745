"""The low-rank layer and what is done to it: wrap, merge, redraw, fold.

y = x W^T + b + scale * (x A^T) B^T with W (out, in) frozen, A (r, in) and B (out, r) trained in fp32. At wrap and
after each merge A is Kaiming-uniform and B is zero (Hu et al. 2021), so the function does not change and B has a
gradient from the first step. The published ReLoRA code zeroes A too when it wraps (`relora.py:122`): neither gets a
gradient until the first merge.

Without dropout the layer multiplies by the one matrix W + scale * B A, the effective weight, added up in fp32 and then
rounded to the dtype of the computation. A merge adds up the same matrix, so with W in fp32 it leaves the function the
same bit for bit (unless TF32 products were turned on: merges never use them). The effective weight is kept from one
update to the next, or rebuilt where it is used: the same bits, for memory or for time. Adding it up costs less than the
two products it saves as soon as a rank's share of an update has more than in * out / (in + out) tokens: 256 at 512 x
512, 1,490 at 2048 x 5461.

Layers that are known to have one input (query, key and value; gate and up) are computed together: the input is cast and
saved once, and its products with the adapters are one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from relora_ray.config.planned import value_at
from relora_ray.methods.adapter import Adapter, adapters, plain_path
from relora_ray.methods.base import Boundary, dense_copy
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.precision import compute_dtype, full_fp32, no_autocast
from relora_ray.methods.targets import find_targets, put_
from relora_ray.methods.updates import LayerUpdate, layer_update, product_singular_values
from relora_ray.modeling.peft_export import LoraUpdate

logger = logging.getLogger(__name__)

ADAPTER_NAMES = ("lora_A", "lora_B", "lora_gain")
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of sibling layers that are given the same input, in Hugging Face's models."""


class LowRank(Adapter):
    """Adapters, and the frozen matrix W that they are added to: one of a linear layer, or one of each expert.

    W keeps its layout: (out, in) from nn.Linear, (in, out) from GPT-2's Conv1D, the same after a dimension of experts.
    How it is stored is `frozen_weights`: in fp32, in bf16 with an int8 `residual` of the same shape, or in bf16.
    `lora_gain`, if there is one, is a learned factor on the scale of each matrix.
    """

    weight: nn.Parameter
    residual: torch.Tensor | None

    def __init__(
        self, weight: nn.Parameter, cfg: LoraConfig, step: int, *, transposed: bool, bias: nn.Parameter | None = None
    ) -> None:
        """As `cfg` has it after `step` updates. `transposed`: W is (in, out)."""
        super().__init__()
        self.transposed = transposed
        self.hold(weight)
        self.bias = bias
        self.new_adapters_(cfg, step)
        self.register_buffer("residual", None)
        self._take_weight(weight, cfg)

    def hold(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def new_adapters_(self, cfg: LoraConfig, step: int) -> None:
        """Adapters of the rank that holds after `step` updates, as new parameters. They are zero until `redraw_`."""
        rank, device = value_at(cfg.lora_rank, step), self.weight.device
        *experts, rows, columns = self.weight.shape
        in_features, out_features = (rows, columns) if self.transposed else (columns, rows)
        self.scale = cfg.alpha / (math.sqrt(rank) if cfg.rslora else rank)
        self.lora_A = nn.Parameter(torch.zeros(*experts, rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_features, rank, device=device))
        gain = torch.ones((*experts, 1, 1) if experts else (), device=device)
        self.lora_gain = nn.Parameter(gain) if cfg.trainable_scaling else None

    @torch.no_grad()
    def _take_weight(self, weight: nn.Parameter, cfg: LoraConfig) -> None:
        weight.requires_grad_(False)
        weight.grad = None  # a view of DDP's buckets, which would stay alive with it
        if cfg.frozen_weights == "fp32":
            return
        self.hold(nn.Parameter(torch.empty_like(weight, dtype=torch.bfloat16), requires_grad=False))
        if cfg.frozen_weights == "bf16_int8":
            self.residual = torch.empty_like(weight, dtype=torch.int8)
        self.set_frozen_(weight)

    @torch.no_grad()
    def frozen(self) -> torch.Tensor:
        """W in fp32 and in `weight`'s layout."""
        return _frozen(self.weight, self.residual)

    @torch.no_grad()
    def set_frozen_(self, value: torch.Tensor) -> None:
        """Store `value`, fp32 and in `weight`'s layout, as W."""
        if self.residual is None:
            self.weight.copy_(value)
            return
        high, low = split_bf16_int8(value)
        self.weight.copy_(high)
        self.residual.copy_(low)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """W + scale * B @ A in fp32 and in `weight`'s layout: a new tensor."""
        with no_autocast(self.weight):
            return _merged(self._parts(), self.scale, self.transposed)

    def merge_(self) -> None:
        """Add the update to W. The adapters are stale until `redraw_`."""
        self.set_frozen_(self.merged())

    @torch.no_grad()
    def update_singular_values(self) -> torch.Tensor:
        """Of scale * gain * B A, in fp64, the largest first: (r,), or (experts, r)."""
        pairs = [(self.lora_B, self.lora_A)] if self.lora_A.ndim == 2 else zip(self.lora_B, self.lora_A, strict=True)
        values = torch.stack([product_singular_values(b, a) for b, a in pairs])  # one by one: they are copied in fp64
        if self.lora_gain is not None:
            values = values * self.lora_gain.double().abs().reshape(-1, 1)
        return (self.scale * values).view(*self.lora_A.shape[:-2], -1)

    @torch.no_grad()
    def redraw_(self, seed: int) -> None:
        """A anew from `seed`, B zero, gain one. A is drawn on the CPU, so it is the same on any device."""
        if self.lora_A.is_meta:
            return  # nothing has a value there, and drawing takes seconds at 7b
        bound = 1 / math.sqrt(self.lora_A.shape[-1])  # kaiming_uniform_ with a = sqrt(5), as in LoRA's code
        generator = torch.Generator().manual_seed(seed)
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()
        if self.lora_gain is not None:
            self.lora_gain.fill_(1.0)
        self.refresh_()

    def keep_effective_(self, dtype: torch.dtype) -> None:
        """Keep the effective weight from now on, for computations in `dtype`, if this one can."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in ADAPTER_NAMES:
            if (parameter := getattr(self, name)) is not None:
                yield name, parameter

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        """What the effective weight is made of."""
        return self.weight, self.residual, self.lora_A, self.lora_B, self.lora_gain

    def extra_repr(self) -> str:
        *_, rank, in_features = self.lora_A.shape
        return f"{in_features} -> {self.lora_B.shape[-2]}, lora_rank={rank}, scale={self.scale:g}"


class LowRankStack(LowRank):
    """Adapters on the matrices of experts, which Hugging Face keeps in one parameter of three dimensions: to it, a
    parametrization of that parameter. Whoever reads the parameter gets W + scale * B A, of every expert.

    Autograd goes through the sum, so a gradient of every matrix exists for a moment. There is no dropout.
    """

    def hold(self, weight: nn.Parameter) -> None:
        self._held = (weight,)  # in a tuple, which registers nothing: it belongs to the list of parametrizations

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self._held[0]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with no_autocast(weight):
            return _merged(
                (weight, self.residual, self.lora_A, self.lora_B, self.lora_gain), self.scale, self.transposed
            )


class LowRankLinear(LowRank):
    """A frozen linear layer with a trained low-rank update. Takes over the parameters of the layer it replaces; a bias
    stays trainable.

    `effective`, if it is kept, is W + scale * B A in the dtype of the computation. Whoever changes a part of it in
    place calls `refresh_`, as draws, which follow a merge, and the optimizers of `methods.lora` do. Eager code notices
    most other changes by the parts' versions, and rebuilds; but a fused optimizer on the CPU raises no versions.
    """

    effective: torch.Tensor | None

    def __init__(self, linear: nn.Linear | Conv1D, cfg: LoraConfig, step: int = 0) -> None:
        super().__init__(
            cast(nn.Parameter, linear.weight), cfg, step, transposed=isinstance(linear, Conv1D), bias=linear.bias
        )
        self.dropout = cfg.dropout
        self.training = linear.training
        self.register_buffer("effective", None, persistent=False)
        self._versions: tuple[int, ...] = ()
        self.together: Together | None = None

    def keep_effective_(self, dtype: torch.dtype) -> None:
        self.effective = torch.empty_like(self.weight, dtype=dtype)
        self.refresh_()

    @torch.no_grad()
    def refresh_(self) -> None:
        if self.together is not None:
            self.together.forget()
        if self.effective is not None and not self.effective.is_meta:
            self.effective.copy_(self.merged())
            self._versions = self._parts_versions()

    def _parts_versions(self) -> tuple[int, ...]:
        return tuple(part._version for part in self._parts() if part is not None)

    def _kept(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The effective weight, if it is kept, in this dtype, and up to date as far as can be seen."""
        if self.effective is None or self.effective.dtype != dtype:
            return None
        if not torch.compiler.is_compiling() and self._versions != self._parts_versions():
            return None
        return self.effective

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        if self.training and self.dropout > 0:
            return self._factored(x)
        return merged_linears([self], x)[0] if self.together is None else self.together.forward(self, x)

    def _factored(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout on the adapters' input: there is no one matrix then."""
        x = x.to(compute_dtype(x))
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            base = F.linear(x, _out_in(self.frozen(), self.transposed).to(x.dtype), bias)
            h = F.linear(F.dropout(x, self.dropout, training=True), self.lora_A.to(x.dtype))
            scale = self.scale if self.lora_gain is None else self.scale * self.lora_gain.to(x.dtype)
            return base + F.linear(h * scale, self.lora_B.to(x.dtype))  # scaled at r columns, not at out


class Together:
    """Layers that are given the same input: whichever is called first computes all, and the others hand out theirs.

    What counts is that it is the same tensor, so a model that gives one of them another input is still computed right:
    it is noticed, and from then on each computes alone.
    """

    def __init__(self, layers: list[LowRankLinear]) -> None:
        self.layers = layers
        self._input: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}
        for layer in layers:
            layer.together = self

    def forward(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        own = self.layers.index(layer)
        if self._input is x and own in self._left:
            y = self._left.pop(own)
            if not self._left:
                self._input = None
            return y
        if self._left:
            logger.warning(
                "layers that were computed together have different inputs: each computes alone from now on. The first "
                "update after a restart may differ in its last bits from that of a run that goes on."
            )
            self.forget()
            for each in self.layers:
                each.together = None
            return merged_linears([layer], x)[0]
        outputs = dict(enumerate(merged_linears(self.layers, x)))
        y = outputs.pop(own)
        self._input, self._left = x, outputs
        return y

    def forget(self) -> None:
        """Drop what was computed and not yet handed out: the weights have changed."""
        self._input, self._left = None, {}


def merged_linears(layers: Sequence[LowRankLinear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x: (..., in) -> of every layer (..., out)."""
    x = x.to(compute_dtype(x))
    with no_autocast(x):
        settings = tuple((layer.scale, layer.transposed) for layer in layers)
        tensors: list[torch.Tensor | None] = []
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            tensors += [bias, layer._kept(x.dtype), *layer._parts()]
        outputs: tuple[torch.Tensor, ...] = _MergedLinears.apply(x, settings, *tensors)
        return outputs


class _MergedLinears(torch.autograd.Function):
    """x M^T + bias for each M = W + s B A, with gradients for x, biases, A, B and the gain in s; of what depends on x
    it saves x alone.

    `kept` is M in x's dtype and W's layout. Without it M is built where it is used, in forward and again in backward:
    2 r / rows of the layer's own products, and no second copy of W is held. The gradient of M, (out, in), is never
    formed: dA = s (dy B)^T x, dB = s dy^T (x A^T). Products with x have the adapters of all layers stacked.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: tuple[tuple[float, bool], ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        ctx.settings = settings
        ctx.save_for_backward(x, *tensors)
        outputs = []
        for (scale, transposed), bias, kept, parts in _by_layer(settings, tensors):
            matrix = _merged(parts, scale, transposed).to(x.dtype) if kept is None else kept
            y = F.linear(x, _out_in(matrix, transposed), bias)
            # With a bias it is a view, of rows, which autograd lets nobody change in place, as Falcon does.
            outputs.append(torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        with no_autocast(x):  # backward may be called inside autocast, too
            layers = list(_by_layer(ctx.settings, tensors))
            dys = [grad.to(x.dtype).reshape(-1, grad.shape[-1]) for grad in grads]
            rows_x = x.reshape(-1, x.shape[-1])
            dx: torch.Tensor | None = None
            if ctx.needs_input_grad[0]:
                for dy, ((scale, transposed), _, kept, parts) in zip(dys, layers, strict=True):
                    matrix = _merged(parts, scale, transposed).to(x.dtype) if kept is None else kept
                    matrix = _out_in(matrix, transposed)
                    dx = dy @ matrix if dx is None else dx.addmm_(dy, matrix)
            ranks = [parts[2].shape[0] for *_, parts in layers]
            h = (rows_x @ _stack([parts[2].to(x.dtype) for *_, parts in layers]).T).split(ranks, 1)  # (rows, r) each
            g = [dy @ parts[3].to(x.dtype) for dy, (*_, parts) in zip(dys, layers, strict=True)]
            das = (_stack(g, 1).T @ rows_x).float().split(ranks)
            given: list[torch.Tensor | None] = []
            for i, ((scale, _), bias, _, parts) in enumerate(layers):
                gain = parts[4]
                total = scale if gain is None else scale * gain
                dgain = None if gain is None else (g[i].float() * h[i].float()).sum() * scale
                dbias = None if bias is None else dys[i].sum(0)
                given += [dbias, None, None, None, das[i] * total, (dys[i].T @ h[i]).float() * total, dgain]
        return (None if dx is None else dx.view(x.shape)), None, *given


def _by_layer(settings: Any, tensors: Sequence[torch.Tensor | None]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Of each layer its (scale, transposed), bias, kept effective weight, and the parts of that."""
    per_layer = len(tensors) // len(settings)
    for i, setting in enumerate(settings):
        bias, kept, *parts = tensors[i * per_layer : (i + 1) * per_layer]
        yield setting, bias, kept, parts


def _stack(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _frozen(weight: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return weight.float() if residual is None else join_bf16_int8(weight, residual)


def _merged(parts: Sequence[Any], scale: float, transposed: bool) -> torch.Tensor:
    """W + scale * gain * B @ A in fp32 and in W's layout: the one place where they are added up."""
    weight, residual, a, b, gain = parts
    left, right = b.float() if gain is None else b.float() * gain, a.float()
    if transposed:
        left, right = right.mT, left.mT
    add = torch.addmm if weight.ndim == 2 else torch.baddbmm
    return add(_frozen(weight, residual), left, right, alpha=scale)


def _out_in(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return weight.T if transposed else weight


def split_bf16_int8(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 as the nearest bf16 and an int8 with the next eight bits of the mantissa: within 2**-16 of the value."""
    value = value.float().contiguous()
    bits = (value.view(torch.int32) + 0x80) >> 8  # to 24 bits; carries move the exponent
    high = (bits + 0x80) >> 8
    low = bits - (high << 8)
    finite = value.isfinite()  # a carry out of nan's exponent would make a zero of it
    rounded = torch.where(finite, high.to(torch.int16).view(torch.bfloat16), value.bfloat16())
    return rounded, torch.where(finite, low, 0).to(torch.int8)


def join_bf16_int8(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 value that `split_bf16_int8` stored."""
    return (((high.contiguous().view(torch.int16).int() << 8) + low) << 8).view(torch.float32)


def wrap_(model: nn.Module, cfg: LoraConfig, step: int = 0) -> list[str]:
    """Put adapters on the matrices of `model`'s blocks that `cfg` names, of the rank that holds after `step` updates;
    returns their paths.

    The rest (embeddings, norms, head, biases) stays trainable. Adapters hold zeros until `redraw_all_`. A weight that
    several layers share gets one adapter. Raises ConfigError, see `targets.find_targets`.
    """
    targets = find_targets(model, cfg)
    targets.say_what_is_left(type(model).__name__)
    parents: dict[str, dict[str, LowRankLinear]] = {}
    for paths in targets.linears:
        layer = LowRankLinear(cast(nn.Linear, model.get_submodule(paths[0])), cfg, step)
        put_(model, paths, layer)
        parents.setdefault(paths[0].rpartition(".")[0], {})[paths[0].rpartition(".")[2]] = layer
    for path, siblings in parents.items():
        if not _mixes(model.get_submodule(path)):
            _put_together(siblings)
    for path in targets.stacks:
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        stack = LowRankStack(getattr(module, name), cfg, step, transposed=bool(getattr(module, "is_transposed", False)))
        setattr(module, name, stack.weight)
        parametrize.register_parametrization(module, name, stack, unsafe=True)
    return [paths[0] for paths in targets.linears] + targets.stacks


def _mixes(module: nn.Module) -> bool:
    """Whether it gives each of its projections an input of its own, as RWKV's, which mix the last token's in."""
    return any(name.startswith("time_mix") for name, _ in module.named_parameters(recurse=False))


def _put_together(siblings: dict[str, LowRankLinear]) -> None:
    for names in ONE_INPUT:
        layers = [siblings[name] for name in names if name in siblings]
        if len(layers) > 1 and len({layer.lora_A.shape[1] for layer in layers}) == 1:
            Together(layers)


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """As `adapters` names them."""
    return {path: layer for path, layer in adapters(model).items() if isinstance(layer, LowRank)}


def new_adapters_all_(model: nn.Module, cfg: LoraConfig, step: int) -> None:
    for layer in low_rank_layers(model).values():
        layer.new_adapters_(cfg, step)


def updates_all(boundary: Boundary) -> dict[str, LayerUpdate]:
    """What the adapters of every layer add to W now, by its path. Ranks share the work. Every rank."""
    works = {path: partial(_update_of, layer) for path, layer in low_rank_layers(boundary.model).items()}
    found = boundary.owned(works)
    return {path: layer_update(found[path][0]) for path in works}


def _update_of(layer: LowRank) -> list[torch.Tensor]:
    return [layer.update_singular_values()]


def keep_effective_all_(model: nn.Module, dtype: torch.dtype) -> None:
    for layer in low_rank_layers(model).values():
        layer.keep_effective_(dtype)


def _entries(model: nn.Module) -> Iterator[tuple[str, LowRank | None, str]]:
    """Of each state-dict entry its name, the layer with adapters that it belongs to, and the plain model's name for
    what it holds; empty where it holds no weight or bias of the plain model."""
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRank)}
    stacks = {path.removesuffix(".0"): m for path, m in layers.items() if isinstance(m, LowRankStack)}
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        if path in stacks:
            yield name, stacks[path], plain_path(f"{path}.0")
        elif path in layers:
            yield name, layers[path], name if leaf in ("weight", "bias") else ""
        else:
            yield name, None, name


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the state-dict entries that hold wrapped layers' W."""
    return {
        name
        for name, layer, _ in _entries(model)
        if layer is not None and name.rpartition(".")[2] in ("weight", "original", "residual")
    }


@torch.no_grad()
def take_adapters_(model: nn.Module, cfg: LoraConfig) -> LoraUpdate:
    """The adapters at all paths of their layers, gains multiplied into B; in `model` B is zero from then on."""
    factors, layers = {}, {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LowRank):
            b = layer.lora_B if layer.lora_gain is None else layer.lora_B * layer.lora_gain
            factors[plain_path(path)] = dense_copy(layer.lora_A), dense_copy(b)
            layers[id(layer)] = layer
    for layer in layers.values():
        layer.lora_B.zero_()
        layer.refresh_()
    (lora_rank,) = {a.shape[-2] for a, _ in factors.values()}
    return LoraUpdate(lora_rank, cfg.alpha, cfg.rslora, cfg.dropout, factors)


@torch.no_grad()
def folded_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the unwrapped architecture with every update added in, as `Method.dense_state_dict` has it."""
    own, dense = model.state_dict(), {}
    with full_fp32():
        for name, layer, plain in _entries(model):
            if layer is None or name.endswith(".bias"):
                dense[plain] = dense_copy(own[name])
            elif plain:
                dense[plain] = layer.merged().cpu()
    return dense
