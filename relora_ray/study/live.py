"""A run as it is now, from its storage, for whoever looks again and again: see commands/watch.py. At each look little
is read: the newest manifest, the page of its progress, a sign of life, and what its log has more than before."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relora_ray.checkpoint import Manifest, read_history
from relora_ray.checkpoint.history import History
from relora_ray.checkpoint.ownership import sign_of_life
from relora_ray.config import RunConfig
from relora_ray.runs.metrics import LogTail, Record, attempt_order, latest, mark_abandoned, series
from relora_ray.runs.setting import find_setting
from relora_ray.runs.speed import flops_per_token, peak_of
from relora_ray.runs.standing import driver_text, is_alive, reached
from relora_ray.runs.tally import Tally, read_tally
from relora_ray.storage import Storage

MAX_TRAINED = 50_000
"""Records of steps that are kept in memory; of more, every other one of the earlier half goes."""
_KEPT = ("kind", "step", "loss", "learning_rate", "tokens_per_s", "step_s", "skipped_steps")
"""Of a step's record."""


@dataclass(frozen=True)
class View:
    """What there is to show. Times are seconds; None: not known."""

    name: str
    url: str
    kind: str
    """The method's."""
    step: int
    steps: int
    driver: str
    alive: bool
    """Whether a driver is at work on it."""
    waits_for: str = ""
    waits_s: float | None = None
    losses: Sequence[float] = ()
    """Of the steps that count, as far as they were read."""
    loss: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    flops_per_s: float | None = None
    """On each worker."""
    peak_flops: float | None = None
    """What its device does at most."""
    boundaries: int = 0
    """In the whole run."""
    passed: int = 0
    """Of those."""
    next_boundary: int | None = None
    next_boundary_s: float | None = None
    attempt: str = ""
    attempt_s: float | None = None
    world_size: int = 0
    device: str = ""
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    """On each worker, by role."""
    saved_step: int | None = None
    saved_s: float | None = None
    """How long ago."""
    resizes: int = 0
    failures: int = 0
    skipped: int = 0
    cause: str = ""
    """Why the last attempts made no step."""

    @property
    def finished(self) -> bool:
        return self.saved_step is not None and self.saved_step >= self.steps

    @property
    def unsaved(self) -> int:
        return max(0, self.step - (self.saved_step or 0))


class Live:
    """Looks at one run."""

    def __init__(self, storage: Storage, *, num_segments: int = 16, peak_flops: float | None = None) -> None:
        """`num_segments`: objects of the log that are read at the first look. `peak_flops`: of a worker's device, where
        it is not known by its name."""
        self.storage, self._peak = storage, peak_flops
        self._tail, self._attempts = LogTail(storage, num_segments=num_segments), dict[str, list[Record]]()
        self._known: dict[str, Manifest] = {}
        self._setting: tuple[str, RunConfig] | None = None

    def look(self, now: float | None = None) -> View:
        """`now`: seconds since 1970. ConfigError if it is no run, StorageError if storage does not answer."""
        now = time.time() if now is None else now
        history = read_history(self.storage, known=self._known)
        cfg, tally, life = self._config(history), read_tally(self.storage, history.head), sign_of_life(self.storage)
        self._read()
        return view(cfg, self.storage.url, history.head, tally, life, self._attempts, now, self._peak)

    def _config(self, history: History) -> RunConfig:
        """Read again only if it is another than before, as it may be until there is a checkpoint."""
        setting = find_setting(self.storage, history)
        if self._setting is None or self._setting[0] != setting.folder:
            self._setting = setting.folder, setting.config()
        return self._setting[1]

    def _read(self) -> None:
        for attempt, records in self._tail.look():
            kept = [{k: r[k] for k in _KEPT if k in r} if r["kind"] == "train" else r for r in records]
            self._attempts.setdefault(attempt, []).extend(kept)
        names = sorted(self._attempts, key=attempt_order)
        if sum(map(len, self._attempts.values())) > MAX_TRAINED:
            for name in names[:-1] or names:
                self._attempts[name] = _thinned(self._attempts[name])
        mark_abandoned([self._attempts[name] for name in names])


def view(
    cfg: RunConfig,
    url: str,
    newest: Manifest | None,
    tally: Tally,
    life: dict[str, Any] | None,
    attempts: Mapping[str, Sequence[Record]],
    now: float,
    peak_flops: float | None = None,
) -> View:
    """`attempts`: the end of the log by attempt, with what does not count marked."""
    records = [record for name in sorted(attempts, key=attempt_order) for record in attempts[name]]
    trained = latest(_sound(records, "train"))
    step = _step(tally, newest, attempts)
    finished = newest is not None and newest.step >= cfg.steps
    alive = is_alive(life, now)
    waits, waits_s = _waits(tally, attempts, now) if alive and not finished else ("", None)
    return View(
        name=cfg.name,
        url=url,
        kind=cfg.method.kind,
        step=step,
        steps=cfg.steps,
        driver=driver_text(life, finished, now),
        alive=alive,
        waits_for=waits,
        waits_s=waits_s,
        saved_step=None if newest is None else newest.step,
        saved_s=None if newest is None else now - newest.unix_time,
        attempt=tally.attempt,
        attempt_s=None if tally.attempt_time is None else now - tally.attempt_time,
        world_size=tally.world_size,
        resizes=tally.resizes.count,
        failures=tally.failures.count,
        cause=tally.last_cause if tally.without_step else "",
        **_training(cfg, trained, step, tally),
        **_held_out(latest(_sound(records, "eval"))),
        **_boundaries(cfg, step, _number(trained[-1].get("step_s")) if trained else None),
        **_machine(cfg, records, trained, tally, peak_flops),
    )


def _training(cfg: RunConfig, trained: Sequence[Record], step: int, tally: Tally) -> dict[str, Any]:
    last = trained[-1] if trained else {"loss": tally.loss, "tokens_per_s": tally.tokens_per_s}
    step_s = _number(last.get("step_s"))
    return {
        "losses": [loss for record in trained if (loss := _number(record.get("loss"))) is not None],
        "loss": _number(last.get("loss")),
        "learning_rate": _number(last.get("learning_rate")),
        "tokens_per_s": _number(last.get("tokens_per_s")),
        "left_s": None if step_s is None else max(0, cfg.steps - step) * step_s,
        "skipped": int(_number(last.get("skipped_steps")) or 0),
    }


def _held_out(evals: Sequence[Record]) -> dict[str, Any]:
    return {"eval_loss": _number(evals[-1].get("loss")), "eval_step": evals[-1]["step"]} if evals else {}


def _boundaries(cfg: RunConfig, step: int, step_s: float | None) -> dict[str, Any]:
    ends = cfg.method.boundaries(cfg.steps)
    passed = bisect_right(ends, step)
    following = ends[passed] if passed < len(ends) else None
    return {
        "boundaries": len(ends),
        "passed": passed,
        "next_boundary": following,
        "next_boundary_s": None if following is None or step_s is None else (following - step) * step_s,
    }


def _machine(
    cfg: RunConfig, records: Sequence[Record], trained: Sequence[Record], tally: Tally, peak: float | None
) -> dict[str, Any]:
    structure: Record = next((r for r in reversed(records) if isinstance(r.get("state_bytes"), dict)), {})
    begun: Record = next((r for r in reversed(records) if r["kind"] == "attempt"), {})
    name = str(begun.get("device_name") or begun.get("device", ""))
    rate = _number(trained[-1].get("tokens_per_s")) if trained else None
    counted = flops_per_token(cfg, trained[-1]["step"] - 1) if trained else None
    workers = _number(begun.get("world_size")) or tally.world_size
    return {
        "state_bytes": {str(k): int(v) for k, v in structure.get("state_bytes", {}).items() if _number(v)},
        "device": name,
        "flops_per_s": counted * rate / workers if counted and rate and workers else None,
        "peak_flops": peak or peak_of(cfg, name),
    }


def _step(tally: Tally, newest: Manifest | None, attempts: Mapping[str, Sequence[Record]]) -> int:
    """As the log has it, if that is as new as the page of progress, which may be a minute old."""
    name = max(attempts, key=attempt_order, default="")
    if not name or attempt_order(name) < attempt_order(tally.attempt):
        return reached(tally, newest)
    steps = [r["step"] for r in attempts[name] if "step" in r and "abandoned" not in r]
    return reached(Tally(attempt=name, step=max(steps, default=0)), newest)


def _waits(tally: Tally, attempts: Mapping[str, Sequence[Record]], now: float) -> tuple[str, float | None]:
    """What for, and for how long."""
    if any(record["kind"] == "train" for record in attempts.get(tally.attempt, ())) and tally.running:
        return "", None
    since = tally.idle_since if tally.waits_for == "machines" else tally.attempt_time
    return tally.waits_for, None if since is None or not tally.waits_for else now - since


def _sound(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if series(record) == kind and "step" in record]


def _thinned(records: Sequence[Record]) -> list[Record]:
    return [record for number, record in enumerate(records) if number % 2 or record["kind"] != "train"]


def _number(value: Any) -> float | None:
    """None for what is no finite number: the log may be anybody's."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
