"""Two drivers of one run, one of them stopped for a while, again and again: does anything mix?

python benchmarks/two_drivers.py [--rounds 100] [--at-once 3] --folder FOLDER > benchmarks/results/two-drivers.md

In a round two drivers with configs that decide the result differently start within a second of each other on one run.
One of them is stopped (SIGSTOP) at a random moment, in half of the rounds right before a random change that it makes in
storage, and resumed (SIGCONT) after a random while, mostly a longer one than that after which a driver is taken for
dead. Pairs are started again until the run is at its end. Every other round is on an S3 server (moto), the others are
in a local folder; half of either keep all checkpoints, and half the last 2, so that much is removed. Each process does
what the driver does, less Ray, and trains 30 steps.

After each round: every process has ended by itself, and as it should; one that was refused has changed nothing but its
own sign of life, and claimed a term if it was refused for its config; all checkpoints are whole, of one setup and one
config, that of the driver who made the first; each attempt began from the last checkpoint that any before it was told
is stored, or from a later one; where all are kept, every acknowledged one is on the final line; and every loss and
every byte of the exported model's weights is that of an undisturbed run of that config.

FOLDER keeps what was found, round by round, so that it can be broken off and gone on with; and all that a round which
failed left behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

from relora_ray.conformance.__main__ import make_data
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from relora_ray.study.ablations import machine, version
from tests.s3 import Server
from tests.test_two_drivers import BEAT_S, PATIENCE_S, Expected, Round, check, configs, draw, undisturbed


def play(seed: int, data: Path, folder: Path, server: Server, expected: dict[str, Expected]) -> dict[str, Any]:
    """What happened, or why it failed; what is left behind stays only if it failed."""
    plan, here = draw(seed), folder / f"round-{seed}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    cfgs = configs(plan, data, here / "runs", server)
    try:
        Round(plan, cfgs, here / "log.jsonl").play()
        found = check(plan, cfgs, here / "log.jsonl", expected)
    except Exception:
        (here / "failure.txt").write_text(f"{plan}\n{traceback.format_exc()}")
        if plan.remote:
            source, copy = run_storage(cfgs[0]), Storage(str(here / "runs" / "tiny"))
            for path in source.list():
                source.copy(path, copy, path)
        return {"seed": seed, "failed": traceback.format_exc().strip().splitlines()[-1]}
    shutil.rmtree(here)
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| | folder | S3 | both |", "|---|---|---|---|"]

    def line(what: str, count: Any) -> None:
        counts = [sum(count(row) for row in rows if row["storage"] == kind) for kind in ("folder", "s3")]
        lines.append(f"| {what} | {counts[0]} | {counts[1]} | {sum(counts)} |")

    line("rounds", lambda row: 1)
    line("drivers started", lambda row: row["processes"])
    line("terms claimed", lambda row: row["terms"])
    line("the run is that of the driver started first", lambda row: row["winner"] == "first")
    line("the run is that of the driver started second", lambda row: row["winner"] == "second")
    line("takeovers: terms claimed while an owner before had not ended", lambda row: row["takeovers"])
    line("... by one that was then refused for its config", lambda row: row["in_vain"])
    line("... from one that did not stand still", lambda row: row["of_running"])
    line("rounds with a takeover", lambda row: row["takeovers"] > 0)
    line("stopped while it owned the run", lambda row: row["stopped"] == "owner")
    line("... and taken over before it ended", lambda row: row["taken_over"])
    line("... and not", lambda row: row["stopped"] == "owner" and not row["taken_over"])
    line("stopped while it was starting or waiting", lambda row: row["stopped"] == "no owner")
    line("ended before it was to be stopped", lambda row: row["stopped"] == "not stopped")
    for how, what in ENDS.items():
        line(f"drivers: {what}", lambda row, how=how: row["ends"].count(how))
    return lines


ENDS = {
    "finished": "came to the run's end",
    "RunBusyError": "refused, as another one lived (RunBusyError)",
    "ConfigError": "refused, as the run is one of another config (ConfigError)",
    "lost": "saw that they were taken over, and ended at once (when_lost)",
    "SupersededError": "refused a write, as they were taken over (SupersededError)",
    "CheckpointError": "refused a commit, as they were taken over (CheckpointError)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    args.folder.mkdir(parents=True, exist_ok=True)
    rounds = args.folder / "rounds.jsonl"
    rows = [json.loads(line) for line in rounds.read_text().splitlines()] if rounds.exists() else []
    todo = sorted(set(range(1, args.rounds + 1)) - {row["seed"] for row in rows})
    if todo:
        root = Path(__file__).parent.parent / "configs/quickstart"
        scratch = Path(tempfile.mkdtemp(prefix="two-drivers-"))
        data = Path(make_data(root / "austen.txt.bz2", root / "tokenizer", scratch))
        server = Server("moto", scratch)
        server.start()
        try:
            expected = undisturbed(data, scratch / "undisturbed")
            with ThreadPoolExecutor(args.at_once) as pool, open(rounds, "a") as file:
                for row in pool.map(lambda seed: play(seed, data, args.folder, server, expected), todo):
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    print(json.dumps(row), file=file, flush=True)
                    rows.append(row)
        finally:
            server.kill()
            shutil.rmtree(scratch)
    failed, good = [row for row in rows if "failed" in row], [row for row in rows if "failed" not in row]
    what, checks = __doc__.split(chr(10) * 2)[2:4]
    print(f"# Two drivers of one run\n\n{' '.join(what.split())}\n\n{' '.join(checks.split())}\n")
    print(f"A driver is taken for dead after {PATIENCE_S:g} s here, and gives a sign of life every {BEAT_S:g} s.\n")
    print(f"Machine: {machine()}. Version: {version()}.")
    print(
        f"Command: `python benchmarks/two_drivers.py --rounds {args.rounds} --at-once {args.at_once} --folder FOLDER`\n"
    )
    print("\n".join(table(good)))
    back = Counter(row["came_back"] for row in good if row["taken_over"])
    how = ", ".join(f"{name} {count}" for name, count in back.most_common())
    print(f"\nOwners that were taken over while they stood still, by how they ended when they came back: {how}.")
    print(f"They put {sum(row['late_puts'] for row in good)} objects after that, all without effect.")
    print(f"\n{len(failed)} of {len(rows)} rounds failed.")
    for row in failed:
        print(f"- seed {row['seed']}: {row['failed']}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
