"""The interface of a training method, and its rules. docs/add-a-method.md goes through it by an example.

A method keeps a run elastic by three promises. Every tensor that lives across steps is a parameter, a
persistent buffer or a tensor of the optimizer's state. Plans depend on the global step only, and random
numbers on (seed, tag, boundary) only. A boundary is a deterministic function of the state before it.

`step` counts finished updates everywhere: `adapt(model, step=300)` gives the structure that update 300 (the
301st) trains, and a boundary "after 300" lies between update 299 and update 300.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError
from relora_ray.keyed import key
from relora_ray.methods.updates import LayerUpdate
from relora_ray.modeling.optim import build_adamw, trainable
from relora_ray.modeling.parallel import World

if TYPE_CHECKING:
    from relora_ray.modeling.peft_export import LoraUpdate


def dense_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 on the CPU, as `Method.dense_state_dict` has them. Whole numbers, such as the experts of each
    token in a table, stay what they are."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


@dataclass(frozen=True)
class BoundaryReport:
    """What happened at a boundary."""

    step: int
    """Finished updates."""
    kind: str
    """"switch" where the warm start ends, "merge", or a word of the method's own."""
    num_layers: int
    """Layers whose frozen weights changed."""
    state_pruned: float
    """Share of the adapters' moments that is zero now."""
    optimizer: torch.optim.Optimizer
    """The optimizer to go on with: a new one if parameters are new, else the one passed in."""
    new_parameters: bool
    """Whether the set of trainable parameters changed, so that DDP must be built anew."""
    updates: Mapping[str, LayerUpdate] = field(default_factory=dict)
    """What was added to each layer, by its path, if the method says so: for the metrics. Equal on every rank."""


Backward = Callable[[Callable[[], torch.Tensor] | None], float]
Gradient = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Update:
    """One update: what a method's `update` is made of. `step` counts the updates before it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        *,
        seed: int,
        world: World | None = None,
        grad_clip: float = 0.0,
        backward: Backward | None = None,
    ) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step
        self.world = world or World()
        self.loss, self.grad_norm = math.nan, math.nan
        """Per token, in nats; before clipping. Of the last backward pass, equal on every rank."""
        self.applied = False
        """Whether the weights have moved: not if the loss or the gradient was not finite."""
        self.notes: dict[str, float] = {}
        """Figures of this update for its record, such as seconds."""
        self._seed, self._grad_clip, self._backward = seed, grad_clip, backward
        self._clipped = False
        self.is_over = False
        """Whether it has come to `apply`."""

    def backward(self, extra: Callable[[], torch.Tensor] | None = None) -> float:
        """The gradient of the mean loss over the global batch, reduced over ranks, added to `.grad`; returns that loss.

        `extra`: a term that is added to the loss, a function of weights alone, so that it is the same on every rank."""
        assert self._backward is not None, "made without rows"
        self.loss, self._clipped = self._backward(extra), False
        return self.loss

    def clip(self) -> bool:
        """Clip the gradient to the run's norm, once; whether it and the loss are finite. Equal on every rank."""
        if not self._clipped:
            limit = self._grad_clip or math.inf
            self.grad_norm = float(torch.nn.utils.clip_grad_norm_(trainable(self.model), limit))
            self._clipped = True
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def apply(self) -> bool:
        """Clip, let the optimizer step if all is finite, and drop the gradients; whether it stepped."""
        self.applied, self.is_over = self.clip(), True
        if self.applied:
            self.optimizer.step()
        # In place under DDP: a dropped gradient would be accumulated outside DDP's buckets, a second copy of all.
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)
        return self.applied

    def seed(self, tag: str, *parts: int | str) -> int:
        """Of a generator for this step: the same on every rank, and after every resume."""
        return key(self._seed, tag, self.step, *parts)

    def owned(self, works: Mapping[str, Callable[[], Sequence[torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
        """The results of works that are each done on one rank only, on every rank: the same bits, whatever machines
        ranks run on. Works are dealt out by turns, in the order of their names. Every rank, with equal names."""
        return self.world.shared(works)


class Boundary(Update):
    """What a boundary is done with: the state after `step` updates, and the rows of the last."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        *,
        seed: int,
        world: World | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        super().__init__(model, optimizer, step, seed=seed, world=world)
        self._gradient = gradient

    def gradient(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of the mean loss over the rows of the update just made, reduced over ranks, by these parameters, which may be
        frozen. Nothing is added to `.grad`. RuntimeError for one that no gradient reaches, such as W in LoRA's layers,
        which compute with W and the adapters in one matrix."""
        assert self._gradient is not None, "made without rows"
        return self._gradient(tensors)


class Method:
    """How weights are trained; what stands here is full-rank training. One instance per attempt; it holds no state of
    its own."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg

    def adapt(self, model: nn.Module, step: int) -> None:
        """Give `model` the structure it has after `step` updates: wrap, freeze; in place, every rank. On the meta
        device too, where nothing has a value."""

    def refresh(self, model: nn.Module) -> None:
        """Bring up to date what is derived from the model's weights, after a state was loaded into it."""

    def frozen_names(self, model: nn.Module) -> set[str]:
        """Names of the state-dict entries that change only at boundaries: a checkpoint's base."""
        return set()

    def fresh_names(self, model: nn.Module) -> set[str]:
        """Names of the parameters that a boundary draws anew, and that a fork may have in another shape."""
        return set()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """All that it will keep of a parameter is there from the start, as tensors in `optimizer.state`: a checkpoint
        is restored into it. Groups may have a `lr_ratio`."""
        return build_adamw(model, self.cfg.optimizer)

    def update(self, update: Update) -> None:
        """Make one update; every rank. It must come to `apply`."""
        update.backward()
        update.apply()

    def is_boundary(self, step: int) -> bool:
        """Whether a boundary follows update `step - 1`. Pure."""
        return step in self._boundaries

    def on_boundary(self, boundary: Boundary) -> BoundaryReport:
        """Do the boundary after `boundary.step` updates, in place; every rank, at the same step."""
        raise NotImplementedError(f"{type(self).__name__} has no boundaries")

    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The function of `model` as a plain state dict of the unwrapped architecture, fp32, on the CPU.

        Does not change the model. NotMergeableError if there is none."""
        return {name: dense_copy(tensor) for name, tensor in model.state_dict().items()}

    def why_no_adapter(self, step: int) -> str:
        """Why the state after `step` updates is no frozen base with low-rank adapters on it: the end of a sentence that
        begins with the method's name. Empty if it is such."""
        return "has no low-rank adapters on a frozen base"

    def take_adapter_(self, model: nn.Module) -> LoraUpdate:
        """The adapters, taken out of `model`, whose function is that of the base from then on: for exports. Called only
        where `why_no_adapter` says nothing."""
        raise NotImplementedError(f"{type(self).__name__} says that it has adapters, and has no take_adapter_")

    def last_boundary(self, step: int) -> int:
        """The last boundary at or before `step`; 0, the start, counts as one."""
        while step > 0 and not self.is_boundary(step):
            step -= 1
        return step

    @cached_property
    def _boundaries(self) -> frozenset[int]:
        return frozenset(self.cfg.method.boundaries(self.cfg.steps))


def build_method(cfg: RunConfig) -> Method:
    """Of the kind that the config names. ConfigError if that is a package's which cannot be imported."""
    try:
        found: type[Method] = resolve_name(cfg.method.implementation)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"method.kind={cfg.method.kind!r} names {cfg.method.implementation} as what trains it, which cannot be "
            f"imported: {error!r}. Repair that package."
        ) from error
    return found(cfg)
