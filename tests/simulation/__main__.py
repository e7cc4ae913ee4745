"""python -m tests.simulation [--seeds 20000] [--first 0] [--processes 2] [--record FILE]

Prints the first seeds that break a promise, each with as few faults as still break it, and what happened. With a
record it works in the background, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from relora_ray.study.ablations import version
from tests.simulation.run import simulate

CHUNK = 100


def failure_of(seed: int, spared: frozenset[int] = frozenset()) -> tuple[str, list[str], int] | None:
    """What goes wrong under a seed, what happened, and the number of faults; None if all is well."""
    try:
        simulate(seed, spared)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        world = error.world  # type: ignore[attr-defined]
        return f"{type(error).__name__}: {error}", world.log, world.num_faults
    return None


def shrink(seed: int) -> tuple[str, list[str]]:
    """The failure of a seed with as few faults as possible, and what happened."""
    found = failure_of(seed)
    assert found is not None
    spared: frozenset[int] = frozenset()
    width = found[2]
    while width:
        for first in range(1, found[2] + 1, width):
            fewer = spared | frozenset(range(first, first + width))
            if fewer != spared and (again := failure_of(seed, fewer)) is not None:
                spared, found = fewer, again
        width //= 2
    return found[0], found[1]


def settle(niceness: int) -> None:
    """In a process that plays seeds: what is imported stays, and a tenth of the time would go into looking at it."""
    gc.freeze()
    gc.disable()
    if niceness:
        os.nice(niceness)
        os.setsid()  # where Linux shares a processor out by session, niceness counts within one only
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(niceness))


def played(chunk: tuple[int, int]) -> tuple[list[int], float]:
    """The seeds of a chunk, given as its first and their number, that break a promise, and seconds of a processor."""
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    failed = []
    for seed in range(chunk[0], sum(chunk)):
        if failure_of(seed) is not None:
            failed.append(seed)
        if seed % 10 == 0:
            gc.collect()
    return failed, time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", type=Path, help="file of what was done: seeds in it are not played again")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    record = json.loads(args.record.read_text()) if args.record and args.record.exists() else []
    first = max([args.first, *(part["first"] + part["seeds"] for part in record)])
    end = args.first + args.seeds
    part: dict[str, Any] = {"version": version(), "first": first, "seeds": 0, "failed": [], "processor_s": 0.0}
    began = time.time()
    with multiprocessing.Pool(args.processes, settle, (19 if args.record else 0,)) as pool:
        chunks = [(start, min(CHUNK, end - start)) for start in range(first, end, CHUNK)]
        for (_, num), (failed, seconds) in zip(chunks, pool.imap(played, chunks), strict=True):
            part["seeds"] += num
            part["failed"] += failed
            part["processor_s"] = round(part["processor_s"] + seconds, 1)
            if args.record:
                args.record.write_text(json.dumps([*record, part], indent=1) + "\n")
            if sys.stderr.isatty():
                print(f"\r{part['seeds']:,} seeds, {len(part['failed'])} failed", end="", file=sys.stderr)
    print(
        f"{part['seeds']:,} seeds from {first}: {len(part['failed'])} failed, {time.time() - began:.0f} s in "
        f"{args.processes} processes"
    )
    for seed in part["failed"][:3]:
        text, log = shrink(seed)
        print(f"\nseed {seed}: {text}\n" + "\n".join(log[-60:]))
    return 1 if part["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
