"""When a run has diverged: a pure function of its losses, its boundaries and the updates that it passes over.

An update is a sign of divergence if its loss or gradient is not finite, or if its loss is `train.divergence_nats` above
the best that the average loss has been since the last boundary. The best, and not the average itself: an average
follows a loss that rises slowly. At a boundary the best begins anew from the average of the moment, as a merge and the
warm-up after it may cost a little. `train.divergence_steps` signs among the last twice as many updates are divergence:
a few good updates on the way up excuse nothing, and a spike is forgotten after so many.

    nats=2, steps=20, a loss of 3 that begins to rise by 0.02 an update: the best stays at 3, the first sign comes after
    100 updates, at 5, the twentieth after 120, at 5.4. One bad update in three: at most 14 signs in 40, never enough.

An update that is passed over changes nothing here. All state is in `Counters`, and so in every checkpoint.
"""

from __future__ import annotations

import math

from relora_ray.checkpoint.manifest import Counters, Sign
from relora_ray.config import TrainConfig

AVERAGE_STEPS = 100
"""The average of the loss forgets an update in about so many."""
FIRST_LOSSES = 10
"""So many enter the average whatever they are, signs or not, and only then there is a best: one odd batch at the start
of a run must not be what all others are held against."""


def window(train: TrainConfig) -> int:
    """Updates among which signs are counted."""
    return 2 * train.divergence_steps


def observe(train: TrainConfig, counters: Counters, step: int, loss: float) -> Counters:
    """The counters after the update `step`, which was not passed over. Pure, and the same on every rank, as the loss
    is: nan if it or the gradient is not finite."""
    counters = _with_signs_of_old(counters, step)
    averaged, average, best = counters.losses_averaged, counters.loss_average, counters.loss_best
    bar = (average if best is None else best) + train.divergence_nats
    is_sign = not math.isfinite(loss) or (averaged > 0 and loss > bar)
    number = counters.losses_seen + 1
    signs = tuple(sign for sign in counters.signs if sign.number > number - window(train))
    if is_sign:
        signs = (*signs, Sign(step, number))[-train.divergence_steps :]  # more say nothing new
    if math.isfinite(loss) and (not is_sign or averaged < FIRST_LOSSES):  # a sign does not raise the bar for the next
        averaged = min(averaged + 1, AVERAGE_STEPS)
        average += (loss - average) / averaged
        if averaged >= FIRST_LOSSES:
            best = average if best is None else min(best, average)
    return counters.model_copy(
        update={
            "losses_seen": number,
            "losses_averaged": averaged,
            "loss_average": average,
            "loss_best": best,
            "signs": signs,
        }
    )


def begin_cycle(counters: Counters) -> Counters:
    """The counters after a boundary: the best begins anew. Signs stay."""
    if counters.loss_best is None:
        return counters
    return counters.model_copy(update={"loss_best": counters.loss_average})


def diverged(train: TrainConfig, counters: Counters, done: int) -> str:
    """Why the run has diverged with the last update, or "" if it has not."""
    if len(counters.signs) < train.divergence_steps:
        return ""
    best = counters.loss_average if counters.loss_best is None else counters.loss_best
    return (
        f"in {len(counters.signs)} of the last {min(window(train), counters.losses_seen)} updates up to {done - 1}, "
        f"the first of them {counters.first_sign}, the loss was not finite or more than "
        f"train.divergence_nats={train.divergence_nats:g} above its best average since the last boundary, {best:.4f}"
    )


def _with_signs_of_old(counters: Counters, step: int) -> Counters:
    """Of a manifest that only says how many signs there were in a row: they end with the update before `step`."""
    num = counters.signs_of_divergence
    if not num:
        return counters
    signs = tuple(Sign(step - num + i, i + 1) for i in range(num))
    return counters.model_copy(update={"signs": signs, "losses_seen": num, "signs_of_divergence": 0})
