"""How a run is doing, from its storage alone.

python -m relora_ray.status RUN
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from relora_ray import metrics
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.errors import ReloraError
from relora_ray.runs import read_config
from relora_ray.storage import Storage, add_options_argument, parse_options


def status(storage: Storage, now: float) -> Iterator[str]:
    """Lines of text. `now`: seconds since 1970."""
    cfg = read_config(storage)
    attempts = metrics.read_all(storage, "attempt")
    trained = metrics.read(storage, "train")
    restarts = [json.loads(storage.get(path)) for path in storage.list("restarts")]
    steps = list_manifests(storage)
    reached = trained[-1]["step"] if trained else 0
    yield f"run {cfg.name}: {_state(storage, reached >= cfg.steps, now)}"
    yield f"  step      {reached:,} of {cfg.steps:,}"
    if attempts:
        last = attempts[-1]
        yield f"  attempt   {last['attempt']}: {last['world_size']} worker(s), since {_age(now - last['unix_time'])}"
    if steps:
        newest = read_manifest(storage, steps[-1])
        unsaved = max(0, reached - newest.step)
        yield f"  saved     step {newest.step:,}, {_age(now - newest.unix_time)} ago; {unsaved} steps after it are not"
    for name, change in (("resizes", "resize"), ("failures", "failure")):
        pages = [page for page in restarts if page["change"] == change]
        down_s, lost = sum(page["down_s"] for page in pages), sum(page["steps_lost"] for page in pages)
        yield f"  {name:9} {len(pages)}: {down_s:.1f} s without training, {lost} steps done again"
    for page in [page for page in restarts if page["change"] != "start"][-5:]:
        cause = page["cause"].splitlines()[0][:80]
        yield f"    {page['attempt']}  {page['down_s']:6.1f} s, {page['steps_lost']} steps  {cause}"
    if attempts and trained:
        useful_s = _useful_s(storage, trained)
        passed_s = max(useful_s, _last_time(storage, steps, restarts) - attempts[0]["unix_time"])
        yield f"  goodput   {useful_s / passed_s:.1%}: {_age(useful_s)} of {_age(passed_s)} went into steps that count"


def _state(storage: Storage, finished: bool, now: float) -> str:
    try:
        lease = json.loads(storage.get("driver.json"))
    except (ReloraError, ValueError):
        return "finished" if finished else "no driver; the launch command continues it"
    age_s = now - lease["unix_time"]
    where = f"driver {lease['pid']} on {lease['host']}"
    return f"{where}, seen {_age(age_s)} ago" + (" (it is gone, or the clocks differ)" if age_s > 60 else "")


def _useful_s(storage: Storage, trained: list[metrics.Record]) -> float:
    """Steps that count, each once, with the boundaries, evaluations and waits for saves between them."""
    others = (("boundary", "boundary_s"), ("eval", "eval_s"), ("checkpoint", "blocked_s"))
    return sum(r["step_s"] for r in trained) + sum(r[key] for kind, key in others for r in metrics.read(storage, kind))


def _last_time(storage: Storage, steps: list[int], restarts: list[dict[str, Any]]) -> float:
    times = [page["unix_time"] for page in restarts]
    return max(times + [read_manifest(storage, step).unix_time for step in steps[-1:]], default=0.0)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.status", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", help="the run's folder or URL")
    add_options_argument(parser)
    args = parser.parse_args()
    try:
        print("\n".join(status(Storage(args.run, parse_options(args.storage_option)), time.time())))
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
