"""The guard against divergence, on losses that are made up: all of it is a function of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence

import pytest

from relora_ray.checkpoint.history import plan_prune
from relora_ray.checkpoint.manifest import Counters
from relora_ray.config import TrainConfig
from relora_ray.runs.divergence import begin_cycle, diverged, observe, window
from tests.checkpoint.test_manifest import manifest

TRAIN = TrainConfig(micro_batch_rows=1)  # 20 signs in 40 updates, 2 nats
BAD = math.nan


def follow(
    losses: Sequence[float],
    *,
    boundaries: Collection[int] = (),
    skip: Collection[int] = (),
    counters: Counters | None = None,
    begin: int = 0,
) -> Iterator[tuple[int, Counters, str]]:
    """After each update from `begin` on: how many are finished, the counters, and why the run has diverged. As the loop
    does it."""
    counters = counters or Counters()
    for step in range(begin, len(losses)):
        if step not in skip:
            counters = observe(TRAIN, counters, step, losses[step])
        why = diverged(TRAIN, counters, step + 1)
        if step + 1 in boundaries:
            counters = begin_cycle(counters)
        yield step + 1, counters, why


def end(
    losses: Sequence[float],
    *,
    boundaries: Collection[int] = (),
    skip: Collection[int] = (),
    counters: Counters | None = None,
) -> tuple[int, Counters, str]:
    """Where the run diverges; after its last update if it does not, with no reason."""
    steps = list(follow(losses, boundaries=boundaries, skip=skip, counters=counters))
    return next((step for step in steps if step[-1]), steps[-1])


def test_slow_rise_is_found() -> None:
    """An average follows it: 0.02 an update in a hundred updates is 2 nats behind."""
    done, counters, why = end([3.0 + 0.02 * max(0, step - 200) for step in range(600)])
    assert done == 200 + 101 + 20
    assert counters.first_sign == 301
    assert "in 20 of the last 40 updates up to 320, the first of them 301, the loss was not finite or more than" in why
    assert "train.divergence_nats=2 above its best average since the last boundary, 3.0000" in why


@pytest.mark.parametrize("boundary", range(200, 400, 10))
def test_slow_rise_across_a_boundary_is_found(boundary: int) -> None:
    """The average has risen by then, by no more than the loss did, and so the bar has too."""
    losses = [3.0 + 0.02 * max(0, step - 200) for step in range(600)]
    done, counters, why = end(losses, boundaries={boundary})
    assert why
    assert done <= 200 + 101 + 20 + 100
    assert counters.first_sign is not None
    assert counters.first_sign >= done - window(TRAIN)


def test_one_good_update_in_twenty_excuses_nothing() -> None:
    done, counters, why = end([3.0] * 200 + [3.0 if step % 20 == 19 else 9.0 for step in range(400)])
    assert done == 200 + 21
    assert counters.first_sign == 200
    assert "in 20 of the last 40 updates" in why


@pytest.mark.parametrize("bad", [9.0, BAD, math.inf])
def test_half_of_the_last_updates_is_divergence_and_a_third_is_not(bad: float) -> None:
    assert end([3.0] * 100 + [bad, 3.0] * 200)[0] == 100 + 39
    assert not end([3.0] * 100 + [bad, 3.0, 3.0] * 2000)[2]


def falling(rng: random.Random, step: int) -> float:
    return 3.0 + 7.5 / (1 + step / 50) ** 0.6 + rng.gauss(0, 0.3)


def restarting(rng: random.Random, step: int) -> float:
    return 3.0 + math.exp(-(step % 500) / 50) + rng.gauss(0, 0.2)


def flat(rng: random.Random, step: int) -> float:
    return 3.0 + rng.gauss(0, 0.3)


def spiky(rng: random.Random, step: int) -> float:
    return rng.choice([7.0, 1e4, math.inf, BAD]) if step % 50 == 25 else flat(rng, step)


@pytest.mark.parametrize("curve", [falling, restarting, flat, spiky])
def test_healthy_run_never_diverges(curve: Callable[[random.Random, int], float]) -> None:
    rng = random.Random(1)
    losses = [curve(rng, step) for step in range(10_000)]
    *_, (_, counters, _) = steps = list(follow(losses, boundaries=range(500, 10_000, 500)))
    assert not any(why for *_, why in steps)
    assert max(len(c.signs) for _, c, _ in steps) <= 1, "nothing adds up"
    assert counters.loss_average == pytest.approx(losses[-1], abs=1.0)


def test_best_begins_anew_at_a_boundary() -> None:
    """Each costs less than 2 nats, all of them more."""
    losses = [3.0 + 1.5 * (step // 200) for step in range(1000)]
    assert not end(losses, boundaries=range(200, 1000, 200))[2]
    assert end(losses)[0] == 400 + 20


def test_odd_first_batch_is_not_what_all_are_held_against() -> None:
    assert not end([1.0] + [10.0] * 1000)[2]
    assert not end([60.0] + [10.0] * 1000)[2]
    *_, (_, counters, _) = follow([60.0] + [10.0] * 200 + [13.0] * 3)
    assert len(counters.signs) == 3, "the best has come down from it"


def test_run_that_explodes_at_once_is_found() -> None:
    done, counters, _ = end([10.0] * 3 + [60.0] * 100)
    assert (done, counters.first_sign) == (23, 3)


def test_odd_batch_after_a_boundary_is_not_either() -> None:
    losses = [8.0] * 200 + [3.0] + [8.0] * 500
    assert not end(losses, boundaries={200})[2]


def test_sign_does_not_raise_the_bar_for_the_next() -> None:
    *_, (_, before, _) = follow([8.0, 6.0] + [5.0] * 500)
    assert before.loss_average == pytest.approx(5.0, abs=0.05)
    counters = before
    for number, loss in enumerate((7.5, BAD, math.inf, 9.0)):
        counters = observe(TRAIN, counters, 502 + number, loss)
        assert [sign.step for sign in counters.signs] == list(range(502, 503 + number))
        assert (counters.loss_average, counters.loss_best) == (before.loss_average, before.loss_best)


def test_sign_is_forgotten_with_the_window() -> None:
    losses = [3.0] * 100 + [9.0] + [3.0] * 10 + [9.0] + [3.0] * 100
    first = {done: c.first_sign for done, c, _ in follow(losses)}
    assert (first[100], first[101], first[140], first[141], first[151], first[152]) == (None, 100, 100, 111, 111, None)


def troubled(seed: int) -> tuple[list[float], set[int], set[int]]:
    """Losses with trouble of all kinds, boundaries, and updates to pass over."""
    rng = random.Random(seed)
    rise, share = rng.choice([0.0, 0.01, 0.03]), rng.choice([0.0, 0.1, 0.45, 0.6])
    losses = [
        rng.choice([9.0, BAD]) if step > 100 and rng.random() < share else 3 + rise * step + rng.gauss(0, 0.3)
        for step in range(400)
    ]
    return losses, set(range(rng.randint(1, 90), 400, 90)), {s for s in range(400) if rng.random() < 0.1}


@pytest.mark.parametrize("seed", range(8))
def test_run_that_stops_anywhere_decides_the_same(seed: int) -> None:
    losses, boundaries, skip = troubled(seed)
    whole = list(follow(losses, boundaries=boundaries, skip=skip))
    for done, counters, _ in whole[::7]:
        stored = Counters.model_validate(json.loads(counters.model_dump_json()))  # as in a manifest
        assert stored == counters
        after = follow(losses, boundaries=boundaries, skip=skip, counters=stored, begin=done)
        assert list(after) == whole[done:]


@pytest.mark.parametrize("seed", range(8))
def test_updates_passed_over_move_nothing(seed: int) -> None:
    """As if they had never been, but for the numbers of the updates."""
    losses, _, skip = troubled(seed)
    made = [step for step in range(400) if step not in skip]
    ours = [c for done, c, _ in follow(losses, skip=skip) if done - 1 not in skip]
    without = [c for _, c, _ in follow([losses[step] for step in made])]
    for mine, plain in zip(ours, without, strict=True):
        renumbered = tuple(sign._replace(step=made[sign.step]) for sign in plain.signs)
        assert mine == plain.model_copy(update={"signs": renumbered})


def test_first_sign_is_right_though_updates_behind_it_are_passed_over() -> None:
    done, counters, _ = end([3.0] * 100 + [9.0] * 100, skip=range(105, 115))
    assert done == 130
    assert counters.first_sign == 100


def test_counters_stay_small_while_the_guard_is_off() -> None:
    *_, (_, counters, _) = follow([3.0] * 20 + [BAD] * 5000)
    assert len(counters.signs) == TRAIN.divergence_steps
    assert len(counters.model_dump_json()) < 1000


OLD = {"skipped_steps": 2, "merges": 1, "loss_average": 3.0, "losses_averaged": 100, "signs_of_divergence": 19}


def test_run_goes_on_from_a_manifest_from_before_signs_had_steps() -> None:
    old = Counters.model_validate(OLD)
    assert old.has_sign
    bad = observe(TRAIN, old, 500, 9.0)
    assert diverged(TRAIN, bad, 501)
    assert bad.first_sign == 481
    good = observe(TRAIN, old, 500, 3.2)
    assert not diverged(TRAIN, good, 501)
    assert good.has_sign
    *_, (_, later, why) = follow([3.2] * 540, counters=good, begin=501)
    assert not why
    assert not later.has_sign
    sound = Counters.model_validate(OLD | {"signs_of_divergence": 0})
    assert end([3.0 + 0.02 * step for step in range(300)], counters=sound)[0] == 101 + 20


@pytest.mark.parametrize("seed", range(60))
def test_boundaries_to_go_back_to_are_never_pruned(seed: int) -> None:
    """The last before the first sign, and the one before; before there is one, something from before that sign."""
    losses, boundaries, skip = troubled(seed)
    rng = random.Random(seed)
    every = rng.choice([1, 7, 25])
    stored = [manifest(0)]
    boundary = 0
    for done, counters, why in follow(losses, boundaries=boundaries, skip=skip):
        if why:
            assert counters.first_sign is not None
            last = [b for b in sorted(boundaries) if b <= counters.first_sign][-2:]
            there = {m.step for m in stored}
            assert there.issuperset(last) if last else min(there) < counters.first_sign
            return
        boundary = done if done in boundaries else boundary
        if done % every == 0 or done in boundaries:
            stored.append(manifest(done, boundary).model_copy(update={"counters": counters}))
            dropped = plan_prune(stored, keep_last=1, keep_every_steps=0)
            stored = [m for m in stored if m not in dropped]
            assert len(stored) <= 8
