"""The benchmark of speed: what it counts, and that it runs. Its numbers are no test."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.throughput import PublishedLinear, _layer, linear_flops, trainee
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import LowRankLinear
from tests.commands import command


@pytest.mark.parametrize(
    ("shape", "factored", "effective"),
    [((512, 512), 0.86, 1.00), ((768, 2048), 1.12, 1.22), ((2048, 2048), 1.26, 1.33), ((2048, 5461), 1.33, 1.38)],
)
def test_bounds_are_the_known_ones(shape: tuple[int, int], factored: float, effective: float) -> None:
    """At rank 128 and updates so long that adding up the effective weight costs nothing."""
    flops = linear_flops(*shape, 128, 10**9)
    assert flops["full"] / flops["factored"] == pytest.approx(factored, abs=0.005)
    assert flops["full"] / flops["effective"] == pytest.approx(effective, abs=0.005)


def test_published_layer_is_ours_but_for_its_dropout() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, bias=False)
    linear.weight.data = linear.weight.data.bfloat16().float()
    published = PublishedLinear(linear, 4, 32.0, dropout=0.1).eval()
    ours = LowRankLinear(linear, LoraConfig(lora_rank=4, alpha=32.0))
    with torch.no_grad():
        published.lora_B.weight.normal_()
        ours.lora_A.copy_(published.lora_A.weight)
        ours.lora_B.copy_(published.lora_B.weight)
        x = torch.randn(5, 16).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(published(x), ours(x), rtol=0.05, atol=0.05)
            assert not torch.equal(published.train()(x), published.eval()(x)), "as shipped, it has dropout"


@pytest.mark.parametrize("name", ["relora", "published", "peft"])
def test_every_opponent_comes_with_and_without_dropout(name: str) -> None:
    """Of one layer, and of each in a model: the share of the input that a row leaves out."""
    if name == "peft":
        pytest.importorskip("peft")
    args = argparse.Namespace(device="cpu", size="9m", layers=1, seq_len=16, rank=4, rows=1, micro_batch_rows=1,
                              compile=False)  # fmt: skip
    for which, expected in ((name, 0.0), (f"{name}-dropout", 0.1)):
        layers = [_layer(which, nn.Linear(16, 24, bias=False), 4)]
        layers += [
            m for m in trainee(args, which).net.modules() if "Linear" in type(m).__name__ and hasattr(m, "lora_A")
        ]
        assert len(layers) == 8
        assert [_dropout(layer) for layer in layers] == [expected] * 8


def _dropout(layer: Any) -> float:
    if isinstance(layer, LowRankLinear):
        return layer.dropout
    found = layer.dropout if isinstance(layer, PublishedLinear) else layer.lora_dropout["default"]
    return float(found.p) if isinstance(found, nn.Dropout) else 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        "layer --shapes 32x48 --tokens 16 --rank 4 --rounds 2 --variants relora published-dropout",
        "model --size 9m --layers 1 --rows 2 --micro-batch-rows 1 --seq-len 16 --rank 4 --rounds 2 --product-side 64 "
        "--variants relora",
    ],
)
def test_page_has_a_row_for_every_variant(arguments: str) -> None:
    done = command("benchmarks.throughput", *arguments.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "in which all take turns. `python -m benchmarks.throughput " + arguments.split()[0] in done.stdout
    names = re.findall(r"^\| (?:32x48 \| )?(full|relora|published-dropout) \|", done.stdout, re.MULTILINE)
    assert names == ["full", *arguments.partition("--variants ")[2].split()]
    assert re.search(r"\| full \|.*\| 1\.00 \| 1\.00 \| 1\.00 \|", done.stdout)


def test_traffic_is_counted_in_what_is_trained() -> None:
    """9m's embedding and head of 32,100 x 128 each, norms, and one layer's weights or its adapters of rank 4."""
    arguments = (
        "traffic --size 9m --layers 1 --rows 2 --micro-batch-rows 1 --seq-len 16 --rank 4 --rounds 2 --device cpu"
    )
    done = command("benchmarks.throughput", *arguments.split())
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(re.findall(r"^\| (full|relora) \| ([\d.]+) MB \|", done.stdout, re.MULTILINE))
    shapes = [(128, 128)] * 4 + [(352, 128)] * 3
    rest = 2 * 32100 * 128 + 3 * 128
    full, relora = rest + sum(i * o for i, o in shapes), rest + sum(4 * (i + o) for i, o in shapes)
    assert float(rows["full"]) == pytest.approx(4 * full / 1e6, abs=0.06)
    assert float(rows["relora"]) == pytest.approx(4 * relora / 1e6, abs=0.06)
