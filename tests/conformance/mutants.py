"""Small copies of what published implementations get wrong, each ours but for one defect.

The first twelve are the table in the README ("Where it differs from the published ReLoRA code" and the copies of it);
the rest show that the remaining checks can fail. Patches are made where training happens, so they hold in the
processes of several ranks too.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from relora_ray import loop
from relora_ray.checkpoint import commit
from relora_ray.conformance.implementation import Spec, Trace
from relora_ray.conformance.ours import Ours, state_tensors
from relora_ray.data import loader
from relora_ray.methods import base
from relora_ray.methods.adapter import adapter_parameters, redraw_all_
from relora_ray.methods.lowrank import relora
from relora_ray.methods.lowrank.config import LoraConfig, ResetConfig
from relora_ray.methods.lowrank.layer import low_rank_layers, wrap_
from relora_ray.methods.lowrank.relora import Relora
from relora_ray.methods.lowrank.reset import prune_state_
from relora_ray.modeling.optim import MOMENTS
from relora_ray.modeling.parallel import World


class ZeroesAAtWrap(Ours):
    """A and B both zero (Guitaricet/relora relora.py:122): no gradient until the first merge."""

    def wrap(self, model: nn.Module, **settings: Any) -> nn.Module:
        model = super().wrap(model, **settings)
        for layer in low_rank_layers(model).values():
            layer.lora_A.data.zero_()
        return model


class MasksApart(Ours):
    """m and v pruned with masks of their own (training_utils.py:optimizer_reset): entries keep m with v = 0."""

    def reset(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        if settings["kind"] in ("zero", "none"):
            return super().reset(model, optimizer, **settings)
        for _, parameter in adapter_parameters(model):
            state = optimizer.state[parameter]
            for number, moment in enumerate(MOMENTS):
                generator = torch.Generator().manual_seed(10 * settings["boundary"] + number)
                score = torch.rand(state[moment].shape, generator=generator)
                if settings["kind"] == "magnitude":
                    score = state[moment].abs()
                pruned = round(settings["ratio"] * score.numel())
                state[moment].mul_(score > score.flatten().kthvalue(pruned).values)
            state["step"].zero_()
        return None


class KeepsAdamsStep(Ours):
    """Adam's step goes on (same): without bias correction fresh moments move weights by up to 6.6 learning rates."""

    def reset(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        reset = ResetConfig(kind=settings["kind"], ratio=settings["ratio"], adam_step="keep")
        prune_state_(optimizer, adapter_parameters(model), reset, seed=settings["seed"], boundary=settings["boundary"])


class ZeroIsRandom(Ours):
    """Kind zero prunes a random 0.999 (same)."""

    def reset(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        if settings["kind"] == "zero":
            settings |= {"kind": "random", "ratio": 0.999}
        super().reset(model, optimizer, **settings)


class MergesInBf16(Ours):
    """The merge is added to bf16 weights (relora.py:276): most of a small update is rounded away."""

    def wrap(self, model: nn.Module, *, rank: int, alpha: float, seed: int, precision: str = "fp32") -> nn.Module:
        wrap_(model, LoraConfig(lora_rank=rank, alpha=alpha, frozen_weights="bf16" if precision == "bf16" else "fp32"))
        redraw_all_(model, seed=seed, boundary=0)
        return model


class CountsInTheProcess(Ours):
    """Merges fall on updates counted since the process started (torchrun_main.py:874)."""

    def train(self, spec: Spec) -> Trace:
        adapt, is_boundary = Relora.adapt, Relora.is_boundary

        def adapting(self: Relora, model: nn.Module, step: int) -> None:
            if not hasattr(self, "started"):
                self.started = step  # type: ignore[attr-defined]
            adapt(self, model, step)

        def counting(self: Relora, step: int) -> bool:
            return is_boundary(self, step - getattr(self, "started", 0)) and step > 0

        with patch.object(Relora, "adapt", adapting), patch.object(Relora, "is_boundary", counting):
            return super().train(spec)


class SkippedStepShiftsTheSchedule(Ours):
    """The scheduler is not stepped when an update is skipped (torchrun_main.py:783)."""

    def train(self, spec: Spec) -> Trace:
        original = loop.lr_multiplier

        def shifted(step: int, cfg: Any) -> float:
            return original(step - sum(s < step for s in spec.nonfinite | spec.skipped), cfg)

        with patch.object(loop, "lr_multiplier", shifted):
            return super().train(spec)


class SavesBeforeTheMerge(Ours):
    """A checkpoint holds the state before the merge of its own step (torchrun_main.py:830 before :879)."""

    def train(self, spec: Spec) -> Trace:
        cross, save = loop._cross_boundary, loop.Checkpointer.save
        before: list[tuple[torch.Tensor, torch.Tensor]] = []

        def crossing(cfg: Any, world: Any, method: Any, state: loop.TrainState, *args: Any) -> Any:
            if state.position.step > spec.warm_start_steps:
                before.extend((t, t.clone()) for t in state_tensors(state))
            return cross(cfg, world, method, state, *args)

        def saving(*args: Any, **kwargs: Any) -> Any:
            after = [(t, t.clone()) for t, _ in before]
            for tensor, value in before:
                tensor.copy_(value)
            try:
                return save(*args, **kwargs)
            finally:
                for tensor, value in after:
                    tensor.copy_(value)
                before.clear()

        with patch.object(loop, "_cross_boundary", crossing), patch.object(loop.Checkpointer, "save", saving):
            return super().train(spec)


def _redraw_from_global_state(model: nn.Module, **_: Any) -> None:
    for layer in low_rank_layers(model).values():
        nn.init.kaiming_uniform_(layer.lora_A, a=5**0.5)
        nn.init.zeros_(layer.lora_B)


class DrawsFromGlobalState(Ours):
    """A is redrawn from each rank's own random state (relora.py:303)."""

    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        super().merge(model, seed=seed, boundary=boundary)
        _redraw_from_global_state(model)

    def train(self, spec: Spec) -> Trace:
        def unchecked(self: World, value: int, what: str) -> None:
            """Ours would notice and stop: the suite must notice by itself."""

        with (
            patch.object(relora, "redraw_all_", _redraw_from_global_state),
            patch.object(World, "assert_same", unchecked),
            patch.object(commit, "_heading", lambda manifest: manifest.step),
        ):
            return super().train(spec)


class UsesQuantile(Ours):
    """torch.quantile finds the magnitude's threshold (training_utils.py:167): it fails above 2^24 elements."""

    def reset(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        if settings["kind"] != "magnitude":
            return super().reset(model, optimizer, **settings)
        for _, parameter in adapter_parameters(model):
            state = optimizer.state[parameter]
            magnitude = state["exp_avg"].abs()
            keep = magnitude > torch.quantile(magnitude.flatten(), settings["ratio"])
            for moment in MOMENTS:
                state[moment].mul_(keep)
            state["step"].zero_()
        return None


class ShardsTheDataByRank(Ours):
    """Every rank reads a contiguous share of the data (torchrun_main.py:716)."""

    def train(self, spec: Spec) -> Trace:
        def rows_of(self: loader.BatchSource, step: int) -> list[loader.MicroBatch]:
            size, total = self._world.size, self._rows.num_rows
            share, each = total // size, self._global_batch_rows // size
            order = np.zeros(self._global_batch_rows, dtype=np.int64)
            for rank in range(size):
                order[rank::size] = rank * share + (np.arange(each) + step * each) % share
            return list(self._share(order))

        with patch.object(loader.BatchSource, "step", rows_of):
            return super().train(spec)


class ExportsAdapters(Ours):
    """Adapters are left unmerged in what is exported: plain transformers drops them."""

    def train(self, spec: Spec) -> Trace:
        def unmerged(self: Relora, model: nn.Module) -> dict[str, torch.Tensor]:
            return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

        with patch.object(Relora, "dense_state_dict", unmerged):
            return super().train(spec)


class MergesWithoutScale(Ours):
    """W += B A, without alpha / r."""

    @torch.no_grad()
    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        for layer in low_rank_layers(model).values():
            layer.weight.add_(layer.lora_B @ layer.lora_A)
        redraw_all_(model, seed=seed, boundary=boundary)


class StartsWithB(Ours):
    """B is not zero at the start."""

    def wrap(self, model: nn.Module, **settings: Any) -> nn.Module:
        model = super().wrap(model, **settings)
        for layer in low_rank_layers(model).values():
            layer.lora_B.data.fill_(1e-3)
        return model


class RestartsAtFullRate(Ours):
    """No climb after a restart."""

    def jagged_cosine(self, step: int, **settings: Any) -> float:
        return super().jagged_cosine(step, **(settings | {"restart_warmup": 1}))


class TrustsAnyFile(Ours):
    """Loads a checkpoint whose file is cut off: here, as if it were whole."""

    def train(self, spec: Spec) -> Trace:
        folder = Path(spec.folder)
        if folder.name.startswith("half-"):
            shutil.copytree(folder.parent / "half", folder, dirs_exist_ok=True)
        return super().train(spec)


class CountsRowsAsTokens(Ours):
    """A budget in tokens is divided by the rows of a batch (args_utils.py:50)."""

    def prepare(self, spec: Spec) -> None:
        super().prepare(self._misread(spec))

    def train(self, spec: Spec) -> Trace:
        return super().train(self._misread(spec))

    def _misread(self, spec: Spec) -> Spec:
        if spec.tokens is None:
            return spec
        steps = spec.tokens // spec.global_batch_rows // 3 * 3
        return dataclasses.replace(spec, tokens=None, steps=steps)


class NeverRedrawsA(Ours):
    """A merge zeroes B and leaves A as it is."""

    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        kept = [layer.lora_A.detach().clone() for layer in low_rank_layers(model).values()]
        super().merge(model, seed=seed, boundary=boundary)
        for layer, a in zip(low_rank_layers(model).values(), kept, strict=True):
            layer.lora_A.data.copy_(a)


class DrawsTheSameAEveryTime(Ours):
    """The draw is keyed, but not by the boundary."""

    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        super().merge(model, seed=seed, boundary=0)


class MasksFromGlobalState(Ours):
    """A random reset draws its mask from each rank's own random state (training_utils.py:random_pruning_)."""

    def reset(self, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        settings["seed"] = int(torch.randint(2**31, ())) if settings["kind"] == "random" else settings["seed"]
        super().reset(model, optimizer, **settings)


class DropsAdapters(Ours):
    """The dense weights are W alone."""

    def dense(self, model: nn.Module) -> dict[str, torch.Tensor]:
        kept = {n: t for n, t in model.state_dict().items() if ".lora_" not in n}
        return {n: t.detach().clone() for n, t in kept.items()}


class UpdatesWithNan(Ours):
    """An update whose gradients are NaN is made."""

    def train(self, spec: Spec) -> Trace:
        careless = SimpleNamespace(**{**vars(math), "isfinite": lambda value: True})
        with patch.object(loop, "math", careless), patch.object(base, "math", careless):
            return super().train(spec)


class NeverResumes(Ours):
    """Starts again at update 0."""

    def train(self, spec: Spec) -> Trace:
        shutil.rmtree(spec.folder, ignore_errors=True)  # there is none before the first attempt
        self.prepare(spec)
        return super().train(spec)


class ForgetsToMerge(Ours):
    """A merge in a run redraws the adapters and adds nothing to W."""

    def train(self, spec: Spec) -> Trace:
        with patch.object(relora, "merge_all_", lambda model: len(low_rank_layers(model))):
            return super().train(spec)


class SaysNothing(Ours):
    """A train that does nothing passes nothing."""

    def train(self, spec: Spec) -> Trace:
        return Trace(crashed=spec.crash is not None)


class ShipsABrokenConfig(Ours):
    def shipped(self) -> list[str]:
        return ["relora/60m.yaml", "full/60m.yaml", "nowhere.yaml"]
