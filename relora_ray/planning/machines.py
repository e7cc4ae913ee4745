"""Kinds of machines with GPUs, as their vendors describe them. No prices: they change by the hour and the region.

GPU memory in 10^9 bytes, as sold. TFLOP/s are peaks without sparsity, where vendors often print twice as much: of
bfloat16 on tensor cores (0: it has none), and of fp32 beside them, as PyTorch multiplies fp32 by default. Network in
Gbit/s that a machine has at any time; `burst_gbps` is what "up to" means, for minutes. AWS's network was compared on
2026-11-28 with the table that Karpenter generates from AWS's pages (zz_generated.bandwidth.go); what else there is was
taken from the vendors' pages as they stood in 2025.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from relora_ray.config.section import nearest
from relora_ray.errors import ConfigError
from relora_ray.modeling.flops import PEAK_BF16


@dataclass(frozen=True)
class Gpu:
    name: str
    """As it stands in the name that CUDA gives it."""
    memory_gb: float
    fp32_tflops: float
    source: str
    bf16_tflops: float = 0.0

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9

    def tflops(self, precision: str) -> float:
        """Peak in a run's `train.precision`. Of bf16 on a GPU without it, that of fp32, in which it is computed."""
        return (self.bf16_tflops if precision == "bf16" else 0.0) or self.fp32_tflops


@dataclass(frozen=True)
class Machine:
    name: str
    gpu: Gpu
    num_gpus: int
    network_gbps: float
    burst_gbps: float = 0.0
    source: str = ""


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_EC2 = "https://docs.aws.amazon.com/ec2/latest/instancetypes/ac.html"
_GCE = "https://cloud.google.com/compute/docs/gpus/gpu-network-bandwidth"

_A10G = "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"


def _gpu(name: str, memory_gb: float, fp32_tflops: float, source: str) -> Gpu:
    return Gpu(name, memory_gb, fp32_tflops, source, PEAK_BF16.get(name.partition("-")[0], 0.0) / 1e12)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 8.1, f"{_NVIDIA}/tesla-t4/"),
        _gpu("A10G", 24, 35, _A10G),
        _gpu("L4", 24, 30.3, f"{_NVIDIA}/l4/"),
        _gpu("L40S", 48, 91.6, f"{_NVIDIA}/l40s/"),
        _gpu("A100", 40, 19.5, f"{_NVIDIA}/a100/"),
        _gpu("A100-80GB", 80, 19.5, f"{_NVIDIA}/a100/"),
        _gpu("H100", 80, 67, f"{_NVIDIA}/h100/"),
        _gpu("H200", 141, 67, f"{_NVIDIA}/h200/"),
    )
}

_AWS = """
g4dn.xlarge T4 1 5 25      g4dn.2xlarge T4 1 10 25    g4dn.4xlarge T4 1 20 25    g4dn.8xlarge T4 1 50
g4dn.12xlarge T4 4 50      g4dn.16xlarge T4 1 50      g4dn.metal T4 8 100
g5.xlarge A10G 1 2.5 10    g5.2xlarge A10G 1 5 10     g5.4xlarge A10G 1 10 25    g5.8xlarge A10G 1 25
g5.12xlarge A10G 4 40      g5.16xlarge A10G 1 25      g5.24xlarge A10G 4 50      g5.48xlarge A10G 8 100
g6.xlarge L4 1 2.5 10      g6.2xlarge L4 1 5 10       g6.4xlarge L4 1 10 25      g6.8xlarge L4 1 25
g6.12xlarge L4 4 40        g6.16xlarge L4 1 25        g6.24xlarge L4 4 50        g6.48xlarge L4 8 100
g6e.xlarge L40S 1 2.5 20   g6e.2xlarge L40S 1 5 20    g6e.4xlarge L40S 1 20      g6e.8xlarge L40S 1 25
g6e.12xlarge L40S 4 100    g6e.16xlarge L40S 1 35     g6e.24xlarge L40S 4 200    g6e.48xlarge L40S 8 400
p4d.24xlarge A100 8 400    p4de.24xlarge A100-80GB 8 400
p5.4xlarge H100 1 100      p5.48xlarge H100 8 3200    p5e.48xlarge H200 8 3200   p5en.48xlarge H200 8 3200
"""
_GOOGLE = """
g2-standard-4 L4 1 10      g2-standard-8 L4 1 16      g2-standard-12 L4 1 16     g2-standard-16 L4 1 32
g2-standard-24 L4 2 32     g2-standard-32 L4 1 32     g2-standard-48 L4 4 50     g2-standard-96 L4 8 100
a2-highgpu-1g A100 1 24    a2-highgpu-2g A100 2 32    a2-highgpu-4g A100 4 50    a2-highgpu-8g A100 8 100
a2-megagpu-16g A100 16 100
a2-ultragpu-1g A100-80GB 1 24   a2-ultragpu-2g A100-80GB 2 32   a2-ultragpu-4g A100-80GB 4 50
a2-ultragpu-8g A100-80GB 8 100
a3-highgpu-1g H100 1 25    a3-highgpu-2g H100 2 50    a3-highgpu-4g H100 4 100   a3-highgpu-8g H100 8 1000
a3-megagpu-8g H100 8 1800  a3-ultragpu-8g H200 8 3600
"""
"""Name, GPU, how many, Gbit/s always, and for a while if that is more."""


def _read(table: str, source: str) -> dict[str, Machine]:
    found = {}
    for entry in re.split(r"\s{2,}|\n", table.strip()):
        name, gpu, count, always, *burst = entry.split()
        found[name] = Machine(name, GPUS[gpu], int(count), float(always), float(burst[0]) if burst else 0.0, source)
    return found


MACHINES = _read(_AWS, _EC2) | _read(_GOOGLE, _GCE)


def find_machines(text: str) -> tuple[Machine, int]:
    """`g6.xlarge:8` -> that kind, 8. One without a number. ConfigError for a kind that is not in the table."""
    name, _, count = text.partition(":")
    if count and (not re.fullmatch(r"\d{1,6}", count) or not int(count)):
        raise ConfigError(f"--machines {text!r}: {count!r} is no number of machines. Write it as {name}:8.")
    if name not in MACHINES:
        raise ConfigError(
            f"--machines {name!r} is not in the table.{nearest(name, list(MACHINES))} Describe another kind by "
            f"--gpu-memory-gb and --gpu-tflops. Known: {', '.join(MACHINES)}."
        )
    return MACHINES[name], int(count or 1)


def gpu_called(name: str, memory_gb: float | None = None) -> Gpu | None:
    """The GPU that CUDA or Ray calls so, such as "NVIDIA A100-SXM4-80GB", "NVIDIA_L4" or "A100-80G"."""
    words = re.split(r"[^A-Za-z0-9]+", name.upper())
    found = next((gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in words), None)
    if found is not None and found.name == "A100" and ({"80GB", "80G"} & set(words) or (memory_gb or 0) > 60):
        return GPUS["A100-80GB"]
    return found
