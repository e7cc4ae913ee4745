from __future__ import annotations

import pytest

from relora_ray.errors import ConfigError
from relora_ray.planning.machines import GPUS, MACHINES, find_machines, gpu_called


def test_kinds_are_found_by_their_vendors_names() -> None:
    machine, count = find_machines("g6.xlarge:8")
    assert (machine.gpu.name, machine.num_gpus, machine.network_gbps, machine.burst_gbps, count) == (
        "L4",
        1,
        2.5,
        10,
        8,
    )
    assert find_machines("p5.48xlarge")[1] == 1
    assert find_machines("a3-highgpu-8g:2")[0].gpu is GPUS["H100"]
    assert {"g4dn", "g5", "g6", "g6e", "p4d", "p5", "a2", "a3", "g2"} <= {
        n.split(".")[0].split("-")[0] for n in MACHINES
    }
    assert len(MACHINES) == 60


def test_every_number_has_a_source() -> None:
    for machine in MACHINES.values():
        assert machine.source.startswith("https://")
        assert machine.gpu.source.startswith("https://")
        assert machine.burst_gbps == 0 or machine.burst_gbps > machine.network_gbps
        assert machine.gpu.memory_gb >= 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "g6.xlage:8",
            r"'g6.xlage' is not in the table. Did you mean 'g6.*xlarge'\? Describe another kind by --gpu-mem",
        ),
        ("g6.xlarge:none", r"'none' is no number of machines. Write it as g6.xlarge:8"),
        ("g6.xlarge:0", r"'0' is no number of machines"),
        ("", r"--machines '' is not in the table"),
    ],
)
def test_others_are_refused_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_machines(text)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S"), ("L4", "L4"), ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("A100-80G", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", None), ("", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_what_cuda_and_ray_call_them(name: str, gpu: str | None) -> None:
    found = gpu_called(name)
    assert (found.name if found else None) == gpu


def test_bf16_on_a_gpu_without_it_is_as_fast_as_fp32() -> None:
    assert GPUS["T4"].tflops("bf16") == GPUS["T4"].tflops("fp32") == 8.1
    assert GPUS["L4"].tflops("bf16") == 121
