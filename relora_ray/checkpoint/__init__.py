"""Checkpoints: one base, one delta and the manifest that commits them. No manifest, no checkpoint."""

from relora_ray.checkpoint.checkpointer import Checkpointer, Position, Saved, restore_model
from relora_ray.checkpoint.commit import Commits, Committer, Outcome, Share
from relora_ray.checkpoint.history import History, existing_step, list_manifests, read_history, read_manifest
from relora_ray.checkpoint.manifest import Manifest, Rollback, Setup

__all__ = [
    "Checkpointer",
    "Commits",
    "Committer",
    "History",
    "Manifest",
    "Outcome",
    "Position",
    "Rollback",
    "Saved",
    "Setup",
    "Share",
    "existing_step",
    "list_manifests",
    "read_history",
    "read_manifest",
    "restore_model",
]
