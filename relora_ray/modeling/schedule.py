"""The learning rate as a pure function of the global step.

Restarts fall on the end of the warm start (if there is one) and then every `restart_every_steps`, by default on every
merge; without a warm start the first is at `restart_every_steps`. Worked example, jagged_cosine with steps=400,
warm_start_steps=100, restart_every_steps=100, warmup_steps=10, restart_warmup_steps=10: the rate climbs over
steps 0-9, follows one cosine to step 400, and at 100, 200 and 300 falls to 0 and climbs back over ten steps.
"""

import math
from bisect import bisect_right
from functools import lru_cache

from relora_ray.config import RunConfig


def lr_multiplier(step: int, cfg: RunConfig) -> float:
    """Learning rate of update `step` (from 0), relative to `optimizer.learning_rate`.

    jagged_cosine is the published `cosine_restarts` (Lialin et al. 2023, section 3; reference
    `training_utils.py:_get_cosine_schedule_with_multiple_warmups_lambda`), with restarts counted from the end
    of the warm start. The first update after a start or restart has rate 0, as published.

    With method.compat=reference what follows the warm start is a run of its own, with a schedule of its own.
    """
    if cfg.method.begins_anew_after_warm_start and 0 < cfg.warm_start_steps <= step:
        return _shape(step - cfg.warm_start_steps, _after_warm_start(cfg))
    warming = step < cfg.warm_start_steps
    return (cfg.warm_start_lr_ratio if warming else 1.0) * _shape(step, cfg)


@lru_cache
def _after_warm_start(cfg: RunConfig) -> RunConfig:
    method = cfg.method.model_copy(update={"warm_start_steps": 0})
    return cfg.model_copy(update={"steps": cfg.steps - cfg.warm_start_steps, "method": method})


def restart_step(step: int, cfg: RunConfig) -> int:
    """The last LR restart at or before `step`; 0, the start of the run, counts as one."""
    if cfg.schedule.kind not in ("jagged_cosine", "cosine_cycles"):
        return 0
    passed = bisect_right(cfg.restarts, step)
    return cfg.restarts[passed - 1] if passed else 0


def _shape(step: int, cfg: RunConfig) -> float:
    schedule, warmup = cfg.schedule, cfg.schedule.warmup_steps
    if schedule.kind == "cosine_cycles":
        return _cycle(step, cfg)
    if step < warmup:
        return step / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "linear":
        return 1.0 - (1.0 - schedule.min_lr_ratio) * _progress(step, warmup, cfg.steps)
    start = restart_step(step, cfg)
    if schedule.kind == "jagged_cosine" and start > 0 and step < start + schedule.restart_warmup_steps:
        target = _cosine(start + schedule.restart_warmup_steps, warmup, cfg.steps, schedule.min_lr_ratio)
        return (step - start) / schedule.restart_warmup_steps * target
    return _cosine(step, warmup, cfg.steps, schedule.min_lr_ratio)


def _cycle(step: int, cfg: RunConfig) -> float:
    start = restart_step(step, cfg)
    end = next((s for s in cfg.restarts if s > step), cfg.steps)
    warmup = cfg.schedule.warmup_steps if start == 0 else cfg.schedule.restart_warmup_steps
    if step - start < warmup:
        return (step - start) / warmup
    return _cosine(step - start, warmup, end - start, cfg.schedule.min_lr_ratio)


def _progress(step: int, start: int, end: int) -> float:
    return (step - start) / max(1, end - start)


def _cosine(step: int, start: int, end: int, min_ratio: float) -> float:
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, start, end)))
