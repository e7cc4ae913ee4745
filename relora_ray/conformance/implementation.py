"""The adapter between the suite and an implementation of ReLoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

Phase = Literal["update", "boundary", "checkpoint"]


class NotOffered(Exception):
    """The implementation has no such thing."""


@dataclass(frozen=True)
class LayerView:
    """The adapters of one wrapped layer: y = x (W + update)^T. The parameters themselves, not copies or views: the
    suite writes to them, and reads their `.grad` and their entry in the optimizer's state. Any form that a merge and
    reset is for can be seen so; of B A it is `low_rank`."""

    drawn: tuple[nn.Parameter, ...]
    """What a merge draws anew, such as A."""
    zeroed: tuple[nn.Parameter, ...]
    """What is zero right after a merge, such as B; the update is linear in all of these together."""
    update: Callable[[torch.dtype], torch.Tensor]
    """What the parameters, as they are now, add to W, (out, in), computed in this type."""

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        return (*self.drawn, *self.zeroed)

    @classmethod
    def low_rank(cls, a: nn.Parameter, b: nn.Parameter, scale: float) -> LayerView:
        """Of scale * B A: A is (r, in), B is (out, r)."""
        return cls((a,), (b,), lambda dtype: scale * b.to(dtype) @ a.to(dtype))


@dataclass(frozen=True)
class Spec:
    """A small run of ReLoRA: a LLaMA of 2 blocks of width 32, rank 4, scale 2, a checkpoint after every two updates."""

    folder: str
    """Where all that the run stores goes. Training with a folder that holds checkpoints resumes; one that was copied
    elsewhere as a whole resumes too."""
    data: str
    """A dataset written by relora_ray.data.prepare; at most 2,048 token ids."""
    steps: int = 12
    warm_start_steps: int = 3
    merge_every_steps: int = 3
    global_batch_rows: int = 6
    seq_len: int = 24
    tokens: int | None = None
    """If set, the run's budget, in place of `steps`."""
    nonfinite: frozenset[int] = frozenset()
    """Updates, from 0, whose loss and gradients are made NaN."""
    skipped: frozenset[int] = frozenset()
    """Updates whose rows the user asks to pass over."""
    crash: tuple[Phase, int] | None = None
    """Give up at once after this phase of the step with so many finished updates, as a process that dies."""


@dataclass
class Trace:
    """What one process did from start to end, or to its crash."""

    began_at: int = 0
    """Finished updates when it started."""
    learning_rates: dict[int, float] = field(default_factory=dict)
    """By update, from 0, whether made or skipped."""
    rows: dict[int, list[str]] = field(default_factory=dict)
    """By update: a digest of every row of tokens that this process fed the model."""
    losses: dict[int, float] = field(default_factory=dict)
    """By update: mean loss over the global batch."""
    boundaries: dict[int, str] = field(default_factory=dict)
    """By number of finished updates: a digest of all weights after the boundary. Merges after 6 and 9 updates, after
    12 too unless the last cycle stays unmerged, and after 3 the end of the warm start if it counts as one."""
    function_change: dict[int, float] = field(default_factory=dict)
    """By boundary: largest change of the logits for token ids 0 to 7, relative to the largest logit."""
    crashed: bool = False
    final: str = ""
    """Digest of all weights and all optimizer state at the end, gathered where they are sharded: equal on all ranks."""
    probe: torch.Tensor | None = None
    """Logits at the end for token ids 0 to 7, shape (8, vocabulary)."""


@torch.no_grad()
def eval_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode, fp32, (rows, length, vocabulary); `model` is left in the mode it was in."""
    was_training = model.training
    logits: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    model.train(was_training)
    return logits


def relative_change(after: torch.Tensor, before: torch.Tensor) -> float:
    """Largest change of an entry, relative to the largest entry."""
    return float((after - before).abs().max() / before.abs().max())


class Implementation:
    """Subclass this. Every method but `name` may be left out: its checks are then reported as not offered."""

    name = "?"

    # Layers. Models are plain: Hugging Face's LLaMA, or nn.Linear layers in an nn.ModuleList; fp32, on the CPU.

    def wrap(self, model: nn.Module, *, rank: int, alpha: float, seed: int, precision: str = "fp32") -> nn.Module:
        """Put adapters on the linear layers of the blocks, as at the start of training in `precision` (fp32, bf16)."""
        raise NotOffered

    def layers(self, model: nn.Module) -> dict[str, LayerView]:
        """All wrapped layers, by name."""
        raise NotOffered

    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        """Merge every adapter, draw A from (seed, boundary, name) and zero B."""
        raise NotOffered

    def dense(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Dense weights of the function of `model`, fp32, under the plain model's names. Copies."""
        raise NotOffered

    def optimizer(self, model: nn.Module, *, learning_rate: float, beta2: float) -> torch.optim.Optimizer:
        """Adam over all trained parameters, whose state has exp_avg, exp_avg_sq and step."""
        raise NotOffered

    def reset(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, kind: str, ratio: float, seed: int, boundary: int
    ) -> None:
        """Prune the adapters' m and v with one mask, tensor by tensor, and start their `step` again at 0.

        zero: all entries. magnitude: the share `ratio` of smallest |m|. random: a random share `ratio`, drawn from
        (seed, boundary, name). none: nothing, `step` included."""
        raise NotOffered

    def jagged_cosine(
        self, step: int, *, steps: int, warmup: int, every: int, restart_warmup: int, floor: float
    ) -> float:
        """The learning rate's multiplier for update `step`."""
        raise NotOffered

    # Runs.

    def prepare(self, spec: Spec) -> None:
        """Called once before `train` is called in one or several processes."""

    def train(self, spec: Spec) -> Trace:
        """Train in this process, or as one rank of torch.distributed's default group if there is one."""
        raise NotOffered

    def export(self, spec: Spec) -> str:
        """A Hugging Face folder of the finished run's model."""
        raise NotOffered

    def checkpoint_files(self, spec: Spec) -> list[Path]:
        """Every file that the newest checkpoint needs."""
        raise NotOffered

    def shipped(self) -> list[str]:
        """Names of the ready-made configs."""
        raise NotOffered

    def run_reduced(self, name: str, spec: Spec) -> int:
        """Run two cycles of a ready-made config, with a smaller model and batch and its own settings otherwise;
        returns how many updates were made."""
        raise NotOffered
