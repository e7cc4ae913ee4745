"""torch.distributed.checkpoint on plain objects: safetensors files and a JSON index. Nothing is pickled.

torch's planner decides who writes what (a replicated tensor is written once, spread over the ranks by bytes;
any world size can read it back). Its own storage layer keeps a pickled `.metadata` and loses file-system
settings on the way (`checkpoint_id`), so storage is ours: one folder holds

    index.json                   {"tensors": {name: {dtype, shape, chunks: [{offsets, sizes, file, key}]}}}
    r00000-p000.safetensors      rank 0's first file, and so on

Writers return size and SHA-256 of every object; readers check both before a byte is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from relora_ray.checkpoint.manifest import Part, StoredObject
from relora_ray.errors import DamagedError
from relora_ray.storage import Storage

INDEX = "index.json"
MAX_FILE_BYTES = 256 * 2**20
"""Bound of one file, hence of what a writer or reader holds beside the state itself."""


@dataclass(frozen=True)
class _Placement:
    """Where a chunk lies: the storage_data of torch's metadata and write results."""

    stored: StoredObject
    key: str


class PartWriter(StorageWriter):
    """Writes one part, at once by all ranks. `part` is complete on the coordinator after `finish`."""

    def __init__(self, storage: Storage, folder: str, rank: int) -> None:
        self._storage, self._folder, self._rank = storage.child(folder), folder, rank
        self.part: Part | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "the folder is given to the constructor"

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_fill_files(plan.items)):
            tensors = {_chunk_key(item.index): _host_copy(planner.resolve_data(item)) for item in items}
            stored = self._put(f"r{self._rank:05d}-p{number:03d}.safetensors", safetensors.torch.save(tensors))
            results += [
                WriteResult(
                    index=item.index,
                    size_in_bytes=tensors[_chunk_key(item.index)].nbytes,
                    storage_data=_Placement(stored, _chunk_key(item.index)),
                )
                for item in items
            ]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        placements = {result.index: result.storage_data for of_rank in results for result in of_rank}
        index = json.dumps({"tensors": _tensor_index(metadata, placements)}, indent=1).encode()
        objects = {placement.stored for placement in placements.values()} | {self._put(INDEX, index)}
        self.part = Part(folder=self._folder, objects=tuple(sorted(objects, key=lambda o: o.path)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _put(self, path: str, data: bytes) -> StoredObject:
        self._storage.put(path, data)
        return StoredObject(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class PartReader(StorageReader):
    """Reads one part at any world size. Raises DamagedError at the first object that is not as recorded."""

    def __init__(self, storage: Storage, part: Part, index: dict[str, Any]) -> None:
        self._storage, self._part, self._index = storage, part, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "the part is given to the constructor"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        placements: dict[MetadataIndex, _Placement] = {}
        objects = {stored.path: stored for stored in self._part.objects}
        for name, entry in self._index.items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for chunk in entry["chunks"]:
                index = MetadataIndex(name, torch.Size(chunk["offsets"]))
                placements[index] = _Placement(objects[chunk["file"]], chunk["key"])
        return Metadata(state_dict_metadata=entries, storage_data=placements)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._placements = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[StoredObject, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._placements[item.storage_index].stored].append(item)
        for stored, items in by_file.items():
            tensors = safetensors.torch.load(read_checked(self._storage, self._part, stored))
            for item in items:
                chunk = tensors[self._placements[item.storage_index].key]
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    chunk = chunk.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(chunk)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def read_index(storage: Storage, part: Part) -> dict[str, Any]:
    """The index of a part: {tensor name: {dtype, shape, chunks}}. DamagedError if it is not as recorded."""
    stored = next((o for o in part.objects if o.path == INDEX), None)
    if stored is None:
        raise DamagedError(f"the manifest of {storage.url}/{part.folder} names no {INDEX}.")
    tensors: dict[str, Any] = json.loads(read_checked(storage, part, stored))["tensors"]
    return tensors


def read_checked(storage: Storage, part: Part, recorded: StoredObject) -> bytes:
    """The bytes of one object, if they are the ones that its manifest recorded; else DamagedError."""
    path = f"{part.folder}/{recorded.path}"
    size_bytes = storage.size(path)
    if size_bytes is None:
        raise DamagedError(f"{storage.url}/{path} is gone, though its manifest names it.")
    if size_bytes != recorded.size_bytes:
        raise DamagedError(
            f"{storage.url}/{path} has {size_bytes:,} bytes; its manifest recorded {recorded.size_bytes:,}."
        )
    data = storage.get(path)
    if hashlib.sha256(data).hexdigest() != recorded.sha256:
        raise DamagedError(f"{storage.url}/{path} is damaged: its SHA-256 is not the one its manifest recorded.")
    return data


def _fill_files(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Split a rank's items into files of at most MAX_FILE_BYTES (one larger tensor is a file of its own)."""
    files: list[list[WriteItem]] = []
    room = 0
    for item in items:
        assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is not a tensor: only tensors are saved"
        size = item.tensor_storage_size() or 0
        if not files or size > room:
            files.append([])
            room = MAX_FILE_BYTES
        files[-1].append(item)
        room -= size
    return files


def _chunk_key(index: MetadataIndex) -> str:
    """The chunk's name inside its file: the tensor's, plus the offset if it is not the tensor's beginning."""
    if index.offset is None or not any(index.offset):
        return index.fqn
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _tensor_index(metadata: Metadata, placements: dict[MetadataIndex, _Placement]) -> dict[str, Any]:
    tensors = {}
    for name, entry in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(entry, TensorStorageMetadata)
        chunks = []
        for chunk in entry.chunks:
            placed = placements[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": placed.stored.path,
                    "key": placed.key,
                }
            )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
    return tensors


def _host_copy(tensor: Any) -> torch.Tensor:
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().cpu().contiguous()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
