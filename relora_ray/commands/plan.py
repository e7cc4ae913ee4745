"""What a run will take, before anything is spent: memory, time, traffic, checkpoints, failures and dollars.

relora-ray plan CONFIG [key=value ...] --machines g6.xlarge:8
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ray import cli
from relora_ray.cli import command, printable
from relora_ray.commands.shipped import find
from relora_ray.config import RunConfig
from relora_ray.config.file import load_config
from relora_ray.errors import ConfigError, ReloraError
from relora_ray.storage import add_options_argument, parse_options
from relora_ray.sweep.space import is_sweep

if TYPE_CHECKING:
    from relora_ray.planning.forecast import Cluster
    from relora_ray.planning.machines import Machine

UTILISATION = 0.4


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    if args.picture is not None and not args.picture.endswith((".png", ".svg")):
        raise ConfigError(f"--picture {args.picture!r} is neither a .png nor a .svg file. Give one of them.")
    rates = _rates(args.spot)
    config = find(args.config)
    if is_sweep(config):
        raise ConfigError(f"{config} is a sweep: a plan is of one run. Give a run's config, such as the sweep's base.")
    cfg = load_config(config, args.overrides)
    machine, count = _machine(args, cfg)
    # Imported only now: a bad config should not have to wait for torch.
    from relora_ray.planning.page import as_json, page
    from relora_ray.planning.picture import draw_plan
    from relora_ray.planning.plan import make_plan
    from relora_ray.planning.suggest import pasteable
    from relora_ray.study.plots import pyplot

    if args.picture is not None:
        pyplot()
    cluster = _cluster(args, cfg, machine, count, rates[0] if rates else 0.0)
    plan = make_plan(cfg, cluster, rates=rates, epochs=_epochs(cfg))
    suggested = pasteable(plan) if args.suggest else []
    if args.json:
        print(json.dumps(as_json(plan, suggested), indent=1))
    else:
        print(printable("\n".join(page(plan, suggested))))
    if args.picture is not None:
        draw_plan(plan, Path(args.picture))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "plan",
        (__doc__ or "").splitlines()[0],
        "relora/1b --machines g6.xlarge:8 --price 0.35 --spot 0.5",
        "relora/7b method.lora_rank=256 --machines p4d.24xlarge:4 --suggest",
        "relora/130m --gpu-memory-gb 24 --gpu-tflops 165 --like runs/relora-130m",
    )
    parser.add_argument("config", help="YAML file, or the name of one that `relora-ray configs` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.micro_batch_rows=16")
    parser.add_argument("--machines", metavar="KIND:N", help="such as g6.xlarge:8, by their vendor's name")
    parser.add_argument("--gpu-memory-gb", type=cli.above_0, metavar="GB", help="of a GPU that no known machine has")
    parser.add_argument("--gpu-tflops", type=cli.above_0, metavar="N", help="its peak, dense, in the run's precision")
    parser.add_argument("--network-gbps", type=cli.above_0, metavar="N", help="of a machine, instead of the table's")
    parser.add_argument("--utilisation", type=cli.share, metavar="SHARE", help=f"of the peak (default: {UTILISATION})")
    parser.add_argument("--like", metavar="RUN", help="instead: the speed that this run has reached, by its records")
    parser.add_argument("--price", type=cli.above_0, metavar="DOLLARS", help="an hour of one machine, as you pay it")
    parser.add_argument(
        "--spot", metavar="RATE[,RATE]", help="failures of one machine a day; with several, all are shown"
    )
    parser.add_argument("--restart-s", type=cli.seconds, metavar="S", help="of a restart (default: 11.7), less reading")
    parser.add_argument("--storage-mb-per-s", type=cli.above_0, metavar="N", help="of one machine (default: 200)")
    parser.add_argument("--suggest", action="store_true", help="what should be chosen instead, as key=value")
    parser.add_argument("--json", action="store_true", help="for tools")
    parser.add_argument("--picture", metavar="FILE", help="also draw memory, goodput and cost: a .png or .svg file")
    add_options_argument(parser)
    return parser


def _machine(args: argparse.Namespace, cfg: RunConfig) -> tuple[Machine | None, int]:
    """The kind of machine that is meant, and how many."""
    from relora_ray.planning.machines import Gpu, Machine, find_machines

    own = [name for name in ("gpu_memory_gb", "gpu_tflops") if getattr(args, name) is not None]
    if len(own) == 1:
        raise ConfigError("--gpu-memory-gb and --gpu-tflops describe a GPU together. Give both.")
    if own and args.machines and ":" not in args.machines and not args.machines.isdigit():
        raise ConfigError(
            "--gpu-memory-gb and --gpu-tflops with --machines: the kind decides them. Give one of the two."
        )
    if own:
        count = (args.machines or "").rpartition(":")[2] or str(cfg.cluster.workers)
        if not count.isdigit() or not int(count):
            raise ConfigError(f"--machines {args.machines!r} with --gpu-tflops: give their number, such as custom:8.")
        gpu = Gpu("custom", args.gpu_memory_gb, args.gpu_tflops, "the command line", args.gpu_tflops)
        return Machine("custom", gpu, 1, args.network_gbps or 10.0), int(count)
    if args.machines is None:
        idle = [f"--{n.replace('_', '-')}" for n in ("network_gbps", "price", "spot", "like") if getattr(args, n)]
        idle += ["--suggest"] if args.suggest else []
        if idle:
            raise ConfigError(
                f"{idle[0]} has no effect without a machine. Add --machines KIND:N, such as g6.xlarge:8, or describe "
                f"its GPU by --gpu-memory-gb and --gpu-tflops."
            )
        return None, 0
    machine, count = find_machines(args.machines)
    if args.network_gbps:
        from dataclasses import replace

        machine = replace(machine, network_gbps=args.network_gbps, burst_gbps=0.0)
    return machine, count


def _cluster(
    args: argparse.Namespace, cfg: RunConfig, machine: Machine | None, count: int, rate: float
) -> Cluster | None:
    if machine is None:
        return None
    from relora_ray.planning.forecast import RESTART_S, STORAGE_MB_PER_S, Cluster

    reached = (args.utilisation or UTILISATION) * machine.gpu.tflops(cfg.train.precision) * 1e12
    if args.like is not None:
        if args.utilisation is not None:
            raise ConfigError("--utilisation and --like both say how fast a GPU is. Give one of the two.")
        from relora_ray.planning.like import reached_flops_per_s

        reached = reached_flops_per_s(
            cli.place("--like", args.like, parse_options(args.storage_option), retry_s=cli.PATIENCE_S)
        )
    return Cluster(
        machine=machine,
        count=count,
        flops_per_s=reached,
        failures_per_day=rate,
        price=args.price,
        storage_bytes_per_s=1e6 * (args.storage_mb_per_s or STORAGE_MB_PER_S),
        restart_s=RESTART_S if args.restart_s is None else args.restart_s,
        save_async=cfg.checkpoint.save_async,
    )


def _epochs(cfg: RunConfig) -> float | None:
    """How often the data are read, if they are there."""
    from relora_ray.data.tokens import read_index
    from relora_ray.runs.places import data_storage

    try:
        count = read_index(data_storage(cfg)).splits["train"].num_tokens
    except (ReloraError, KeyError):
        return None
    return cfg.steps * cfg.tokens_per_step / count if count else None


def _rates(text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= rate < 1e6 for rate in found):
        raise ConfigError(f"--spot {text!r}: give failures of one machine a day, such as 0.5, or several: 0.1,0.5,2.")
    return found


if __name__ == "__main__":
    sys.exit(main())
