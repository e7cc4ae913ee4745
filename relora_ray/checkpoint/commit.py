"""From every rank's share to one committed manifest.

A rank that has stored its share of a save hands a `Share` to its committer and is told the `Outcome`, the same on every
rank. Somebody gathers the shares: rank 0 over a process group of its own (here), or the driver's coordinator (runtime).
Either way `Commits` decides: nothing is committed unless all shares are there and none failed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from relora_ray.checkpoint.manifest import (
    Manifest,
    Part,
    attempt_number,
    list_manifests,
    part_folders,
    pinned_steps,
    plan_prune,
    read_manifest,
)
from relora_ray.config import CheckpointConfig
from relora_ray.errors import CheckpointError, DamagedError, ReloraError
from relora_ray.parallel import World
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Message):
    """One rank's part in a save: the manifest as it would be if nobody else had stored anything."""

    rank: int
    manifest: Manifest
    writers: tuple[int, ...]
    """Ranks that store something. The shares of the others are not waited for."""
    error: str = ""
    """Why the rank's objects are not stored; empty if they are, and verified."""


class Outcome(_Message):
    """What became of a save, on every rank alike."""

    manifest: Manifest | None
    """None if nothing was committed."""
    error: str = ""
    fatal: bool = False
    """The run must stop: somebody else is writing it."""


class Committer(Protocol):
    def __call__(self, share: Share) -> Outcome:
        """Hand in one rank's share and wait until all are in and the manifest is stored (every rank, any thread)."""


class Commits:
    """Commits and prunes one run's checkpoints. One at a time, wherever commits are made."""

    def __init__(self, storage: Storage, cfg: CheckpointConfig) -> None:
        self._storage, self._cfg = storage, cfg
        self._known: dict[int, Manifest] = {}
        """Manifests by step: they never change, so each is read once."""

    def commit(self, shares: Sequence[Share]) -> Outcome:
        """Never raises: a failure of any kind is an outcome that every rank hears of."""
        failures = [f"rank {share.rank}: {share.error}" for share in shares if share.error]
        if failures:
            return Outcome(manifest=None, error="; ".join(failures))
        try:
            manifest = merge_shares(shares)
            self._refuse_if_superseded(manifest.attempt)
            self._put(manifest)
        except ReloraError as error:
            return Outcome(manifest=None, error=str(error), fatal=isinstance(error, CheckpointError))
        except Exception as error:
            logger.exception("the commit failed")
            return Outcome(manifest=None, error=f"{type(error).__name__}: {error}", fatal=True)
        return Outcome(manifest=manifest)

    def committed(self, draft: Manifest) -> Manifest | None:
        """What this attempt has committed at the step of `draft`, if it has."""
        try:
            found = read_manifest(self._storage, draft.step)
        except ReloraError:
            return None
        return found if found.attempt == draft.attempt else None

    def prune(self, committed: Manifest) -> None:
        """Remove what is no longer needed, after a commit. Never raises: the next one tries again."""
        self._prune(committed.attempt, keep_last=self._cfg.keep_last)

    def remove_orphans(self, attempt: str) -> None:
        """Remove what attempts before `attempt` stored and did not commit. Without this, attempts that end before
        their first commit, on a full disk say, would fill it further. Never raises."""
        self._prune(attempt, keep_last=sys.maxsize)

    def _refuse_if_superseded(self, attempt: str) -> None:
        """The newest attempt owns the run. This also tells two drivers apart where a server has no create-once put."""
        number, _, digits = attempt.partition("-")
        newest = newest_attempt(self._storage)
        owner = self._storage.get(f"{ATTEMPTS}/{newest:04d}").decode() if newest == int(number) else ""
        if newest > int(number) or (owner and owner != digits):
            raise CheckpointError(
                f"{self._storage.url} is being written by attempt {newest}, which began after this one ({attempt}): "
                f"two drivers are on one run, or this is left over from an attempt that was given up. This one stops "
                f"now."
            )

    def _put(self, manifest: Manifest) -> None:
        record = manifest.model_dump_json(indent=1).encode()
        try:
            self._storage.put_new(manifest.path, record)
        except FileExistsError as error:
            # A client that repeats a put whose answer was lost is refused by its own object. What an earlier attempt
            # committed while it was given up is replaced: nobody resumed from it.
            found = self._storage.get(manifest.path)
            if found != record and _attempt_of(found) < attempt_number(manifest.attempt):
                self._storage.put(manifest.path, record)
            elif found != record:
                raise CheckpointError(
                    f"{self._storage.url}/{manifest.path} was committed by somebody else: two drivers are on one run. "
                    f"Stop one of them; this one stops now."
                ) from error
        self._known[manifest.step] = manifest

    def _prune(self, attempt: str, *, keep_last: int) -> None:
        try:
            self._refuse_if_superseded(attempt)
            for path in self._not_needed(attempt, keep_last):
                self._storage.delete(path)
        except Exception as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _not_needed(self, attempt: str, keep_last: int) -> list[str]:
        steps, unreadable = list_manifests(self._storage), False
        for step in steps:
            if step not in self._known:
                try:
                    self._known[step] = read_manifest(self._storage, step)
                except DamagedError as error:
                    logger.warning("what no manifest names is kept, because one cannot be read: %s", error)
                    unreadable = True
        self._known = {step: manifest for step, manifest in self._known.items() if step in steps}
        folders = part_folders(self._storage)
        if unreadable:  # it may name any of them
            folders &= {part.folder for manifest in self._known.values() for part in manifest.parts}
        dropped, unneeded = plan_prune(
            self._known.values(),
            folders,
            keep_last=keep_last,
            keep_every_steps=self._cfg.keep_every_steps,
            attempt=attempt,
            pinned=pinned_steps(self._storage),
        )
        return [m.path for m in dropped] + unneeded  # manifests first: none ever names what is gone


def newest_attempt(storage: Storage) -> int:
    """The number of the attempt that began last, 0 if there was none."""
    names = [path.rpartition("/")[2] for path in storage.list(ATTEMPTS)]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _attempt_of(record: bytes) -> int:
    try:
        return attempt_number(json.loads(record)["attempt"])
    except (ValueError, KeyError, TypeError, IndexError):
        return 0  # not a manifest: it may be replaced


def merge_shares(shares: Sequence[Share]) -> Manifest:
    """One manifest that names all ranks' objects. CheckpointError unless they are of one save, one of each rank."""
    first = shares[0].manifest
    for share in shares:
        if _heading(share.manifest) != _heading(first):
            raise CheckpointError(
                f"rank {share.rank} stored step {share.manifest.step} of attempt {share.manifest.attempt}, rank "
                f"{shares[0].rank} step {first.step} of {first.attempt}, or other values: nothing was committed."
            )
    if missing := sorted(set(shares[0].writers) - {share.rank for share in shares}):
        raise CheckpointError(f"step {first.step}: there are no shares of ranks {missing}.")

    def union(parts: list[Part]) -> Part:
        objects = {stored for part in parts for stored in part.objects}
        return parts[0].model_copy(update={"objects": tuple(sorted(objects, key=lambda stored: stored.path))})

    bases = [share.manifest.base for share in shares if share.manifest.base is not None]
    return first.model_copy(
        update={
            "base": union(bases) if bases else None,
            "delta": union([share.manifest.delta for share in shares]),
            "unix_time": max(share.manifest.unix_time for share in shares),
        }
    )


def _heading(manifest: Manifest) -> dict[str, object]:
    """What all ranks must agree on."""
    heading = manifest.model_dump(exclude={"base", "delta", "unix_time", "versions"})
    parts = [part and (part.folder, part.digest) for part in (manifest.base, manifest.delta)]
    return heading | {"parts": parts}


class GroupCommitter:
    """Without a coordinator: rank 0 gathers and commits, over a group of its own, so that it may happen in a thread
    while training reduces gradients. Made by every rank at the same time."""

    def __init__(self, world: World, commits: Commits, *, timeout_s: float) -> None:
        self._world, self._commits = world, commits
        # gloo on any device: NCCL would queue behind training's collectives.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world.size > 1 else None

    def __call__(self, share: Share) -> Outcome:
        if self._group is None:
            outcome = self._commits.commit([share])
            if outcome.manifest is not None:
                self._commits.prune(outcome.manifest)
            return outcome
        shares: list[Share] | None = [share] * self._world.size if self._world.is_first else None
        dist.gather_object(share, shares, dst=0, group=self._group)
        box = [self._commits.commit(shares) if shares else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        assert box[0] is not None
        if shares and box[0].manifest is not None:
            self._commits.prune(box[0].manifest)
        return box[0]
