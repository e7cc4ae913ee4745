"""python benchmarks/state_bytes.py [--sizes 60m 130m 350m 1b] > benchmarks/results/state-bytes.md

Bytes of the training state of each method at the shipped sizes, counted from its tensors on the meta device: no weight
is made. As `report` and sweeps show them of a run: weights and what is kept of them, their gradients, the optimizer's.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from relora_ray.config.file import load_config
from relora_ray.config.method import kinds
from relora_ray.methods.base import build_method
from relora_ray.modeling.model import build_model, num_parameters
from relora_ray.modeling.optim import state_bytes

CONFIGS = Path(__file__).parent.parent / "configs"


def rows(size: str) -> Iterator[str]:
    """Of each method that has a config of this size, full-rank first."""
    full = 0
    for kind in kinds():
        path = CONFIGS / kind / f"{size}.yaml"
        if not path.is_file():
            continue
        cfg = load_config(path)
        model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=0, device="meta")
        method = build_method(cfg)
        method.adapt(model, cfg.steps)
        held = state_bytes(model, method.build_optimizer(model))
        full = full or sum(held.values())
        trained = num_parameters(model, trainable_only=True)
        cells = [
            f"{count / 1e6:,.0f}" for count in (held["weights"] + held["derived"], held["gradients"], held["optimizer"])
        ]
        yield (
            f"| {size} | {kind} | {trained / 1e6:,.1f} | {' | '.join(cells)} | {sum(held.values()) / 1e6:,.0f} | "
            f"{sum(held.values()) / full:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    parser.add_argument("--sizes", nargs="+", default=["60m", "130m", "350m", "1b"])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print("# Bytes of the training state\n")
    print("`python benchmarks/state_bytes.py`: MB on each worker, fp32, by the settings in `configs/`.\n")
    print("| size | method | trained, M | weights and derived | gradients | optimizer | all | of full-rank |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for row in rows(size):
            print(row)


if __name__ == "__main__":
    main()
