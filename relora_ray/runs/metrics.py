"""Metrics as JSON lines: one record per event, plain Python values, units in the key names.

Records have a `kind`: train, eval, boundary, updates, checkpoint, attempt or end. Everything that may be plotted goes
here; `read` gives one series over all attempts of a run, of the steps that count: see `mark_abandoned`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median
from typing import Any

from relora_ray.checkpoint.ownership import ATTEMPT, AttemptKey, attempt_key
from relora_ray.errors import StorageError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

METRICS = "metrics"
"""A run's folder of what it says of itself, with one for every attempt."""
Record = dict[str, Any]

_ATTEMPT = re.compile(ATTEMPT)
_PAGE = re.compile(rf"(?:step-(\d+))?-?({ATTEMPT})?")
"""Names in restarts/ and ledger/: an attempt, a step of versions that named no attempt, or both."""
_NUM_READS = 16
"""Requests under way at once. A run that was restarted often has thousands of small objects."""


class MetricsLog:
    """Writes one attempt's records to `metrics/<attempt>/00000.jsonl`, 00001.jsonl and so on. One writer: rank 0.

    Object stores cannot append: the newest object is put again, whole, until it is `segment_bytes` long. That is done
    by a thread, one put at a time: slow or failing storage neither holds training up nor ends it.
    """

    def __init__(self, storage: Storage, attempt: str, *, flush_every: int = 20, segment_bytes: int = 2**20) -> None:
        self._storage = storage.child(METRICS).child(attempt)
        self._flush_every, self._segment_bytes = flush_every, segment_bytes
        self._number = 0
        self._lines: list[bytes] = []
        """Of the newest object."""
        self._num_pending = 0
        """Lines since the last flush."""
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="relora-ray-metrics")
        self._waiting: Future[bool] | None = None
        """A put that has not begun: it will take all lines there are by then."""

    def write(self, record: Record, *, flush: bool = False) -> None:
        # JSON has no nan: a skipped step's loss becomes null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._lock:
            self._lines.append(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self._num_pending += 1
        if flush or self._num_pending >= self._flush_every:
            self.flush()

    def flush(self) -> Future[bool]:
        """Begin to store all records so far; the future says whether they are."""
        self._num_pending = 0
        with self._lock:
            if self._waiting is None:
                self._waiting = self._thread.submit(self._put)
            return self._waiting

    def close(self) -> None:
        """Store what is pending; a failure is a warning."""
        if not self.flush().result():
            logger.warning("the last metrics records were not stored")
        self._thread.shutdown()

    def _put(self) -> bool:
        with self._lock:
            self._waiting = None
            lines = list(self._lines)
        if not lines:
            return True
        data = b"".join(lines)
        try:
            self._storage.put(f"{self._number:05d}.jsonl", data)
        except StorageError as error:
            logger.warning("metrics records wait: %s", error)
            return False
        if len(data) >= self._segment_bytes:
            self._number += 1
            with self._lock:
                del self._lines[: len(lines)]
        return True


def read_attempts(storage: Storage) -> list[tuple[str, list[Record]]]:
    """All records by attempt, the earliest attempt first, those that do not count marked. Reads the whole log. A line
    that a crash cut short is left out, and with a warning what is no record of ours."""
    paths = sorted(storage.list(METRICS), key=_segment_key)
    attempts: dict[str, list[Record]] = {}
    for path, data in zip(paths, _get_all(storage, paths), strict=True):
        records = attempts.setdefault(path.split("/")[1], [])
        lines = data.decode(errors="replace").splitlines()
        found = [record for line in lines if (record := _record(line)) is not None]
        if len(found) < len(lines) - 1:
            logger.warning(
                "%s/%s: %d of %d lines are no records and are left out: somebody has changed what is there",
                storage.url,
                path,
                len(lines) - len(found),
                len(lines),
            )
        records += found
    mark_abandoned(list(attempts.values()))
    return list(attempts.items())


def _record(line: str) -> Record | None:
    """A line's record, or None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if isinstance(record.get("step", 0), int) else None


class LogTail:
    """The end of a run's log, for somebody who looks again and again: at each look only what is new is read."""

    def __init__(self, storage: Storage, *, num_segments: int = 16) -> None:
        """`num_segments`: so many objects before the newest are read at the first look; each has `segment_bytes` or a
        little more, or is the last of an attempt."""
        self._storage, self._num_segments = storage, num_segments
        self._sizes: dict[str, int] = {}
        """What has been read of each object."""
        self._growing = ""
        """The newest at the look before: it may have grown since, also if there is a newer one now."""

    def look(self) -> list[tuple[str, list[Record]]]:
        """New records by attempt, the earliest attempt first. One request, and two for each object that may be new."""
        paths = sorted(self._storage.list(METRICS), key=_segment_key)[-self._num_segments :]
        may_be_new = [path for path in paths if path not in self._sizes or path == self._growing]
        found: dict[str, list[Record]] = {}
        for path, data in zip(may_be_new, _in_threads(self._grown, may_be_new), strict=True):
            lines = data.decode(errors="replace").splitlines()
            records = [record for line in lines if (record := _record(line)) is not None]
            if records:
                found.setdefault(path.split("/")[1], []).extend(records)
        self._growing = paths[-1] if paths else ""
        return list(found.items())

    def _grown(self, path: str) -> bytes:
        size, before = self._storage.size(path), self._sizes.get(path, 0)
        if size is None:  # a removed run
            return b""
        self._sizes[path] = size
        return self._storage.get_range(path, before, size)


def mark_abandoned(attempts: Sequence[Sequence[Record]]) -> None:
    """Give `abandoned: True` to every record that does not count. `attempts`: the records of each, the earliest first.

    An attempt's records count only up to the step from which a later attempt started: what it did after that was lost
    or given up, also while the later one has not come so far, or never will. An attempt started where its first record
    is, whose kind is attempt.
    """
    until = math.inf
    for records in reversed(attempts):
        for record in records:
            if record.get("step", 0) > until:
                record["abandoned"] = True
        until = min([until, *(record["step"] for record in records if "step" in record)])


def series(record: Record) -> str:
    """What a record is a point of: its kind, or `eval/books` of the set `books` of data.validation. Who
    asks for `eval` gets the run's own held-out rows alone."""
    name = record.get("name")
    return f"eval/{name}" if record["kind"] == "eval" and isinstance(name, str) and name else str(record["kind"])


def of_one_text(evals: Sequence[Record]) -> list[Record]:
    """Those on the text that the last is on, whose losses alone compare with its: a set that was added later may be
    exchanged, and so may the number of rows."""

    def text(record: Record) -> tuple[Any, Any]:
        return record.get("data_fingerprint"), record.get("tokens")

    return [record for record in evals if text(record) == text(evals[-1])]


def sets_of(kinds: Iterable[str]) -> list[str]:
    """The names of the sets among `read_kinds`' keys."""
    return sorted(kind.removeprefix("eval/") for kind in kinds if kind.startswith("eval/"))


def read_kinds(storage: Storage) -> dict[str, list[Record]]:
    """All records by their series, attempt by attempt; none is an empty list. Reads the whole log, once."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    for _, records in read_attempts(storage):
        for record in records:
            kinds[series(record)].append(record)
    return kinds


def latest(records: Iterable[Record]) -> list[Record]:
    """Of one kind's records one per step that counts, by step: the latest attempt's."""
    by_step = {record["step"]: record for record in records if "abandoned" not in record and "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def structures(kinds: Mapping[str, Sequence[Record]]) -> list[Record]:
    """What was trained and how large it was, as it began and after each boundary that counts: of `read_kinds`."""
    return [*kinds["attempt"][:1], *latest(kinds["boundary"])]


def read_all(storage: Storage, kind: str) -> list[Record]:
    """All records of one series, attempt by attempt."""
    return read_kinds(storage)[kind]


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token; of a very large one, that of 700 nats, as no float holds it."""
    return math.exp(min(loss, 700.0))


def read(storage: Storage, kind: str) -> list[Record]:
    """One record of a kind per step that counts, by step: the latest attempt's."""
    return latest(read_all(storage, kind))


def read_pages(storage: Storage, folder: str) -> list[Record]:
    """What the coordinator wrote into restarts/ or ledger/, one object each: by step, if their names have one, and then
    by attempt. One that cannot be read is left out, with a warning: they tell and decide nothing."""
    pages, paths = [], sorted(storage.list(folder), key=_page_key)
    for path, data in zip(paths, _get_all(storage, paths), strict=True):
        try:
            page = json.loads(data)
        except (ValueError, RecursionError):
            page = None
        if isinstance(page, dict):
            pages.append(page)
        else:
            logger.warning("%s/%s is no page of ours, and is left out", storage.url, path)
    return pages


def _get_all(storage: Storage, paths: Sequence[str]) -> list[bytes]:
    return _in_threads(storage.get, paths)


def _in_threads(read: Callable[[str], bytes], paths: Sequence[str]) -> list[bytes]:
    if len(paths) < 2:
        return [read(path) for path in paths]
    with ThreadPoolExecutor(_NUM_READS, thread_name_prefix="relora-ray-read") as pool:
        return list(pool.map(read, paths))


def attempt_order(name: str) -> AttemptKey:
    """Later attempts are greater. Names that are no attempt's, which nothing of ours writes, are before all."""
    return attempt_key(name) if _ATTEMPT.fullmatch(name) else (-1, 0)


def _segment_key(path: str) -> tuple[AttemptKey, str, int, str]:
    """Numbers as numbers: attempt 10000 is after 9999. Of two drivers that counted alike, one follows the other."""
    attempt, _, segment = path.removeprefix(f"{METRICS}/").rpartition("/")
    number = segment.removesuffix(".jsonl")
    return attempt_order(attempt), attempt, int(number) if number.isdigit() else -1, segment


def _page_key(path: str) -> tuple[int, AttemptKey, str]:
    found = _PAGE.fullmatch(path.rpartition("/")[2].removesuffix(".json"))
    if found is None:
        return -1, (-1, 0), path
    return int(found[1] or 0), attempt_key(found[2]) if found[2] else (0, 0), path


class StepTimer:
    """Median seconds of recent steps: one slow step does not move the time left."""

    def __init__(self, window: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, step_s: float) -> None:
        self._seconds.append(step_s)

    @property
    def step_s(self) -> float:
        return median(self._seconds) if self._seconds else 0.0


def size_text(size_bytes: float) -> str:
    """`1234567` -> `1.235 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} TB"
