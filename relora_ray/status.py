"""How a run is doing, from its storage alone.

python -m relora_ray.status RUN
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from relora_ray.checkpoint import Manifest, read_history
from relora_ray.checkpoint.ownership import PATIENCE_S, sign_of_life
from relora_ray.cli import print_about
from relora_ray.metrics import attempt_order
from relora_ray.rollback import read_rollbacks
from relora_ray.runs import MODEL, find_setting
from relora_ray.storage import Storage
from relora_ray.tally import Tally, read_tally


def status(storage: Storage, now: float) -> Iterator[str]:
    """Lines of text. `now`: seconds since 1970. Reads a handful of objects, however long the run's history is."""
    history = read_history(storage)
    cfg, newest = find_setting(storage, history).config(), history.head
    tally, life = read_tally(storage, newest), sign_of_life(storage)
    finished = newest is not None and newest.step >= cfg.steps
    alive = life is not None and now - life.get("unix_time", 0.0) <= PATIENCE_S
    yield f"run {cfg.name}: {_state(life, alive, finished, now)}"
    if finished and not alive and not storage.exists(f"{MODEL}/config.json"):
        yield "  export    the model is not exported: start the run again, and it is, or says what is wrong"
    reached = _reached(tally, newest)
    yield f"  step      {reached:,} of {cfg.steps:,}"
    if tally.attempts:
        since = "" if tally.attempt_time is None else f", since {_age(now - tally.attempt_time)}"
        yield f"  attempt   {tally.attempt}: {tally.world_size} worker(s){since}"
    yield from _what_holds_it_up(tally, alive and not finished, now)
    if tally.loss is not None and tally.tokens_per_s is not None:
        when = "" if tally.step_time is None else f", {_age(now - tally.step_time)} ago"
        yield f"  trained   loss {tally.loss:.4f}, {tally.tokens_per_s:,.0f} tokens/s{when}"
    if newest is not None:
        unsaved = max(0, reached - newest.step)
        yield f"  saved     step {newest.step:,}, {_age(now - newest.unix_time)} ago; {unsaved} steps after it are not"
    for path, error in history.unreadable:
        yield f"  damaged   {path}: {error}"
    for name, changes in (("resizes", tally.resizes), ("failures", tally.failures)):
        cost = f"{changes.down_s:.1f} s without training, {changes.steps_lost} steps done again"
        yield f"  {name:9} {changes.count}: {cost}"
    for rollback in read_rollbacks(storage, history):
        yield f"  diverged  {rollback}"
    for restart in [restart for restart in tally.restarts if restart.change != "start"][-5:]:
        cause = restart.cause[:80]
        yield f"    {restart.attempt}  {restart.down_s:6.1f} s, {restart.steps_lost} steps  {cause}"
    if tally.began is not None and reached:
        last = max(tally.unix_time, newest.unix_time if newest is not None else 0.0)
        passed_s = max(tally.useful_s, last - tally.began)
        share = tally.useful_s / passed_s if passed_s else 0.0
        yield f"  goodput   {share:.1%}: {_age(tally.useful_s)} of {_age(passed_s)} went into steps that count"


def _reached(tally: Tally, newest: Manifest | None) -> int:
    """Finished updates. A checkpoint may be stored a moment before the page that says so, but what an attempt has gone
    back from is of no account."""
    if newest is None or attempt_order(tally.attempt) > attempt_order(newest.attempt):
        return tally.step
    return max(tally.step, newest.step)


def _state(life: dict[str, Any] | None, alive: bool, finished: bool, now: float) -> str:
    if life is None or (finished and not alive):
        return "finished" if finished else "no driver; the launch command continues it"
    if "unix_time" not in life:
        return "its driver's sign of life cannot be read"
    where = f"driver {life.get('pid')} on {life.get('host')}, seen {_age(now - life['unix_time'])} ago"
    return where if alive else f"{where} (it is gone, or the clocks differ); the launch command continues it"


def _what_holds_it_up(tally: Tally, alive: bool, now: float) -> Iterator[str]:
    """`alive`: whether a driver is at work on it."""
    if tally.without_step:
        attempts = "1 attempt" if tally.without_step == 1 else f"{tally.without_step} attempts in a row"
        yield f"  no step   {attempts} made no step; the last: {tally.last_cause or 'it did not say why'}"
    if alive and not tally.running:
        since = "" if tally.idle_since is None else f", since {_age(now - tally.idle_since)}"
        yield f"  waiting   for machines{since}"


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


main = print_about("status", __doc__.splitlines()[0], lambda run: "\n".join(status(run, time.time())))


if __name__ == "__main__":
    sys.exit(main())
