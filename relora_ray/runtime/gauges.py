"""What a run does, as Ray's metrics: Prometheus scrapes them with the driver's machine. Ray puts `ray_` in front of the
names, and `_total` behind a counter's. cluster/monitoring/ has a dashboard and alerts over them.

Ray reports a gauge only if it was set since the report before: so all are set again and again, also while a run waits.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from relora_ray.checkpoint import read_history
from relora_ray.config import RunConfig
from relora_ray.runs.metrics import Record, series
from relora_ray.runs.places import run_storage
from relora_ray.runs.sinks import Opener
from relora_ray.runs.tally import Tally

BEAT_S = 5.0
"""Less than Ray's time between two reports, 10 s."""
REASONS = ("machines", "first step")
"""What a run may wait for: see Tally.waits_for."""

GAUGES = {
    "relora_running": "1 while a driver trains the run, 0 when it has ended",
    "relora_step": "finished updates that count",
    "relora_steps": "updates in the whole run",
    "relora_loss": "training loss of the last update, in nats per token",
    "relora_eval_loss": "loss on held-out text, in nats per token",
    "relora_learning_rate": "learning rate of the last update",
    "relora_tokens_per_second": "tokens that all workers train on per second, the median of recent updates",
    "relora_left_seconds": "seconds of training that are left, at the speed of now",
    "relora_boundary": "boundaries passed: merges, and the end of the warm start",
    "relora_unsaved_steps": "finished updates after the newest checkpoint",
    "relora_checkpoint_seconds": "seconds from the begin of the last checkpoint to its commit",
    "relora_checkpoint_blocked_seconds": "seconds for which training waited for it",
    "relora_commit_timestamp_seconds": "when the newest checkpoint was committed, since 1970",
    "relora_world_size": "workers of the attempt under way, 0 if there is none",
    "relora_skipped_updates": "updates that were not made: loss or gradient was not finite, or left out",
    "relora_waiting": "1 for what the run waits for, by reason: machines or first step",
    "relora_state_bytes": "bytes of training state on each worker, by role",
}
COUNTERS = {
    "relora_restarts": "attempts that began after another, by change: resize or failure",
    "relora_checkpoints_missed": "checkpoints that could not be stored",
}
TAGS = {
    "relora_waiting": ("run", "reason"),
    "relora_state_bytes": ("run", "role"),
    "relora_restarts": ("run", "change"),
}
"""All others have `run`."""

_OF_RECORDS = {
    "train": {
        "loss": "relora_loss",
        "learning_rate": "relora_learning_rate",
        "tokens_per_s": "relora_tokens_per_second",
        "left_s": "relora_left_seconds",
        "skipped_steps": "relora_skipped_updates",
    },
    "eval": {"loss": "relora_eval_loss"},
    "checkpoint": {"save_s": "relora_checkpoint_seconds", "blocked_s": "relora_checkpoint_blocked_seconds"},
}
"""By kind of record, which of its numbers are gauges as they are."""


def gauges(cfg: RunConfig) -> Opener:
    return Opener("Ray's metrics", lambda about: _Gauges(cfg))


class _Gauges:
    def __init__(self, cfg: RunConfig) -> None:
        self._cfg, self._tally, self._metrics = cfg, Tally(), dict[str, Any]()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """Of all gauges, by name and tags."""
        for kind, described in ((Gauge, GAUGES), (Counter, COUNTERS)):
            for name, description in described.items():
                self._metrics[name] = kind(name, description, TAGS.get(name, ("run",)))
        self._set("relora_steps", cfg.steps)
        self._set("relora_running", 1)
        if (head := read_history(run_storage(cfg)).head) is not None:
            self._tally.committed(head.step, head.path)
            self._set("relora_commit_timestamp_seconds", head.unix_time)
        self._thread = threading.Thread(target=self._beat, name="relora-ray-gauges", daemon=True)
        self._thread.start()

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["kind"] == "term":
                self._tally.begin_term(record["number"], time.time())
            self._tally.add(record, time.time())
            self._of(record)
        self._of_tally()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._set("relora_running", 0)
        self._set("relora_world_size", 0)
        for reason in REASONS:
            self._set("relora_waiting", 0, reason=reason)

    def _of(self, record: Record) -> None:
        kind = record["kind"]
        for key, name in _OF_RECORDS.get(series(record), {}).items():
            if isinstance(value := record.get(key), int | float):
                self._set(name, value)
        for role, num_bytes in record.get("state_bytes", {}).items():
            self._set("relora_state_bytes", num_bytes, role=role)
        if kind == "checkpoint":
            self._set("relora_commit_timestamp_seconds", time.time())
        elif kind == "checkpoint_missed":
            self._count("relora_checkpoints_missed")
        elif kind == "restart" and record["change"] != "start":
            self._count("relora_restarts", change=record["change"])

    def _of_tally(self) -> None:
        tally, cfg = self._tally, self._cfg
        self._set("relora_step", tally.step)
        self._set("relora_boundary", bisect_right(cfg.method.boundaries(cfg.steps), tally.step))
        self._set("relora_world_size", tally.world_size if tally.running else 0)
        if tally.committed_step is not None:
            self._set("relora_unsaved_steps", max(0, tally.step - tally.committed_step))
        waits_for = "" if tally.step >= cfg.last_step else tally.waits_for
        for reason in REASONS:
            self._set("relora_waiting", float(waits_for == reason), reason=reason)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._lock:
                for (name, tags), value in self._values.items():
                    self._metrics[name].set(value, tags=dict(tags))

    def _set(self, name: str, value: float, **tags: str) -> None:
        tags = {"run": self._cfg.name} | tags
        with self._lock:
            self._values[name, tuple(tags.items())] = value
            self._metrics[name].set(value, tags=tags)

    def _count(self, name: str, **tags: str) -> None:
        self._metrics[name].inc(tags={"run": self._cfg.name} | tags)
