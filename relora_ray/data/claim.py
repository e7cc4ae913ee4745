"""Who prepares a dataset: one process owns --out, as a driver owns a run, and nothing existing is overwritten.

.prepare/terms/0001.json      who claimed the folder: created once
.prepare/drivers/<id>.json    its sign of life
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relora_ray.checkpoint.owner import Hold, owning
from relora_ray.checkpoint.ownership import PATIENCE_S, refuse_if_taken_over
from relora_ray.data.encode import WORK
from relora_ray.errors import DataError, RunBusyError, SupersededError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)


class Claim:
    """This process's, on --out."""

    def __init__(self, storage: Storage, hold: Hold) -> None:
        self._storage, self._work, self._hold = storage, storage.child(WORK), hold

    def heard(self) -> None:
        """DataError if another process is known to have taken over. Costs nothing."""
        if self._hold.lost:
            raise self._lost()

    def check(self) -> None:
        """DataError if --out is another's by now: called before each write that another's work must not meet."""
        self.heard()
        try:
            refuse_if_taken_over(self._work, self._hold.term)
        except SupersededError:
            raise self._lost() from None
        # Whoever took over may have finished, and put all away.
        if not self._work.exists(f"terms/{self._hold.term.number:04d}.json") or self._storage.exists("index.json"):
            raise self._lost()

    def _lost(self) -> DataError:
        return DataError(
            f"{self._storage.url} was taken over by another process, as this one gave no sign of life for "
            f"{PATIENCE_S:.0f} s. It stops now, and writes nothing more."
        )


def refuse_if_used(storage: Storage) -> None:
    """DataError if the folder holds anything but unfinished work of this command."""
    there = storage.list()
    if "index.json" in there:
        raise DataError(f"{storage.url} already holds a dataset. Choose another --out, or delete it first.")
    if there and not any(path.startswith(f"{WORK}/") for path in there):
        raise DataError(f"{storage.url} is not empty: it holds {there[0]}. Choose an --out of its own.")


@contextmanager
def claiming(storage: Storage) -> Iterator[Claim]:
    """Own the folder for a block. DataError, which names the owner, if another process does and lives, or did and has
    finished meanwhile."""
    refuse_if_used(storage)
    owner: dict[str, Any] = {}

    def say(seen: dict[str, Any]) -> None:
        owner.update(seen)
        logger.warning(
            "%s is being prepared by %s: seeing whether it lives, for up to %.0f s",
            storage.url, _name(seen), PATIENCE_S,
        )  # fmt: skip

    work = storage.child(WORK)
    try:
        with owning(work, waiting=say) as hold:
            if storage.exists("index.json"):
                storage.delete_below(WORK)
                raise DataError(f"{storage.url} was prepared by {_name(owner)} meanwhile. Choose another --out.")
            yield Claim(storage, hold)
    except RunBusyError:
        raise DataError(
            f"{storage.url} is being prepared by {_name(owner)}, which lives. Choose another --out, or stop that one "
            f"first: what it has done is kept."
        ) from None


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
