"""Checkpoints: one base, one delta and the manifest that commits them. No manifest, no checkpoint."""

from typing import TYPE_CHECKING, Any

from relora_ray.checkpoint.commit import Commits, Committer, Outcome, Share
from relora_ray.checkpoint.history import History, best_step, existing_step, list_manifests, read_history, read_manifest
from relora_ray.checkpoint.manifest import Manifest, Rollback, Setup

if TYPE_CHECKING:
    from relora_ray.checkpoint.checkpointer import Checkpointer, Position, Saved, restore_model

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
    "best_step",
    "existing_step",
    "list_manifests",
    "read_history",
    "read_manifest",
    "restore_model",
]


def __getattr__(name: str) -> Any:
    """What needs torch, when it is asked for: whoever only commits starts in a second without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from relora_ray.checkpoint import checkpointer

    return getattr(checkpointer, name)
