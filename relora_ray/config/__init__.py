"""What a run is to be: settings, their rules, and how a file is read. Imports no torch and no Ray."""

from relora_ray.config.method import MethodConfig
from relora_ray.config.run import (
    STRUCTURAL,
    CheckpointConfig,
    ClusterConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    split_step,
)
from relora_ray.config.section import Section, flatten, nearest

__all__ = [
    "STRUCTURAL",
    "CheckpointConfig",
    "ClusterConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "flatten",
    "nearest",
    "split_step",
]
