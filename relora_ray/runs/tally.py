"""What a run has done so far, in one small object, so that nobody needs to read its whole log to know.

    progress/0003-1f2e3d4c.json    by the owner of term 3, driver 1f2e3d4c; put anew as the run goes on

A `Tally` is told events, which are metrics records and a few that only the coordinator knows, and counts. It never
grows beyond some kilobytes. Each owner goes on from the page of the one before, under a name of its own: what an
earlier owner writes late is not looked at.

The page tells and decides nothing. It may be some minutes old, or lost: then the metrics are read instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ray.checkpoint import Manifest, read_history
from relora_ray.checkpoint.ownership import Term, attempt_key
from relora_ray.errors import ReloraError, StorageError
from relora_ray.runs.metrics import Record, attempt_order, read_attempts, read_pages, series
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "progress"
MAX_BYTES = 100_000
PAGE_S = 60.0
"""While a run trains, its page is put at least this often, also if nothing else happens."""
MAX_RESTARTS = 20
MAX_CAUSE = 100
MAX_POINTS = 256
NEWEST_POINTS = 64

_NAME = re.compile(rf"{FOLDER}/(\d{{4,9}})-[0-9a-f]{{1,32}}\.json")
SECONDS = {"train": "step_s", "boundary": "boundary_s", "eval": "eval_s", "checkpoint": "blocked_s"}
"""What makes up the time of the steps that count: by kind of record, the key of its seconds."""


class Changes(BaseModel):
    """What resizes or failures cost so far."""

    count: int = 0
    down_s: float = 0.0
    steps_lost: int = 0


class Restart(BaseModel):
    """As the page in restarts/ has it, its cause shortened."""

    attempt: str
    change: str
    cause: str
    world_size: int
    from_step: int | None
    """None if it ended before it had restored a state."""
    steps_lost: int
    down_s: float
    unix_time: float


class Tally(BaseModel):
    """Tell it everything in the order in which it happened: `add` and `committed`. Times are in seconds since 1970."""

    model_config = ConfigDict(extra="ignore")  # a later version's page says more

    term: int = 0
    """Whose owner counts."""
    began: float | None = None
    unix_time: float = 0.0
    """Of the last event."""
    step: int = 0
    """Finished updates that count."""
    step_time: float | None = None
    """When the last of them was finished, if that is known."""
    loss: float | None = None
    tokens_per_s: float | None = None
    committed_step: int | None = None
    manifest: str = ""
    """Path of the newest checkpoint's."""

    attempts: int = 0
    attempt: str = ""
    """The latest one; its number of workers, when it began, whether it has not ended, whether it has made a step."""
    world_size: int = 0
    attempt_time: float | None = None
    running: bool = False
    trains: bool = False
    idle_since: float | None = None
    """When the last attempt ended, or this term began, if that is known."""
    without_step: int = 0
    """Attempts in a row that ended before they had made a step, and why the last of them did."""
    last_cause: str = ""

    resizes: Changes = Field(default_factory=Changes)
    failures: Changes = Field(default_factory=Changes)
    restarts: list[Restart] = []
    """The last ones."""
    useful: list[tuple[int, float]] = []
    """Seconds that went into the steps up to one, for some steps in ascending order: see `_spend`."""
    counted: dict[str, int] = {}
    """By series, the last step whose seconds are among them: each counts once."""

    @classmethod
    def load(cls, page: bytes) -> Tally:
        """ValidationError if it is not a page."""
        return cls.model_validate_json(page)

    def page(self) -> dict[str, Any]:
        page = self.model_dump(mode="json")
        return page | {"useful": [[step, round(seconds, 3)] for step, seconds in self.useful]}

    def begin_term(self, number: int, now: float) -> None:
        """Another owner goes on: what the one before it had under way is over."""
        self._end("the driver ended", now)
        self.term, self.idle_since = number, now

    def add(self, event: Record, now: float | None = None) -> None:
        """`now`: when it was told, if that is known. Kinds that say nothing to count are passed over.

        Besides metrics records, as loop.py writes them, and pages of restarts: {"kind": "begin", "attempt",
        "world_size", "cause"} as soon as an attempt is begun, which is before its first record or without one, and
        {"kind": "lost", "attempt", "cause"} when it is over.
        """
        now = now or event.get("unix_time")
        self.unix_time = max(self.unix_time, now or 0.0)
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event, now)
        if event["kind"] in SECONDS:
            self._count(event)

    def committed(self, step: int, manifest: str = "", now: float | None = None) -> None:
        """A checkpoint is the newest now."""
        self.committed_step, self.manifest = step, manifest
        self.unix_time = max(self.unix_time, now or 0.0)

    @property
    def waits_for(self) -> Literal["", "machines", "first step"]:
        """What holds the run up, while a driver is at work on it: machines, while no attempt is under way, or an
        attempt's first step, before which it builds the model and restores its state."""
        if not self.running:
            return "machines"
        return "" if self.trains else "first step"

    @property
    def useful_s(self) -> float:
        """What went into steps that count, each once, with the boundaries, evaluations and waits for saves between."""
        return self.useful[-1][1] if self.useful else 0.0

    def _on_begin(self, event: Record, now: float | None) -> None:
        if event["attempt"] == self.attempt:
            return
        self._end(str(event.get("cause", "")), now)
        self.attempts += 1
        self.attempt, self.world_size, self.attempt_time = event["attempt"], event.get("world_size", 0), now
        self.running, self.trains = True, False
        self.began = now if self.began is None else self.began

    def _on_attempt(self, event: Record, now: float | None) -> None:
        """Its state is restored: what was done after that step, by those before it, does not count any more."""
        self._on_begin(event, now)
        step = event["step"]
        if self.step != step:
            self.step, self.step_time, self.loss = step, None, None
        if self.committed_step is not None and self.committed_step > step:
            self.committed_step, self.manifest = step, ""
        while self.useful and self.useful[-1][0] > step:
            end, until_end = self.useful.pop()
            if self.useful and self.useful[-1][0] < step:
                begin, until_begin = self.useful[-1]
                share = (step - begin) / (end - begin)
                self.useful.append((step, until_begin + share * (until_end - until_begin)))
        self.counted = {kind: min(counted, step) for kind, counted in self.counted.items()}

    def _on_lost(self, event: Record, now: float | None) -> None:
        if event["attempt"] == self.attempt:
            self._end(str(event.get("cause", "")), now)

    def _on_end(self, event: Record, now: float | None) -> None:
        """It came to the run's end, maybe without a step, as all had been done."""
        self.running, self.without_step, self.idle_since = False, 0, now

    def _end(self, cause: str, now: float | None) -> None:
        if not self.running:
            return
        self.running, self.idle_since = False, now
        if not self.trains:
            self.without_step += 1
            self.last_cause = _short(cause)

    def _on_train(self, event: Record, now: float | None) -> None:
        self.trains, self.without_step = True, 0
        self.step, self.step_time = event["step"], now
        self.loss, self.tokens_per_s = _finite(event.get("loss")), _finite(event.get("tokens_per_s"))

    def _on_checkpoint(self, event: Record, now: float | None) -> None:
        if self.committed_step is None or event["step"] > self.committed_step:
            self.committed(event["step"])

    def _on_restart(self, event: Record, now: float | None) -> None:
        self._on_begin(event, now)  # in a log in which it stored nothing else
        if event.get("trained", True):
            self.trains, self.without_step = True, 0
        else:
            self._end(event.get("ended_by", ""), now)
        restart = Restart.model_validate(event | {"cause": _short(event["cause"])})
        self.restarts = [*self.restarts, restart][-MAX_RESTARTS:]
        changes = {"resize": self.resizes, "failure": self.failures}.get(restart.change)
        if changes is not None:
            changes.count += 1
            changes.down_s += restart.down_s
            changes.steps_lost += restart.steps_lost

    def _count(self, event: Record) -> None:
        one, step = series(event), event["step"]
        if step > self.counted.get(one, -1):
            self.counted[one] = step
            self._spend(step, _finite(event.get(SECONDS[event["kind"]])) or 0.0)

    def _spend(self, step: int, seconds: float) -> None:
        """Add to the time of a step, the last one or one before it, as a save ends later than it begins.

        An attempt may start at any step before, and then what was spent after it does not count. So the sum is known at
        each of the newest steps, and further back at fewer and fewer, between which it is taken to be a straight line.
        """
        if not self.useful or self.useful[-1][0] < step:
            self.useful.append((step, self.useful_s))
        for index in reversed(range(len(self.useful))):
            at, spent = self.useful[index]
            if at < step:
                break
            self.useful[index] = at, spent + seconds
        if len(self.useful) > MAX_POINTS:
            self.useful = self.useful[:-NEWEST_POINTS:2] + self.useful[-NEWEST_POINTS:]


class ProgressLog:
    """Counts for the owner of a term, and keeps its page stored: by a thread, one put at a time, so that slow or
    failing storage holds nobody up."""

    def __init__(self, storage: Storage, term: Term) -> None:
        """Goes on from what the owners before counted. Reads storage; a failure is a warning, and begins anew."""
        self._storage, self._path = storage, f"{FOLDER}/{term.number:04d}-{term.driver}.json"
        try:
            self.tally = read_tally(storage, read_history(storage).head)
        except ReloraError as error:
            logger.warning("what the run did before term %d is not counted: %s", term.number, error)
            self.tally = Tally()
        self.tally.begin_term(term.number, time.time())
        self._lock, self._page, self._page_time = threading.Lock(), b"", 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="relora-ray-progress")
        self._waiting: Future[None] | None = None
        """A put that has not begun: it will take the newest page there is by then."""
        self._store()

    def add(self, event: Record) -> None:
        self.tally.add(event, time.time())
        if event["kind"] in ("begin", "attempt", "lost", "restart", "end") or time.time() > self._page_time + PAGE_S:
            self._store()

    def committed(self, manifest: Manifest) -> None:
        self.tally.committed(manifest.step, manifest.path, time.time())
        self._store()

    def close(self) -> None:
        """Returns when the newest page is stored."""
        self._thread.shutdown()

    def _store(self) -> None:
        page = json.dumps(self.tally.page(), allow_nan=False).encode()
        with self._lock:
            self._page, self._page_time = page, time.time()
            if self._waiting is None:
                self._waiting = self._thread.submit(self._put)

    def _put(self) -> None:
        with self._lock:
            self._waiting, page = None, self._page
        try:
            self._storage.put(self._path, page)
        except StorageError as error:
            logger.warning("the run's progress is stored later: %s", error)


def latest_page(storage: Storage) -> Tally | None:
    """The one of the latest term that has one; None if there is none, or if it cannot be read."""
    found = [(int(name[1]), path) for path in storage.list(FOLDER) if (name := _NAME.fullmatch(path))]
    if not found:
        return None
    number, path = max(found)
    try:
        tally = Tally.load(storage.get_expected(path, at_most=MAX_BYTES))
    except ValidationError as error:
        logger.warning("%s/%s is no page of a run's progress: %s", storage.url, path, error.errors()[0]["msg"])
        return None
    tally.term = number
    return tally


def read_tally(storage: Storage, head: Manifest | None) -> Tally:
    """What the run has done so far. `head`: its newest checkpoint's manifest.

    From its latest page, unless that is missing or a later term without one has trained since, as terms without a
    coordinator do: then from the whole log.
    """
    tally = latest_page(storage)
    if tally is not None and (head is None or attempt_key(head.attempt)[0] <= tally.term):
        return tally
    return replay(read_attempts(storage), read_pages(storage, "restarts"))


def replay(attempts: list[tuple[str, list[Record]]], restarts: list[Record]) -> Tally:
    """What the owner of the run would have counted. `attempts`: the records of each, the earliest first."""
    tally, pages = Tally(), {str(page.get("attempt")): {"kind": "restart"} | page for page in restarts}
    metrics = dict(attempts)
    for name in sorted(metrics.keys() | pages.keys(), key=lambda name: (attempt_order(name), name)):
        for event in [*metrics.get(name, []), *([pages[name]] if name in pages else [])]:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # somebody has changed it: it says nothing
                tally.add(event)
    return tally


def _short(cause: str) -> str:
    """Its first line, cut."""
    return (cause.strip().splitlines() or [""])[0][:MAX_CAUSE]


def _finite(number: Any) -> float | None:
    return float(number) if isinstance(number, int | float) and math.isfinite(number) else None
