"""Train a run, or a sweep: what `ray job submit` calls.

    python -m relora_ray.launch CONFIG [key=value ...] [--dry-run] [--wait]

Starting and continuing after a crash are this one command. Uses the Ray cluster of RAY_ADDRESS (Ray jobs have
it set), or else starts a local Ray. Exit codes: 0 done, 1 failed, 2 refused before anything was spent,
130 interrupted by Ctrl-C, 143 told to stop by SIGTERM, as `ray job stop` does: the state of a run is stored first.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from relora_ray.cli import command, say, show
from relora_ray.config import RunConfig
from relora_ray.config_file import load_config
from relora_ray.errors import ConfigError, ReloraError, RunBusyError, StoppedError
from relora_ray.progress import Progress, SweepProgress
from relora_ray.sweep.space import is_sweep, load_sweep


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m relora_ray.launch", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file: one file is one run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as steps=300 optimizer.learning_rate=1e-3"
    )
    parser.add_argument("--dry-run", action="store_true", help="check config, storage, data and machines, and end")
    parser.add_argument(
        "--wait", action="store_true", help="if another driver trains the run, wait for its end, and go on from there"
    )
    args = parser.parse_intermixed_args(argv)
    cfg, train = (_prepare_sweep if is_sweep(args.config) else _prepare_run)(args)
    if args.dry_run:
        return _dry_run(cfg)
    try:
        return train()
    except ReloraError as error:
        return say(error, {RunBusyError: 2, ConfigError: 2, StoppedError: 143}.get(type(error), 1))
    except OSError:  # not of a file that the user named: all those have been looked at
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130


Prepared = tuple[RunConfig, Callable[[], int]]
"""A run's config, and what trains it; returns the exit code. Raises ReloraError, KeyboardInterrupt."""


def _prepare_run(args: argparse.Namespace) -> Prepared:
    """Raises ReloraError for all that can be refused before Ray starts."""
    cfg = load_config(args.config, args.overrides)
    # Imported only now: a bad config should not have to wait for torch and Ray.
    from relora_ray.report import summary
    from relora_ray.runs import run_storage
    from relora_ray.runtime import driver

    cfg = driver.preflight(cfg)

    def train() -> int:
        progress = Progress(cfg, sys.stdout)
        try:
            driver.run(cfg, on_event=progress, wait=args.wait)
        finally:
            progress.close()
        show(summary(run_storage(cfg)))
        return 0

    return cfg, train


def _prepare_sweep(args: argparse.Namespace) -> Prepared:
    """The same of a sweep; the config is that of one of its runs."""
    sweep = load_sweep(args.config, args.overrides)
    print("\n".join(sweep.plan()), flush=True)
    from relora_ray.plots import pyplot
    from relora_ray.runtime.sweep import check_sweep, first_run, run_sweep
    from relora_ray.sweep.report import page, write_up

    pyplot()
    sweep, folder = check_sweep(sweep)

    def train() -> int:
        points = run_sweep(sweep, on_event=SweepProgress(sweep, sys.stdout))
        write_up(sweep, points, folder)
        show("\n".join(page(sweep, points, [])))
        show(f"written to {folder.url}: README.md, table.csv, best.yaml and pictures")
        return 1 if any(point.state == "failed" for point in points) else 0

    return first_run(sweep), train


def _dry_run(cfg: RunConfig) -> int:
    from relora_ray.runtime.dry_run import dry_run

    fine = True
    for finding in dry_run(cfg):
        print(finding, flush=True)
        fine &= finding.fine
    return 0 if fine else 2


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
