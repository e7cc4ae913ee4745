"""Write a run's model as a plain Hugging Face folder: merged weights, config and tokenizer.

python -m relora_ray.export RUN OUT [--step STEP] [--dtype float32|bfloat16]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from relora_ray.cli import at_least_0, command, place
from relora_ray.errors import ConfigError
from relora_ray.runs import export_model, find_setting, load_trained
from relora_ray.storage import Storage, add_options_argument, parse_options


def export(run: Storage, out: Storage, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> int:
    """Export the newest checkpoint, or the one at `step`; returns its step. OUT must be empty."""
    if found := out.list():
        raise ConfigError(f"{out.url} is not empty: {found[0]} is there. Choose another folder, or delete it first.")
    trained = load_trained(run, step)
    dense = trained.method.dense_state_dict(trained.model)
    export_model(find_setting(trained.storage), trained.cfg, trained.model, dense, out, dtype=dtype)
    return trained.manifest.step


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder or URL")
    parser.add_argument("out", metavar="OUT", help="folder or URL to write")
    parser.add_argument("--step", type=at_least_0, default=None, help="a checkpoint's step; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_options_argument(parser)
    args = parser.parse_args(argv)
    options = parse_options(args.storage_option)
    run, out = place("RUN", args.run, options), place("OUT", args.out, options)
    step = export(run, out, step=args.step, dtype=getattr(torch, args.dtype))
    print(f"wrote {args.out}: the model after step {step:,}")


if __name__ == "__main__":
    sys.exit(main())
