"""Cross-entropy of a causal language model, summed over tokens, in fp32.

Logits are large: 126 KiB a token in fp32 at 32,100 classes, several times that with what autograd keeps. Where they
are, the head's product and the loss are one autograd function that goes over the tokens in chunks, makes gradients
where it makes the loss, and leaves of a chunk's logits nothing (the idea of Hsu et al. 2024, "Liger Kernel", and
Wijmans et al. 2024, "Cut Your Losses"). PyTorch has `F.linear_cross_entropy`: on a CPU it was 2 to 5 times slower, and
its loss under bf16 was off by 4e-2 (torch 2.13).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from relora_ray.config import TrainConfig
from relora_ray.errors import ConfigError
from relora_ray.modeling.recompute import recompute_blocks_

logger = logging.getLogger(__name__)

WHOLE_BYTES = 64 * 2**20
"""Logits that take less than this in fp32 are not chunked: there is nothing to be gained."""
CHUNK_BYTES = 256 * 2**20
"""The logits of a chunk, in the dtype of the computation: so large that adding up chunks' gradients costs little."""
SOFTMAX_BYTES = {"cpu": 8 * 2**20, "cuda": CHUNK_BYTES}
"""What exists of the logits in fp32 at a time: on a CPU what its cache holds."""
LARGE = 100.0
"""Logits of about this size are beyond every cap in use."""


def _router_weight(model: nn.Module) -> float:
    """Of the balancing loss of experts in the architecture's loss; 0 where its config does not ask for one."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    if not getattr(text, "output_router_logits", False):
        return 0.0
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if (weight := getattr(model, name, getattr(text, name, None))) is not None:
            return float(weight)
    return 0.0


def default_chunk(vocabulary: int, *, bf16: bool) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_BYTES // (vocabulary * (2 if bf16 else 4)))


class TokenLoss(nn.Module):
    """A model that returns its loss, so that DDP and `torch.compile` see one module with one result."""

    def __init__(self, model: nn.Module, cfg: TrainConfig, *, compiled: bool = False, sized_for: str = "") -> None:
        """`model`: a Hugging Face causal language model, adapted or not. It is held, not copied. `sized_for`: the kind
        of device whose buffers it has; default: that of what it is given."""
        super().__init__()
        self._sized_for = sized_for
        self.model = model
        if cfg.recompute:
            recompute_blocks_(model)
        self.bf16, self.chunk_tokens = cfg.precision == "bf16", cfg.loss_chunk_tokens
        backbone = getattr(model, "base_model", model)
        self._extra_weight = _router_weight(model)
        self._head_is_plain: bool | None = False if backbone is model or self._extra_weight else None
        """None: not tried out yet."""
        # In tuples, which register nothing: they hold the same parameters as `model`.
        self._parts = (model, backbone, softmax_loss_)
        self._run: tuple[Callable[..., Any], ...] = self._parts
        if compiled:
            self._run = tuple(torch.compile(each) for each in self._parts)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """inputs, targets: (rows, tokens) ids; weights: (rows,). Returns an fp32 scalar.

        Where the architecture's config has a loss of its own for the router of experts, it is added while training,
        with the weight of the tokens."""
        model, backbone, softmax = self._run
        # A parameter that is computed is computed once in a pass, not at every expert that reads its matrix.
        with parametrize.cached(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            chunk = self._chunk(inputs)
            if not chunk:
                return self._whole(model(input_ids=inputs), targets, weights)
            hidden = backbone(input_ids=inputs)[0]
            head = self._head()
            dtype = torch.bfloat16 if self.bf16 else hidden.dtype
        per_token_weights = weights[:, None].expand(targets.shape).flatten()
        wanted = torch.is_grad_enabled()  # it is always off inside of a function's forward
        softmax_bytes = SOFTMAX_BYTES.get(self._sized_for or inputs.device.type, CHUNK_BYTES)
        sizes = (chunk, max(1, softmax_bytes // (4 * len(head.weight))))
        with torch.autocast(inputs.device.type, enabled=False):
            total: torch.Tensor = _HeadLoss.apply(
                hidden, head.weight, head.bias, targets.flatten(), per_token_weights, dtype, sizes, softmax, wanted
            )
        return total

    def _whole(self, output: Any, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        per_token = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        total = (per_token.view(targets.shape).sum(1) * weights).sum()
        if not (self._extra_weight and self.model.training):
            return total
        if getattr(output, "aux_loss", None) is None:
            raise ConfigError(
                f"{type(self.model).__name__} returns no loss of its router, though output_router_logits in its "
                f"config.json asks for one. Set that to false there: the loss of the tokens trains the router then."
            )
        return total + self._extra_weight * output.aux_loss * (weights.sum() * targets.shape[1])

    def take_head_for_plain(self, is_plain: bool) -> None:
        """Do not try out whether the logits are a linear head's: what holds no numbers cannot say."""
        if self._head_is_plain is None:
            self._head_is_plain = is_plain

    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def _chunk(self, inputs: torch.Tensor) -> int:
        """Tokens of a chunk; 0: all logits at once."""
        if self.chunk_tokens == 0 or self._head_is_plain is False:
            return 0
        vocabulary = self._head().weight.shape[0]
        if self.chunk_tokens is None and inputs.numel() * vocabulary * 4 < WHOLE_BYTES:
            return 0
        if self._head_is_plain is None:
            self._head_is_plain = self._has_plain_head(inputs)
            return self._chunk(inputs)
        return self.chunk_tokens or default_chunk(vocabulary, bf16=self.bf16)

    @torch.no_grad()
    def _has_plain_head(self, inputs: torch.Tensor) -> bool:
        """Whether the logits are the head of the backbone's output and nothing else: no cap, no scale. Tried out, with
        large random weights in the head: its own may be zero, or too small for a cap to show."""
        backbone, head, training = self._parts[1], self._head(), self.model.training
        self.model.eval()
        ids, plain = inputs[:1, :8], type(head) is nn.Linear
        if plain:
            hidden, own = backbone(input_ids=ids)[0], head.weight
            drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
            drawn *= LARGE / hidden.float().norm(dim=-1).mean().clamp_min(1e-6)
            head.weight = nn.Parameter(drawn, requires_grad=False)  # alone, though an embedding may share it
            try:
                plain = torch.equal(head(hidden), self.model(input_ids=ids).logits)
            finally:
                head.weight = own
        self.model.train(training)
        if not plain:
            logger.warning(
                "%s does more to its logits than a linear head: they are not chunked, and take %.1f GB in fp32",
                type(self.model).__name__,
                inputs.numel() * head.weight.shape[0] * 4 / 1e9,
            )
        return plain


def softmax_loss_(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the cross-entropies, computed in fp32; `logits`, (n, classes), become each row's gradient,
    softmax less one at the target."""
    at = targets[:, None]
    top, own = logits.amax(1).float(), logits.gather(1, at).squeeze(1).float()
    p = F.softmax(logits, dim=-1, dtype=torch.float32)
    losses = top - p.amax(1).log() - own  # the largest p is 1 / sum of exp(logit - top): one exp a logit, not two
    logits.copy_(p.scatter_add_(1, at, p.new_full((), -1.0).expand(at.shape)))
    return (losses * weights).sum()


class _HeadLoss(torch.autograd.Function):
    """Sum over tokens of weight times cross-entropy of `hidden` W^T + bias, chunk by chunk.

    Gradients are made in the forward pass, for a result of gradient one: gradients of W add up in fp32 over chunks. A
    weight is put on the rows of `hidden` and not on those of the logits, of which there are more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype,
        sizes: tuple[int, int],
        softmax: Callable[..., torch.Tensor],
        wanted: bool,
    ) -> torch.Tensor:
        """`sizes`: tokens of a chunk, and of those that are in fp32 at a time."""
        chunk, at_once = sizes
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=rows.device)
        d_rows = torch.empty_like(rows) if wanted else None
        d_weight: torch.Tensor | None = None
        d_bias: torch.Tensor | None = None
        for begin in range(0, len(rows), chunk):
            part = slice(begin, begin + chunk)
            logits = F.linear(rows[part], matrix, offset)
            for few in zip(*(t.split(at_once) for t in (logits, targets[part], weights[part])), strict=True):
                total += softmax(*few)
            if d_rows is None:
                continue
            torch.mm(logits, matrix, out=d_rows[part])
            weighted = weights[part, None].to(dtype)
            product = logits.T @ (rows[part] * weighted)
            d_weight = product.float() if d_weight is None else d_weight.add_(product)
            if bias is not None:
                product = (logits.T @ weighted).squeeze(1)
                d_bias = product.float() if d_bias is None else d_bias.add_(product)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.made = d_rows, d_weight, d_bias, weights
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,), (d_rows, d_weight, d_bias, weights) = grads, ctx.made
        ctx.made = None  # they are changed in place: there is no second time
        d_hidden = (d_rows * (weights * grad)[:, None]).to(ctx.dtype).view(ctx.shape)
        return d_hidden, d_weight.mul_(grad), None if d_bias is None else d_bias.mul_(grad), *[None] * 6
