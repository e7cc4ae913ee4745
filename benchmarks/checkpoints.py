"""What a checkpoint costs: bytes, seconds that training waits, throughput, resume, memory. Two ranks, a real S3 server.

python benchmarks/checkpoints.py [--server ceph|moto|rclone] [--sizes 60m 130m] > benchmarks/results/checkpoints.md

The state is that of ReLoRA inside a cycle, at the reference's sizes, with all moments filled. Saves behind training and
blocking ones alternate in one process group with plain uploads, in which each rank puts one object of as many random
bytes as its share has, by s3fs's own multi-part upload; a first save is not counted. Medians.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from relora_ray.checkpoint import Checkpointer, Position, Saved, read_history
from relora_ray.checkpoint.ownership import Term
from relora_ray.config import RunConfig
from relora_ray.config.file import load_config
from relora_ray.config.planned import value_at
from relora_ray.conformance.processes import run_ranks
from relora_ray.methods.base import build_method
from relora_ray.modeling.model import build_model, num_parameters
from relora_ray.modeling.parallel import World
from relora_ray.storage import Storage
from relora_ray.study.ablations import machine, version
from tests import ceph
from tests.s3 import BUCKET, Server

CONFIGS = Path(__file__).parent.parent / "configs/relora"
ROUNDS = 5
MB = 1e6


def build(cfg: RunConfig, device: str = "cpu") -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """Method, model and optimizer as they are inside a cycle."""
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed, device=device)
    method.adapt(model, cfg.warm_start_steps)
    return method, model, method.build_optimizer(model)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Change every trained weight and moment, the same on every rank."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class PeakMemory:
    """The largest growth of this process's resident memory between `with` and its end, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._start, self.growth, self._ended = _resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.growth = max(self.growth, _resident() - self._start)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(cfg: RunConfig, url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Every rank."""
    world, storage = World.current(), Storage(url, options)
    method, model, optimizer = build(cfg)
    frozen = method.frozen_names(model)
    modes = {mode: cfg.checkpoint.model_copy(update={"save_async": mode, "keep_last": 1}) for mode in (True, False)}
    first, second = Term(1, "0" * 8).attempt(1), Term(1, "0" * 8).attempt(2)
    what: dict[str, Any] = {"tokens_per_step": 1, "identity": "none", "data_fingerprint": "none"}
    checkpointer = Checkpointer(storage, modes[True], world, attempt=first, **what)
    step = boundary = 0
    found: dict[str, list[Saved]] = {}
    peaks: dict[str, list[int]] = {}

    def save(kind: str, save_async: bool) -> Saved:
        nonlocal step, boundary
        step += 1
        boundary = step if kind == "base" else boundary
        update(model, optimizer, step)
        checkpointer._cfg = modes[save_async]
        dist.barrier()
        results = checkpointer.save(Position(step, boundary), model, optimizer, frozen)
        while not results:
            time.sleep(0.01)
            results = checkpointer.poll()
        assert results[-1].manifest is not None, results
        return results[-1]

    last = save("base", True).manifest
    assert last is not None
    share_bytes = sum(p.size_bytes for p in last.parts) // world.size
    plain = []
    for _ in range(ROUNDS):
        for kind in ("base", "delta"):
            for save_async in (True, False):
                with PeakMemory() as memory:
                    name = f"{kind} {'behind' if save_async else 'blocking'}"
                    found.setdefault(name, []).append(save(kind, save_async))
                peaks.setdefault(name, []).append(memory.growth)
        data = os.urandom(share_bytes)
        dist.barrier()
        began = time.perf_counter()
        storage.put(f"plain/{world.rank}", data)
        dist.barrier()
        plain.append(time.perf_counter() - began)
    storage.delete_below(f"plain/{world.rank}")
    checkpointer.close()
    method, fresh, fresh_optimizer = build(cfg)
    update(fresh, fresh_optimizer, 99)
    reader = Checkpointer(storage, modes[True], world, attempt=second, **what)
    history = read_history(storage)
    dist.barrier()
    began = time.perf_counter()
    reader.restore(history.read(history.line[-1]), history.line, fresh, fresh_optimizer, frozen)
    resume_s = time.perf_counter() - began
    return {
        "base_bytes": last.base.size_bytes if last.base else 0,
        "delta_bytes": last.delta.size_bytes,
        "blocked": {k: median(s.blocked_s for s in v) for k, v in found.items()},
        "saved": {k: median(s.save_s for s in v) for k, v in found.items()},
        "peak": {k: max(v) for k, v in peaks.items()},
        "plain_s": median(plain),
        "resume_s": resume_s,
    }


def formula(cfg: RunConfig) -> tuple[int, int, int]:
    """Bytes of base, delta and a full-rank checkpoint from the shapes alone: fp32 weights, two fp32 moments."""
    shape = cfg.model.llama
    assert shape is not None
    h, i, layers, vocab = shape.hidden_size, shape.intermediate_size, shape.num_layers, cfg.model.llama_vocab_size
    method: Any = cfg.method
    rank = value_at(method.lora_rank, 0)
    linears = layers * (4 * h * h + 3 * h * i)
    adapters = layers * rank * (4 * 2 * h + 3 * (h + i))
    others = 2 * vocab * h + (2 * layers + 1) * h
    return 4 * linears, 12 * (adapters + others), 12 * (linears + others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=("ceph", "moto", "rclone"), default="ceph")
    parser.add_argument("--sizes", nargs="+", default=["60m", "130m"])
    args = parser.parse_args()
    if args.server == "ceph" and (why := ceph.install()):
        raise SystemExit(f"Ceph cannot be installed: {why}")
    ceph.Ceph.size = 24 << 30
    print(f"# What a checkpoint costs\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n")
    print(f"Machine: {machine()}; 2 ranks of one thread, {args.server} on the same machine. Version: {version()}.")
    print(f"Command: `python benchmarks/checkpoints.py --server {args.server} --sizes {' '.join(args.sizes)}`\n")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.server, Path(folder))
        server.start()
        try:
            for size in args.sizes:
                cfg = load_config(CONFIGS / f"{size}.yaml")
                ranks = run_ranks(2, measure, cfg, f"s3://{BUCKET}/{size}", server.options)
                print("\n".join(section(size, cfg, ranks)), flush=True)
        finally:
            server.kill()
    print("\n".join(sizes_on_meta()))


def section(size: str, cfg: RunConfig, ranks: list[dict[str, Any]]) -> list[str]:
    first = ranks[0]
    base, delta, full = formula(cfg)
    lines = [f"## {size}\n", "| | MB | computed | |", "|---|---|---|---|"]
    for name, found, computed in (("base", first["base_bytes"], base), ("delta", first["delta_bytes"], delta)):
        lines.append(f"| {name} | {found / MB:.1f} | {computed / MB:.1f} | {found / computed - 1:+.2%} |")
    lines += [f"| full training's | | {full / MB:.1f} | {full / first['delta_bytes']:.2f} deltas |", ""]
    lines += [
        "| a save of | mode | training waits, s | until the commit, s | MB/s | grows by, MB |",
        "|---|---|---|---|---|---|",
    ]
    for kind, names in (("base", "base and delta"), ("delta", "delta")):
        size_bytes = first["delta_bytes"] + (first["base_bytes"] if kind == "base" else 0)
        for mode in ("behind", "blocking"):
            key = f"{kind} {mode}"
            blocked, saved = (max(r[what][key] for r in ranks) for what in ("blocked", "saved"))
            peak = max(r["peak"][key] for r in ranks)
            lines.append(
                f"| {names} | {mode} | {blocked:.3f} | {saved:.2f} | {size_bytes / saved / MB:.0f} | {peak / MB:.0f} |"
            )
    both = first["base_bytes"] + first["delta_bytes"]
    plain_s = max(r["plain_s"] for r in ranks)
    saved_s, waits = (max(r["saved"]["base blocking"] for r in ranks), max(r["blocked"]["base behind"] for r in ranks))
    lines += [
        "",
        f"Training waits {waits / saved_s:.1%} of a blocking save. A plain multi-part upload of as many bytes: "
        f"{plain_s:.2f} s, {both / plain_s / MB:.0f} MB/s; a blocking save of the two has {plain_s / saved_s:.2f} of "
        f"that. Restoring on both ranks, every byte checked: {max(r['resume_s'] for r in ranks):.2f} s.\n",
    ]
    return lines


def sizes_on_meta() -> list[str]:
    """Deltas against full training's checkpoints at sizes that do not fit here: from tensors without data."""
    lines = [
        "## Larger models, from the shapes of their tensors\n",
        "| | base, GB | delta, GB | full training's, GB | deltas |",
    ]
    lines.append("|---|---|---|---|---|")
    for path in ("60m", "130m", "250m", "350m", "1b", "3b", "7b"):
        cfg = load_config(CONFIGS / f"{path}.yaml")
        method, model, _ = build(cfg, "meta")
        frozen = method.frozen_names(model)
        base = sum(t.nbytes for name, t in model.state_dict().items() if name in frozen)
        delta = 12 * num_parameters(model, trainable_only=True)
        full = 12 * num_parameters(build_model(cfg.model, seq_len=8, seed=0, device="meta"))
        lines.append(f"| {path} | {base / 1e9:.3f} | {delta / 1e9:.3f} | {full / 1e9:.3f} | {full / delta:.2f} |")
    return lines


if __name__ == "__main__":
    main()
