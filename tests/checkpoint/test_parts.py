"""Parts cut into chunks: who writes what, and how it is read back. Bounds of files are made small; the rest is real."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from relora_ray.checkpoint import layout
from relora_ray.checkpoint.checkpointer import HostCopies
from relora_ray.checkpoint.layout import boxes, plan_part
from relora_ray.checkpoint.manifest import Part, StoredObject
from relora_ray.checkpoint.parts import INDEX, PartReader, read_index, write_share
from relora_ray.conformance.processes import run_ranks
from relora_ray.storage import Storage
from tests.s3 import FaultyProxy
from tests.test_storage import s3_storage

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) % 119).reshape(shape).to(dtype)


def state() -> Tensors:
    """Tensors of every kind and shape; most are larger than 4,000 bytes."""
    return {
        "matrix": numbered((300, 17), torch.float32),
        "half": numbered((37, 200), torch.bfloat16),
        "bytes": numbered((9000,), torch.int8),
        "one_row": numbered((1, 3001), torch.float32),
        "wide": numbered((3, 1, 2500), torch.float32),
        "deep": numbered((2, 2, 2, 700), torch.float32),
        "transposed": numbered((60, 70), torch.float32).t(),
        "strided": numbered((90, 80), torch.float32)[::2, ::2],
        "expanded": numbered((1, 50), torch.float32).expand(80, 50),
        "small": numbered((5, 5), torch.float32),
        "scalar": torch.tensor(7.5),
        "none": torch.empty(0),
        "none_wide": torch.empty((0, 5000), dtype=torch.bfloat16),
        "none_deep": torch.empty((4000, 0), dtype=torch.int8),
    }


def write(storage: Storage, folder: str, tensors: Tensors, num_ranks: int) -> Part:
    """As the ranks of a run do it, one after another; each by a plan of its own."""
    objects: list[StoredObject] = []
    for rank in range(num_ranks):
        plan = plan_part(tensors, num_ranks)
        copies = HostCopies().take("delta", plan.slices(rank, tensors))
        objects += write_share(storage, folder, plan, rank, copies)
    return Part(folder=folder, objects=tuple(objects), digest=0)


def write_as_before(storage: Storage, folder: str, tensors: Tensors) -> Part:
    """As versions did it that stored a tensor of any size in one chunk under its own name."""
    contents, index = {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file, shape = f"r00000-p{number:03d}.safetensors", list(tensor.shape)
        contents[file] = safetensors.torch.save({name: tensor.contiguous()})
        chunk = {"offsets": [0] * len(shape), "sizes": shape, "file": file, "key": name}
        index[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "chunks": [chunk]}
    contents[INDEX] = json.dumps({"tensors": index}).encode()
    objects = []
    for path, data in contents.items():
        storage.put(f"{folder}/{path}", data)
        objects.append(StoredObject(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return Part(folder=folder, objects=tuple(objects), digest=0)


def wrong_tensors(url: str, parts: list[Part], ranks: Any = None) -> list[str]:
    """Those that the current ranks, or a group of them, do not read back bit by bit. One target has other strides."""
    storage, wrong = Storage(url), []
    for part in parts:
        targets = {name: torch.ones_like(tensor.contiguous()) for name, tensor in state().items()}
        targets["matrix"] = torch.ones((17, 300)).t()
        reader = PartReader(storage, part, read_index(storage, part))
        dcp.load(dict(targets), storage_reader=reader, process_group=ranks, no_dist=not dist.is_initialized())
        wrong += [
            f"{part.folder}: {name}" for name, tensor in state().items() if not torch.equal(targets[name], tensor)
        ]
    return wrong


def wrong_for_three_and_for_two(url: str, parts: list[Part]) -> list[str]:
    two = dist.new_group([0, 1])
    wrong = wrong_tensors(url, parts)
    return wrong + wrong_tensors(url, parts, two) if dist.get_rank() < 2 else wrong


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 4000)
    return 4000


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_are_read_at_any_world_size(tmp_path: Path, small_files: int) -> None:
    """Written by 1, 2 and 3 ranks, and by versions that did not cut; read by 1, 2 and 3."""
    storage = Storage(str(tmp_path))
    parts = [write(storage, f"delta/step-00000001-{num_ranks:04d}-aa", state(), num_ranks) for num_ranks in (1, 2, 3)]
    for part in parts:
        assert max(o.size_bytes for o in part.objects if o.path != INDEX) <= small_files
        cut = {name for name, entry in read_index(storage, part).items() if len(entry["chunks"]) > 1}
        assert cut == state().keys() - {"small", "scalar", "none", "none_wide", "none_deep"}
    parts.append(write_as_before(storage, "delta/step-00000001-0009-aa", state()))
    assert wrong_tensors(str(tmp_path), parts) == []
    assert run_ranks(3, wrong_for_three_and_for_two, str(tmp_path), parts) == [[], [], []]


def test_older_versions_read_a_tensor_that_is_not_cut_as_ever(tmp_path: Path) -> None:
    storage, tensors = Storage(str(tmp_path)), {"a": torch.ones(3), "b": torch.ones((2, 2))}
    for name in ("now", "before"):
        folder = f"base/step-00000001-0001-{'aa' if name == 'now' else 'bb'}"
        part = write(storage, folder, tensors, 1) if name == "now" else write_as_before(storage, folder, tensors)
        for key, entry in read_index(storage, part).items():
            (chunk,) = entry["chunks"]
            assert (chunk["key"], chunk["sizes"], entry["shape"]) == (key, *[list(tensors[key].shape)] * 2)


def random_tensors(seed: int) -> Tensors:
    """On no device: shapes of all kinds, sizes from nothing to many files, names of all lengths and letters."""
    draw = random.Random(seed)
    tensors = {}
    for number in range(draw.randrange(1, 30)):
        shape = [draw.choice([0, 1, 1, 2, 3, 7, 50, 999]) for _ in range(draw.randrange(4))]
        while math.prod(shape) > 60_000:
            shape.pop()
        name = f"{number}." + "".join(draw.choices('abc."\\\n\x01äß中😀', k=draw.choice([1, 20, 60])))
        tensors[name] = torch.empty(shape, dtype=draw.choice(DTYPES), device="meta")
    return tensors


@pytest.mark.parametrize("seed", range(60))
def test_every_element_is_stored_once_in_files_within_their_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(-seed)
    max_file_bytes, num_ranks = draw.randrange(1500, 20_000), draw.randrange(1, 9)
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", max_file_bytes)
    tensors = random_tensors(seed)
    plan = plan_part(tensors, num_ranks)
    seen = {name: torch.zeros(tensor.shape, dtype=torch.int8) for name, tensor in tensors.items()}
    for rank, files in enumerate(plan.files):
        slices = plan.slices(rank, tensors)
        for chunks in files.values():
            stored = {c.key: torch.zeros(slices[c.key].shape, dtype=slices[c.key].dtype) for c in chunks}
            assert len(safetensors.torch.save(stored)) <= max_file_bytes
            for chunk in chunks:
                chunk.of(seen[chunk.name]).add_(1)
    assert all((count == 1).all() for count in seen.values())
    assert_even(plan)
    index = json.loads(plan.index)["tensors"]
    placed = [(c["file"], c["key"]) for entry in index.values() for c in entry["chunks"]]
    assert sorted(placed) == sorted((f, c.key) for files in plan.files for f, chunks in files.items() for c in chunks)
    assert plan_part(dict(reversed(tensors.items())), num_ranks) == plan, "the order of a dict makes no difference"


def test_plan_for_a_thousand_ranks_is_made_once() -> None:
    """Whatever the tensors hold; another number of writers, or a moment that is zero, is another plan."""
    tensors = {str(n): torch.zeros(7 + n % 5, 3) for n in range(3000)}
    plan = plan_part(tensors, 1024)
    assert_even(plan)
    assert plan_part({name: tensor + 1 for name, tensor in tensors.items()}, 1024) is plan
    assert plan_part(tensors, 1023) != plan
    fewer = plan_part({n: t for n, t in tensors.items() if n != "5"}, 1024, {"5": tensors["5"]})
    assert json.loads(fewer.index)["zeros"] == {"5": {"dtype": "float32", "shape": [7, 3]}}


def assert_even(plan: layout.PartPlan) -> None:
    """No two ranks differ by more than the largest chunk."""
    chunks = [[c.stored_bytes for inside in files.values() for c in inside] for files in plan.files]
    sizes = [sum(of_rank) for of_rank in chunks]
    assert max(sizes) - min(sizes) <= max(size for of_rank in chunks for size in of_rank)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_tensor_is_written_once_spread_by_bytes(num_ranks: int) -> None:
    tensors = {f"t{i}": torch.empty(i * 1000, device="meta") for i in range(1, 40)}
    plan = plan_part(tensors, num_ranks)
    shares = [plan.slices(rank, tensors) for rank in range(num_ranks)]
    assert sorted(key for share in shares for key in share) == sorted(tensors)
    sizes = [sum(tensor.nbytes for tensor in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 0.005 * sum(sizes), "the largest are given out first"


@pytest.mark.parametrize("shape", [(128_256, 8192), (1, 1_000_000_000), (1_000_000_007,), (2, 500_000_000)])
def test_one_huge_tensor_is_written_by_all_ranks(shape: tuple[int, ...]) -> None:
    """With the real bound. A rank copies its own share only."""
    tensors = {"huge": torch.empty(shape, device="meta")}
    plan = plan_part(tensors, 8)
    shares = [sum(t.nbytes for t in plan.slices(rank, tensors).values()) for rank in range(8)]
    assert sum(shares) == tensors["huge"].nbytes
    assert max(shares) - min(shares) <= layout.MAX_FILE_BYTES
    assert all(c.stored_bytes < 48 * 2**20 for files in plan.files for chunks in files.values() for c in chunks)
    assert_even(plan)


def test_copies_are_of_the_slices_alone(small_files: int) -> None:
    tensors = {"a": numbered((300, 100), torch.float32)}
    shares = [plan_part(tensors, 3).slices(rank, tensors) for rank in range(3)]
    copies = [HostCopies().take("delta", share) for share in shares]
    held = [sum(copy.untyped_storage().nbytes() for copy in of_rank.values()) for of_rank in copies]
    assert sum(held) == tensors["a"].nbytes
    assert max(held) - min(held) <= small_files
    assert all(
        part.untyped_storage().data_ptr() == tensors["a"].data_ptr() for share in shares for part in share.values()
    )


@pytest.mark.parametrize(
    ("shape", "max_elements", "expected"),
    [
        ((), 1, [((), ())]),
        ((0, 9), 1, [((0, 0), (0, 9))]),
        ((4, 2), 8, [((0, 0), (4, 2))]),
        ((4, 2), 7, [((0, 0), (2, 2)), ((2, 0), (2, 2))]),
        ((7,), 3, [((0,), (2,)), ((2,), (2,)), ((4,), (3,))]),
        ((2, 5), 3, [((0, 0), (1, 2)), ((0, 2), (1, 3)), ((1, 0), (1, 2)), ((1, 2), (1, 3))]),
        ((1, 1, 2), 1, [((0, 0, 0), (1, 1, 1)), ((0, 0, 1), (1, 1, 1))]),
    ],
)
def test_boxes(shape: tuple[int, ...], max_elements: int, expected: Any) -> None:
    assert list(boxes(shape, max_elements)) == expected


def test_no_upload_to_s3_is_in_parts(proxy: FaultyProxy) -> None:
    """110 MB were one object: s3fs sends those in parts, which stay in the bucket if the process is killed."""
    storage = s3_storage(proxy.endpoint)
    tensors = {"embedding": torch.zeros((110_000, 1000), dtype=torch.int8)}
    part = write(storage, "base/step-00000001-0001-aa", tensors, 1)
    written = sorted(path.rpartition("/")[2] for method, path in proxy.log if method in ("PUT", "POST"))
    assert written == sorted(stored.path for stored in part.objects)
    assert len(written) == 4
