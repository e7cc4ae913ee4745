"""Which rank writes what of a base or a delta, into which file. Nothing here touches storage or a tensor's values.

Tensors are cut into boxes so small that every file is one request to an object store. A (32000, 1024) tensor in fp32 is
131 MB and three chunks: `model.embed_tokens.weight[0:10666,0:1024]`, `[10666:21333,...` and `[21333:32000,...`. All
ranks of a data-parallel run hold the same tensors, so each makes the whole plan by itself: nothing is asked of the
others, and only its own share is copied to host memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace
from itertools import pairwise
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

MAX_FILE_BYTES = 48 * 2**20
"""Bound of one file, header included. Files of more than one request leave parts behind when a process is killed,
which no listing shows and S3 bills. s3fs cuts from 100 MiB on, Azure's client above 64 MiB, gcsfs from 50 MiB on."""
_FRAME_BYTES = 32
"""Of a header beside its entries: its length, braces, padding."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, most often all of it, that is stored as one tensor of a file."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    key: str
    """In the file: the tensor's name, and the box in brackets unless it is the whole tensor."""
    stored_bytes: int
    """At most; with its entry in the header."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This box of the tensor, sharing its memory."""
        for dim, (offset, length) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor


@dataclass(frozen=True)
class PartPlan:
    """Who writes what of one part. The same on every rank."""

    files: tuple[dict[str, list[Chunk]], ...]
    """By rank: its files and what is in them."""
    index: bytes

    def slices(self, rank: int, tensors: Tensors) -> dict[str, torch.Tensor]:
        """What this rank writes, by key, sharing memory with `tensors`."""
        return {chunk.key: chunk.of(tensors[chunk.name]) for chunks in self.files[rank].values() for chunk in chunks}


def plan_part(tensors: Tensors, num_ranks: int, zeros: Tensors | None = None) -> PartPlan:
    """Cut tensors (on any device, meta too) into chunks, and spread those over ranks and files. `zeros`: those that
    hold nothing else, which are named only. The same plan is made once: saves of a cycle differ in values alone."""
    return _plan_part(_shapes(tensors), num_ranks, _shapes(zeros or {}), MAX_FILE_BYTES)


Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def _shapes(tensors: Tensors) -> Shapes:
    return tuple((name, tuple(tensors[name].shape), tensors[name].dtype) for name in sorted(tensors))


@lru_cache(maxsize=4)
def _plan_part(shapes: Shapes, num_ranks: int, zeros: Shapes, max_file_bytes: int) -> PartPlan:
    chunks = [chunk for name, shape, dtype in shapes for chunk in _cut(name, shape, dtype.itemsize, max_file_bytes)]
    assert len({chunk.key for chunk in chunks}) == len(chunks), "no tensor is named like a box of another"
    shares: list[list[Chunk]] = [[] for _ in range(num_ranks)]
    least = [(0, rank) for rank in range(num_ranks)]  # a heap
    # To the rank with the least so far, largest first: no two ranks then differ by more than one chunk.
    for chunk in sorted(chunks, key=lambda chunk: -chunk.stored_bytes):
        num_bytes, rank = least[0]
        shares[rank].append(chunk)
        heapreplace(least, (num_bytes + chunk.stored_bytes, rank))
    files = tuple(_fill_files(share, rank, max_file_bytes) for rank, share in enumerate(shares))
    file_of = {chunk.key: file for of_rank in files for file, inside in of_rank.items() for chunk in inside}
    index: dict[str, dict[str, Any]] = {name: _kind(shape, dtype) | {"chunks": []} for name, shape, dtype in shapes}
    for chunk in chunks:
        place = {"offsets": chunk.offsets, "sizes": chunk.sizes, "file": file_of[chunk.key], "key": chunk.key}
        index[chunk.name]["chunks"].append(place)
    named = {name: _kind(shape, dtype) for name, shape, dtype in zeros}
    return PartPlan(files, json.dumps({"tensors": index, "zeros": named}).encode())


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch."), "shape": shape}


def _cut(name: str, shape: tuple[int, ...], itemsize: int, max_file_bytes: int) -> list[Chunk]:
    def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
        box = ",".join(f"{offset}:{offset + size}" for offset, size in zip(offsets, sizes, strict=True))
        key = name if sizes == shape and not any(offsets) else f"{name}[{box}]"
        entry = {key: {"dtype": "F8_E4M3FNUZ", "shape": sizes, "data_offsets": [max_file_bytes] * 2}}
        return Chunk(name, offsets, sizes, key, math.prod(sizes) * itemsize + len(json.dumps(entry)))

    whole = chunk((0,) * len(shape), shape)
    room = max_file_bytes - _FRAME_BYTES
    if whole.stored_bytes <= room:
        return [whole]
    # Less the longest entry: none has larger numbers.
    room -= chunk(shape, shape).stored_bytes - math.prod(shape) * itemsize
    assert room >= itemsize, "a file has room for one element and its name"
    return [chunk(*box) for box in boxes(shape, room // itemsize)]


def boxes(shape: tuple[int, ...], max_elements: int) -> Iterator[Box]:
    """Boxes that tile `shape`: runs of whole rows, as many in each but for one. Where a row is too large, each row is
    cut by itself, so a (1, N) tensor along its second dimension."""
    row_elements = math.prod(shape[1:])
    if math.prod(shape) <= max_elements:
        yield (0,) * len(shape), shape
    elif row_elements <= max_elements:
        num_runs = math.ceil(shape[0] / (max_elements // row_elements))
        for start, end in pairwise(shape[0] * i // num_runs for i in range(num_runs + 1)):
            yield (start, *(0,) * (len(shape) - 1)), (end - start, *shape[1:])
    else:
        for row in range(shape[0]):
            for offsets, sizes in boxes(shape[1:], max_elements):
                yield (row, *offsets), (1, *sizes)


def _fill_files(chunks: list[Chunk], rank: int, max_file_bytes: int) -> dict[str, list[Chunk]]:
    files: dict[str, list[Chunk]] = {}
    room = 0
    for chunk in chunks:
        if not files or chunk.stored_bytes > room:
            files[f"r{rank:05d}-p{len(files):03d}.safetensors"] = []
            room = max_file_bytes - _FRAME_BYTES
        files[next(reversed(files))].append(chunk)
        room -= chunk.stored_bytes
    return files
