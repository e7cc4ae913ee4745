"""Metrics objects: put whole, cut into segments, never in training's way."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from relora_ray.errors import StorageError
from relora_ray.metrics import MetricsLog, read, read_all
from relora_ray.storage import Storage


def steps(storage: Storage) -> list[int]:
    return [record["step"] for record in read_all(storage, "train")]


def test_records_are_stored_in_order_in_segments(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    log = MetricsLog(storage, "0001-a", flush_every=3, segment_bytes=200)
    for step in range(100):
        log.write({"kind": "train", "step": step, "loss": float("nan") if step == 7 else 1.5})
        if step % 10 == 0:
            assert log.flush().result()
    log.close()
    assert steps(storage) == list(range(100))
    assert len(storage.list("metrics/0001-a")) > 1
    assert read(storage, "train")[7]["loss"] is None


def test_training_does_not_wait_for_slow_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, go = Storage(str(tmp_path)), threading.Event()
    original = Storage.put

    def slow(self: Storage, path: str, data: bytes) -> None:
        assert go.wait(30)
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", slow)
    log = MetricsLog(storage, "0001-a", flush_every=1)
    for step in range(50):
        log.write({"kind": "train", "step": step})
    assert storage.list() == []
    go.set()
    log.close()
    assert steps(storage) == list(range(50))


def test_failed_put_is_made_good_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, failures = Storage(str(tmp_path)), [1, 2]
    original = Storage.put

    def flaky(self: Storage, path: str, data: bytes) -> None:
        if failures:
            raise StorageError(f"down {failures.pop()}")
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", flaky)
    log = MetricsLog(storage, "0001-a", flush_every=5, segment_bytes=100)
    for step in range(40):
        log.write({"kind": "train", "step": step})
        log.flush().result()
    log.close()
    assert not failures
    assert steps(storage) == list(range(40))


def test_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("metrics/0001-a/00000.jsonl", json.dumps({"kind": "train", "step": 1}).encode() + b'\n{"kind": "tr')
    assert steps(storage) == [1]
