"""Metrics as JSON lines: one record per event, plain Python values, units in the key names.

Records have a `kind`: train, eval, boundary, checkpoint, attempt or end. Everything that may be plotted goes
here; `read` gives one series over all attempts of a run, the latest attempt winning where steps were repeated.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median
from typing import Any

from relora_ray.errors import StorageError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsLog:
    """Writes one attempt's records to `metrics/<attempt>/00000.jsonl`, 00001.jsonl and so on. One writer: rank 0.

    Object stores cannot append: the newest object is put again, whole, until it is `segment_bytes` long. That is done
    by a thread, one put at a time: slow or failing storage neither holds training up nor ends it.
    """

    def __init__(self, storage: Storage, attempt: str, *, flush_every: int = 20, segment_bytes: int = 2**20) -> None:
        self._storage = storage.child("metrics").child(attempt)
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


def read_kinds(storage: Storage) -> dict[str, list[Record]]:
    """All records by kind, attempt by attempt; no record of a kind is an empty list. Reads the whole log, once. A line
    that a crash cut short is left out."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    for path in storage.list("metrics"):
        for line in storage.get(path).decode().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and "kind" in record:
                kinds[record["kind"]].append(record)
    return kinds


def latest(records: Iterable[Record]) -> list[Record]:
    """Of one kind's records one per step, by step: the latest attempt's."""
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def read_all(storage: Storage, kind: str) -> list[Record]:
    """All records of one kind, attempt by attempt."""
    return read_kinds(storage)[kind]


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token; of a very large one, that of 700 nats, as no float holds it."""
    return math.exp(min(loss, 700.0))


def read(storage: Storage, kind: str) -> list[Record]:
    """One record of a kind per step, by step: the latest attempt's."""
    return latest(read_all(storage, kind))


def read_pages(storage: Storage, folder: str) -> list[Record]:
    """What the coordinator wrote into restarts/ or ledger/: one object each, by name."""
    return [json.loads(storage.get(path)) for path in storage.list(folder)]


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
