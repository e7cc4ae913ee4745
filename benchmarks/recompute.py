"""What activation recomputation saves and costs: peak memory and seconds of a pass, with and without it.

python benchmarks/recompute.py [--size 60m] [--rounds 3] > benchmarks/results/recompute.md

Each measurement is a process of its own, in turns. Memory is the most that the process had resident while it made
passes, less what it had after one of eight tokens: activations, logits, gradients' buffers. The plan's count stands
beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from relora_ray.config import RunConfig
from relora_ray.config.file import load_config
from relora_ray.methods.base import build_method
from relora_ray.modeling.model import build_model
from relora_ray.modeling.optim import trainable
from relora_ray.modeling.parallel import keep_freed_memory
from relora_ray.modeling.token_loss import TokenLoss
from relora_ray.planning.count import phases, quiet
from relora_ray.study.ablations import machine, version

ROOT = Path(__file__).parent.parent
PASSES = 4


def config(args: argparse.Namespace, method: str, *, recompute: bool) -> RunConfig:
    return load_config(
        str(ROOT / f"configs/{method}/{args.size}.yaml"),
        [
            "data.path=none", f"data.seq_len={args.seq_len}", f"train.micro_batch_rows={args.rows}",
            f"train.precision={args.precision}", f"train.recompute={str(recompute).lower()}",
            "cluster.gpus_per_worker=0",
        ],
    )  # fmt: skip


def measure(cfg: RunConfig) -> dict[str, float]:
    """Of this process. After the warm start, if there is one."""
    keep_freed_memory()
    torch.set_num_threads(2)
    step = phases(cfg)[-1].begins
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=0)
    method.adapt(model, step)
    method.refresh(model)
    loss = TokenLoss(model.train(), cfg.train)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)

    def make_pass(rows: int, tokens: int) -> float:
        ids = torch.randint(0, 32000, (rows, tokens + 1))
        began = time.perf_counter()
        (loss(ids[:, :-1], ids[:, 1:], torch.ones(rows)) / ids[:, 1:].numel()).backward()
        return time.perf_counter() - began

    make_pass(1, 8)  # libraries are loaded, and have their buffers
    before = resident("VmRSS")
    seconds = [make_pass(cfg.train.micro_batch_rows, cfg.data.seq_len) for _ in range(PASSES)]
    return {"bytes": resident("VmHWM") - before, "seconds": median(seconds[1:])}


def resident(what: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return float(line.split()[1]) * 1024
    raise AssertionError(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="60m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, recompute = args.one.split(",")
        print(json.dumps(measure(config(args, method, recompute=recompute == "True"))))
        return
    found: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for _ in range(args.rounds):
        for method in ("full", "relora"):
            for recompute in (False, True):
                command = [sys.executable, *sys.argv, f"--one={method},{recompute}"]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[method, recompute].append(json.loads(said.splitlines()[-1]))
                print(method, recompute, found[method, recompute][-1], file=sys.stderr)
    print("# Activation recomputation\n")
    print(f"Command: `python benchmarks/recompute.py {' '.join(sys.argv[1:])}`. {version()}, {machine()}.\n")
    print(
        f"{args.size}, {args.rows} rows of {args.seq_len} tokens, {args.precision}: forward and backward pass of a "
        f"micro-batch, medians of {args.rounds} processes each, in turns.\n"
    )
    print("| method | recompute | seconds | memory besides the state, MB | counted by the plan, MB |")
    print("|---|---|---|---|---|")
    for (method, recompute), each in found.items():
        with quiet():
            counted = phases(config(args, method, recompute=recompute))[-1].measure(args.rows).peak_bytes
        print(
            f"| {method} | {'yes' if recompute else 'no'} | {median(e['seconds'] for e in each):.2f} "
            f"| {median(e['bytes'] for e in each) / 1e6:,.0f} | {counted / 1e6:,.0f} |"
        )


if __name__ == "__main__":
    main()
