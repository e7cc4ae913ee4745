"""The protocol of ownership and checkpoints under thousands of seeded faults; see run.py for what is simulated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from relora_ray.checkpoint import Commits, Share
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import CheckpointConfig
from tests.simulation.__main__ import failure_of, shrink
from tests.simulation.mutants import MUTANTS, Mutate
from tests.simulation.run import draft, simulate, stored
from tests.simulation.world import Process, World, bucket_storage

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
    """Of the seeds below `NUM_SEEDS_TO_FIND`, by one at least."""
    first = MUTANTS[mutate]
    assert failure_of(first) is None, "not by the protocol as it is"
    mutate(monkeypatch)
    assert any(failure_of(seed) is not None for seed in (*range(first, NUM_SEEDS_TO_FIND), *range(first)))


def test_seed_says_all_that_happens() -> None:
    assert simulate(7).log == simulate(7).log
    assert simulate(7).log != simulate(8).log


def test_commit_takes_six_requests() -> None:
    world = World(0)
    world.faults, counts = False, []

    def work() -> None:
        storage = bucket_storage(world, "runs/a")
        commits, lineage = (
            Commits(storage, CheckpointConfig(save_every_steps=1)),
            Lineage(claim(storage, "00000001").attempt(1)),
        )
        for step in range(5):
            position = SimpleNamespace(step=step, boundary=0, rollbacks=(), counters=Counters())
            manifest, _ = stored(storage, draft(lineage, position, 1), "00", 0)
            before = world.num_requests
            outcome = commits.commit([Share(rank=0, manifest=manifest, writers=(0,))])
            counts.append(world.num_requests - before)
            assert outcome.manifest is not None
            lineage.committed(outcome.manifest)

    world.start(Process(world, "run", work))
    world.run()
    assert counts == [6] * 5
