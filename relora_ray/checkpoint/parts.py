"""The objects of a base or a delta: safetensors files and a JSON index. Nothing is pickled. One folder holds

    index.json                   {"tensors": {name: {dtype, shape, chunks: [{offsets, sizes, file, key}]}},
                                  "zeros": {name: {dtype, shape}}}
    r00000-p000.safetensors      rank 0's first file, and so on

layout.py decides who writes what: a tensor is stored once, in one or more chunks, spread over the ranks by bytes.
torch.distributed.checkpoint's planner puts it together again at any world size.
torch's own storage layer keeps a pickled `.metadata` and loses file-system settings on the way (`checkpoint_id`), so
storage is ours. Size and SHA-256 of every object are recorded, and checked before a byte is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from relora_ray.checkpoint.layout import PartPlan, Tensors
from relora_ray.checkpoint.manifest import Part, StoredObject
from relora_ray.errors import DamagedError, StorageError
from relora_ray.storage import Storage

T = TypeVar("T")
U = TypeVar("U")

INDEX = "index.json"
NUM_IN_FLIGHT = 2
"""Files that a rank writes or reads at a time: what it holds beside the state itself."""


def write_share(storage: Storage, folder: str, plan: PartPlan, rank: int, copies: Tensors) -> list[StoredObject]:
    """Store a rank's files of one part, rank 0 the index too. `copies`: of the plan's slices, by key, on the CPU; each
    with memory of its own, and not changed meanwhile."""

    def put(path: str) -> StoredObject:
        if path == INDEX:
            data = plan.index
        else:
            data = safetensors.torch.save({chunk.key: copies[chunk.key] for chunk in plan.files[rank][path]})
        storage.put(f"{folder}/{path}", data)
        stored = StoredObject(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        if (found := storage.size(f"{folder}/{path}")) != stored.size_bytes:
            raise StorageError(f"{storage.url}/{folder}/{path} has {found} bytes; {stored.size_bytes} were written.")
        return stored

    return in_flight(put, [*plan.files[rank], *([INDEX] if rank == 0 else [])])


def in_flight(action: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Results of `action` on all items, a few at a time; the first error, with no more begun after it."""
    with ThreadPoolExecutor(NUM_IN_FLIGHT, thread_name_prefix="relora-ray-part") as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Placement:
    """Where a chunk lies: the storage_data of torch's metadata."""

    stored: StoredObject
    key: str


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

        def read(stored: StoredObject) -> None:
            tensors = safetensors.torch.load(read_checked(self._storage, self._part, stored))
            for item in by_file[stored]:
                chunk = tensors[self._placements[item.storage_index].key]
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    chunk = chunk.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(chunk)
                planner.commit_tensor(item, target)

        in_flight(read, by_file)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def read_index(storage: Storage, part: Part) -> dict[str, Any]:
    """What a part stores: {tensor name: {dtype, shape, chunks}}. DamagedError if its index is not as recorded."""
    tensors: dict[str, Any] = read_whole_index(storage, part)["tensors"]
    return tensors


def read_whole_index(storage: Storage, part: Part) -> dict[str, Any]:
    """The same under "tensors", and under "zeros" those that hold zeros only, which are not stored: versions before
    format 5 did not name them."""
    stored = next((o for o in part.objects if o.path == INDEX), None)
    if stored is None:
        raise DamagedError(f"the manifest of {storage.url}/{part.folder} names no {INDEX}.")
    index: dict[str, Any] = json.loads(read_checked(storage, part, stored))
    return index


def read_checked(storage: Storage, part: Part, recorded: StoredObject) -> bytes:
    """The bytes of one object, if they are the ones that its manifest recorded; else DamagedError.

    Bytes that are wrong are read once more: they may have been spoilt on the way. One that is missing is asked for
    again for some time: it was there when the manifest was committed.
    """
    storage = storage.sibling(part.run) if part.run else storage
    path = f"{part.folder}/{recorded.path}"
    for _ in range(2):
        try:
            data = storage.get_expected(path)
        except StorageError as error:
            if error.missing:
                raise DamagedError(f"{storage.url}/{path} is gone, though a manifest names it.") from error
            raise
        if len(data) == recorded.size_bytes and hashlib.sha256(data).hexdigest() == recorded.sha256:
            return data
    if len(data) != recorded.size_bytes:
        raise DamagedError(
            f"{storage.url}/{path} has {len(data):,} bytes; its manifest recorded {recorded.size_bytes:,}."
        )
    raise DamagedError(f"{storage.url}/{path} is damaged: its SHA-256 is not the one its manifest recorded.")


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
