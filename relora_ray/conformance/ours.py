"""This implementation, held to the suite."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import nn

from relora_ray import loop
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.config import OptimizerConfig, RunConfig
from relora_ray.config.file import load_config, parse_config
from relora_ray.conformance.implementation import (
    Implementation,
    LayerView,
    Spec,
    Trace,
    eval_logits,
    relative_change,
)
from relora_ray.methods.adapter import adapter_parameters, merge_all_, redraw_all_
from relora_ray.methods.lowrank.config import LoraConfig, ResetConfig
from relora_ray.methods.lowrank.layer import folded_state_dict, low_rank_layers, wrap_
from relora_ray.methods.lowrank.reset import prune_state_
from relora_ray.modeling import optim
from relora_ray.modeling.optim import build_adamw
from relora_ray.modeling.parallel import World, digest
from relora_ray.modeling.schedule import lr_multiplier
from relora_ray.runs.batches import Data
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run

PHASES = {"train": "update", "boundary": "boundary", "checkpoint": "checkpoint"}


class Crash(Exception):
    """Stands for a process that dies."""


class Ours(Implementation):
    name = "relora_ray"

    def __init__(self, configs: Path = Path("configs")) -> None:
        self._configs = configs

    def wrap(self, model: nn.Module, *, rank: int, alpha: float, seed: int, precision: str = "fp32") -> nn.Module:
        wrap_(model, LoraConfig(lora_rank=rank, alpha=alpha))  # bf16 is autocast: weights and adapters stay fp32
        redraw_all_(model, seed=seed, boundary=0)
        return model

    def layers(self, model: nn.Module) -> dict[str, LayerView]:
        return {p: LayerView.low_rank(m.lora_A, m.lora_B, m.scale) for p, m in low_rank_layers(model).items()}

    def merge(self, model: nn.Module, *, seed: int, boundary: int) -> None:
        merge_all_(model)
        redraw_all_(model, seed=seed, boundary=boundary)

    def dense(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return folded_state_dict(model)

    def optimizer(self, model: nn.Module, *, learning_rate: float, beta2: float) -> torch.optim.Optimizer:
        return build_adamw(model, OptimizerConfig(learning_rate=learning_rate, beta2=beta2))

    def reset(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, kind: str, ratio: float, seed: int, boundary: int
    ) -> None:
        reset = ResetConfig.model_validate({"kind": kind, "ratio": ratio})
        prune_state_(optimizer, adapter_parameters(model), reset, seed=seed, boundary=boundary)

    def jagged_cosine(
        self, step: int, *, steps: int, warmup: int, every: int, restart_warmup: int, floor: float
    ) -> float:
        return lr_multiplier(step, _schedule(steps, warmup, every, restart_warmup, floor))

    def prepare(self, spec: Spec) -> None:
        check_run(config(spec))

    def train(self, spec: Spec) -> Trace:
        trace, cfg = Trace(), config(spec)

        def on_record(record: Record) -> None:
            kind, step = record["kind"], record["step"]
            if kind == "attempt":
                trace.began_at = step
            elif kind == "train":
                trace.learning_rates[step - 1] = record["learning_rate"]
                if math.isfinite(record["loss"]):
                    trace.losses[step - 1] = record["loss"]
            elif kind == "boundary":
                trace.boundaries[step] = str(record["digest"])
            if spec.crash is not None and (PHASES.get(kind), step) == spec.crash:
                raise Crash(f"{kind} {step}")

        with _recorded_rows(trace), _recorded_changes(trace), poisoned(spec.nonfinite):
            try:
                state = loop.run_attempt(cfg, World.current(), on_record=on_record)
            except Crash:
                trace.crashed = True
                return trace
        trace.final = str(digest(state_tensors(state)))
        trace.probe = _probe(state.model)
        return trace

    def export(self, spec: Spec) -> str:
        return f"{run_storage(config(spec)).url}/model"

    def checkpoint_files(self, spec: Spec) -> list[Path]:
        storage = run_storage(config(spec))
        manifest = read_manifest(storage, list_manifests(storage)[-1])
        parts = [part for part in (manifest.base, manifest.delta) if part is not None]
        paths = [f"{part.folder}/{o.path}" for part in parts for o in part.objects]
        return [Path(storage.url, path) for path in (*paths, manifest.path)]

    def shipped(self) -> list[str]:
        found = sorted(self._configs.rglob("*.yaml"))
        return [str(p.relative_to(self._configs)) for p in found if p.parent.name not in ("ablations", "sweeps")]

    def run_reduced(self, name: str, spec: Spec) -> int:
        cfg = load_config(self._configs / name, _reduced(load_config(self._configs / name), spec))
        state = loop.run_attempt(check_run(cfg), World())
        merges = state.position.counters.merges
        assert cfg.method.kind != "relora" or merges == 2, f"{merges} merges"
        return state.position.step


def config(spec: Spec) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": spec.folder,
        "seed": 3,
        "steps": spec.steps or None,
        "tokens": spec.tokens,
        "global_batch_rows": spec.global_batch_rows,
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 2048},
        "data": {"path": spec.data, "seq_len": spec.seq_len},
        "method": {
            "kind": "relora",
            "lora_rank": 4,
            "alpha": 8,
            "warm_start_steps": spec.warm_start_steps,
            "merge_every_steps": spec.merge_every_steps,
        },
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.01},
        "schedule": {"kind": "jagged_cosine", "warmup_steps": 1, "restart_warmup_steps": 1},
        "train": {"micro_batch_rows": 3, "eval_rows": 5, "skip_steps": sorted(spec.skipped)},
        # Not in a thread: a check must know which checkpoints there are when it crashes the run.
        "checkpoint": {"save_every_steps": 2, "keep_last": 100, "save_async": False},
    }
    return parse_config(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))


@lru_cache
def _schedule(steps: int, warmup: int, every: int, restart_warmup: int, floor: float) -> RunConfig:
    spec = Spec("x", "x", steps=steps, merge_every_steps=every, warm_start_steps=0)
    raw = config(spec).model_dump()
    raw["schedule"] = {
        "kind": "jagged_cosine",
        "warmup_steps": warmup,
        "restart_warmup_steps": restart_warmup,
        "min_lr_ratio": floor,
    }
    return RunConfig.model_validate(raw)


def state_tensors(state: loop.TrainState) -> list[torch.Tensor]:
    """All weights and all optimizer state, sharing their memory."""
    kept = optim.state_tensors(state.model, state.optimizer)
    return [t.detach() for t in (*state.model.state_dict().values(), *kept.values())]


@contextlib.contextmanager
def _recorded_rows(trace: Trace) -> Iterator[None]:
    """Note every row of weight 1 that the loop asks for."""
    original = loop.open_batches

    def open_batches(cfg: RunConfig, world: World) -> Data:
        data = original(cfg, world)
        take = data.train.step

        def step(number: int) -> Any:
            batches = take(number)
            rows = [r for b in batches for r, weight in zip(b.inputs, b.weights, strict=True) if weight == 1]
            trace.rows[number] = [hashlib.sha256(r.contiguous().numpy().tobytes()).hexdigest()[:12] for r in rows]
            return batches

        setattr(data.train, "step", step)  # noqa: B010
        return data

    with patch.object(loop, "open_batches", open_batches):
        yield


def _probe(model: nn.Module) -> torch.Tensor:
    """Logits for token ids 0 to 7, (8, vocabulary)."""
    return eval_logits(model, torch.arange(8)[None])[0]


@contextlib.contextmanager
def _recorded_changes(trace: Trace) -> Iterator[None]:
    """Note how much every boundary changes the function."""
    original = loop._cross_boundary

    def cross(cfg: RunConfig, world: World, method: Any, state: loop.TrainState, *args: Any) -> Any:
        before, done = _probe(state.model), state.position.step
        result = original(cfg, world, method, state, *args)
        trace.function_change[done] = relative_change(_probe(state.model), before)
        return result

    with patch.object(loop, "_cross_boundary", cross):
        yield


@contextlib.contextmanager
def poisoned(steps: Collection[int]) -> Iterator[None]:
    """Make the loss and gradients of these updates NaN, as bad data or an overflow would."""
    original = loop._accumulate_gradients

    def accumulate(
        cfg: RunConfig, world: World, wrapped: nn.Module, batches: Any, step: int, wish: bool, extra: Any = None
    ) -> tuple[float, bool]:
        loss, wished = original(cfg, world, wrapped, batches, step, wish, extra)
        if step not in steps:
            return loss, wished
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        return math.nan, wished

    with patch.object(loop, "_accumulate_gradients", accumulate):
        yield


def _reduced(cfg: RunConfig, spec: Spec) -> list[str]:
    """Overrides for two cycles of two updates; everything else is the config's own."""
    overrides = [
        f"storage={spec.folder}",
        f"data={{path: {spec.data}, seq_len: {spec.seq_len}}}",
        "model={hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2, vocab_size: 2048}",
        "global_batch_rows=2",
        "train.micro_batch_rows=1",
        "train.eval_rows=2",
        "train.compile=false",
        "schedule.warmup_steps=1",
        "checkpoint.save_every_steps=2",
        "checkpoint.keep_every_steps=0",
    ]
    warm = 0
    if not isinstance(cfg.method, LoraConfig):
        overrides += [f"method.{key}={value}" for key, value in cfg.method.tiny.items()]
    else:
        warm = 2 if cfg.method.warm_start_steps else 0
        overrides += ["method.lora_rank=4", f"method.warm_start_steps={warm}"]
    if cfg.merges:
        overrides += ["method.merge_every_steps=2", "schedule.restart_warmup_steps=1"]
    return [*overrides, f"steps={warm + 4}"]
