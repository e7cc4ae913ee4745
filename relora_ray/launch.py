"""Train a run, or a sweep: what `ray job submit` calls.

    relora-ray launch CONFIG [key=value ...] [~key ...] [--dry-run] [--wait] [--print-config]
    relora-ray launch --keys [SECTION]

Starting and continuing after a crash are this one command. Uses the Ray cluster of RAY_ADDRESS (Ray jobs have
it set), or else starts a local Ray. Exit codes: 0 done, 1 failed, 2 refused before anything was spent,
130 stopped by Ctrl-C, 143 by SIGTERM, as `ray job stop` does, 129 by SIGHUP: a run's state is stored first.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from relora_ray import cli
from relora_ray.cli import command, say, show
from relora_ray.commands.progress import Progress, SweepProgress
from relora_ray.commands.shipped import find
from relora_ray.config import RunConfig
from relora_ray.config.file import load_config, to_yaml
from relora_ray.errors import ConfigError, ReloraError, RunBusyError, StoppedError
from relora_ray.masking import masked
from relora_ray.runtime import own_ray, server
from relora_ray.sweep.space import is_sweep, load_sweep, text


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        "launch",
        (__doc__ or "").splitlines()[0],
        "quickstart",
        "configs/relora/60m.yaml steps=40000 cluster.workers=4",
        "quickstart --dry-run",
        "laptop/relora steps=200 --print-config",
        "--keys method",
    )
    parser.add_argument(
        "config", nargs="?", help="YAML file, or the name of one that `relora-ray configs` lists: one is one run"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as steps=300 optimizer.learning_rate=1e-3; ~key takes a key out, and it has its default",
    )
    parser.add_argument("--dry-run", action="store_true", help="check config, storage, data and machines, and end")
    parser.add_argument(
        "--wait", action="store_true", help="if another driver trains the run, wait for its end, and go on from there"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole config as it would run, and end")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="SECTION",
        help="print every key, or those of a section or of one key, with type, default and unit, and end",
    )
    args = parser.parse_intermixed_args(argv)
    if args.keys is not None:
        return _print_keys(args.keys or None, args.config)
    if args.config is None:
        raise ConfigError("no config is given. `relora-ray configs` lists those that come with the package.")
    args.config = find(args.config)
    if args.print_config:
        return _print_config(args)
    with ExitStack() as at_the_end:
        cfg, train = (_prepare_sweep if is_sweep(args.config) else _prepare_run)(args, at_the_end)
        if args.dry_run:
            return _dry_run(cfg)
        try:
            return train()
        except ReloraError as error:
            if isinstance(error, StoppedError):
                return say(error, error.exit_code)
            return say(error, 2 if isinstance(error, (RunBusyError, ConfigError)) else 1)
        except OSError:  # not of a file that the user named: all those have been looked at
            traceback.print_exc()
            return 1
        except KeyboardInterrupt:
            print("interrupted: run the same command again to continue from the last checkpoint", file=sys.stderr)
            return 130


def _print_keys(section: str | None, config: str | None) -> int:
    from relora_ray.commands.reference import lines

    if config is not None:
        raise ConfigError(f"--keys is of no config: leave {config!r} out, or use --print-config for its values.")
    show("\n".join(lines(section)))
    return 0


def _print_config(args: argparse.Namespace) -> int:
    """A run's, or those of a sweep's points, each behind its settings, for the first seed."""
    if not is_sweep(args.config):
        show(masked(to_yaml(load_config(args.config, args.overrides))).rstrip("\n"))
        return 0
    sweep = load_sweep(args.config, args.overrides)
    points, what = (sweep.points, "point") if sweep.points else (sweep.possible_points, "possible point")
    for number, settings in enumerate(points[:MAX_PRINTED]):
        cfg = sweep.config(number, settings, sweep.spec.seeds[0])
        show(f"--- # {what} {number}: {text(settings)}\n{masked(to_yaml(cfg))}".rstrip("\n"))
    if len(points) > MAX_PRINTED:
        show(f"# and {len(points) - MAX_PRINTED} more")
    return 0


MAX_PRINTED = 50

Prepared = tuple[RunConfig, Callable[[], int]]
"""A run's config, and what trains it; returns the exit code. Raises ReloraError, KeyboardInterrupt."""


def _prepare_run(args: argparse.Namespace, at_the_end: ExitStack) -> Prepared:
    """Raises ReloraError for all that can be refused before Ray starts."""
    cfg = load_config(args.config, args.overrides)
    if not args.dry_run and (ends := _if_finished(cfg)):
        return cfg, ends
    progress = Progress(cfg, sys.stdout, says_waits=not args.dry_run)
    at_the_end.callback(progress.close)
    progress.waits_for("Ray and torch are imported")
    # Both take some seconds, in which this process imports Ray. A dry run makes its checks itself.
    at = "" if args.dry_run else server.begin()
    is_own = own_ray.is_wanted() and not args.dry_run
    ray_here = at_the_end.enter_context(own_ray.OwnRay.to_train(cfg.cluster)) if is_own else None
    from relora_ray.runtime.preflight import begin_preflight

    checked = None if args.dry_run else begin_preflight(cfg, at)
    from relora_ray.commands.report import summary
    from relora_ray.runs.places import run_storage
    from relora_ray.runtime import driver

    if checked is not None:
        progress.waits_for("config, model, data and storage are checked")
        cfg = checked.result()

    def train() -> int:
        try:
            driver.run(cfg, on_event=progress, wait=args.wait, own_ray=ray_here, server=at if is_own else "")
        finally:
            progress.close()
        show(summary(run_storage(cfg)))
        return 0

    return cfg, train


def _if_finished(cfg: RunConfig) -> Callable[[], int] | None:
    """What is to be said of a run that has nothing left to do: neither torch nor Ray is needed for it."""
    from relora_ray.runs.places import run_storage
    from relora_ray.runs.setting import check_run, is_finished

    storage = run_storage(cfg)
    if not is_finished(cfg, storage):
        return None
    check_run(cfg)
    from relora_ray.commands.report import summary

    def say_so() -> int:
        show(f"{storage.url} has made all of its {cfg.last_step:,} updates: nothing is left to do\n{summary(storage)}")
        return 0

    return say_so


def _prepare_sweep(args: argparse.Namespace, at_the_end: ExitStack) -> Prepared:
    """The same of a sweep; the config is that of one of its runs."""
    sweep = load_sweep(args.config, args.overrides)
    print("\n".join(sweep.plan()), flush=True)
    progress = SweepProgress(sweep, sys.stdout, says_waits=not args.dry_run)
    at_the_end.callback(progress.close)
    progress.waits_for("Ray and torch are imported")
    at = server.begin()
    is_own = own_ray.is_wanted() and not args.dry_run
    ray_here = at_the_end.enter_context(own_ray.OwnRay.to_train(sweep.cluster)) if is_own else None
    from relora_ray.runtime.sweep import check_sweep, run_sweep
    from relora_ray.study.plots import pyplot
    from relora_ray.sweep.report import page, write_up

    pyplot()
    progress.waits_for("configs, models, data and storage are checked")
    sweep, folder = check_sweep(sweep, at)

    def train() -> int:
        try:
            points = run_sweep(sweep, on_event=progress, own_ray=ray_here, server=at if is_own else "")
        finally:
            progress.close()
        write_up(sweep, points, folder)
        show("\n".join(page(sweep, points, [])))
        show(f"written to {folder.url}: README.md, table.csv, best.yaml and pictures")
        return 1 if any(point.state == "failed" for point in points) else 0

    return sweep.first_run, train


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
