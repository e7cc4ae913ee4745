"""Write a run's model as a plain Hugging Face folder: merged weights, config and tokenizer; or base and adapter.

python -m relora_ray.export RUN OUT [--step STEP | --best] [--dtype float32|bfloat16] [--max-shard-size 4GB] [--adapter]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relora_ray import cli
from relora_ray.cli import at_least_0, command, place
from relora_ray.errors import ConfigError
from relora_ray.hub import HUB_NAME
from relora_ray.runs.rollback import best_checkpoint_step, checkpoint_step
from relora_ray.runs.setting import ADAPTER, BASE, find_setting
from relora_ray.storage import Storage, add_options_argument, parse_options

if TYPE_CHECKING:
    import torch


def export(
    run: Storage,
    out: Storage,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    base_name: str = "",
) -> int:
    """Export the newest checkpoint, or the one at `step`; returns its step. OUT must be empty. `base_name`: write
    a base, which the adapter calls so, and an adapter. `dtype`: of the weights; None: float32."""
    import torch  # --help must not wait for it

    from relora_ray.runs.adapter import export_adapter
    from relora_ray.runs.card import model_card
    from relora_ray.runs.run import export_model, load_trained

    dtype = dtype or torch.float32
    if found := out.list():
        raise ConfigError(f"{out.url} is not empty: {found[0]} is there. Choose another folder, or delete it first.")
    if base_name:
        _refuse_without_adapter(run, step)
    trained = load_trained(run, step)
    if base_name:
        export_adapter(trained, out, dtype=dtype, max_shard_size=max_shard_size, base_name=base_name)
        return trained.manifest.step
    setting, manifest = find_setting(trained.storage), trained.manifest
    dense = trained.method.dense_state_dict(trained.model)
    card = model_card(trained.cfg, manifest, setting.data_index(), dtype=str(dtype).removeprefix("torch."))
    export_model(setting, trained.cfg, trained.model, dense, out, dtype=dtype, max_shard_size=max_shard_size, card=card)
    return manifest.step


def _refuse_without_adapter(run: Storage, step: int | None) -> None:
    """ConfigError where there is none, before weights are read."""
    from relora_ray.methods.base import build_method

    cfg = find_setting(run).config()
    if why := build_method(cfg).why_no_adapter(checkpoint_step(run, step)):
        raise ConfigError(
            f"{run.url} cannot be exported as an adapter: method.kind={cfg.method.kind} {why}. Export it without "
            f"--adapter."
        )


def _shard_size(text: str) -> str:
    """For argparse: as transformers has it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a file, such as 4GB or 500MB")
    return f"{found[1]}{found[2]}".upper().replace("IB", "iB")


def _base_name(text: str) -> str:
    """For argparse: a name on the hub, or of the folder."""
    if not HUB_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name on the Hugging Face hub, such as you/relora-250m-base")
    return text


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        "export",
        (__doc__ or "").splitlines()[0],
        "runs/quickstart exported",
        "runs/quickstart exported --step 300 --dtype bfloat16",
        "runs/quickstart s3://bucket/models/quickstart --best --max-shard-size 4GB",
        "runs/quickstart exported --step 450 --adapter",
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder or URL")
    parser.add_argument("out", metavar="OUT", help="folder or URL to write, which must be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=at_least_0, default=None, help="a checkpoint's step; default: the newest")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument(
        "--max-shard-size", type=_shard_size, metavar="SIZE",
        help="of one file of weights, such as 4GB, with an index where there are several; default: transformers' own",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="store_true",
        help=f"OUT/{BASE} is the model without its adapters, and OUT/{ADAPTER} those, for peft",
    )  # fmt: skip
    parser.add_argument(
        "--base-model", type=_base_name, metavar="NAME",
        help=f"with --adapter: the hub name under which OUT/{BASE} will be found; default: {BASE}",
    )  # fmt: skip
    add_options_argument(parser)
    args = parser.parse_args(argv)
    if args.base_model and not args.adapter:
        raise ConfigError(f"--base-model={args.base_model} has no effect without --adapter, whose base it names.")
    options = parse_options(args.storage_option)
    run, out = place("RUN", args.run, options), place("OUT", args.out, options)
    import torch

    step = export(
        run,
        out,
        step=best_checkpoint_step(run) if args.best else args.step,
        dtype=getattr(torch, args.dtype),
        max_shard_size=args.max_shard_size,
        base_name=(args.base_model or BASE) if args.adapter else "",
    )
    what = f"{BASE} and {ADAPTER}, together the model" if args.adapter else "the model"
    print(f"wrote {args.out}: {what} after step {step:,}")


if __name__ == "__main__":
    sys.exit(main())
