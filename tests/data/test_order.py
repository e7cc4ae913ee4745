"""Row order: a permutation per epoch, the same for any world size, forever the same."""

from __future__ import annotations

import numpy as np
import pytest

from relora_ray.data.order import permute, rank_slots, step_rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 31, 32, 33, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    for seed in range(5):
        assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_permute_looks_random() -> None:
    size = 20_000
    image = permute(np.arange(size), size, 7)
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.03  # 4 standard deviations of a random one
    assert (np.diff(image) == 1).sum() < 10  # expected once
    assert abs((image[: size // 2] < size // 2).mean() - 0.5) < 0.02


def test_order_is_pinned() -> None:
    """These numbers must never change: a run that resumes under a newer version would see other data."""
    assert permute(np.arange(8), 8, 1).tolist() == PINNED_PERMUTATION
    assert step_rows(5, num_rows=100, global_batch_rows=6, seed=3).tolist() == PINNED_STEP


PINNED_PERMUTATION = [1, 0, 4, 2, 3, 7, 6, 5]
PINNED_STEP = [24, 32, 84, 34, 85, 86]


def test_an_epoch_takes_every_row_once_and_the_next_in_another_order() -> None:
    num_rows, batch = 35, 7
    epochs = [
        np.concatenate(
            [step_rows(s, num_rows=num_rows, global_batch_rows=batch, seed=1) for s in range(e * 5, e * 5 + 5)]
        )
        for e in range(3)
    ]
    for rows in epochs:
        assert sorted(rows) == list(range(num_rows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_a_step_may_straddle_epochs_and_drops_no_row() -> None:
    num_rows, batch, steps = 10, 4, 5
    rows = np.concatenate([step_rows(s, num_rows=num_rows, global_batch_rows=batch, seed=1) for s in range(steps)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def test_batch_larger_than_the_data_repeats_epochs() -> None:
    rows = step_rows(0, num_rows=3, global_batch_rows=7, seed=1)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_seeds_give_other_orders() -> None:
    first, second = (step_rows(0, num_rows=1000, global_batch_rows=50, seed=s) for s in (1, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("rows", [1, 6, 8])
def test_ranks_share_the_rows_of_a_step(world_size: int, rows: int) -> None:
    slots = [rank_slots(rows, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(s) for s in slots}) == 1
    taken = np.concatenate(slots)
    assert sorted(taken[taken >= 0]) == list(range(rows))
