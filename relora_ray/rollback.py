"""What becomes of a run that diverges: it goes back to before, and passes over the rows that it diverged on.

    rollbacks/0001.json    from which checkpoint to go on, which updates not to make, why

An update is a sign of divergence if its loss is not finite, or is `train.divergence_nats` above the average of the
losses before. After `train.divergence_steps` signs in a row, or more than `train.max_nonfinite_steps` losses that are
not finite, the run goes back to the last boundary before the first sign, and does not make the updates from as many
before that sign as followed it (none before the boundary). Without a boundary's checkpoint it goes back to the newest
from before the first sign. At most `train.max_rollbacks` times.

The record is stored before anything else happens, and every attempt after reads it. After a boundary, what is left out
is a function of the losses alone. Before the first one (full training, a warm start) it depends on which checkpoint is
there to go back to, and so on which saves were left out.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from relora_ray.checkpoint import Manifest, list_manifests
from relora_ray.checkpoint.manifest import Counters
from relora_ray.config import RunConfig, TrainConfig
from relora_ray.errors import DivergedError
from relora_ray.methods import Method
from relora_ray.storage import Storage

FOLDER = "rollbacks"
AVERAGE_STEPS = 100
"""The average of the loss forgets an update in about so many."""


class Rollback(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    """From 1."""
    to_step: int
    """Finished updates of the checkpoint to go on from."""
    skip_from: int
    """First update that is not made, ..."""
    skip_until: int
    """... and the first after it that is made again."""
    why: str
    unix_time: float

    def abandons(self, manifest: Manifest) -> bool:
        """Whether a checkpoint lies on the way that was given up."""
        return manifest.step > self.to_step and manifest.counters.rollbacks < self.number

    def __str__(self) -> str:
        return (
            f"back to step {self.to_step}; updates {self.skip_from} to {self.skip_until - 1} are passed over "
            f"(rollback {self.number})"
        )


def read_rollbacks(storage: Storage) -> list[Rollback]:
    """All of a run, the first first."""
    return [Rollback.model_validate_json(storage.get(path)) for path in storage.list(FOLDER)]


def skipped(rollbacks: Iterable[Rollback]) -> frozenset[int]:
    """Updates that are not made."""
    return frozenset(step for r in rollbacks for step in range(r.skip_from, r.skip_until))


def observe(train: TrainConfig, counters: Counters, loss: float) -> Counters:
    """The counters after an update with this loss. Pure, and the same on every rank, as the loss is."""
    seen, average = counters.losses_averaged, counters.loss_average
    if not math.isfinite(loss) or (seen and loss > average + train.divergence_nats):
        return counters.model_copy(update={"signs_of_divergence": counters.signs_of_divergence + 1})
    seen = min(seen + 1, AVERAGE_STEPS)
    average += (loss - average) / seen
    return counters.model_copy(update={"losses_averaged": seen, "loss_average": average, "signs_of_divergence": 0})


def diverged(train: TrainConfig, counters: Counters, done: int) -> str:
    """Why the run has diverged with the last update, or "" if it has not."""
    if counters.signs_of_divergence < train.divergence_steps:
        return ""
    return (
        f"up to step {done - 1} the loss was not finite or more than train.divergence_nats={train.divergence_nats:g} "
        f"above its average of {counters.loss_average:.4f} in {counters.signs_of_divergence} updates in a row"
    )


def roll_back(
    cfg: RunConfig, storage: Storage, method: Method, counters: Counters, done: int, why: str
) -> Rollback | None:
    """Store that the run goes back; None if it has done so often enough. One rank.

    DivergedError if no checkpoint from before the divergence is left.
    """
    number = counters.rollbacks + 1
    if number > cfg.train.max_rollbacks:
        return None
    first_sign = done - max(counters.signs_of_divergence, counters.skipped_in_a_row)
    before = [step for step in list_manifests(storage) if step <= first_sign]
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
    rollback = Rollback(
        number=number,
        to_step=to_step,
        skip_from=max(to_step, skip_from),
        skip_until=done,
        why=why,
        unix_time=time.time(),
    )
    with contextlib.suppress(FileExistsError):  # the first try arrived, and its answer was lost
        storage.put_new(f"{FOLDER}/{number:04d}.json", rollback.model_dump_json(indent=1).encode())
    return rollback
