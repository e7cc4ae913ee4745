"""All that a run has told, read once: for every page, table and picture of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from relora_ray.checkpoint import Rollback, read_history
from relora_ray.checkpoint.history import Origin, read_origin
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.runs import metrics
from relora_ray.runs.evaluations import Evaluation, read_evaluations
from relora_ray.runs.metrics import Record
from relora_ray.runs.rollback import read_rollbacks
from relora_ray.runs.setting import MODEL, find_setting
from relora_ray.storage import Storage

MAX_NUMBER = 1e300
"""What a record of ours never comes to: whole numbers in JSON have no end, and floats have."""
INT, NUMBER, TEXT = (int,), (int, float, type(None)), (str,)
NEEDED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "attempt": {"step": INT, "world_size": INT},
    "train": {"step": INT, "loss": NUMBER, "tokens": INT},
    "eval": {"step": INT, "loss": NUMBER, "perplexity": NUMBER},
    "boundary": {"step": INT, "boundary_kind": TEXT},
    "updates": {"step": INT, "layers": (list,), "norms": (list,), "effective_ranks": (list,)},
    "checkpoint": {"step": INT, "delta_bytes": INT, "base_bytes": INT, "base_is_new": (bool,)},
    "end": {"step": INT},
}
"""By kind, what is shown of a record, and of which type: one without it is not ours."""


@dataclass(frozen=True, repr=False)  # it may hold a million records
class RunLog:
    """Of one run. Records are those of `NEEDED`, and what they must have they have."""

    url: str
    cfg: RunConfig
    attempts: Sequence[tuple[str, Sequence[Record]]]
    """The earliest first. Records that do not count are marked: `metrics.mark_abandoned`."""
    restarts: Sequence[Record] = ()
    """Pages of the coordinator, if it had one."""
    rollbacks: Sequence[Rollback] = ()
    origin: Origin | None = None
    parent: RunLog | None = None
    """Of the run that this was forked from, if it is there still."""
    has_model: bool = False
    evaluations: Sequence[Evaluation] = ()
    """What `relora-ray evaluate` has stored beside it."""

    @cached_property
    def kinds(self) -> dict[str, list[Record]]:
        """All records by their series, as `metrics.read_kinds` has them."""
        found: dict[str, list[Record]] = {kind: [] for kind in NEEDED}
        for _, records in self.attempts:
            for record in records:
                found.setdefault(metrics.series(record), []).append(record)
        return found

    def latest(self, kind: str) -> list[Record]:
        """One record per step that counts, by step."""
        return metrics.latest(self.kinds.get(kind, []))


def read_log(storage: Storage, children: tuple[str, ...] = ()) -> RunLog:
    """Reads the whole log, once, and its parent's. ConfigError if there is no run; DamagedError or CheckpointError
    where what the run is cannot be read. Records that somebody has changed are left out.

    `children`: URLs of forks of this run that it is read for: what storage says of parents may go round."""
    history = read_history(storage)
    cfg = find_setting(storage, history).config()
    attempts = [
        (name, [record for record in records if _is_ours(record)]) for name, records in metrics.read_attempts(storage)
    ]
    return RunLog(
        url=storage.url,
        cfg=cfg,
        attempts=[(name, records) for name, records in attempts if records],
        restarts=metrics.read_pages(storage, "restarts"),
        rollbacks=read_rollbacks(storage, history),
        origin=(origin := read_origin(storage)),
        parent=None if origin is None else _parents(storage.sibling(origin.parent), (*children, storage.url)),
        has_model=storage.exists(f"{MODEL}/config.json"),
        evaluations=list(read_evaluations(storage)),
    )


def _parents(storage: Storage, children: tuple[str, ...]) -> RunLog | None:
    if storage.url in children:
        return None
    try:
        return read_log(storage, children)
    except (ConfigError, CheckpointError):  # deleted, or copied without it
        return None


def _is_ours(record: Record) -> bool:
    needed = NEEDED.get(record["kind"])
    return needed is not None and all(isinstance(record.get(name, ()), types) for name, types in needed.items())


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a record; None if it has none, as it is of another version, or was not finite."""
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) < MAX_NUMBER and math.isfinite(value) else None
