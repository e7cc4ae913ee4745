"""Metrics objects: put whole, cut into segments, never in training's way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from relora_ray.errors import StorageError
from relora_ray.runs.metrics import MetricsLog, latest, read, read_all, read_kinds, read_pages, structures
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


def write(storage: Storage, attempt: str, start: int, steps: Iterable[int]) -> None:
    log = MetricsLog(storage, attempt)
    log.write({"kind": "attempt", "step": start, "attempt": attempt})
    for step in steps:
        log.write({"kind": "train", "step": step, "by": attempt})
    log.close()


def by(storage: Storage) -> list[tuple[int, str]]:
    return [(record["step"], record["by"]) for record in read(storage, "train")]


@pytest.mark.parametrize(
    "names",
    [
        ["9999-aa", "10000-aa", "10001-aa"],
        ["9999.0001-aa", "10000.0001-aa", "10000.0002-aa"],
        ["0001.9999-aa", "0001.10000-aa", "0002.0001-aa"],
        ["10000-aa", "0001.0001-bb", "0001.0002-bb"],
    ],
)
def test_attempts_are_in_the_order_of_their_numbers(tmp_path: Path, names: list[str]) -> None:
    storage = Storage(str(tmp_path))
    for start, name in enumerate(names):
        write(storage, name, start, [start + 1, start + 2])
    assert [record["attempt"] for record in read_all(storage, "attempt")] == names
    assert by(storage) == [(1, names[0]), (2, names[1]), (3, names[2]), (4, names[2])]


def test_segments_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for number in (99_999, 100_000):
        line = json.dumps({"kind": "train", "step": number})
        storage.put(f"metrics/0001.0001-aa/{number:05d}.jsonl", line.encode())
    assert steps(storage) == [99_999, 100_000]


def test_steps_that_were_given_up_do_not_count(tmp_path: Path) -> None:
    """The second attempt came to 7 and the run then went back to 3; the third has not come so far yet."""
    storage = Storage(str(tmp_path))
    a, b, c = "0001.0001-aa", "0001.0002-aa", "0001.0003-aa"
    write(storage, a, 0, range(1, 6))
    write(storage, b, 4, range(5, 8))
    write(storage, c, 3, [4])
    assert by(storage) == [(1, a), (2, a), (3, a), (4, c)]
    assert by(storage) == [(r["step"], r["by"]) for r in latest(read_kinds(storage)["train"])]
    assert steps(storage) == [*range(1, 6), *range(5, 8), 4], "all that was done is still there to be read"


def test_attempt_that_has_done_nothing_yet_drops_what_it_does_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(storage, "0001.0001-aa", 0, range(1, 6))
    write(storage, "0002.0001-bb", 2, [])
    assert [step for step, _ in by(storage)] == [1, 2]


def test_what_an_attempt_of_an_earlier_owner_writes_late_does_not_count(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write(storage, "0002.0001-bb", 2, range(3, 5))
    write(storage, "0001.0001-aa", 0, range(1, 9))
    assert by(storage) == [(1, "0001.0001-aa"), (2, "0001.0001-aa"), (3, "0002.0001-bb"), (4, "0002.0001-bb")]


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("restarts", ["9999-aa", "10000-aa", "0001.9999-bb", "0001.10000-bb"]),
        ("ledger", ["step-00000012", "step-00000012-0001.9999-aa", "step-00000012-0001.10000-aa",
                    "step-99999999-0001.0001-aa", "step-100000000-0001.0001-aa"]),
    ],
)  # fmt: skip
def test_pages_are_in_the_order_of_their_numbers(tmp_path: Path, folder: str, names: list[str]) -> None:
    storage = Storage(str(tmp_path))
    for name in sorted(names):
        storage.put(f"{folder}/{name}.json", json.dumps({"name": name}).encode())
    assert [page["name"] for page in read_pages(storage, folder)] == names


def test_objects_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each get waits until another is under way: one after another, they would wait for ever."""
    storage, both = Storage(str(tmp_path)), threading.Barrier(2)
    for number in (1, 2):
        write(storage, f"0001.000{number}-aa", 0, [number])
    original = Storage.get

    def get(self: Storage, path: str) -> bytes:
        both.wait(30)
        return original(self, path)

    monkeypatch.setattr(Storage, "get", get)
    assert len(read_all(storage, "attempt")) == 2


def test_a_boundary_that_was_given_up_is_not_what_is_trained(tmp_path: Path) -> None:
    """The first attempt came past the end of the warm start, the second began again from before."""
    storage = Storage(str(tmp_path))
    for attempt, step, boundary in (("0001.0001-aa", 0, 3), ("0002.0001-bb", 2, None)):
        log = MetricsLog(storage, attempt)
        log.write({"kind": "attempt", "step": step, "num_trainable": 100})
        if boundary is not None:
            log.write({"kind": "boundary", "step": boundary, "num_trainable": 40})
        log.close()
    assert [record["num_trainable"] for record in structures(read_kinds(storage))] == [100]
