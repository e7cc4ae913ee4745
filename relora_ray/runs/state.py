"""What a run is between two steps, and what its checkpoints know it by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import nn

from relora_ray.checkpoint import Position
from relora_ray.config import STRUCTURAL, RunConfig, flatten
from relora_ray.methods.base import Method
from relora_ray.modeling.model import num_parameters
from relora_ray.modeling.optim import state_bytes
from relora_ray.modeling.parallel import World
from relora_ray.runs.metrics import Record
from relora_ray.runs.run import bare_model, new_model


@dataclass
class TrainState:
    """What a run is between two steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    position: Position


def build_state(cfg: RunConfig, method: Method, world: World, step: int) -> TrainState:
    """Model and optimizer with the structure they have after `step` updates; tensors are yet to be restored."""
    model = new_model(cfg) if step == 0 else bare_model(cfg)
    method.adapt(model, step)
    model.to(world.device)
    return TrainState(model, method.build_optimizer(model), Position(step=step))


def identity_digest(cfg: RunConfig, data_fingerprint: str) -> str:
    """Digest of all that decides the run's result: a checkpoint of another run is not gone on from.

    Settings at their defaults are left out, so that a version with one more setting still knows its own runs; and so
    are those that show in the tensors' names.
    """
    given = flatten(cfg.model_dump(mode="json", exclude_defaults=True)).keys() - set(STRUCTURAL) | {"method.kind"}
    settings = {k: v for k, v in cfg.identity().items() if k in given} | {"data.fingerprint": data_fingerprint}
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def structure_record(state: TrainState) -> Record:
    return {
        "num_parameters": num_parameters(state.model),
        "num_trainable": num_parameters(state.model, trainable_only=True),
        "state_bytes": state_bytes(state.model, state.optimizer),
    }
