"""What one update computes and keeps, counted from the run's own code on tensors that hold nothing.

The model that a method has adapted on the meta device is copied to torch's fake tensors on the CPU, which have shapes,
types and storages and no memory. Loss, backward pass and optimizer step then run as they do in training, autocast and
hand-written gradients included, and three things are seen: multiplications (torch.utils.flop_counter, the rule of one
multiplication and addition as two FLOPs), what autograd keeps for the backward pass, and the most bytes that are there
at a time. A 7b model takes seconds. So a method or an architecture needs no formula of its own here.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from relora_ray.config import RunConfig, TrainConfig
from relora_ray.errors import ReloraError, first_words
from relora_ray.methods.base import Method, Update
from relora_ray.modeling.architecture import in_training
from relora_ray.modeling.optim import trainable
from relora_ray.modeling.small import small_config
from relora_ray.modeling.token_loss import WHOLE_BYTES, TokenLoss, default_chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """What a micro-batch and an update take on one worker."""

    rows: int
    """Of the micro-batch."""
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    """What autograd keeps of a micro-batch, weights apart: activations."""
    peak_bytes: int
    """The most that is there at a time besides the state, activations included: gradients of all that is trained
    belong to the state, whether they are there yet or not."""
    update_flops: int
    """Once an update: the optimizer, projections, effective weights."""
    update_peak_bytes: int
    num_passes: int = 1
    """Backward passes an update over the same rows."""
    why_not: str = ""
    """If it could not be run without values: what is counted by formula then."""

    @property
    def micro_flops(self) -> int:
        return self.num_passes * (self.forward_flops + self.backward_flops)

    @property
    def buffer_bytes(self) -> int:
        """What is there besides activations where most is: logits, their gradients, gradients that are yet to be added
        up, the optimizer's intermediate results."""
        return max(self.peak_bytes, self.update_peak_bytes) - self.saved_bytes


def trace(cfg: RunConfig, method: Method, model: nn.Module, rows: int) -> Pass:
    """Of a micro-batch of `rows` rows. `model`: as `method` has adapted it, on the meta device; it is not changed. What
    cannot be run without values, as experts whose rows depend on a router, is counted by `by_formula`."""
    try:
        return _run(cfg, method, model, rows)
    except ReloraError:
        raise
    except Exception as error:  # of somebody else's architecture or method: data that decide what is computed
        why = f"{type(error).__name__}: {first_words(error)}"
        logger.info("%s cannot be run without values: %s", type(model).__name__, why)
        return by_formula(cfg, model, rows, why)


def _run(cfg: RunConfig, method: Method, model: nn.Module, rows: int) -> Pass:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _without_memory(model)
        method.refresh(model)
        optimizer = method.build_optimizer(model)
        for state in optimizer.state.values():
            for name, kept in state.items():
                if isinstance(kept, torch.Tensor) and kept.ndim == 0:
                    state[name] = torch.tensor(0.0, dtype=kept.dtype)  # its value is known, unlike that of torch.zeros
        loss = TokenLoss(model, cfg.train, sized_for="cuda" if cfg.cluster.gpus_per_worker else "cpu")
        loss.take_head_for_plain(has_plain_head(cfg, model))
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(rows, cfg.data.seq_len, dtype=torch.long)
        seen = _Passes(lambda: loss(ids, ids, torch.ones(rows)) / cfg.tokens_per_step, inputs_alone=cfg.train.recompute)
        with Watch(model, optimizer) as watch:
            seen.watch = watch
            try:
                method.update(_FakeUpdate(model, optimizer, 0, seed=0, backward=seen.backward))
            except Exception as error:  # of somebody's update, which may ask for values: it is left out, and said so
                if not seen.num_passes:  # the pass itself failed
                    raise
                logger.info("%s.update cannot be run without values: %s", type(method).__name__, first_words(error))
                for parameter in trainable(model):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                watch.begin()
                optimizer.step()
            total, update_peak = watch.flops, watch.peak
    per_pass = seen.forward_flops + seen.backward_flops
    return Pass(
        rows=rows,
        forward_flops=seen.forward_flops // seen.num_passes,
        backward_flops=seen.backward_flops // seen.num_passes,
        saved_bytes=seen.saved_bytes,
        peak_bytes=seen.peak_bytes,
        update_flops=total - per_pass,
        update_peak_bytes=update_peak,
        num_passes=seen.num_passes,
    )


class _FakeUpdate(Update):
    """An update of which no number is known: all is finite."""

    def clip(self) -> bool:
        return True


class _Passes:
    """Backward passes, and what they take."""

    def __init__(self, forward: Callable[[], torch.Tensor], *, inputs_alone: bool) -> None:
        """`inputs_alone`: autograd keeps blocks' inputs, which its hooks do not see."""
        self.forward, self.inputs_alone = forward, inputs_alone
        self.watch: Watch
        self.num_passes = self.forward_flops = self.backward_flops = self.saved_bytes = self.peak_bytes = 0

    def backward(self, extra: Callable[[], torch.Tensor] | None) -> float:
        self.watch.begin()
        begin, there = self.watch.flops, self.watch.now
        with saved_bytes(self.watch.known) as saved:
            total = self.forward()
            if extra is not None:
                total = total + extra()
            middle = self.watch.flops
            kept = self.watch.now - there if self.inputs_alone else sum(saved.values())
            self.saved_bytes = max(self.saved_bytes, kept)
            total.backward()
        self.num_passes += 1
        self.forward_flops += middle - begin
        self.backward_flops += self.watch.flops - middle
        self.peak_bytes = max(self.peak_bytes, self.watch.peak)
        del total
        self.watch.begin()
        return 0.0


@contextmanager
def saved_bytes(known: Mapping[int, Any]) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps of what is computed in the block, by storage, each once; none of `known`."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class Watch(TorchDispatchMode):
    """FLOPs of what runs in the block, and the bytes of tensors that were made in it: those that are there now, and the
    most since `begin`. What a kernel makes for itself alone is not seen."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        self.known = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        """Storages of the state: they are held, so that no other takes their place."""
        self._live: dict[int, int] = {}
        self.flops = self.now = self.peak = 0

    def begin(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if (count := COUNTED.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.now += self._live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _added_product(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * left.numel() * right.shape[-1])


COUNTED: dict[Any, Callable[..., int]] = flop_registry | {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Torch's own counts, and what it lacks: products that are added in place, and fused attention on a CPU. As if nothing
was masked, as there: 4 products of (tokens, tokens) and a head's width forward and 10 back, two of them made again."""


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on fake tensors of the CPU, in the fake mode that is on. What is one tensor stays one."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        fake: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for name, mark in vars(tensor).items():  # such as what spares it from decay
            setattr(fake, name, mark)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def chunk_tokens(train: TrainConfig, vocabulary: int) -> int:
    """Of a micro-batch from which on its logits are made in chunks of equal size."""
    return (
        train.loss_chunk_tokens
        or max(WHOLE_BYTES // (4 * vocabulary), default_chunk(vocabulary, bf16=train.precision == "bf16")) + 1
    )


def has_plain_head(cfg: RunConfig, model: nn.Module) -> bool:
    """Whether the logits are a linear head's and nothing else's, as `TokenLoss` tries out: here by a tiny model of the
    same architecture. Of LLaMA it is known; of one without a tiny form it is taken to be so."""
    if cfg.model.llama is not None:
        return True
    config: Any = model.config
    return _tiny_has_plain_head(config.to_json_string())


@functools.lru_cache
def _tiny_has_plain_head(config: str) -> bool:
    try:
        content = json.loads(config)
        small = in_training(small_config(transformers.CONFIG_MAPPING[content["model_type"]].from_dict(content)))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            tiny: nn.Module = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32)
            loss = TokenLoss(tiny, _Train())  # type: ignore[arg-type]
            return loss._head_is_plain is not False and loss._has_plain_head(torch.zeros(1, 8, dtype=torch.long))
    except Exception:  # whatever a class of transformers raises of a tiny form: there is none
        return True


class _Train:
    """What `TokenLoss` asks of `train`."""

    precision, loss_chunk_tokens, recompute = "fp32", None, False


def by_formula(cfg: RunConfig, model: nn.Module, rows: int, why_not: str) -> Pass:
    """The same without running anything: 2 FLOPs a token forward for each weight of a matrix, 2 back for its input and
    2 for its gradient if it is trained; and of attention 4 * tokens * width forward and 10 back (Kaplan et al. 2020,
    section 2.1, who leave attention's gradient at twice the forward pass; PaLM, Chowdhery et al. 2022, appendix B).
    Of stacked experts those that a token goes to. Activations: 34 bytes a token, block and unit of width, at 2 bytes a
    number and with attention that keeps no scores (Korthikanti et al. 2022, equation 2)."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    tokens = rows * cfg.data.seq_len
    width, depth = int(getattr(text, "hidden_size", 0) or 0), int(getattr(text, "num_hidden_layers", 0) or 0)
    share = _experts_share(text)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables -= {id(head.weight)} if isinstance(head, nn.Linear) else set()
    active = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in tables:
            continue
        count = parameter.numel() * (share if "expert" in name and "shared" not in name else 1.0)
        active += count
        trained += count if parameter.requires_grad else 0.0
    scores = 4 * tokens * cfg.data.seq_len * width * depth
    number_bytes = 2 if cfg.train.precision == "bf16" else 4
    one_block, saved = 0, 17 * number_bytes * tokens * width * depth
    if cfg.train.recompute:  # blocks' inputs, and in the backward pass all of one
        one_block, saved = 17 * number_bytes * tokens * width, number_bytes * tokens * width * depth
    logits = (
        4 * min(tokens, 2**26 // (4 * max(1, int(getattr(text, "vocab_size", 1))))) * getattr(text, "vocab_size", 0)
    )
    forward = int(2 * tokens * active + scores)
    return Pass(
        rows=rows,
        forward_flops=forward,
        backward_flops=int(2 * tokens * (active + trained) + 2.5 * scores) + forward * cfg.train.recompute,
        saved_bytes=saved,
        peak_bytes=saved + max(one_block, 2 * int(logits)),
        update_flops=0,
        update_peak_bytes=0,
        why_not=why_not,
    )


def _experts_share(text: Any) -> float:
    """Of the experts, those that a token goes to."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), 1)
    each = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
    used = next((n for name in each if isinstance(n := getattr(text, name, None), int) and n > 0), total)
    return min(1.0, used / total)
