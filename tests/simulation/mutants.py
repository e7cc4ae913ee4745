"""Faults of earlier versions, put back: the simulation must find each of them."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from relora_ray.checkpoint import Commits, Outcome, Rollback, commit, history
from relora_ray.checkpoint.commit import rollback_path
from relora_ray.checkpoint.history import Pin
from relora_ray.checkpoint.manifest import Manifest
from relora_ray.errors import StorageError
from relora_ray.runs import rollback
from relora_ray.storage import Storage
from tests.simulation.run import Driver, Trainer

Mutate = Callable[[pytest.MonkeyPatch], None]


def reader_deletes(patch: pytest.MonkeyPatch) -> None:
    """One 404 makes a checkpoint damaged, and a damaged one is set aside: the next prune removes its parts."""
    patch.setattr(Storage, "get_expected", Storage.get)

    def set_aside(driver: Driver, path: str) -> None:
        with contextlib.suppress(StorageError):
            driver.storage.delete(path)

    patch.setattr(Driver, "pass_over", set_aside)


def pins_name_manifests(patch: pytest.MonkeyPatch) -> None:
    """A fork pins its parent's manifest, and not the base that it needs."""
    put = history._put_pin

    def without_folders(storage: Storage, run: str, number: int, pin: Pin) -> None:
        put(storage, run, number, pin.model_copy(update={"folders": ()}))

    patch.setattr(history, "_put_pin", without_folders)


def newest_is_the_highest_step(patch: pytest.MonkeyPatch) -> None:
    def by_step(found: Any, *, key: Any = None) -> list[Any]:
        return builtins.sorted(found, key=(lambda path: key(path)[1]) if key is history._key else key)

    patch.setattr(history, "sorted", by_step, raising=False)


def rollbacks_are_not_fenced(patch: pytest.MonkeyPatch) -> None:
    """An attempt that was given up has the run go back."""

    def store(trainer: Trainer, record: Rollback) -> Outcome:
        try:
            trainer._storage.put_new(rollback_path(record), record.model_dump_json().encode())
        except (StorageError, FileExistsError) as error:
            return Outcome(manifest=None, error=str(error))
        return Outcome(manifest=None)

    patch.setattr(Trainer, "store", store)
    patch.setattr(rollback, "attempt_key", lambda attempt: (0, 0))


def nobody_owns_a_run(patch: pytest.MonkeyPatch) -> None:
    """Whoever was taken over goes on, and wins the run back."""
    patch.setattr(commit, "refuse_if_superseded", lambda storage, attempt: None)


def fence_is_asked_before_only(patch: pytest.MonkeyPatch) -> None:
    """A write that was held up behind its fence is acknowledged."""

    def decide(commits: Commits, attempt: str, path: str, record: bytes) -> None:
        commits.fence(attempt)
        with contextlib.suppress(FileExistsError):
            commits._storage.put_new(path, record)

    patch.setattr(Commits, "decide", decide)


def best_is_pruned(patch: pytest.MonkeyPatch) -> None:
    """The checkpoint with the lowest held-out loss goes like any other."""
    whole = history.plan_prune

    def without_it(line: Sequence[Manifest], *, keep_best: bool, **keep: Any) -> list[Manifest]:
        return whole(line, **keep)

    patch.setattr(commit, "plan_prune", without_it)


MUTANTS: dict[Mutate, int] = {
    reader_deletes: 6,
    pins_name_manifests: 1039,
    newest_is_the_highest_step: 96,
    rollbacks_are_not_fenced: 91,
    nobody_owns_a_run: 0,
    fence_is_asked_before_only: 721,
    best_is_pruned: 0,
}
"""With the first seed that finds it in the present protocol. A test that begins there takes seconds; a change of the
protocol that moves it costs time only."""
