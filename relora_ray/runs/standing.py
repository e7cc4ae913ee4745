"""How far a run is and who is at work on it, as status and watch say it."""

from __future__ import annotations

from typing import Any

from relora_ray.checkpoint import Manifest
from relora_ray.checkpoint.ownership import PATIENCE_S
from relora_ray.runs.metrics import attempt_order
from relora_ray.runs.tally import Tally


def reached(tally: Tally, newest: Manifest | None) -> int:
    """Finished updates. A checkpoint may be stored a moment before the page that says so, but what an attempt has gone
    back from is of no account."""
    if newest is None or attempt_order(tally.attempt) > attempt_order(newest.attempt):
        return tally.step
    return max(tally.step, newest.step)


def is_alive(life: dict[str, Any] | None, now: float) -> bool:
    """Whether a driver is at work on it, by its sign of life. `now`: seconds since 1970."""
    return life is not None and now - life.get("unix_time", 0.0) <= PATIENCE_S


def driver_text(life: dict[str, Any] | None, finished: bool, now: float) -> str:
    alive = is_alive(life, now)
    if life is None or (finished and not alive):
        return "finished" if finished else "no driver; the launch command continues it"
    if "unix_time" not in life:
        return "its driver's sign of life cannot be read"
    where = f"driver {life.get('pid')} on {life.get('host')}, seen {age_text(now - life['unix_time'])} ago"
    return where if alive else f"{where} (it is gone, or the clocks differ); the launch command continues it"


def age_text(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
