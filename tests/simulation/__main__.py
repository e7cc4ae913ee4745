"""python -m tests.simulation [--seeds 20000] [--first 0] [--processes 2] [--json FILE]

Prints the first seeds that break a promise, each with as few faults as still break it, and what happened.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
from functools import partial

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


def failures(first: int, num: int) -> list[int]:
    logging.disable(logging.CRITICAL)
    return [seed for seed in range(first, first + num) if failure_of(seed) is not None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="file for the result")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began, failed, done = time.time(), [], 0
    with multiprocessing.Pool(args.processes) as pool:
        chunks = range(args.first, args.first + args.seeds, CHUNK)
        for found in pool.imap_unordered(partial(failures, num=min(CHUNK, args.seeds)), chunks):
            failed += found
            done += CHUNK
            if sys.stderr.isatty():
                print(f"\r{done:,} seeds, {len(failed)} failed, {time.time() - began:.0f} s", end="", file=sys.stderr)
    seconds = time.time() - began
    print(
        f"{args.seeds:,} seeds from {args.first}: {len(failed)} failed, {seconds:.0f} s in {args.processes} processes"
    )
    for seed in sorted(failed)[:3]:
        text, log = shrink(seed)
        print(f"\nseed {seed}: {text}\n" + "\n".join(log[-60:]))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"seeds": args.seeds, "first": args.first, "failed": sorted(failed), "seconds": seconds}, file)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
