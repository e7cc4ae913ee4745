"""Who else is told what a run does: trackers, people's own code, gauges. Each in a thread of its own, so that none of
them can slow a run down or end it.

    with listening(cfg, show, say=print) as tell:
        run_attempt(cfg, World(), on_record=tell)  # by rank 0 only

A `Feed` keeps at most `ROOM` records that its sink has not taken. Where there are more, every other record of a step
goes, so that a curve keeps its shape. All that is lost is counted and said.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from relora_ray.checkpoint.ownership import FIRST_TERM
from relora_ray.config import RunConfig
from relora_ray.errors import first_words
from relora_ray.masking import masked
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage

GROUP = "relora_ray.callbacks"
ROOM = 10_000
AT_ONCE = 500
MAX_FAILURES = 5
"""A sink that fails so often in a row is left out, unless it is `patient`."""
PAUSES_S = (1.0, 60.0)
"""Before a patient one is tried again: the first pause, which doubles, and the longest."""
CLOSE_S = 30.0
"""When the run has ended, all sinks together may take so long for what is left."""

OnRecord = Callable[[Record], None]
Say = Callable[[str], None]


class Sink(Protocol):
    def add(self, records: Sequence[Record]) -> None:
        """Take all of them, or raise."""

    def close(self) -> None:
        """There will be no more."""


@dataclass(frozen=True)
class About:
    """The run, as a sink knows it."""

    id: str
    """The same for each start of the run, and no other run's."""
    name: str
    url: str
    config: Mapping[str, Any]
    """Its settings by dotted names, without secrets."""


@dataclass(frozen=True)
class Opener:
    """A sink that is yet to be opened, by its feed's thread."""

    name: str
    open: Callable[[About], Sink]
    patient: bool = False
    """Try again for ever, as a network may come back; else what raises loses the record, and is left out in the end."""


def about(cfg: RunConfig) -> About:
    """Reads storage. Ask when the run has begun: the record of its first term tells it from one of the same name that
    was deleted."""
    storage = run_storage(cfg)
    first = storage.find(FIRST_TERM) or storage.url.encode()
    settings = {key: masked(value) if isinstance(value, str) else value for key, value in cfg.settings().items()}
    digest = sha256(b"\n".join([cfg.name.encode(), first])).hexdigest()[:16]
    return About(digest, cfg.name, masked(storage.url), settings)


@contextmanager
def listening(cfg: RunConfig, on_record: OnRecord, *, say: Say, openers: Sequence[Opener] = ()) -> Iterator[OnRecord]:
    """What to call with each record, from any thread: `on_record` sees it first, and then all sinks: those of
    `cfg.tracking`, `openers`, and callbacks that are installed. `say` is called in other threads, and never while
    `on_record` is."""
    from relora_ray.runs.trackers import trackers

    lock = threading.RLock()

    def say_alone(text: str) -> None:
        with lock:
            say(text)

    given = [*trackers(cfg.tracking), *openers, *callbacks()]
    feeds = [Feed(opener, lambda: about(cfg), say_alone) for opener in given]

    def tell(record: Record) -> None:
        with lock:
            on_record(record)
        for feed in feeds:
            feed.tell(record)

    try:
        yield tell
    finally:
        until = time.monotonic() + CLOSE_S
        for feed in feeds:
            feed.end()
        for feed in feeds:
            feed.wait(until - time.monotonic())


class Feed:
    """Brings records to one sink."""

    def __init__(self, opener: Opener, about: Callable[[], About], say: Say) -> None:
        self._opener, self._about, self._say = opener, about, say
        self._changed = threading.Condition()
        self._waiting: list[Record] = []
        self._num_taken, self._num_lost, self._in_hand, self._num_failures = 0, 0, 0, 0
        self._ending = self._over = self._has_failed = False
        self._thread = threading.Thread(target=self._run, name=f"relora-ray-{opener.name}", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Costs microseconds, whatever the sink does."""
        record = copy.deepcopy(record)  # a sink's changes are its own
        with self._changed:
            if self._over or self._ending:
                self._num_lost += 1
                return
            self._waiting.append(record)
            thinned = len(self._waiting) > ROOM
            if thinned:
                before, first = len(self._waiting), not self._num_lost
                self._waiting = _thinned(self._waiting)
                self._num_lost += before - len(self._waiting)
            self._changed.notify()
        if thinned and first:
            self._say(f"{self._opener.name} does not keep up: {ROOM:,} records wait, and it is told of fewer steps")

    def end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """For its end, at most so long."""
        self._thread.join(max(0.0, seconds))
        with self._changed:
            left = len(self._waiting) + self._in_hand + self._num_lost
            stuck, self._over = self._thread.is_alive(), True
        if left:
            why = ": it does not answer" if stuck else ""
            self._say(f"{self._opener.name} was not told of {left:,} of {left + self._num_taken:,} records{why}")

    def _run(self) -> None:
        try:
            if not self._there_is_something():
                return
            sink = self._until_it_works(lambda: self._opener.open(self._about()))
            while batch := self._next():
                self._hand_over(sink, batch)
            sink.close()
        except _FAILURES as error:
            self._say(f"{self._opener.name} is left out from here on: {_told(error)}")
        finally:
            with self._changed:
                self._over = True
                self._num_lost += len(self._waiting) + self._in_hand
                self._waiting, self._in_hand = [], 0

    def _there_is_something(self) -> bool:
        """Waits for a first record; false if the run ends without one."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            return bool(self._waiting)

    def _next(self) -> list[Record]:
        """What is to be handed over next; empty at the end."""
        count = AT_ONCE if self._opener.patient else 1
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            batch, self._waiting = self._waiting[:count], self._waiting[count:]
            self._in_hand = len(batch)
            return batch

    def _hand_over(self, sink: Sink, batch: list[Record]) -> None:
        """Raises what the sink raised when it is to be left out."""
        taken = True
        if self._opener.patient:
            self._until_it_works(lambda: sink.add(batch))
        else:
            try:
                sink.add(batch)
                self._num_failures = 0
            except _FAILURES as error:
                self._failed(error)
                taken = False
                if self._num_failures >= MAX_FAILURES:
                    raise
        with self._changed:
            self._num_taken += len(batch) if taken else 0
            self._num_lost += 0 if taken else len(batch)
            self._in_hand = 0

    def _until_it_works(self, action: Callable[[], Any]) -> Any:
        """The result. If it fails, it is tried again with growing pauses, but not after the end, nor if the sink is not
        patient."""
        pause_s, longest_s = PAUSES_S
        while True:
            last = self._ending or not self._opener.patient
            try:
                result = action()
            except _FAILURES as error:
                if last:
                    raise
                self._failed(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._ending, pause_s)
                pause_s = min(2 * pause_s, longest_s)
                continue
            if self._num_failures:
                self._say(f"{self._opener.name} works again")
            self._num_failures = 0
            return result

    def _failed(self, error: BaseException) -> None:
        """Of failures in a row the first is told."""
        self._num_failures += 1
        if self._num_failures == 1 and not (self._has_failed and not self._opener.patient):
            what = "is tried again, and records wait" if self._opener.patient else "the record is passed over"
            self._say(f"{self._opener.name}: {_told(error)}; {what}")
        self._has_failed = True


_FAILURES = (Exception, SystemExit)
"""Of somebody else's code."""


def _told(error: BaseException) -> str:
    return masked(f"{type(error).__name__}: {first_words(error)}")


def _thinned(records: list[Record]) -> list[Record]:
    """Without every other record of a step; without the oldest, if that is none."""
    kept = [record for number, record in enumerate(records) if number % 2 or record["kind"] != "train"]
    return kept if len(kept) < len(records) else records[1:]


def callbacks() -> list[Opener]:
    """Those of all packages that are installed. An entry point's object is called with the run (`About`), and gives
    what is called with each record; if that has a `close`, it is called at the end."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return [Opener(f"callback {point.name}", _Callback.opener(point)) for point in points]


class _Callback:
    def __init__(self, on_record: Any) -> None:
        self._on_record = on_record

    @classmethod
    def opener(cls, point: EntryPoint) -> Callable[[About], Sink]:
        def open_(about: About) -> Sink:
            on_record = point.load()(about)
            if not callable(on_record):
                raise TypeError(f"{point.value} gave {on_record!r}, which cannot be called with a record")
            return cls(on_record)

        return open_

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self._on_record(record)

    def close(self) -> None:
        if callable(close := getattr(self._on_record, "close", None)):
            close()
