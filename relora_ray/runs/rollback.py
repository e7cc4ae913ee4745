"""What becomes of a run that diverges: it goes back to before, and passes over the rows that it diverged on.

    rollbacks/<attempt>.json    from which checkpoint to go on, which updates not to make, why

After too many signs of divergence (divergence.py), or more than `train.max_nonfinite_steps` losses in a row that are
not finite, the run goes back to the last boundary before the first sign, and does not make the updates from as many
before that sign as followed it (none before the boundary). Without a boundary's checkpoint it goes back to the newest
from before the first sign. At most `train.max_rollbacks` times.

The record is stored before anything else happens; the next attempt reads it, and the checkpoints after it name it.
After a boundary, what is left out is a function of the losses alone. Before the first one (full training, a warm start)
it depends on which checkpoint is there to go back to, and so on which saves were left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from relora_ray.checkpoint import History, Manifest, Rollback, best_step, existing_step, read_history
from relora_ray.checkpoint.commit import ROLLBACKS
from relora_ray.checkpoint.manifest import MAX_BYTES, Counters, key_of
from relora_ray.checkpoint.ownership import AttemptKey, attempt_key
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, DamagedError, DivergedError
from relora_ray.storage import Storage

if TYPE_CHECKING:
    from relora_ray.methods.base import Method

MAX_WHY = 5_000


def read_rollbacks(storage: Storage, history: History | None = None) -> tuple[Rollback, ...]:
    """All on the run's way so far, the first first: those that its newest checkpoint knows, and those since.

    A record counts if nobody has committed anything since its attempt. One of an attempt that was given up, and that
    comes late, does not.
    """
    history = history or read_history(storage)
    since: list[tuple[AttemptKey, Rollback]] = []
    for path in storage.list_surely(ROLLBACKS):
        try:
            found = Rollback.model_validate_json(storage.get_expected(path, at_most=MAX_BYTES))
        except ValidationError as error:
            raise CheckpointError(
                f"{storage.url}/{path} is no readable record: {error.errors()[0]['msg']}. Restore it, or remove it if "
                f"the run is to go on from its newest checkpoint."
            ) from error
        since.append((attempt_key(found.attempt) if found.attempt else (0, 0), found))
    since.sort(key=lambda item: (item[0], item[1].number))
    head = history.head
    if head is None or head.format < 4:  # of a version whose manifests do not tell
        return tuple(found for _, found in since)
    known = head.rollbacks
    return (*known, *(found for key, found in since if key >= attempt_key(head.attempt) and found not in known))


def where_to_go_on(
    storage: Storage, at_least: Iterable[str] = ()
) -> tuple[list[str], tuple[Rollback, ...], list[tuple[str, DamagedError]]]:
    """For an attempt that begins: the manifests that it may go on from, the best last; what the run has gone back
    from; and manifests later than these that cannot be read. `at_least`: manifests that are known to be committed."""
    history = read_history(storage, at_least=at_least)
    rollbacks = read_rollbacks(storage, history)
    return _before_going_back(history, rollbacks), rollbacks, history.unreadable


def checkpoint_step(storage: Storage, step: int | None = None) -> int:
    """`step`, or that of the checkpoint that the run would go on from: one that it has gone back from is newer until
    the next is stored. CheckpointError and DamagedError as `existing_step` raises them."""
    if step is None:
        paths, _, _ = where_to_go_on(storage)
        if paths and (key := key_of(paths[-1])):
            return key[1]
    return existing_step(storage, step)


def best_checkpoint_step(storage: Storage) -> int:
    """As `best_step`, of those that the run has not gone back from."""
    return best_step(storage, checkpoint_step(storage))


def _before_going_back(history: History, rollbacks: Sequence[Rollback]) -> list[str]:
    """Manifests of the run's line, oldest first, up to where it last went back to."""
    paths = list(history.line)
    if history.head is None:
        return paths
    if history.head.format < 4:
        manifests, _ = history.read_line()  # without those that cannot be read, and could not be restored
        return [m.path for m in manifests if not any(_abandons(r, m) for r in rollbacks)]
    to_step = min((r.to_step for r in rollbacks if r not in history.head.rollbacks), default=history.head.step)
    return [path for path, step in zip(paths, history.steps, strict=True) if step <= to_step]


def _abandons(rollback: Rollback, manifest: Manifest) -> bool:
    """Whether a checkpoint of a version without lines lies on the way that was given up."""
    return manifest.step > rollback.to_step and manifest.counters.rollbacks < rollback.number


def skipped(rollbacks: Iterable[Rollback], steps: int) -> frozenset[int]:
    """Updates that are not made, of a run with so many `steps`. CheckpointError if a record says what cannot be."""
    for rollback in rollbacks:
        if not rollback.skip_from <= rollback.skip_until <= steps:
            raise CheckpointError(
                f"rollback {rollback.number} passes over updates {rollback.skip_from} to {rollback.skip_until - 1}, "
                f"and the run has {steps}: no version wrote that. See who else can write in the run's folder."
            )
    return frozenset(step for r in rollbacks for step in range(r.skip_from, r.skip_until))


def roll_back(
    cfg: RunConfig, method: Method, before: Sequence[int], counters: Counters, done: int, why: str, *, attempt: str
) -> Rollback | None:
    """Where the run goes back to; None if it has done so often enough. Pure. `before`: steps of the checkpoints on this
    attempt's way.

    DivergedError if no checkpoint from before the divergence is left.
    """
    number = counters.rollbacks + 1
    if number > cfg.train.max_rollbacks:
        return None
    first_sign = counters.first_sign
    assert first_sign is not None, "the last update was one"
    before = [step for step in before if step <= first_sign]
    if not before:
        raise DivergedError(
            f"{why}, and there is no checkpoint from before update {first_sign}. Keep more of them "
            f"(checkpoint.keep_last, checkpoint.keep_every_steps), or start again with a lower optimizer.learning_rate."
        )
    skip_from = 2 * first_sign - done
    boundary = method.last_boundary(first_sign)
    # The newest without a sign outlives pruning, which may be under way; at the first sign itself it may be too late.
    to_step = max((step for step in before if step < first_sign), default=before[-1])
    if boundary and boundary in before:
        to_step = boundary
    return Rollback(
        number=number,
        to_step=to_step,
        skip_from=max(to_step, skip_from),
        skip_until=done,
        why=why[:MAX_WHY],
        unix_time=time.time(),
        attempt=attempt,
    )
