"""From every rank's share to one committed manifest.

A rank that has stored its share of a save hands a `Share` to its committer and is told the `Outcome`, the same on every
rank. Somebody gathers the shares: rank 0 over a process group of its own (group.py), or the driver's coordinator
(runtime), which has no use for torch and does without it. Either way `Commits` decides: nothing is committed unless all
shares are there and none failed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from relora_ray.checkpoint.history import (
    History,
    Removal,
    needed_folders,
    old_pins,
    part_folders,
    plan_prune,
    plan_removal,
    read_history,
    read_pins,
    release,
    removal_path,
    removals_text,
)
from relora_ray.checkpoint.manifest import Manifest, Part, Rollback, key_of
from relora_ray.checkpoint.ownership import refuse_if_superseded
from relora_ray.config import CheckpointConfig
from relora_ray.errors import CheckpointError, ReloraError, SupersededError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

ROLLBACKS = "rollbacks"
LAST_WORDS_S = 60.0
"""How long an attempt that failed waits for the save under way."""


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
    """Who decides what a run's attempts have done."""

    def commit(self, share: Share) -> Outcome:
        """Hand in one rank's share and wait until all are in and the manifest is stored (every rank, any thread)."""

    def roll_back(self, rollback: Rollback) -> Outcome:
        """Store that the run goes back (one rank)."""


class Commits:
    """Commits and prunes one run's checkpoints. One at a time, wherever commits are made."""

    def __init__(
        self, storage: Storage, cfg: CheckpointConfig, is_current: Callable[[str], bool] = lambda attempt: True
    ) -> None:
        """`is_current`: whether whoever counts attempts has not begun a later one."""
        self._storage, self._cfg, self._is_current = storage, cfg, is_current
        self._known: dict[str, Manifest] = {}
        """Manifests by path: they never change, so each is read once."""
        self._removed: set[str] = set()
        """Manifests that are gone: lines need not name them any more."""
        self._num_removals = 0
        self._lock = threading.Lock()
        """Held while something is removed."""
        self._pruning, self._to_prune = threading.Lock(), list[Manifest]()
        """Held by the one call of `prune` that works; the newest checkpoint that it is yet to prune after, if any."""

    def fence(self, attempt: str, *, own: bool = True) -> None:
        """SupersededError unless `attempt` is the run's latest. Asked before and after every write that decides
        something: see ownership.py, also for `own`."""
        if not self._is_current(attempt):
            raise SupersededError(
                f"attempt {attempt} of {self._storage.url} was given up, and another one has begun. It stops now, and "
                f"stores nothing more."
            )
        refuse_if_superseded(self._storage, attempt, own=own)

    def commit(self, shares: Sequence[Share]) -> Outcome:
        """Never raises: a failure of any kind is an outcome that every rank hears of."""
        failures = [f"rank {share.rank}: {share.error}" for share in shares if share.error]
        if failures:
            return Outcome(manifest=None, error="; ".join(failures))
        try:
            manifest = merge_shares(shares)
            manifest = manifest.model_copy(
                update={"line": tuple(path for path in manifest.line if path not in self._removed)}
            )
            self.decide(manifest.attempt, manifest.path, manifest.model_dump_json(indent=1).encode())
            self._known[manifest.path] = manifest
        except ReloraError as error:
            return Outcome(manifest=None, error=str(error), fatal=isinstance(error, CheckpointError))
        except Exception as error:
            logger.exception("the commit failed")
            return Outcome(manifest=None, error=f"{type(error).__name__}: {error}", fatal=True)
        return Outcome(manifest=manifest)

    def roll_back(self, rollback: Rollback) -> Outcome:
        """Store that a run goes back. Never raises."""
        try:
            self.decide(rollback.attempt, rollback_path(rollback), rollback.model_dump_json(indent=1).encode())
        except ReloraError as error:
            return Outcome(manifest=None, error=str(error), fatal=isinstance(error, CheckpointError))
        return Outcome(manifest=None)

    def decide(self, attempt: str, path: str, record: bytes) -> None:
        """Create a record that decides something; it is acknowledged when this returns. `path` names the attempt.

        SupersededError if a later attempt has begun. What was stored all the same is inert by its name.
        """
        self.fence(attempt, own=False)  # once is enough
        try:
            self._storage.put_new(path, record)
        except FileExistsError as error:
            # A client that repeats a put whose answer was lost is refused by its own object.
            if self._storage.get_expected(path) != record:
                raise SupersededError(
                    f"{self._storage.url}/{path} exists, with other content: two processes take themselves for attempt "
                    f"{attempt}. This one stops now."
                ) from error
        self.fence(attempt)

    def prune(self, committed: Manifest) -> None:
        """Remove what was written down at the last commit, and write down what this one leaves behind. Never raises:
        the next one tries again. May run beside commits. While one is at work, others leave theirs to it: they would
        hold the threads that commits need."""
        self._to_prune[:] = [committed]
        while self._to_prune and self._pruning.acquire(blocking=False):
            try:
                for newest in [self._to_prune.pop() for _ in self._to_prune[:]]:
                    self._prune(newest)
            finally:
                self._pruning.release()

    def _prune(self, committed: Manifest) -> None:
        with self._removing(committed.attempt):
            # Prunes may queue up behind commits: one before may have removed this checkpoint already.
            at_least = [committed.path] if committed.path not in self._removed else []
            history = read_history(self._storage, at_least=at_least, known=self._known)
            if history.head is None or history.head.attempt != committed.attempt:
                return
            line, _ = history.read_line()
            self._known = {m.path: m for m in line}
            self._carry_out(history, line, committed.attempt)
            removal = self.plan(history, committed.attempt)
            self._num_removals += 1
            self._write_down(removal, committed.attempt, self._num_removals)
            kept = [m for m in line if m.path not in removal.manifests]
            for run in sorted(_foreign(line) - _foreign(kept)):
                release(self._storage.sibling(run), self._storage.url.rpartition("/")[2])

    def plan(self, history: History, attempt: str) -> Removal:
        """What is no longer needed, and was not stored by `attempt` or a later one."""
        line, whole = history.read_line()
        pins = read_pins(self._storage).values()
        pinned = {path for pin in pins for path in pin.manifests}
        old_steps = set(old_pins(self._storage).values())
        dropped = plan_prune(
            line,
            keep_last=self._cfg.keep_last,
            keep_every_steps=self._cfg.keep_every_steps,
            keep_best=self._cfg.keep_best,
            pinned_steps={*old_steps, *(m.step for m in line if m.path in pinned)},
        )
        folders, on_line = part_folders(self._storage), {m.path for m in line}
        unreadable = {path for path, _ in history.unreadable} | (set(history.line) - on_line)
        # A pin of a version before names a step, and the run may have left the line that its fork was made on since.
        pinned_off = {p for p in history.paths if p not in on_line and (key := key_of(p)) and key[1] in old_steps}
        old = history.read_those(sorted(pinned_off))
        unreadable |= pinned_off - {m.path for m in old}
        if not whole or unreadable:  # a manifest that cannot be read may name any of the others, and be restored
            folders &= needed_folders(line)
        folders -= needed_folders(old)
        paths = [path for path in history.paths if path not in unreadable | pinned_off]
        return plan_removal(
            line, dropped, paths, folders, pinned={f for pin in pins for f in pin.folders}, attempt=attempt
        )

    def remove_orphans(self, attempt: str, line: Sequence[str]) -> None:
        """Remove what attempts before `attempt` stored and did not commit. Without this, attempts that end before
        their first commit, on a full disk say, would fill it further. Never raises.

        `line`: what the attempt goes on from, chosen before. An earlier attempt that has written down since that it
        removes some of it sees this one begun, and does not: its record is void.
        """
        with self._removing(attempt):
            history = read_history(self._storage, known=self._known)
            own = [history.read(path) for path in line if path in history.paths]
            for path in history.void(own):
                self.fence(attempt)
                self._storage.delete(path)
                del history.removals[path]
            standing = {*history.standing, *(m.path for m in own)}
            manifests = [history.read(path) for path in sorted(standing)]  # what is off the line stays until a commit
            self._carry_out(history, manifests, attempt)
            parts = {folder for folder in part_folders(self._storage) if not folder.startswith("setup/")}
            pinned = {f for pin in read_pins(self._storage).values() for f in pin.folders}
            removal = plan_removal(manifests, [], [], parts, pinned=pinned, attempt=attempt)
            self._write_down(removal, attempt, 0)  # by another process than whoever commits, which begins with 1

    def remove_now(self, removal: Removal, attempt: str) -> None:
        """Without waiting for another commit: for a run that nobody trains. Raises ReloraError."""
        self._write_down(removal, attempt, 1)
        history = read_history(self._storage)
        self._carry_out(history, history.read_line()[0], attempt)

    @contextlib.contextmanager
    def _removing(self, attempt: str) -> Iterator[None]:
        """One at a time; what goes wrong is a warning."""
        with self._lock:
            try:
                yield
            except Exception as error:
                logger.warning("attempt %s could not remove what is no longer needed: %s", attempt, error)

    def _write_down(self, removal: Removal, attempt: str, number: int) -> None:
        if not removal:
            return
        self.decide(attempt, removal_path(attempt, number), removals_text(removal).encode())
        for path in removal.manifests:
            self._storage.delete(path)
            self._removed.add(path)

    def _carry_out(self, history: History, needing: Sequence[Manifest], attempt: str) -> None:
        """Remove what was written down before, less what is needed all the same."""
        if not history.removals:
            return
        self.fence(attempt)
        needed = needed_folders(needing)
        needed |= {folder for pin in read_pins(self._storage).values() for folder in pin.folders}
        for path, (_, removal) in history.removals.items():
            for manifest in sorted(set(removal.manifests) - {m.path for m in needing}):
                self._storage.delete(manifest)
                self._removed.add(manifest)
            for folder in sorted(set(removal.folders) - needed):
                self._storage.delete_below(folder)
            # As long as the head names one of them, a put of it that arrives twice would bring it back on the line; and
            # a manifest that is yet to arrive would be the head, until one of a later attempt is there.
            named = history.head is not None and bool(set(removal.manifests) & set(history.head.line))
            if not named and not any(history.would_lead(delta) for delta in removal.deltas):
                self._storage.delete(path)


def _foreign(manifests: Iterable[Manifest]) -> set[str]:
    """Runs whose folders these need."""
    return {part.run for m in manifests for part in m.parts if part.run}


def rollback_path(rollback: Rollback) -> str:
    return f"{ROLLBACKS}/{rollback.attempt}.json"


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
