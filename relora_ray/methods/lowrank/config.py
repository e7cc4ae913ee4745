"""The sections of LoRA and ReLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from relora_ray.config.method import OnBlocks, WarmStart
from relora_ray.config.planned import Plan, all_values, cycle_ends
from relora_ray.config.section import Planned, Section

if TYPE_CHECKING:
    from relora_ray.config.run import RunConfig, TrainConfig


class ResetConfig(Section):
    """What a merge does to the Adam state of the adapters. m and v share one mask (the reference draws two).

    The defaults are the best of benchmarks/results/ablations-resets (1.2 M parameters, 600 updates, 3 merges, learning
    rate and scale tuned for each row; held-out loss, mean of 3 seeds, which differ from each other by up to 0.04):
    zero 2.1304, magnitude 0.9 2.1332, random 0.9 2.1342, zero with the step kept 2.1344, none 2.1379. As published:
    random 0.999 2.1557, magnitude 0.9 3.1709.
    """

    kind: Literal["zero", "magnitude", "random", "none"] = "zero"
    """zero: all of m and v. magnitude: all but the largest `1 - ratio` by |m|. random: a keyed random `ratio`.
    none: keep everything (for ablations)."""
    ratio: float = Field(0.95, gt=0, lt=1)
    """Share of entries that magnitude and random prune. Above, the more the better: none of them (kind none), 0.9 and
    all of them (kind zero) came out in this order."""
    adam_step: Literal["reset", "keep"] = "reset"
    """Adam's bias-correction counter of the adapters. reset: starts again at 0, so the first updates are
    corrected and stay near the learning rate. keep: as published; with beta2 = 0.999 an entry with fresh
    moments then moves up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate at once and
    6.6 times within 12 steps. Each wants a learning rate of its own: at best 8e-3 and 4e-3 in the runs above."""


class LoraConfig(OnBlocks, WarmStart):
    kind: Literal["lora"] = "lora"
    """LoRA pre-training: adapters on frozen weights, never merged during training."""
    implementation = "relora_ray.methods.lowrank.lora:Lora"
    free_at_boundaries = frozenset({"lora_rank", "alpha", "rslora", "dropout", "warm_start_lr_ratio"})
    tiny: ClassVar[Mapping[str, Any]] = {"lora_rank": 2, "alpha": 4}
    rank_key = "lora_rank"
    lora_rank: Planned = 128
    """Inner dimension of the adapters. With relora it may change at merges: `{0: 256, 20000: 128}` is 256 at first and
    128 after the merge at step 20000. Adapters of another rank begin without moments, whatever `reset` says."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / lora_rank (rsLoRA: alpha / sqrt(lora_rank))."""
    rslora: bool = False
    """Scale by alpha / sqrt(lora_rank) (Kalajdzievski 2023)."""
    frozen_weights: Literal["fp32", "bf16_int8", "bf16"] = "fp32"
    """How the frozen weights are stored, and so what a merge can add to. fp32: 4 bytes a weight; a merge changes
    nothing in the function, bit for bit. bf16_int8: 3 bytes, bf16 and the next 8 bits of the mantissa. bf16: 2 bytes,
    as published; most of a small update is rounded away (for comparison only). Error of the sum of 20 merges of rms
    1e-4 and 1e-5 into weights of std 0.02 (benchmarks/results/merge-numerics.md): fp32 5e-6 and 5e-5, bf16_int8 1.3e-3
    and 1.3e-2, bf16 0.33 and 0.90."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input; experts' adapters have none. Above 0 the layer is computed in two branches
    instead of with one merged matrix: slower, and a merge then changes the function by rounding."""
    trainable_scaling: bool = False
    """Learn one factor per layer on top of the scale; 1 at the start and again after every merge."""

    def problems(self, cfg: RunConfig) -> list[str]:
        return [*super().problems(cfg), *self._rank_problems(cfg)]

    def _rank_problems(self, cfg: RunConfig) -> list[str]:
        if not isinstance(self.lora_rank, Plan):
            return []
        return [
            f"method.lora_rank={self.lora_rank} changes, and method.kind={self.kind} never merges: adapters can change "
            f"their rank where they are merged. Give one rank, or use method.kind=relora."
        ]

    def keeps_effective_weights(self, train: TrainConfig) -> bool:
        """Whether wrapped layers keep W + scale * B A, see `train.effective_weights`."""
        if self.dropout:
            return False
        if train.effective_weights == "auto":
            return self.frozen_weights == "fp32"
        return train.effective_weights == "kept"


class ReloraConfig(LoraConfig):
    kind: Literal["relora"] = "relora"  # type: ignore[assignment]
    """ReLoRA (Lialin et al. 2023): merge and redraw the adapters every `merge_every_steps`."""
    implementation = "relora_ray.methods.lowrank.relora:Relora"
    free_at_boundaries = LoraConfig.free_at_boundaries | {"merge_every_steps", "reset"}
    tiny: ClassVar[Mapping[str, Any]] = {"lora_rank": 2, "alpha": 4, "merge_every_steps": 3, "warm_start_steps": 3}
    merge_every_steps: Planned
    """Updates in a cycle, counted from the end of the warm start. Cycles may change their length where one begins:
    `{0: 1000, 5000: 2000}`; the learning rate then restarts at every merge."""
    reset: ResetConfig = ResetConfig()

    @property
    def zeroes_moments(self) -> bool:
        return self.reset.kind == "zero" and not self.compat

    compat: Literal["", "reference"] = ""
    """reference: the arithmetic of the published code (Guitaricet/relora at 176f376) where it differs. A and B both
    start at zero; merges fall one update later, so that none follows the last cycle; a reset only where the learning
    rate restarts; m and v are pruned with masks of their own; reset kind zero prunes a random 0.999; Adam's step is
    kept; after a warm start optimizer and schedule begin anew. Draws stay keyed. For comparisons, and to continue what
    was begun there; the published layer also has dropout=0.1."""

    @model_validator(mode="after")
    def _check_compat(self) -> ReloraConfig:
        if not self.compat:
            return self
        rules = {
            "reset.adam_step='keep'": self.reset.adam_step == "keep",
            "reset.kind zero, magnitude or random": self.reset.kind != "none",
            "trainable_scaling=false (the published one is dead after a merge)": not self.trainable_scaling,
            "merge_every_steps of 2 or more": min(all_values(self.merge_every_steps)) > 1,
            "merge_every_steps that does not change": not isinstance(self.merge_every_steps, Plan),
            "lora_rank that does not change": not isinstance(self.lora_rank, Plan),
        }
        for needed, kept in rules.items():
            if not kept:
                raise ValueError(f"method.compat='reference' needs method.{needed}. Set that, or remove compat.")
        return self

    def cycles(self, steps: int) -> tuple[int, ...]:
        every: Any = self.merge_every_steps  # a Plan, if it is no number, which has a hash
        return cycle_ends(self.warm_start_steps, every, steps, "method.merge_every_steps")

    def boundaries(self, steps: int) -> tuple[int, ...]:
        found = super().boundaries(steps)
        if not self.compat:
            return found
        merges = set(self.cycles(steps))
        return tuple(step + (step in merges) for step in found if step < steps)

    @property
    def begins_anew_after_warm_start(self) -> bool:
        return self.compat == "reference"

    def problems(self, cfg: RunConfig) -> list[str]:
        return [*self._compat_problems(cfg), *super().problems(cfg), *self._cycle_problems(cfg), *self._idle_settings()]

    def _compat_problems(self, cfg: RunConfig) -> list[str]:
        if self.compat == "reference" and cfg.optimizer.weight_decay:
            return [
                f"optimizer.weight_decay={cfg.optimizer.weight_decay} with method.compat='reference': the published "
                f"code decays norms and biases too, which is not reproduced. Set optimizer.weight_decay=0."
            ]
        return []

    def _cycle_problems(self, cfg: RunConfig) -> list[str]:
        if self.warm_start_steps >= cfg.steps:
            return []  # it is told, and there are no cycles to count
        ends, merge, every = self.cycles(cfg.steps), self.merge_every_steps, cfg.schedule.restart_every_steps
        if ends[-1] != cfg.steps:
            near = ends[-2:]
            return [
                f"method.merge_every_steps={merge} has cycles end at {' and '.join(map(str, near))} (counted from "
                f"method.warm_start_steps={self.warm_start_steps}), and not at steps={cfg.steps}. Cycles must be "
                f"whole: use steps={min(near, key=lambda end: abs(end - cfg.steps))}, or another cycle length."
            ]
        if every and isinstance(merge, Plan):
            return [
                f"schedule.restart_every_steps={every} with method.merge_every_steps={merge}: where cycles change "
                f"their length, the learning rate restarts at every merge. Remove one of the two."
            ]
        if every and isinstance(merge, int) and every % merge:
            fits = sorted({(every // merge) * merge or merge, -(-every // merge) * merge})
            return [
                f"schedule.restart_every_steps={every} is not a multiple of method.merge_every_steps={merge}. LR "
                f"restarts must fall on merges: use {' or '.join(map(str, fits))}, or change method.merge_every_steps."
            ]
        return []

    def _rank_problems(self, cfg: RunConfig) -> list[str]:
        if self.warm_start_steps >= cfg.steps:
            return []
        merges = self.cycles(cfg.steps)[:-1]
        return [
            f"method.{key} changes at step {step}, where no cycle begins. Cycles begin at {_around(step, merges)}."
            for key in ("lora_rank", "merge_every_steps")
            if isinstance(planned := getattr(self, key), Plan)
            for step in planned
            if step and step not in merges
        ]

    def _idle_settings(self) -> list[str]:
        reset, default = self.reset, ResetConfig()
        idle: list[tuple[str, object]] = []
        if reset.kind in ("zero", "none") and reset.ratio != default.ratio:
            idle.append(("method.reset.ratio", reset.ratio))
        if reset.kind == "none" and reset.adam_step != default.adam_step:
            idle.append(("method.reset.adam_step", reset.adam_step))
        return [f"{k}={v} has no effect with method.reset.kind={reset.kind}. Remove one of the two." for k, v in idle]


def _around(step: int, merges: tuple[int, ...]) -> str:
    near = [*[s for s in merges if s < step][-1:], *[s for s in merges if s > step][:1]]
    return " and ".join(map(str, near)) or "0 alone"
