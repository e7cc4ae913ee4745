"""Metrics as JSON lines: one record per event, plain Python values, units in the key names.

Records have a `kind`: train, eval, boundary, checkpoint, attempt or end. Everything that may be plotted goes
here; `read` gives one series over all attempts of a run, the latest attempt winning where steps were repeated.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from statistics import median
from typing import Any

from relora_ray.errors import StorageError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class MetricsLog:
    """Writes one attempt's records to `metrics/<attempt>.jsonl`. One writer: rank 0."""

    def __init__(self, storage: Storage, attempt: str, *, flush_every: int = 20) -> None:
        self._storage, self._path, self._flush_every = storage, f"metrics/{attempt}.jsonl", flush_every
        self._pending: list[str] = []

    def write(self, record: Record, *, flush: bool = False) -> None:
        # JSON has no nan: a skipped step's loss becomes null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._pending.append(json.dumps(clean, allow_nan=False))
        if flush or len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Store what is pending. Metrics must not end a run: a failure is a warning, and is tried again later."""
        if not self._pending:
            return
        try:
            self._storage.append(self._path, ("\n".join(self._pending) + "\n").encode())
        except StorageError as error:
            logger.warning("%d metrics records wait: %s", len(self._pending), error)
            return
        self._pending.clear()


def read_all(storage: Storage, kind: str) -> list[Record]:
    """All records of one kind, attempt by attempt. A line that a crash cut short is left out."""
    records = []
    for path in storage.list("metrics"):
        for line in storage.get(path).decode().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and record.get("kind") == kind:
                records.append(record)
    return records


def read(storage: Storage, kind: str) -> list[Record]:
    """One record of a kind per step, by step: the latest attempt's."""
    by_step = {record["step"]: record for record in read_all(storage, kind)}
    return [by_step[step] for step in sorted(by_step)]


class StepTimer:
    """Median seconds of recent steps: one slow step does not move the time left."""

    def __init__(self, window: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, step_s: float) -> None:
        self._seconds.append(step_s)

    @property
    def step_s(self) -> float:
        return median(self._seconds) if self._seconds else 0.0
