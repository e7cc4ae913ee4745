"""What 20 merges leave of an update when the frozen weights are held in fp32, bf16 + int8 residual, or bf16.

python benchmarks/merge_numerics.py [--device cuda] > benchmarks/results/merge-numerics.md

Weights of std 0.02, updates of rms 1e-3, 1e-4 and 1e-5, rank 128, the shapes of the 1B LLaMA's linear layers. Error:
norm of (applied - exact) over norm of exact, sums in fp64. Seconds: median of the merges, kinds interleaved.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch
from torch import nn

from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import LowRankLinear
from relora_ray.study.ablations import machine

KINDS = ("fp32", "bf16_int8", "bf16")
SHAPES = ((2048, 2048), (2048, 5461))
MERGES, RANK = 20, 128


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(shape: tuple[int, int], rms: float, device: str) -> dict[str, tuple[float, float, float, int]]:
    """By kind: error, share of weights that the last merge did not move, median seconds, bytes."""
    linear = nn.Linear(*shape, bias=False)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    layers = {
        kind: LowRankLinear(copy.deepcopy(linear), LoraConfig(lora_rank=RANK, alpha=32, frozen_weights=kind)).to(device)
        for kind in KINDS
    }
    start = {kind: layer.frozen().double() for kind, layer in layers.items()}
    exact = torch.zeros_like(start["fp32"])
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    still = dict.fromkeys(KINDS, 0.0)
    for merge in range(MERGES):
        for number, (kind, layer) in enumerate(layers.items()):
            layer.redraw_(merge)
            b = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(merge)).to(device)
            layer.lora_B.copy_(b)
            layer.lora_B.mul_(rms / (layer.scale * layer.lora_B @ layer.lora_A).square().mean().sqrt())
            if number == 0:
                exact += layer.scale * layer.lora_B.double() @ layer.lora_A.double()
            before = layer.frozen().clone()
            wait(device)
            began = time.perf_counter()
            layer.merge_()
            wait(device)
            seconds[kind].append(time.perf_counter() - began)
            still[kind] = float((layer.frozen() == before).double().mean())
    found = {}
    for kind, layer in layers.items():
        error = float((layer.frozen().double() - start[kind] - exact).norm() / exact.norm())
        held = [layer.weight, *([] if layer.residual is None else [layer.residual])]
        found[kind] = error, still[kind], median(seconds[kind]), sum(t.numel() * t.element_size() for t in held)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{machine()}, {torch.get_num_threads()} threads"
    print("# Twenty merges into frozen weights\n")
    print(" ".join(__doc__[__doc__.index("Weights of") :].split()))
    print(f"\nMachine: {name}. Command: `python benchmarks/merge_numerics.py --device {device}`\n")
    print("| layer | rms of an update | held as | error of the sum | do not move | ms a merge | bytes a weight |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for rms in (1e-3, 1e-4, 1e-5):
            for kind, (error, still, merge_s, size) in measure(shape, rms, device).items():
                print(
                    f"| {shape[0]} x {shape[1]} | {rms:g} | {kind} | {error:.1e} | {100 * still:.1f} % | "
                    f"{1000 * merge_s:.1f} | {size / shape[0] / shape[1]:g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
