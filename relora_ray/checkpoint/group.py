"""Who commits where there is no coordinator: rank 0, over a process group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from relora_ray.checkpoint.commit import Commits, Outcome, Share
from relora_ray.checkpoint.manifest import Rollback
from relora_ray.modeling.parallel import World, broadcast_bytes, gather_bytes


class GroupCommitter:
    """Without a coordinator: rank 0 gathers and commits, over a group of its own, so that it may happen in a thread
    while training reduces gradients. Made by every rank at the same time."""

    def __init__(self, world: World, commits: Commits, *, timeout_s: float) -> None:
        self._world, self._commits = world, commits
        # gloo on any device: NCCL would queue behind training's collectives.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world.size > 1 else None

    def roll_back(self, rollback: Rollback) -> Outcome:
        return self._commits.roll_back(rollback)

    def commit(self, share: Share) -> Outcome:
        if self._group is None:
            outcome = self._commits.commit([share])
            if outcome.manifest is not None:
                self._commits.prune(outcome.manifest)
            return outcome
        first, cpu = self._world.is_first, torch.device("cpu")
        shares = gather_bytes(share.model_dump_json().encode(), self._world.size, cpu, self._group)
        made = self._commits.commit([Share.model_validate_json(s) for s in shares]) if first else None
        told = made.model_dump_json().encode() if made else b""
        outcome = Outcome.model_validate_json(broadcast_bytes(told, first, cpu, self._group))
        if first and outcome.manifest is not None:
            self._commits.prune(outcome.manifest)
        return outcome
