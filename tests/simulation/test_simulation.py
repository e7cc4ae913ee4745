"""The protocol of ownership and checkpoints under thousands of seeded faults; see run.py for what is simulated."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.__main__ import failure_of, shrink
from tests.simulation.mutants import MUTANTS, Mutate
from tests.simulation.run import simulate

NUM_SEEDS = 500
NUM_SEEDS_TO_FIND = 2_000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_promises_are_kept() -> None:
    for seed in range(NUM_SEEDS):
        if failure_of(seed) is not None:
            text, log = shrink(seed)
            raise AssertionError(f"seed {seed}: {text}\n" + "\n".join(log[-80:]))


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_fault_of_an_earlier_version_is_found(mutate: Mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    assert any(failure_of(seed) is not None for seed in range(NUM_SEEDS_TO_FIND))


def test_seed_says_all_that_happens() -> None:
    assert simulate(7).log == simulate(7).log
    assert simulate(7).log != simulate(8).log
