"""Checks of single layers and of optimizer state. Each returns the value found and whether it is within its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
import transformers
from torch import nn

from relora_ray.conformance.implementation import Implementation, eval_logits, relative_change

Outcome = tuple[str, bool]

RANK, ALPHA, SEED = 4, 10.0, 1  # a scale of 2.5: an implementation that forgets it is seen
MOMENTS = ("exp_avg", "exp_avg_sq")


def small_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).train()


class Stack(nn.Module):
    """Linear layers in a list, as in a model's blocks."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in shapes)


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> torch.Tensor:
    return eval_logits(model, ids())


@torch.no_grad()
def _shake_(implementation: Implementation, model: nn.Module) -> None:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(3)
    for layer in implementation.layers(model).values():
        for tensor in layer.trained:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)


def wrap_exact(implementation: Implementation) -> Outcome:
    model = small_llama()
    before = logits(model)
    model = implementation.wrap(model, rank=RANK, alpha=ALPHA, seed=SEED)
    num_layers = len(implementation.layers(model))
    change = relative_change(logits(model), before)
    return f"{change:.1e}, {num_layers} layers", change <= 1e-6 and num_layers == 14


def first_gradient(implementation: Implementation) -> Outcome:
    model = implementation.wrap(small_llama(), rank=RANK, alpha=ALPHA, seed=SEED)
    model(input_ids=ids(), labels=ids()).loss.backward()
    layers = implementation.layers(model).values()
    moving = sum(any(t.grad is not None and bool(t.grad.any()) for t in layer.trained) for layer in layers)
    return f"{moving} of {len(layers)}", moving == len(layers)


def merge_function(implementation: Implementation) -> Outcome:
    model = implementation.wrap(small_llama(), rank=RANK, alpha=ALPHA, seed=SEED)
    plain = logits(model)
    _shake_(implementation, model)
    before = logits(model)
    assert relative_change(before, plain) > 0.1, "the adapters must matter, or this shows nothing"
    implementation.merge(model, seed=SEED, boundary=7)
    change = relative_change(logits(model), before)
    fresh = all(
        all(bool(t.any()) for t in layer.drawn) and not any(bool(t.any()) for t in layer.zeroed)
        for layer in implementation.layers(model).values()
    )
    return f"{change:.1e}" + ("" if fresh else ", adapters not fresh"), change <= 1e-5 and fresh


@torch.no_grad()
def merge_bf16(implementation: Implementation) -> Outcome:
    """Weights of std 0.02; adapters are drawn so that their update has the named rms; sums in fp64."""
    errors = []
    for rms in (1e-3, 1e-4, 1e-5):
        model: nn.Module = Stack((256, 192))
        nn.init.normal_(model.get_parameter("layers.0.weight"), std=0.02)
        model = implementation.wrap(model, rank=16, alpha=40.0, seed=SEED, precision="bf16")
        start = implementation.dense(model)["layers.0.weight"].double()
        exact = torch.zeros_like(start)
        generator = torch.Generator().manual_seed(0)
        for merge in range(20):
            (layer,) = implementation.layers(model).values()
            for tensor in layer.drawn:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.125 - 0.0625)
            for tensor in layer.zeroed:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            factor = rms / layer.update(torch.float32).square().mean().sqrt()
            for tensor in layer.zeroed:
                tensor.mul_(factor)
            exact += layer.update(torch.float64)
            implementation.merge(model, seed=SEED, boundary=merge + 1)
        applied = implementation.dense(model)["layers.0.weight"].double() - start
        errors.append(float((applied - exact).norm() / exact.norm()))
    return ", ".join(f"{error:.1e}" for error in errors), max(errors) <= 0.01


def _trained(implementation: Implementation, beta2: float = 0.999) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose every trained tensor has moments and a step of 30."""
    model = implementation.wrap(small_llama(), rank=RANK, alpha=ALPHA, seed=SEED)
    _shake_(implementation, model)
    optimizer = implementation.optimizer(model, learning_rate=1e-3, beta2=beta2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        for parameter in _parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _adapters(implementation: Implementation, model: nn.Module) -> list[torch.Tensor]:
    return [tensor for layer in implementation.layers(model).values() for tensor in layer.trained]


def reset_state(implementation: Implementation) -> Outcome:
    """Per kind: the count of survivors, one mask for m and v, survivors and everything else bit for bit, `step`.

    `step` starts again at 0 with every kind that prunes: kept, it takes fresh moments for old ones."""
    wrong: dict[str, int] = {}
    for kind in ("zero", "magnitude", "random", "none"):
        model, optimizer = _trained(implementation)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in _parameters(optimizer)}
        implementation.reset(model, optimizer, kind=kind, ratio=0.9, seed=SEED, boundary=7)
        adapters = {id(t) for t in _adapters(implementation, model)}
        count = sum(int((p.detach() != weights[n]).sum()) for n, p in model.named_parameters())
        kept_entries, entries = 0, 0
        for parameter, old in before.items():
            new = optimizer.state[parameter]
            if id(parameter) not in adapters:
                count += sum(int((new[k] != old[k]).sum()) for k in old)
                continue
            kept = new["exp_avg"] != 0
            count += int((kept != (new["exp_avg_sq"] != 0)).sum())
            count += sum(int((new[k] != torch.where(kept, old[k], 0.0)).sum()) for k in MOMENTS)
            count += int(float(new["step"]) != (float(old["step"]) if kind == "none" else 0))
            if kind == "magnitude":
                smallest_kept = old["exp_avg"].abs()[kept].min() if kept.any() else math.inf
                count += int(((old["exp_avg"].abs() > smallest_kept) & ~kept).sum())
            kept_entries, entries = kept_entries + int(kept.sum()), entries + kept.numel()
        share, allowed = kept_entries / entries, {"zero": 0.0, "none": 1.0}.get(kind, 0.1)
        tolerance = 0.0 if kind in ("zero", "none") else 0.02  # random: 3 standard deviations of 7,000 entries
        count += round(max(0.0, abs(share - allowed) - tolerance) * entries)
        if count:
            wrong[kind] = count
    return ", ".join(f"{kind}: {count}" for kind, count in wrong.items()) or "0", not wrong


def reset_large(implementation: Implementation) -> Outcome:
    """`torch.quantile` refuses tensors above 2^24 elements: A, or what is drawn in its place, has 2^24 + 1,024 here."""
    model = implementation.wrap(Stack((2**14 + 1, 1024)), rank=1024, alpha=1024.0, seed=SEED)
    optimizer = implementation.optimizer(model, learning_rate=1e-3, beta2=0.999)
    (layer,) = implementation.layers(model).values()
    for parameter in _parameters(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    large = max(layer.drawn, key=torch.Tensor.numel)
    large.grad = torch.linspace(0.5, 1.0, large.numel()).view(large.shape)
    for tensor in layer.zeroed:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    implementation.reset(model, optimizer, kind="magnitude", ratio=0.9, seed=SEED, boundary=7)
    kept = (optimizer.state[large]["exp_avg"] != 0).flatten()
    share = float(kept.double().mean())
    largest = not kept[: int(0.89 * len(kept))].any()
    return f"{share:.4f}", abs(share - 0.1) < 1e-3 and largest


def reset_jump(implementation: Implementation) -> Outcome:
    """Gradients fall 1,000-fold before the reset: one that trusts old scales for some entries and not for others, or
    takes fresh moments for old ones, moves A by many learning rates."""
    worst, where = 0.0, ""
    for kind, beta2 in product(("zero", "magnitude", "random"), (0.95, 0.999)):
        lr = 1e-2
        model = implementation.wrap(Stack((64, 48), (48, 64)), rank=8, alpha=8.0, seed=SEED)
        optimizer = implementation.optimizer(model, learning_rate=lr, beta2=beta2)
        generator = torch.Generator().manual_seed(1)
        _steps(optimizer, generator, 10.0, 190)
        _steps(optimizer, generator, 0.01, 10)
        implementation.reset(model, optimizer, kind=kind, ratio=0.9, seed=SEED, boundary=200)
        moving = [tensor for layer in implementation.layers(model).values() for tensor in layer.drawn]
        start = [tensor.detach().clone() for tensor in moving]
        for step in range(1, 11):
            _steps(optimizer, generator, 0.01, 1)
            for tensor, before in zip(moving, start, strict=True):
                moved = float((tensor.detach() - before).abs().max()) / (lr * step)
                if moved > worst:
                    worst, where = moved, f"{kind}, beta2 {beta2}"
    return f"{worst:.2f} ({where})", worst <= 2.0


def _steps(optimizer: torch.optim.Optimizer, generator: torch.Generator, scale: float, count: int) -> None:
    for _ in range(count):
        for parameter in _parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        optimizer.step()


def draws_keyed(implementation: Implementation) -> Outcome:
    """Two processes have different random states at a merge: every rank draws dropout of its own, say. And a draw
    that is the same at every boundary, or for every layer, is no draw."""

    def drawn(boundary: int, state: int) -> list[list[torch.Tensor]]:
        """What is drawn before and after a merge, and the survivors of a random reset."""
        model, optimizer = _trained(implementation)
        tensors = [tensor for layer in implementation.layers(model).values() for tensor in layer.drawn]
        before = [tensor.detach().clone() for tensor in tensors]
        torch.manual_seed(state)
        implementation.merge(model, seed=SEED, boundary=boundary)
        after = [tensor.detach().clone() for tensor in tensors]
        implementation.reset(model, optimizer, kind="random", ratio=0.5, seed=SEED, boundary=boundary)
        return [before, after, [optimizer.state[tensor]["exp_avg"] != 0 for tensor in tensors]]

    first, other_state, other_boundary = drawn(7, 11), drawn(7, 99), drawn(8, 11)
    wrong = {
        "A and the random state": _unequal(first[1], other_state[1]),
        "masks and the random state": _unequal(first[2], other_state[2]),
        "A as before the merge": 14 - _unequal(first[0], first[1]),
        "A as at another boundary": 14 - _unequal(first[1], other_boundary[1]),
        "masks as at another boundary": 14 - _unequal(first[2], other_boundary[2]),
        "A as in the first layer": sum(torch.equal(first[1][0], other) for other in first[1][1:]),
    }
    return "; ".join(f"{what}: {n}" for what, n in wrong.items() if n) or "0", not any(wrong.values())


def _unequal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> int:
    return sum(not torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def dense_function(implementation: Implementation) -> Outcome:
    """In the middle of a cycle: right after a merge an export that drops the adapters is right by luck."""
    model = implementation.wrap(small_llama(), rank=RANK, alpha=ALPHA, seed=SEED)
    _shake_(implementation, model)
    plain = small_llama()
    keys = plain.load_state_dict(implementation.dense(model), strict=False)
    wrong = len(keys.missing_keys) + len(keys.unexpected_keys)
    change = relative_change(logits(plain), logits(model))
    return f"{wrong}; {change:.1e}", wrong == 0 and change <= 1e-5


def published_jagged_cosine(step: int, total: int, warmup: int, every: int, rewarm: int, floor: float) -> float:
    """Lialin et al. 2023 as published in `training_utils.py`, for adjust_step = 0."""

    def cosine(at: int) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1, total - warmup)))

    if step < warmup:
        return step / max(1, warmup)
    in_cycle = step % every
    if in_cycle < rewarm and step >= every:
        return in_cycle / max(1, rewarm) * cosine(step - in_cycle + rewarm)
    return cosine(step)


def jagged_settings() -> Iterator[tuple[int, int, int, int, float]]:
    for every, cycles, warmup, rewarm, floor in product((20, 50), (2, 5), (0, 7, 20), (1, 9), (0.01, 0.1, 0.5)):
        yield every * cycles, warmup, every, rewarm, floor
    for every, cycles, warmup, rewarm, floor in product((97,), (3, 4), (0, 50), (5, 96), (0.1,)):
        yield every * cycles, warmup, every, rewarm, floor


def jagged_cosine(implementation: Implementation) -> Outcome:
    worst = 0.0
    for steps, warmup, every, rewarm, floor in jagged_settings():
        for step in range(steps):
            ours = implementation.jagged_cosine(
                step, steps=steps, warmup=warmup, every=every, restart_warmup=rewarm, floor=floor
            )
            published = published_jagged_cosine(step, steps, warmup, every, rewarm, floor)
            worst = max(worst, abs(ours - published))
    return f"{worst:.1e}", worst <= 1e-12
