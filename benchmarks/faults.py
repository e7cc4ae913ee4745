"""Seeded faults in runs of two workers on a real Ray cluster: does anything change the result?

python benchmarks/faults.py [--runs 4] [--each 13] > benchmarks/results/faults.md

Every run has faults of all kinds at random steps: SIGKILL of a process that trains in forward, backward, reduction,
merge, reset, the copy for a save, upload and commit; SIGSTOP of one; SIGKILL of Ray's worker, of the coordinator, of a
machine's daemons (it is replaced) and of the S3 server, which comes back after 3 s. At the end every loss must be the
uninterrupted run's, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"

import ray

from relora_ray.conformance.__main__ import make_data
from relora_ray.runs.metrics import read_pages
from relora_ray.runs.places import run_storage
from relora_ray.study.ablations import machine, version
from tests.faults import Fault, Play, plan
from tests.runtime.test_faults import bucket_config
from tests.s3 import Server
from tests.tiny import stored_losses

STEPS = 393


def name(fault: Fault) -> str:
    return f"stopped in {fault.where}" if fault.signal == "SIGSTOP" else fault.where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--each", type=int, default=13, help="faults in a run")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    root = Path(__file__).parent.parent / "configs/quickstart"
    data = Path(make_data(root / "austen.txt.bz2", root / "tokenizer", Path(tempfile.mkdtemp())))
    server = Server("rclone", Path(tempfile.mkdtemp()))
    server.start()
    whole = bucket_config(data, server, "whole", f"steps={STEPS}")
    Play([]).run(whole)
    expected = stored_losses(whole)
    print(f"# Faults\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n")
    print(f"Machine: {machine()}; Ray {ray.__version__}. Version: {version()}.")
    print(f"Command: `python benchmarks/faults.py --runs {args.runs} --each {args.each}`\n")
    print("| seed | faults | attempts | steps done again | seconds without training | losses that differ |")
    print("|---|---|---|---|---|---|")
    took_place: Counter[str] = Counter()
    down_s: list[float] = []
    for seed in range(1, args.runs + 1):
        cfg = bucket_config(data, server, f"faults-{seed}", f"steps={STEPS}")
        faults = plan(seed=seed, count=args.each, steps=STEPS)
        play = Play(faults, server)
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it thinks of the faults
            play.run(cfg)
        done = play.took_place()
        took_place.update(name(fault) for fault in faults if fault.number in done)
        storage = run_storage(cfg)
        pages = read_pages(storage, "restarts")
        changes = [page for page in pages if page["change"] != "start"]
        down_s += [page["down_s"] for page in changes]
        found = stored_losses(cfg)
        differ = sum(found.get(step) != loss for step, loss in expected.items())
        print(
            f"| {seed} | {len(done)} of {len(faults)} | {len(pages)} | {sum(page['steps_lost'] for page in changes)} | "
            f"{sum(page['down_s'] for page in changes):.1f} | {differ} of {len(expected)} |",
            flush=True,
        )
    server.kill()
    print(f"\n{sum(took_place.values())} faults. Seconds without training after one: median {median(down_s):.1f}, most")
    print(f"{max(down_s):.1f}. By kind: {', '.join(f'{kind} {n}' for kind, n in sorted(took_place.items()))}.")


if __name__ == "__main__":
    main()
