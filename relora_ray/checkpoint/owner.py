"""A driver's hold on a run: it claims a term, shows that it lives, and hears when another has taken over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from relora_ray.checkpoint.ownership import (
    BEAT_CALL_S,
    BEAT_S,
    BEFORE_TERMS,
    Life,
    Term,
    claim,
    new_driver,
    refuse_if_taken_over,
)
from relora_ray.errors import StorageError, SupersededError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)


class Hold:
    """What `owning` gives: the term, and `lost`, why it is over, once another driver has begun one."""

    def __init__(self, term: Term) -> None:
        self.term, self.lost = term, ""
        self._tell: Callable[[str], None] | None = None
        self._lock = threading.Lock()

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called with the reason, in a thread; at once if it has happened."""
        with self._lock:
            self._tell = tell
            if self.lost:
                tell(self.lost)

    def lose(self, reason: str) -> None:
        with self._lock:
            self.lost = reason
            if self._tell is not None:
                self._tell(reason)


@contextmanager
def owning(
    storage: Storage,
    *,
    wait: bool = False,
    check: Callable[[], object] = lambda: None,
    waiting: Callable[[dict[str, Any]], object] = lambda owner: None,
) -> Iterator[Hold]:
    """Own the run for a block. RunBusyError if another driver lives; `wait`: wait for its end instead.
    `check`: called right before the claim; `waiting`: see `claim`."""
    driver = new_driver()
    life, ended, thread = Life(storage, driver), threading.Event(), None
    try:
        life.begin()  # before the claim, or it would look like that of a dead one for a moment
        hold = Hold(claim(storage, driver, wait=wait, check=check, waiting=waiting))
        storage.delete(BEFORE_TERMS)  # nobody's any more
        thread = threading.Thread(
            target=_watch, args=(storage, life, hold, ended), name="relora-ray-owner", daemon=True
        )
        thread.start()
        yield hold
    finally:
        ended.set()
        if thread is not None:
            thread.join()
        life.end()


def _watch(storage: Storage, life: Life, hold: Hold, ended: threading.Event) -> None:
    # A look that takes long would keep the next sign of life from being given: others would take this one for dead.
    patient = storage.patient(BEAT_CALL_S)
    while not ended.wait(BEAT_S):
        try:
            life.beat()
        except StorageError as error:  # one that gives no sign is taken for dead
            logger.warning("no sign of life could be stored: %s", error)
        try:
            refuse_if_taken_over(patient, hold.term)
        except SupersededError as error:
            hold.lose(str(error))
            return
        except StorageError as error:
            logger.warning("whether another driver has taken over cannot be seen: %s", error)
