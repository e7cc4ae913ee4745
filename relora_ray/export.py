"""Write a run's model as a plain Hugging Face folder: merged weights, config and tokenizer.

python -m relora_ray.export RUN OUT [--step STEP] [--dtype float32|bfloat16]
"""

from __future__ import annotations

import argparse

import torch

from relora_ray.errors import ConfigError, ReloraError
from relora_ray.runs import export_model, load_trained
from relora_ray.storage import Storage


def export(run: str, out: str, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> int:
    """Export the newest checkpoint, or the one at `step`; returns its step. OUT must hold no model yet."""
    target = Storage(out)
    if target.exists("config.json"):
        raise ConfigError(f"{target.url} holds a model already. Choose another folder, or delete it first.")
    trained = load_trained(run, step)
    export_model(trained.storage, trained.cfg, trained.method.dense_state_dict(trained.model), target, dtype=dtype)
    return trained.manifest.step


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", help="the run's folder or URL")
    parser.add_argument("out", help="folder or URL to write")
    parser.add_argument("--step", type=int, default=None, help="a checkpoint's step; default: the newest")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    try:
        step = export(args.run, args.out, step=args.step, dtype=getattr(torch, args.dtype))
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    print(f"wrote {args.out}: the model after step {step:,}")


if __name__ == "__main__":
    main()
