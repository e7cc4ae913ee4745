"""Checkpoints: one base, one delta and the manifest that commits them. No manifest, no checkpoint."""

from relora_ray.checkpoint.checkpointer import Checkpointer, Position, Saved, restore_model
from relora_ray.checkpoint.commit import Commits, Committer, Outcome, Share
from relora_ray.checkpoint.manifest import (
    Manifest,
    existing_step,
    list_manifests,
    pin,
    plan_prune,
    read_manifest,
)

__all__ = [
    "Checkpointer",
    "Commits",
    "Committer",
    "Manifest",
    "Outcome",
    "Position",
    "Saved",
    "Share",
    "existing_step",
    "list_manifests",
    "pin",
    "plan_prune",
    "read_manifest",
    "restore_model",
]
