"""Who owns a run: a driver claims the next term, and whoever sees a later one stops.

    terms/0003.json              who claimed term 3: created once, never changed or removed
    drivers/<id>.json            a driver's sign of life, put anew every few seconds, removed when it ends

A term is Raft's word for one owner's time. Attempts are counted within one: attempt `0003.0002-1f2e3d4c` is the second
of term 3, and 1f2e3d4c is the driver. Everything that is written carries its attempt in its name, and a later attempt
makes what an earlier one writes late inert. A write that decides something asks `refuse_if_superseded` before and
after. Before, so that little is written in vain. After, because of what happens to a write that is held up: if the next
owner did not see it when it looked at what is there, its own claim is seen here, and the write is not acknowledged.

Numbers are dense, so one object, the next number's, says whether there is a later term. It is looked at and listed, as
storage may answer one question wrongly. Signs of life are a courtesy: they keep a second driver from taking over a run
that is being trained. No clocks are compared, and nothing breaks if a driver that lives is taken for dead.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora_ray import clock
from relora_ray.errors import RunBusyError, StorageError, SupersededError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

TERMS = "terms"
FIRST_TERM = f"{TERMS}/0001.json"
"""Written when a run begins."""
DRIVERS = "drivers"
BEFORE_TERMS = "driver.json"
"""The sign of life of versions that had no terms."""
BEAT_S = 5.0
BEAT_CALL_S = 10.0
"""A sign of life that is not stored by then is given up for the next."""
PATIENCE_S = 45.0
"""A driver without a sign of life for so long is taken for dead: longer than several of its puts may take."""
LOOK_S = 2.0
"""Between two looks at another driver's sign of life."""
MAX_BYTES = 10_000
UNREADABLE = "unreadable"
"""The driver of a term whose record says nothing."""

ATTEMPT = r"(?:\d{4,9}\.)?\d{4,9}-[0-9a-f]{1,32}"
_ATTEMPT = re.compile(r"(?:(\d{4,9})\.)?(\d{4,9})-([0-9a-f]{1,32})")
_TERM = re.compile(rf"{TERMS}/(\d{{4,9}})\.json")

AttemptKey = tuple[int, int]
"""Term and number in it; (0, 7) for the attempt `0007-1f2e3d4c` of a version without terms. Later ones are greater."""


@dataclass(frozen=True)
class Term:
    number: int
    driver: str
    """Hexadecimal digits that no other driver has."""

    def attempt(self, number: int) -> str:
        return f"{self.number:04d}.{number:04d}-{self.driver}"


def attempt_key(attempt: str) -> AttemptKey:
    found = _ATTEMPT.fullmatch(attempt)
    assert found, attempt
    return int(found[1] or 0), int(found[2])


def term_of(attempt: str) -> Term:
    return Term(attempt_key(attempt)[0], attempt.rpartition("-")[2])


def new_driver() -> str:
    return uuid.uuid4().hex[:8]


def claim(
    storage: Storage,
    driver: str = "",
    *,
    wait: bool = False,
    check: Callable[[], object] = lambda: None,
    waiting: Callable[[dict[str, Any]], object] = lambda owner: None,
) -> Term:
    """Own the run from now on.

    RunBusyError if another driver shows that it lives; takes up to `PATIENCE_S` seconds if there was one. `wait`: wait
    for its end instead. `check`: called right before; whoever has no business here must not take over. `waiting`: told
    the sign of life of one that may live, when it is waited for.
    """
    mine, found = driver or new_driver(), _newest(storage)
    before = _highest_in_names(storage)  # somebody may have removed the terms
    while True:
        _wait_until_free(storage, found, wait, waiting)
        check()
        term = Term(max(found.number if found else 0, before) + 1, mine)
        record = {"driver": mine, "host": platform.node(), "unix_time": clock.now()}
        try:
            storage.put_new(_path(term.number), json.dumps(record).encode())
        except FileExistsError:
            found = _read(storage, term.number)
            if found.driver != mine:  # else the first try arrived, and its answer was lost
                logger.info("term %d of %s was claimed by another driver just now", term.number, storage.url)
                continue
        if _read(storage, term.number).driver != mine:
            raise RunBusyError(
                f"{storage.url}: two drivers claimed term {term.number} at the same moment, and the other one has it: "
                f"this server ignores If-None-Match. Start one driver at a time."
            )
        _forget(storage, found, mine)
        return term


def _forget(storage: Storage, before: Term | None, mine: str) -> None:
    """Remove the sign of life of the owner before, which did not live to do so; nobody looks at it any more."""
    if before is not None and before.driver not in (mine, UNREADABLE):
        try:
            storage.delete(f"{DRIVERS}/{before.driver}.json")
        except StorageError as error:
            logger.warning("driver %s of term %d left a sign of life: %s", before.driver, before.number, error)


def succeed(storage: Storage, term: Term) -> Term:
    """The next term, for the same driver: for who goes on in its name after a crash, and does not know what the one
    before it began. SupersededError if another driver has the run."""
    newest = term
    while (later := _look(storage, newest.number + 1)) is not None:
        newest = later
    if newest.driver != term.driver:
        raise _superseded(storage, term, newest)
    try:
        storage.put_new(
            _path(newest.number + 1), json.dumps({"driver": term.driver, "unix_time": clock.now()}).encode()
        )
    except FileExistsError:
        return succeed(storage, Term(newest.number, term.driver))
    return Term(newest.number + 1, term.driver)


def refuse_if_superseded(storage: Storage, attempt: str, *, own: bool = True) -> None:
    """SupersededError if a later term than that of `attempt` has begun, or if its own is another driver's: where the
    server has no create-once put, two may have claimed one at the same moment. Not `own`: that is not asked."""
    mine = term_of(attempt)
    newest = _look(storage, mine.number + 1) or _newest(storage, after=0 if own else mine.number)
    if newest is not None and _is_after(newest, mine):
        raise _superseded(storage, mine, newest)
    if own:
        _refuse_if_gone(storage, mine, newest)


def refuse_if_taken_over(storage: Storage, term: Term) -> None:
    """SupersededError if another driver than that of `term` owns the run: its own may have gone on to later terms."""
    newest = _newest(storage)
    if newest is not None and newest.driver != term.driver and _is_after(newest, term):
        raise _superseded(storage, term, newest)
    _refuse_if_gone(storage, term, newest)


def _refuse_if_gone(storage: Storage, mine: Term, newest: Term | None) -> None:
    """SupersededError if what this driver owns the run by is not there any more: the folder was moved or removed, and
    what is stored now would be part of no run."""
    if newest is not None and newest.number >= mine.number:
        return
    path = _path(mine.number)
    if storage.find(path) is None and path not in storage.list_surely(TERMS):
        raise SupersededError(
            f"{storage.url}/{path}, by which this driver owns the run, is gone: the run's folder was moved or removed. "
            f"It stops now. Put the folder back and start again, or start where it is now."
        )


def _is_after(newest: Term, mine: Term) -> bool:
    return newest.number > mine.number or (
        newest.number == mine.number and newest.driver not in (mine.driver, UNREADABLE)
    )


class Life:
    """A driver's signs of life. `beat` is called every `BEAT_S` seconds, by a thread."""

    def __init__(self, storage: Storage, driver: str) -> None:
        # A put that hangs must not silence the ones after it.
        self._patient, self._storage = storage, storage.patient(BEAT_CALL_S)
        self._path, self._beats = f"{DRIVERS}/{driver}.json", 0
        self._who = {"host": platform.node(), "machine": _machine(), "pid": os.getpid()}

    def begin(self) -> None:
        """The first, which a start depends on, is tried again for as long as anything is. Raises StorageError."""
        self._put(self._patient)

    def beat(self) -> None:
        """Raises StorageError."""
        self._put(self._storage)

    def _put(self, storage: Storage) -> None:
        self._beats += 1
        record = self._who | {"beat": self._beats, "unix_time": clock.now()}
        storage.put(self._path, json.dumps(record).encode())

    def end(self) -> None:
        try:
            self._storage.delete(self._path)
        except StorageError as error:
            logger.warning("%s stays behind: %s", self._path, error)


def sign_of_life(storage: Storage) -> dict[str, Any] | None:
    """The newest owner's, or None if it has ended or there was none: `host`, `pid`, `beat`, `unix_time`."""
    newest = _newest(storage)
    return _read_life(storage, f"{DRIVERS}/{newest.driver}.json" if newest else BEFORE_TERMS)


def _wait_until_free(
    storage: Storage, owner: Term | None, wait: bool, waiting: Callable[[dict[str, Any]], object]
) -> None:
    path = f"{DRIVERS}/{owner.driver}.json" if owner else BEFORE_TERMS
    seen, until, said = _read_life(storage, path), clock.monotonic() + PATIENCE_S, False
    over = False
    if seen is not None and not _is_dead(seen):
        waiting(seen)
    while seen is not None and not _is_dead(seen) and not over:
        clock.sleep(min(LOOK_S, PATIENCE_S / 10))
        over = clock.monotonic() >= until  # and one look after that: this process may have been stopped for long
        found = _read_life(storage, path)
        if found == seen:
            continue
        if found is not None and not wait:
            raise RunBusyError(
                f"{storage.url} is being trained by another driver, process {found.get('pid')} on "
                f"{found.get('host')}: it gave a sign of life ({path}) while this one looked on. Stop that one, give "
                f"this run another name, or launch with --wait to take over when it ends."
            )
        if found is not None and not said:
            said = True
            logger.warning(
                "%s is being trained by process %s on %s: waiting for its end",
                storage.url, found.get("pid"), found.get("host"),
            )  # fmt: skip
        seen, until, over = found, clock.monotonic() + PATIENCE_S, False


def _superseded(storage: Storage, mine: Term, later: Term) -> SupersededError:
    return SupersededError(
        f"{storage.url} belongs to driver {later.driver} since term {later.number}; this is driver {mine.driver} of "
        f"term {mine.number}, which was taken for dead or given up. It stops now, and stores nothing more."
    )


def _path(number: int) -> str:
    return f"{TERMS}/{number:04d}.json"


def _numbers(storage: Storage) -> list[int]:
    return [int(found[1]) for path in storage.list(TERMS) if (found := _TERM.fullmatch(path))]


def _highest_in_names(storage: Storage) -> int:
    """The latest term that the names of what was stored in it tell."""
    names = [path.rpartition("/")[2].removesuffix(".json") for path in storage.list("manifests")]
    attempts = [name.split("-", 2)[2] for name in names if name.count("-") > 2]
    terms = [attempt_key(attempt)[0] for attempt in attempts if _ATTEMPT.fullmatch(attempt)]
    begun = [name.partition("-")[0] for name in storage.folders("setup")]
    return max([*terms, *(int(number) for number in begun if number.isdigit())], default=0)


def _newest(storage: Storage, after: int = 0) -> Term | None:
    number = max(_numbers(storage), default=0)
    return _read(storage, number) if number > after else None


def _look(storage: Storage, number: int) -> Term | None:
    try:
        return _parse(number, storage.get(_path(number), at_most=MAX_BYTES))
    except StorageError as error:
        if error.missing:
            return None
        raise


def _read(storage: Storage, number: int) -> Term:
    return _parse(number, storage.get_expected(_path(number), at_most=MAX_BYTES))


def _parse(number: int, record: bytes) -> Term:
    try:
        return Term(number, str(json.loads(record)["driver"]))
    except (ValueError, KeyError, TypeError):
        return Term(number, UNREADABLE)  # a claim all the same


def _read_life(storage: Storage, path: str) -> dict[str, Any] | None:
    if (record := storage.find(path, at_most=MAX_BYTES)) is None:
        return None
    try:
        found = json.loads(record)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(life: dict[str, Any]) -> bool:
    """Whether its process ran on this machine and is gone."""
    if not _machine() or life.get("machine") != _machine() or not isinstance(life.get("pid"), int):
        return False
    try:
        os.kill(life["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@functools.cache
def _machine() -> str:
    """What process ids belong to: containers on one machine have ids of their own, and a reboot begins anew. Empty
    where it cannot be known."""
    try:
        return f"{os.readlink('/proc/self/ns/pid')} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return ""
