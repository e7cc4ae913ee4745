"""What a fork may do otherwise than its parent, by their configs alone: no torch is imported.

A fork from the end of a warm start is, bit for bit, the run that would have trained the warm start itself, if its
config gives the warm start's updates the same rows and learning rates: `warm_start_digest` tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256

from relora_ray.config import RunConfig
from relora_ray.modeling.schedule import lr_multiplier

_MAY_DIFFER = ("steps", "optimizer.", "schedule.", "train.skip_steps")


def may_differ(cfg: RunConfig) -> tuple[str, ...]:
    """Beginnings of keys in which a fork may differ from its parent: what was trained is taken as it is, all else is as
    if the run had been its own."""
    return (*_MAY_DIFFER, *(f"method.{key}" for key in sorted(cfg.method.free_at_boundaries)))


def warm_start_digest(cfg: RunConfig) -> str:
    """Of all that decides the state at the end of the warm start, less the adapters: runs with one digest can share it.
    Empty without a warm start."""
    if not cfg.warm_start_steps:
        return ""
    decisive = {k: v for k, v in cfg.identity().items() if not k.startswith(may_differ(cfg))}
    decisive |= {k: v for k, v in cfg.identity().items() if k.startswith("optimizer.")}
    decisive["skip"] = [step for step in cfg.train.skip_steps if step < cfg.warm_start_steps]
    decisive["init_from"] = cfg.model.init_from
    decisive["multipliers"] = [lr_multiplier(step, cfg) for step in range(cfg.warm_start_steps)]
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def fixed_keys(cfg: RunConfig, keys: Iterable[str]) -> list[str]:
    """Of these keys of a config those in which no fork may differ from its parent."""
    decisive = cfg.identity().keys() | {"model.init_from"}
    return [key for key in keys if key in decisive and not key.startswith(may_differ(cfg))]
