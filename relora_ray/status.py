"""How a run is doing, from its storage alone.

python -m relora_ray.status RUN
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from relora_ray import metrics
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.errors import ReloraError
from relora_ray.rollback import read_rollbacks
from relora_ray.runs import print_about, read_config
from relora_ray.runtime.lease import PATH
from relora_ray.storage import Storage


def status(storage: Storage, now: float) -> Iterator[str]:
    """Lines of text. `now`: seconds since 1970."""
    cfg = read_config(storage)
    records = metrics.read_kinds(storage)
    attempts, trained = records["attempt"], metrics.latest(records["train"])
    restarts = metrics.read_pages(storage, "restarts")
    times = [page["unix_time"] for page in restarts]
    steps = list_manifests(storage)
    reached = trained[-1]["step"] if trained else 0
    yield f"run {cfg.name}: {_state(storage, reached >= cfg.steps, now)}"
    yield f"  step      {reached:,} of {cfg.steps:,}"
    if attempts:
        last = attempts[-1]
        yield f"  attempt   {last['attempt']}: {last['world_size']} worker(s), since {_age(now - last['unix_time'])}"
    if steps:
        newest = read_manifest(storage, steps[-1])
        times.append(newest.unix_time)
        unsaved = max(0, reached - newest.step)
        yield f"  saved     step {newest.step:,}, {_age(now - newest.unix_time)} ago; {unsaved} steps after it are not"
    for name, change in (("resizes", "resize"), ("failures", "failure")):
        pages = [page for page in restarts if page["change"] == change]
        down_s, lost = sum(page["down_s"] for page in pages), sum(page["steps_lost"] for page in pages)
        yield f"  {name:9} {len(pages)}: {down_s:.1f} s without training, {lost} steps done again"
    for rollback in read_rollbacks(storage):
        yield f"  diverged  {rollback}"
    for page in [page for page in restarts if page["change"] != "start"][-5:]:
        cause = page["cause"].splitlines()[0][:80]
        yield f"    {page['attempt']}  {page['down_s']:6.1f} s, {page['steps_lost']} steps  {cause}"
    if attempts and trained:
        useful_s = _useful_s(records)
        passed_s = max(useful_s, max(times, default=0.0) - attempts[0]["unix_time"])
        yield f"  goodput   {useful_s / passed_s:.1%}: {_age(useful_s)} of {_age(passed_s)} went into steps that count"


def _state(storage: Storage, finished: bool, now: float) -> str:
    try:
        lease = json.loads(storage.get(PATH))
    except (ReloraError, ValueError):
        return "finished" if finished else "no driver; the launch command continues it"
    age_s = now - lease["unix_time"]
    where = f"driver {lease['pid']} on {lease['host']}"
    return f"{where}, seen {_age(age_s)} ago" + (" (it is gone, or the clocks differ)" if age_s > 60 else "")


def _useful_s(records: dict[str, list[metrics.Record]]) -> float:
    """Steps that count, each once, with the boundaries, evaluations and waits for saves between them."""
    seconds = {"train": "step_s", "boundary": "boundary_s", "eval": "eval_s", "checkpoint": "blocked_s"}
    return sum(sum(r[key] for r in metrics.latest(records[kind])) for kind, key in seconds.items())


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    print_about("status", __doc__.splitlines()[0], lambda run: "\n".join(status(run, time.time())))


if __name__ == "__main__":
    main()
