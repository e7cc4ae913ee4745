"""How fast an update is: ReLoRA here, full-rank training, PEFT's LoRA and the published layer, in the same tuned loop.

    python -m benchmarks.throughput layer [--shapes 2048x5461 2048x2048] [--tokens 2048] [--micro-batches 4]
    python -m benchmarks.throughput model [--size 60m] [--layers N] [--seq-len 512] [--rows 8] [--micro-batch-rows 4]
    python -m benchmarks.throughput traffic [--size 60m] [--layers N] ...
    python -m benchmarks.throughput allocator [--size 60m] [--variants full relora] ...

Each prints a page; `pip install -c constraints.txt '.[bench]'` first. Traffic is that of two gloo ranks here, the rest
has one process. Every opponent is a process of its own that waits until it is asked: they take turns within a round, an
update each, and ratios are medians over rounds of the times in one round. All have bf16 products, fp32 masters of what
they train, fused AdamW, SDPA attention, this project's loop and its settings of the allocator; `published` and PEFT
hold their frozen weights in bf16. Adapters come with and without dropout, in a row each: `-dropout` is 0.1, with which
the published code is shipped, and which is 0 here and in PEFT unless it is set. Beside each ratio is its bound: what
the count of multiplications allows if all products ran at one speed. FLOP utilisation is against a large product
measured in the same run. `allocator` is with these settings and without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.data.loader import MicroBatch
from relora_ray.loop import _accumulate_gradients, _loss_sum
from relora_ray.methods.base import Boundary, Method, Update, build_method
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.methods.lowrank.layer import LowRankLinear
from relora_ray.methods.lowrank.relora import Relora
from relora_ray.methods.targets import block_linears
from relora_ray.modeling.flops import Order, linear_flops, llama_flops
from relora_ray.modeling.model import build_model, num_parameters
from relora_ray.modeling.optim import build_adamw, trainable
from relora_ray.modeling.parallel import World, keep_freed_memory
from relora_ray.modeling.token_loss import TokenLoss
from relora_ray.study.ablations import machine, version

ALLOCATOR = ("given back", "kept")
"""What becomes of freed memory: glibc's default, and `keep_freed_memory`."""
DROPOUT = 0.1
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Side of the square product that says how fast the machine multiplies."""


class PublishedLinear(nn.Module):
    """The arithmetic of the published layer (Guitaricet/relora at 176f376, `ReLoRaLinear.forward`): the base product,
    and beside it B A of the input after dropout, scaled."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.scale = nn.Dropout(dropout), alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["layer", "model", "traffic", "allocator"])
    parser.add_argument("--shapes", nargs="+", default=["2048x5461", "2048x2048"], help="in x out, for layer")
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, for layer")
    parser.add_argument("--micro-batches", type=int, default=4, help="an update has, for layer")
    parser.add_argument("--size", default="60m", help="as model.size")
    parser.add_argument("--layers", type=int, help="only so many of the model's")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="an update has, for model")
    parser.add_argument("--micro-batch-rows", type=int, default=4)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", help="of those that there are; full is always one")
    parser.add_argument("--product-side", type=int, help="of the square product that says how fast the machine is")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print("\n".join(page(args)), flush=True)


def page(args: argparse.Namespace) -> Iterator[str]:
    yield f"# Throughput: {args.what}\n"
    where = f"{machine()}, {args.threads} threads"
    if args.device == "cuda":
        where = f"{torch.cuda.get_device_name()}; {where}"
    yield f"{where}; {version()}; bf16, rank {args.rank}, medians of {args.rounds} rounds"
    yield f"in which all take turns{', torch.compile' if args.compile else ''}. `{' '.join(_command(args))}`\n"
    yield from {"layer": layers, "model": model, "traffic": traffic, "allocator": allocator}[args.what](args)


def _command(args: argparse.Namespace) -> Iterator[str]:
    yield f"python -m benchmarks.throughput {args.what}"
    names = ("shapes", "tokens", "micro_batches") if args.what == "layer" else (
        "size", "layers", "seq_len", "rows", "micro_batch_rows"
    )  # fmt: skip
    for name in (*names, "rank", "rounds", "variants", "compile"):
        value = getattr(args, name)
        if value not in (None, False):
            said = "" if value is True else " " + (" ".join(value) if isinstance(value, list) else str(value))
            yield f"--{name.replace('_', '-')}{said}"


# ---- layers


ORDER: dict[str, Order] = {
    "full": "full",
    "relora": "effective",
    "relora-rebuilt": "effective",
    "relora-int8": "effective",
    "relora-dropout": "factored",
    "published": "factored",
    "published-dropout": "factored",
    "peft": "factored",
    "peft-dropout": "factored",
}


def dropout_of(name: str) -> float:
    return DROPOUT if name.endswith("-dropout") else 0.0


def layers(args: argparse.Namespace) -> Iterator[str]:
    variants = _variants(args, tuple(name for name in ORDER if name != "relora-int8"))
    yield f"One layer, forward and backward of {args.micro_batches} micro-batches of {args.tokens} tokens, and what an"
    yield "update adds: the effective weight's sum. Full-rank's weight is in bf16 already. x full-rank: larger is"
    yield "faster; bound: by the count of multiplications.\n"
    yield "| shape | variant | ms | x full-rank | bound | of its bound |"
    yield "|---|---|---|---|---|---|"
    for shape in args.shapes:
        i, o = map(int, shape.split("x"))
        times = take_turns(args, variants, lambda name, i=i, o=o: ("layer", name, i, o))
        flops = linear_flops(i, o, args.rank, args.tokens * args.micro_batches)
        for name in variants:
            ratio, bound = _ratio(times["full"], times[name]), flops["full"] / flops[ORDER[name]]
            ms = statistics.median(times[name]) * 1e3
            yield f"| {shape} | {name} | {ms:.1f} | {ratio:.2f} | {bound:.2f} | {ratio / bound:.2f} |"


def layer_update(args: argparse.Namespace, name: str, i: int, o: int) -> Update:
    torch.manual_seed(0)
    device = torch.device(args.device)
    linear = nn.Linear(i, o, bias=False, device=device)
    layer = _layer(name, linear, args.rank).to(device)
    rows = [torch.randn(args.tokens, i, device=device).bfloat16().requires_grad_() for _ in range(args.micro_batches)]
    grads = [torch.randn(args.tokens, o, device=device).bfloat16() for _ in range(args.micro_batches)]

    def update() -> None:
        for x, dy in zip(rows, grads, strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                y = layer(x)
            y.backward(dy)
            x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        if isinstance(layer, LowRankLinear) and not layer.dropout:
            layer.refresh_()

    return update


def _layer(name: str, linear: nn.Linear, rank: int) -> nn.Module:
    if name == "full":
        return linear.bfloat16()
    if name.startswith("published"):
        return PublishedLinear(linear, rank, 32.0, dropout_of(name))
    if name.startswith("peft"):
        from peft.tuners.lora import LoraConfig as PeftConfig
        from peft.tuners.lora.layer import Linear

        linear.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        settings = PeftConfig(r=rank, lora_alpha=32, lora_dropout=dropout_of(name))
        return Linear(linear, "default", settings, r=rank, lora_alpha=32)
    layer = LowRankLinear(linear, LoraConfig(lora_rank=rank, alpha=32.0, dropout=dropout_of(name)))
    if name == "relora":
        layer.keep_effective_(torch.bfloat16)
    layer.redraw_(0)
    return layer


# ---- models


def model(args: argparse.Namespace) -> Iterator[str]:
    variants = _variants(args, tuple(ORDER))
    cfg = config(args, "full")
    found = take_turns(args, variants, lambda name: ("model", name), measured := {})
    yield f"LLaMA {args.size}{f', {args.layers} layers of it' if args.layers else ''}: updates of {args.rows} rows of"
    yield f"{args.seq_len} tokens in micro-batches of {args.micro_batch_rows}. A large product runs at"
    speed = product_flops(args)
    memory = "allocated on the GPU" if args.device == "cuda" else "of the whole process"
    yield f"{speed / 1e12:.3g} TFLOP/s. Peak memory is {memory}.\n"
    yield "state: weights, what is kept of them, gradients and moments. merge: merge and reset of all layers.\n"
    columns = ("variant", "ms an update", "tokens/s", "x full-rank", "bound", "of its bound", "FLOP utilisation",
               "peak memory", "state", "trained", "merge")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    flops = {name: model_flops(cfg, args.rank, ORDER[name]) for name in variants}
    for name in variants:
        s = statistics.median(found[name])
        ratio, bound = _ratio(found["full"], found[name]), flops["full"] / flops[name]
        rate = cfg.tokens_per_step / s
        merge_s = measured[name]["merge_s"]
        yield (
            f"| {name} | {s * 1e3:.0f} | {rate:,.0f} | {ratio:.2f} | {bound:.2f} | {ratio / bound:.2f} "
            f"| {flops[name] * rate / speed:.0%} | {measured[name]['peak'] / 1e9:.2f} GB "
            f"| {measured[name]['state'] / 1e9:.2f} GB | {measured[name]['trained'] / 1e6:.1f} M "
            f"| {'' if merge_s is None else f'{merge_s:.3f} s'} |"
        )


def allocator(args: argparse.Namespace) -> Iterator[str]:
    """With the allocator's defaults, and as a process that trains on the CPU sets it."""
    names = _variants(args, tuple(ORDER))
    both = [f"{name}, {setting}" for name in names for setting in ALLOCATOR]
    found = take_turns(args, both, lambda name: ("allocator", *reversed(name.split(", "))), measured := {})
    cfg = config(args, "full")
    yield f"LLaMA {args.size}{f', {args.layers} layers of it' if args.layers else ''}: updates of {args.rows} rows of"
    yield f"{args.seq_len} tokens in micro-batches of {args.micro_batch_rows}. Peak memory is of the whole process.\n"
    yield "| method | freed memory is | ms an update | tokens/s | x | peak memory |\n|---|---|---|---|---|---|"
    for name in names:
        for setting in ALLOCATOR:
            times = found[f"{name}, {setting}"]
            s, ratio = statistics.median(times), _ratio(found[f"{name}, {ALLOCATOR[0]}"], times)
            peak = measured[f"{name}, {setting}"]["peak"]
            yield (
                f"| {name} | {setting} | {s * 1e3:.0f} | {cfg.tokens_per_step / s:,.0f} | {ratio:.2f} "
                f"| {peak / 1e9:.2f} GB |"
            )


def config(args: argparse.Namespace, name: str) -> RunConfig:
    method: dict[str, Any] = {"kind": "full"}
    if name.startswith("relora"):
        method = {"kind": "relora", "lora_rank": args.rank, "alpha": 32, "merge_every_steps": 1000,
                  "dropout": dropout_of(name)}  # fmt: skip
    if name == "relora-int8":
        method["frozen_weights"] = "bf16_int8"
    kept = "kept" if name == "relora" else "rebuilt"
    layers = {"num_layers": args.layers} if args.layers else {}
    raw = {
        "name": name, "steps": 1000, "global_batch_rows": args.rows, "model": {"size": args.size, **layers},
        "data": {"path": "none", "seq_len": args.seq_len}, "method": method, "optimizer": {"learning_rate": 1e-3},
        "train": {"micro_batch_rows": args.micro_batch_rows, "precision": "bf16", "effective_weights": kept},
        "schedule": {"kind": "constant"}, "checkpoint": {"save_every_steps": 1000},
    }  # fmt: skip
    return parse_config(json.dumps(raw))


@dataclass(frozen=True)
class Trainee:
    """A model that is trained, as in loop.py."""

    update: Callable[[], None]
    net: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method | None
    """None for what is not this project's."""

    def state_bytes(self) -> int:
        """After an update: weights and what is kept of them, their gradients and moments."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [*self.net.parameters(), *self.net.buffers(), *moments]
        return sum(t.nbytes for t in tensors) + sum(p.nbytes for p in trainable(self.net))

    def merge_s(self, device: str) -> float | None:
        """Seconds of a merge and reset; None without adapters of this project."""
        if not isinstance(self.method, Relora):
            return None
        merge = functools.partial(self.method.on_boundary, Boundary(self.net, self.optimizer, 1000, seed=0))
        return min(_timed(merge, device) for _ in range(3))


def trainee(args: argparse.Namespace, name: str, world: World | None = None) -> Trainee:
    cfg, world = config(args, name), world or World()
    device = torch.device(args.device)
    net = build_model(cfg.model, seq_len=args.seq_len, seed=0)
    method = build_method(cfg)
    if name.startswith("published"):
        for path, linear in list(block_linears(net)):
            parent, _, leaf = path.rpartition(".")
            setattr(net.get_submodule(parent), leaf, PublishedLinear(linear, args.rank, 32.0, dropout_of(name)))
    elif name.startswith("peft"):
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        leaves = sorted({path.rpartition(".")[2] for path, _ in block_linears(net)})
        for _, linear in block_linears(net):
            linear.weight.data = linear.weight.data.bfloat16()
        rest = [p for p in net.parameters() if p.dtype == torch.float32]
        adapters = PeftConfig(r=args.rank, lora_alpha=32, lora_dropout=dropout_of(name), target_modules=leaves)
        net = get_peft_model(net, adapters).get_base_model()
        for parameter in rest:  # embeddings, norms and head are trained, as by the others
            parameter.requires_grad_(True)
    else:
        method.adapt(net, 0)
    net.to(device)
    theirs = name.startswith(("published", "peft"))
    optimizer = build_adamw(net, cfg.optimizer) if theirs else method.build_optimizer(net)
    run: nn.Module = TokenLoss(net, cfg.train, compiled=args.compile)
    generator = torch.Generator().manual_seed(1)
    weights = torch.ones(args.micro_batch_rows, device=device)
    batches = []
    for _ in range(args.rows // args.micro_batch_rows // world.size):
        shape = (args.micro_batch_rows, args.seq_len + 1)
        ids = torch.randint(0, cfg.model.llama_vocab_size, shape, generator=generator).to(device)
        batches.append(MicroBatch(inputs=ids[:, :-1], targets=ids[:, 1:], weights=weights))

    run = world.wrap(run, warm_up=lambda wrapped: _loss_sum(wrapped, batches[0]))
    if isinstance(run, DistributedDataParallel):
        run.register_comm_hook(None, count_and_reduce)

    def update() -> None:
        made = Update(
            net, optimizer, 0, seed=0, world=world, grad_clip=1.0,
            backward=lambda extra: _accumulate_gradients(cfg, world, run, batches, 0, False, extra)[0],
        )  # fmt: skip
        method.update(made)
        assert made.applied, "the loss is not a number"

    return Trainee(update, net, optimizer, method if name.startswith("relora") else None)


reduced_bytes = 0
"""Of gradients that this process has given to an all-reduce."""


def count_and_reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own reduction, with its bytes counted."""
    global reduced_bytes
    reduced_bytes += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)


count_and_reduce.__annotations__.clear()  # DDP compares them with types, and in this module they are strings


# ---- traffic


def traffic(args: argparse.Namespace) -> Iterator[str]:
    """Two ranks, a process each, over gloo on this machine; they share its cores."""
    if args.device != "cpu":
        raise SystemExit("traffic is measured over gloo: add --device cpu")
    variants = _variants(args, ("full", "relora"))
    yield f"LLaMA {args.size}{f', {args.layers} layers of it' if args.layers else ''}, two gloo ranks on one machine:"
    yield f"updates of {args.rows} rows of {args.seq_len} tokens in micro-batches of {args.micro_batch_rows}. reduced:"
    yield "gradients that a rank gives to the all-reduce per update, counted in DDP's hook; all in fp32, and of what is"
    yield "trained only.\n"
    yield "| variant | reduced | full-rank / this | ms an update | x full-rank |"
    yield "|---|---|---|---|---|"
    ranks = [f"{name} {rank}" for name in variants for rank in range(2)]
    ports = dict(zip(variants, _free_ports(len(variants)), strict=True))
    job = {ranked: ("traffic", *ranked.split(), ports[ranked.split()[0]]) for ranked in ranks}
    found = take_turns(args, ranks, job.__getitem__, measured := {}, at_once=2)
    for name in variants:
        first = f"{name} 0"
        share = measured["full 0"]["reduced"] / measured[first]["reduced"]
        ms, ratio = statistics.median(found[first]) * 1e3, _ratio(found["full 0"], found[first])
        yield f"| {name} | {measured[first]['reduced'] / 1e6:.1f} MB | {share:.2f} | {ms:.0f} | {ratio:.2f} |"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def model_flops(cfg: RunConfig, rank: int, order: Order) -> float:
    llama = cfg.model.llama
    assert llama is not None

    def of_linear(name: str, i: int, o: int) -> float:
        return linear_flops(i, o, rank, cfg.tokens_per_step)[order]

    return llama_flops(llama, cfg.model.llama_vocab_size, cfg.data.seq_len, of_linear)


def product_flops(args: argparse.Namespace) -> float:
    """Multiplications and additions per second of a large bf16 product: the best of several."""
    n = args.product_side or PRODUCT[args.device]
    torch.set_num_threads(args.threads)
    a, b = (torch.randn(n, n, device=args.device).bfloat16() for _ in range(2))

    def product() -> None:
        a @ b

    return 2.0 * n**3 / min(_timed(product, args.device) for _ in range(10))


# ---- turns


def take_turns(
    args: argparse.Namespace,
    variants: Sequence[str],
    job: Callable[[str], tuple[Any, ...]],
    measured: dict[str, dict[str, Any]] | None = None,
    at_once: int = 1,
) -> dict[str, list[float]]:
    """Seconds of an update by variant and round. Every variant has a process of its own, which is asked in turn;
    `at_once` that follow each other work together."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    groups = [variants[i : i + at_once] for i in range(0, len(variants), at_once)]
    for group in groups:
        for name in group:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, args, job(name)), daemon=True))
            processes[-1].start()
            theirs.close()
        for name in group:
            _receive(pipes[name], name)  # built, and warmed up: one after the other
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(args.rounds):
        for group in groups if turn % 2 else reversed(groups):
            for name in group:
                pipes[name].send("go")
            for name in group:
                times[name].append(_receive(pipes[name], name))
    for name, pipe in pipes.items():
        pipe.send("end")
        said = _receive(pipe, name)
        if measured is not None:
            measured[name] = said
    for process in processes:
        process.join()
    return times


def _receive(pipe: Connection, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(
            f"the process of {name} has ended: see above. If nothing is said there, the machine's memory was too small "
            f"for all at once: name fewer --variants."
        ) from None


def serve(pipe: Connection, args: argparse.Namespace, job: tuple[Any, ...]) -> None:
    """A variant's process."""
    torch.set_num_threads(args.threads)
    kind, *rest = job
    if kind == "allocator":
        setting, *rest = rest
    if args.device == "cpu" and (kind != "allocator" or setting == "kept"):
        keep_freed_memory()
    trained: Trainee | None = None
    if kind == "layer":
        update = layer_update(args, *rest)
    else:
        name, *group = rest
        world = World()
        if kind == "traffic":
            rank, port = group
            torch.set_num_threads(max(1, args.threads // 2))
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
            world = World.current()
        trained = trainee(args, name, world)
        update = trained.update
    for _ in range(2):
        update()
    before, rounds = reduced_bytes, 0
    pipe.send("ready")
    while pipe.recv() == "go":
        pipe.send(_timed(update, args.device))
        rounds += 1
    said: dict[str, Any] = {"peak": World(device=torch.device(args.device)).peak_memory_bytes()}
    if trained is not None:
        said["reduced"] = (reduced_bytes - before) / max(1, rounds)
        said["trained"] = num_parameters(trained.net, trainable_only=True)
        said["state"], said["merge_s"] = trained.state_bytes(), trained.merge_s(args.device)
    pipe.send(said)


def _timed(work: Update, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _variants(args: argparse.Namespace, known: Sequence[str]) -> list[str]:
    asked = args.variants or known
    for name in asked:
        if name not in known:
            raise SystemExit(f"--variants has {name!r}, which is none of {', '.join(known)}")
    return list(dict.fromkeys(["full", *asked]))


def _ratio(full: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(full, own, strict=True))


if __name__ == "__main__":
    main()
