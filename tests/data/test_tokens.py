"""Prepared data and what reads it: rows, checks, micro-batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from relora_ray.data.loader import BatchSource
from relora_ray.data.order import step_rows
from relora_ray.data.tokens import TokenRows, read_index
from relora_ray.errors import DataError
from relora_ray.modeling.parallel import World
from relora_ray.storage import Storage


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def stream(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.load(p) for p in sorted(folder.glob(f"{split}-*.npy"))])


def test_rows_cut_the_stream_without_gaps(data: Path) -> None:
    storage = Storage(str(data))
    index = read_index(storage)
    assert len(index.splits["train"].shards) > 2
    assert {s.num_tokens for s in index.splits["train"].shards[:-1]} == {10_000}
    rows = TokenRows(storage, index, "train", 24)
    tokens = stream(data, "train")
    assert rows.num_rows == (len(tokens) - 1) // 24
    read = rows.read(np.arange(rows.num_rows))
    assert read.shape == (rows.num_rows, 25)
    assert np.array_equal(read[:, :-1].ravel(), tokens[: rows.num_rows * 24])
    assert np.array_equal(read[:, 1:].ravel(), tokens[1 : rows.num_rows * 24 + 1])


def test_rows_from_a_remote_file_system_are_the_same(data: Path) -> None:
    local, remote = Storage(str(data)), Storage("memory://tokens")
    for path in local.list():
        remote.put(path, local.get(path))
    index = read_index(remote)
    wanted = np.array([0, 416, 417, 900])  # row 416 crosses from one shard to the next
    assert np.array_equal(
        TokenRows(remote, index, "train", 24).read(wanted), TokenRows(local, index, "train", 24).read(wanted)
    )


def test_missing_data_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no index\.json.*python -m relora_ray\.data\.prepare"):
        read_index(Storage(str(tmp_path / "nothing")))


def test_changed_index_is_refused(copy: Path) -> None:
    raw = json.loads((copy / "index.json").read_text())
    raw["splits"]["train"]["num_tokens"] += 1
    (copy / "index.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="was changed: its fingerprint"):
        read_index(Storage(str(copy)))


def test_short_shard_is_refused(copy: Path) -> None:
    shard = copy / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    index = read_index(Storage(str(copy)))
    with pytest.raises(DataError, match=r"train-00000\.npy"):
        TokenRows(Storage(str(copy)), index, "train", 24).read(np.array([0]))


def test_damaged_remote_shard_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_RAY_CACHE", str(tmp_path))
    local, remote = Storage(str(data)), Storage("memory://damaged")
    for path in local.list():
        remote.put(path, local.get(path))
    broken = bytearray(remote.get("train-00000.npy"))
    broken[-1] ^= 1
    remote.put("train-00000.npy", bytes(broken))
    with pytest.raises(DataError, match="damaged: its SHA-256"):
        TokenRows(remote, read_index(remote), "train", 24).read(np.array([0]))


def test_row_longer_than_the_data_is_refused(data: Path) -> None:
    storage = Storage(str(data))
    with pytest.raises(DataError, match=r"not enough for one row of data\.seq_len=1000000"):
        TokenRows(storage, read_index(storage), "train", 1_000_000)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 6])
def test_every_world_size_reads_the_rows_of_the_step(data: Path, world_size: int, micro: int) -> None:
    storage = Storage(str(data))
    rows = TokenRows(storage, read_index(storage), "train", 24)
    expected = rows.read(step_rows(4, num_rows=rows.num_rows, global_batch_rows=6, seed=3))
    seen, shapes = [], set()
    for rank in range(world_size):
        source = BatchSource(rows, World(rank, world_size), global_batch_rows=6, micro_batch_rows=micro, seed=3)
        batches = source.step(4)
        shapes.add(tuple(b.inputs.shape for b in batches))
        for batch in batches:
            seen += [tuple(r.tolist()) for r, w in zip(batch.inputs, batch.weights, strict=True) if w]
            assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    assert sorted(seen) == sorted(tuple(r[:-1].tolist()) for r in expected)
    assert len(shapes) == 1, "every rank makes the same micro-batches"


def test_evaluation_rows_are_the_first_ones_at_any_world_size(data: Path) -> None:
    storage = Storage(str(data))
    rows = TokenRows(storage, read_index(storage), "validation", 24)
    expected = rows.read(np.arange(5))[:, :-1].tolist()
    for world_size in (1, 2, 3, 7):
        seen = []
        for rank in range(world_size):
            source = BatchSource(rows, World(rank, world_size), global_batch_rows=6, micro_batch_rows=2, seed=3)
            for batch in source.first_rows(5):
                seen += [r.tolist() for r, w in zip(batch.inputs, batch.weights, strict=True) if w]
        assert sorted(seen) == sorted(expected)
