"""How a run is doing, from its storage alone.

python -m relora_ray.status RUN
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from relora_ray import cli
from relora_ray.checkpoint import History, Manifest, read_history
from relora_ray.checkpoint.ownership import sign_of_life
from relora_ray.cli import command, printable
from relora_ray.runs.rollback import read_rollbacks
from relora_ray.runs.setting import MODEL, find_setting
from relora_ray.runs.standing import age_text, driver_text, is_alive, reached
from relora_ray.runs.tally import Tally, read_tally
from relora_ray.storage import Storage


def status(storage: Storage, now: float) -> Iterator[str]:
    """Lines of text. `now`: seconds since 1970. Reads a handful of objects, however long the run's history is."""
    history = read_history(storage)
    cfg, newest = find_setting(storage, history).config(), history.head
    tally, life = read_tally(storage, newest), sign_of_life(storage)
    finished = newest is not None and newest.step >= cfg.steps
    alive = is_alive(life, now)
    yield f"run {cfg.name}: {driver_text(life, finished, now)}"
    if finished and not alive and cfg.method.exports and not storage.exists(f"{MODEL}/config.json"):
        yield "  export    the model is not exported: start the run again, and it is, or says what is wrong"
    done = reached(tally, newest)
    yield f"  step      {done:,} of {cfg.steps:,}"
    if tally.attempts:
        since = "" if tally.attempt_time is None else f", since {age_text(now - tally.attempt_time)}"
        yield f"  attempt   {tally.attempt}: {tally.world_size} worker(s){since}"
    yield from _what_holds_it_up(tally, alive and not finished, now)
    if tally.loss is not None and tally.tokens_per_s is not None:
        when = "" if tally.step_time is None else f", {age_text(now - tally.step_time)} ago"
        yield f"  trained   loss {tally.loss:.4f}, {tally.tokens_per_s:,.0f} tokens/s{when}"
    if newest is not None:
        unsaved, age = max(0, done - newest.step), age_text(now - newest.unix_time)
        yield f"  saved     step {newest.step:,}, {age} ago; {unsaved} steps after it are not"
        yield from _best(history, newest)
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
    if tally.began is not None and done:
        last = max(tally.unix_time, newest.unix_time if newest is not None else 0.0)
        passed_s = max(tally.useful_s, last - tally.began)
        share = tally.useful_s / passed_s if passed_s else 0.0
        yield f"  goodput   {share:.1%}: {age_text(tally.useful_s)} of {age_text(passed_s)} went into steps that count"


def _best(history: History, newest: Manifest) -> Iterator[str]:
    """Where the held-out loss was lowest, of the evaluations up to the newest checkpoint."""
    if (best := newest.counters.best) is not None:
        kept = "" if history.path_at(best.step) else "; there is no checkpoint of it"
        yield f"  best      step {best.step:,}, held-out loss {best.loss:.4f}{kept}"


def _what_holds_it_up(tally: Tally, alive: bool, now: float) -> Iterator[str]:
    """`alive`: whether a driver is at work on it."""
    if tally.without_step:
        attempts = "1 attempt" if tally.without_step == 1 else f"{tally.without_step} attempts in a row"
        yield f"  no step   {attempts} made no step; the last: {tally.last_cause or 'it did not say why'}"
    if alive and not tally.running:
        since = "" if tally.idle_since is None else f", since {age_text(now - tally.idle_since)}"
        yield f"  waiting   for machines{since}"


@command
def main(argv: Sequence[str] | None = None) -> None:
    summary = "How a run is doing, from its storage alone."
    args = cli.run_parser("status", summary, "runs/quickstart", "s3://bucket/runs/quickstart").parse_args(argv)
    print(printable("\n".join(status(cli.run_of(args), time.time()))))


if __name__ == "__main__":
    sys.exit(main())
