"""The world of one attempt: ranks, plain DDP and the few reductions the loop needs.

Everything works unchanged without a process group, as a world of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relora_ray import errors
from relora_ray.errors import RankFailedError, RanksDisagreeError, ReloraError
from relora_ray.replicas import disagreement
from relora_ray.verdict import in_words, verdict

logger = logging.getLogger(__name__)

T = TypeVar("T")


def keep_freed_memory() -> None:
    """Have glibc keep what tensors on the CPU give back, for the next ones, until the process ends.

    By default it returns the pages of every large tensor to the system, which has to clear them when they are asked for
    again: 5 % to 17 % of an update, and the peak is no higher (benchmarks/results/allocator.md). What is free between
    peaks stays with the process. Settings of the environment win, and other C libraries are left alone."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: what is free at the end of the heap stays


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """The default process group's world, or a world of one without a group."""
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Such as "NVIDIA H100 80GB HBM3"; "cpu" without a GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def seed(self, seed: int) -> None:
        """Seed the generators that this process draws from: as `torch.manual_seed`, which takes 2 ms a call where it
        makes a note for a CUDA that is never initialized."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def peak_memory_bytes(self) -> int:
        """The most that this process has held: of the GPU's memory if it has one, or else of the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def wrap(
        self, model: nn.Module, warm_up: Callable[[nn.Module], torch.Tensor], check: Callable[[], None] = lambda: None
    ) -> nn.Module:
        """`model` under DDP (every rank, at the same step); itself in a world of one.

        DDP lays out its buckets anew after its first backward pass, and a ring all-reduce of three or more ranks
        adds in an order that depends on the place in a bucket. So that a resumed run adds in the same order as
        one that went on, that first pass is spent here, on `warm_up`'s loss, whose gradients are dropped. Before that
        `check` is called: DDP's next pass would fail for a parameter without one, and not name it.
        """
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            forward_sync_buffers=False,  # buffers here are constants
            gradient_as_bucket_view=True,
            init_sync=False,  # replicas are equal by construction, and checked: assert_same_
        )
        warm_up(wrapped).backward()
        check()
        model.zero_grad(set_to_none=False)  # as after any other step
        return wrapped

    def sync_gradients(self, model: nn.Module, *, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one micro-step: gradients are reduced only where `now` is set (the last one)."""
        if now or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def sum(self, *values: float) -> list[float]:
        """Sums of float64 values over all ranks, equal on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add up each tensor over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. It travels as JSON: nothing is unpickled from the network."""
        if self.size == 1:
            return value
        return json.loads(broadcast_bytes(json.dumps(value).encode(), self.is_first, self.device))

    def on_first(self, action: Callable[[], T]) -> T:
        """The result of `action` on rank 0, of JSON's types, on every rank; its error is raised on every rank too."""
        result, error = None, None
        if self.is_first:
            result, error = _attempted(action)
        if self.size == 1 and error is not None:
            raise error
        result, told = self.broadcast((result, _told(error)))
        if told:
            raise _error_of(told, 0)
        return cast(T, result)

    def on_all(self, action: Callable[[], T]) -> T:
        """What `action` returns here, on every rank; if it fails on any, the first such rank's error on every rank."""
        result, error = _attempted(action)
        if self.size == 1 and error is not None:
            raise error
        if self.size > 1:
            told = [json.loads(t) for t in gather_bytes(json.dumps(_told(error)).encode(), self.size, self.device)]
            if failed := [rank for rank, t in enumerate(told) if t]:
                raise _error_of(told[failed[0]], failed[0], named=True)
        return cast(T, result)

    def shared(self, works: Mapping[str, Callable[[], Sequence[torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
        """The results of works by their names, on every rank, each computed on one: the rank by turns in the order of
        names. An error on one rank is raised on all."""
        names = sorted(works)
        mine = {name: works[name] for number, name in enumerate(names) if number % self.size == self.rank}
        done: dict[str, Sequence[torch.Tensor]] = {}

        def compute() -> None:
            done.update({name: work() for name, work in mine.items()})

        self.on_all(compute)
        done = {name: [t.contiguous().to(self.device) for t in tensors] for name, tensors in done.items()}
        if self.size == 1:
            return {name: list(done[name]) for name in names}
        shapes = {name: [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in ts] for name, ts in done.items()}
        told = [json.loads(t) for t in gather_bytes(json.dumps(shapes).encode(), self.size, self.device)]
        found = {}
        for number, name in enumerate(names):
            owner = number % self.size
            tensors = list(done.get(name, ())) or [
                torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                for dtype, shape in told[owner][name]
            ]
            for tensor in tensors:
                if tensor.numel():  # as bytes: not every backend knows every type
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=owner)
            found[name] = tensors
        return found

    def assert_same(self, digest: int, what: str) -> None:
        """Raise RanksDisagreeError on every rank, naming the odd ones, unless all digests are equal."""
        if self.size == 1:
            return
        mine = torch.tensor([digest], dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine)
        if odd := disagreement([int(d.item()) for d in gathered]):
            raise RanksDisagreeError(f"{what}: {odd}")


def broadcast_bytes(data: bytes, is_source: bool, device: torch.device, group: Any = None) -> bytes:
    """The bytes of the group's rank 0, which is the source, on every rank."""
    length = torch.tensor([len(data) if is_source else 0], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0, group=group)
    body = _as_tensor(data, device) if is_source else torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(body, src=0, group=group)
    return bytes(body.cpu().numpy())


def gather_bytes(data: bytes, size: int, device: torch.device, group: Any = None) -> list[bytes]:
    """Every rank's bytes, on every rank."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64, device=device), group=group)
    longest = max(int(length) for length in lengths)
    bodies = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(size)]
    dist.all_gather(bodies, _as_tensor(data.ljust(longest, b"\0"), device), group=group)
    return [bytes(body[: int(length)].cpu().numpy()) for body, length in zip(bodies, lengths, strict=True)]


def _as_tensor(data: bytes, device: torch.device) -> torch.Tensor:
    if not data:  # torch refuses an empty buffer
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _attempted(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except ReloraError as error:
        return None, error
    except Exception as error:  # the other ranks wait for what becomes of it
        logger.exception("a rank failed")
        return None, error


def _told(error: Exception | None) -> dict[str, Any] | None:
    """An error as JSON: one of ours keeps its class and what is known of it, of others the verdict is."""
    if error is None:
        return None
    if getattr(errors, type(error).__name__, None) is not type(error):
        return {"kind": "RankFailedError", "text": in_words(error), "marks": {"verdict": verdict(error)}}
    known = ("restart_helps", "missing", "exists", "verdict")
    marks = {name: getattr(error, name) for name in known if hasattr(error, name)}
    return {"kind": type(error).__name__, "text": str(error), "marks": marks}


def _error_of(told: dict[str, Any], rank: int, *, named: bool = False) -> ReloraError:
    """What a rank has told, to be raised on all. `named`: the message says which it was, as it does of errors that are
    not ours."""
    kind: type[ReloraError] = getattr(errors, told["kind"])
    named = named or kind is RankFailedError
    error = kind(f"rank {rank}: {told['text']}" if named else told["text"])
    for name, value in told["marks"].items():
        setattr(error, name, value)
    error.rank = rank
    return error


@torch.no_grad()
def digest(tensors: Sequence[torch.Tensor]) -> int:
    """A 63-bit digest of the tensors' bits, in order, that any single flipped bit changes.

    Per tensor the sum of its bit patterns as integers, so it costs one pass on the device; sums are combined with odd
    multipliers, so tensors that changed places are seen too.
    """
    return digest_of_sums(bit_sums(tensors))


@torch.no_grad()
def bit_sums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Of each tensor, the sum of its bit patterns as integers: not 0 means that not all of it is zero."""
    sums = [as_integers(t.detach().contiguous()).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).tolist() if sums else []


def digest_of_sums(sums: Sequence[int]) -> int:
    value = 0
    for total in sums:
        value = (value * 6364136223846793005 + total + 1442695040888963407) % 2**63
    return value


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits, 8 bytes at a time where they divide: a sum of int64 runs at the speed of memory."""
    size = next(size for size in (8, 4, 2, 1) if tensor.nbytes % size == 0)
    if tensor.storage_offset() * tensor.element_size() % size:
        tensor = tensor.clone()
    return tensor.flatten().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
