"""What there is of a run: parameters, bytes by role, and what a checkpoint holds, of every structure it goes through.

All is counted from tensors on the meta device, by the functions that count, cut and store them in a run: nothing is
estimated, and no method has a formula here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn

from relora_ray.checkpoint.checkpointer import split_state
from relora_ray.checkpoint.layout import plan_part
from relora_ray.config import RunConfig
from relora_ray.config.method import BUILT_IN
from relora_ray.config.planned import Plan
from relora_ray.methods.base import build_method
from relora_ray.methods.full_config import FullConfig
from relora_ray.modeling.model import embedding_rows
from relora_ray.modeling.optim import state_bytes, trainable
from relora_ray.planning.trace import Pass, trace
from relora_ray.runs.run import bare_model

WARM_START = "warm start"
DEPTHS = (2, 4)
"""A LLaMA's blocks are all alike, so that what n of them take is a straight line in n: it is drawn through these."""


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same tensors are trained."""

    cfg: RunConfig
    name: str
    begins: int
    """Finished updates."""
    steps: int
    parameters: dict[str, int]
    """embeddings: with the head. linear: all other matrices. adapters: what the method has added. other: norms and the
    like."""
    trained: int
    vocabulary: int
    """Rows of the embedding."""
    frozen_entries: int
    """Of matrices that are not trained."""
    state: dict[str, int]
    """Bytes on each worker: weights, adapters, derived, gradients, optimizer."""
    base_bytes: int
    delta_bytes: int
    """Of a checkpoint in mid-cycle."""
    delta_after_reset_bytes: int
    """The same less what the optimizer keeps of what a boundary draws anew: zeros are not stored."""
    _passes: dict[int, Pass] = field(default_factory=dict, compare=False, repr=False)

    @property
    def gradient_bytes(self) -> int:
        return self.state["gradients"]

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    def measure(self, rows: int) -> Pass:
        """What an update takes with micro-batches of so many rows."""
        if rows not in self._passes:
            self._passes[rows] = _measure(self.cfg, self.begins, rows)
        return self._passes[rows]


def phases(cfg: RunConfig) -> list[Phase]:
    """Of a run, in order. Those that follow each other with equal tensors are one."""
    found: list[Phase] = []
    starts = sorted(step for step in _starts(cfg) if step < cfg.steps)
    with quiet():
        for step, end in zip(starts, [*starts[1:], cfg.steps], strict=True):
            phase = _phase(cfg, step, end - step, _name(cfg, step))
            if found and found[-1].state == phase.state and found[-1].parameters == phase.parameters:
                found[-1] = replace(found[-1], steps=found[-1].steps + phase.steps)
            else:
                found.append(phase)
    return found


def full_rank(cfg: RunConfig, known: list[Phase]) -> Phase:
    """Full-rank training of the same model, on the same rows. `known`: the run's phases: a warm start is such training,
    and need not be counted twice."""
    if known[0].name == WARM_START or cfg.method.kind == "full":
        return replace(known[0], name="full-rank", steps=cfg.steps)
    plain = cfg.model_copy(update={"method": FullConfig()})
    with quiet():
        return _phase(plain, 0, cfg.steps, "full-rank")


def _starts(cfg: RunConfig) -> set[int]:
    """Finished updates after which the tensors may be others."""
    plans = [value for name in type(cfg.method).model_fields if isinstance(value := getattr(cfg.method, name), Plan)]
    first = () if cfg.method.kind in BUILT_IN else cfg.method.boundaries(cfg.steps)[:2]
    return {0, cfg.warm_start_steps, *(step for plan in plans for step in plan), *first}


def _name(cfg: RunConfig, step: int) -> str:
    return WARM_START if step < cfg.warm_start_steps else cfg.method.kind


def _phase(cfg: RunConfig, step: int, steps: int, name: str) -> Phase:
    model = bare_model(cfg, device="meta")
    plain = {id(parameter) for parameter in model.parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(head := model.get_output_embeddings(), nn.Linear):  # type: ignore[operator]
        tables.add(id(head.weight))
    method = build_method(cfg)
    method.adapt(model, step)
    optimizer = method.build_optimizer(model)
    held = state_bytes(model, optimizer)
    kinds: dict[str, int] = dict.fromkeys(("embeddings", "linear", "adapters", "other"), 0)
    adapters = 0
    for parameter in model.parameters():
        added = id(parameter) not in plain and parameter.requires_grad
        kind = "embeddings" if id(parameter) in tables else "linear" if parameter.ndim > 1 else "other"
        kinds["adapters" if added else kind] += parameter.numel()
        adapters += parameter.nbytes * added
    frozen = method.frozen_names(model)
    base, delta = split_state(model, optimizer, frozen)
    drawn = method.fresh_names(model) if cfg.method.zeroes_moments else ()
    fresh = tuple(f"optimizer.{name}." for name in drawn)
    return Phase(
        cfg=cfg,
        name=name,
        begins=step,
        steps=steps,
        parameters=kinds,
        trained=sum(p.numel() for p in trainable(model)),
        vocabulary=embedding_rows(model),
        frozen_entries=sum(p.numel() for p in model.parameters() if not p.requires_grad and p.ndim > 1),
        state={"weights": held["weights"] - adapters, "adapters": adapters}
        | {role: held[role] for role in ("derived", "gradients", "optimizer")},
        base_bytes=stored_bytes(base),
        delta_bytes=stored_bytes(delta),
        delta_after_reset_bytes=stored_bytes({n: t for n, t in delta.items() if not (fresh and n.startswith(fresh))}),
    )


def stored_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Of a part of a checkpoint, its index and the headers of its files included, as the run's own plan has it."""
    if not tensors:
        return 0
    plan = plan_part(tensors, 1)
    files = [chunk for chunks in plan.files[0].values() for chunk in chunks]
    return len(plan.index) + sum(chunk.stored_bytes for chunk in files)


def _measure(cfg: RunConfig, step: int, rows: int) -> Pass:
    llama = cfg.model.llama
    with quiet():
        if llama is None or llama.num_layers <= DEPTHS[1]:
            return _trace(cfg, step, rows)
        low, high = (_trace(_with_depth(cfg, depth), step, rows) for depth in DEPTHS)
    more = (llama.num_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    counted = {
        name: round(a + (getattr(high, name) - a) * more)
        for name in (f.name for f in fields(Pass) if f.name not in ("rows", "num_passes", "why_not"))
        for a in (getattr(low, name),)
    }
    return replace(low, **counted)


def _with_depth(cfg: RunConfig, num_layers: int) -> RunConfig:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"num_layers": num_layers})})


def _trace(cfg: RunConfig, step: int, rows: int) -> Pass:
    model, method = bare_model(cfg, device="meta"), build_method(cfg)
    method.adapt(model, step)
    return trace(cfg, method, model, rows)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what is said of each model that is built, as a plan builds many, and without what torch says of a kernel
    that has no shapes without values, which is told otherwise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
