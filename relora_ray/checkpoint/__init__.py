"""Checkpoints: one base, one delta and the manifest that commits them. No manifest, no checkpoint."""

from relora_ray.checkpoint.checkpointer import Checkpointer, Position, restore_model
from relora_ray.checkpoint.manifest import (
    Manifest,
    list_manifests,
    plan_prune,
    read_manifest,
)

__all__ = [
    "Checkpointer",
    "Manifest",
    "Position",
    "list_manifests",
    "plan_prune",
    "read_manifest",
    "restore_model",
]
