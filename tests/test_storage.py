"""Plain objects: atomic puts, create-once, errors that name the object. Local disk, a full one, and fsspec."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_ray.errors import StorageError
from relora_ray.storage import Storage


@pytest.fixture(params=["local", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local folder, the same by URL, and an fsspec file system that is not a folder."""
    return Storage(
        {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]
    )


def test_put_get_list_delete(storage: Storage) -> None:
    assert storage.list() == []
    storage.put("a/one", b"1")
    storage.put("a/b/two", b"22")
    storage.put("c", b"")
    storage.put("a/one", b"111")
    assert storage.list() == ["a/b/two", "a/one", "c"]
    assert storage.list("a/b") == ["a/b/two"]
    assert storage.list("nothing") == []
    assert (storage.get("a/one"), storage.size("a/one"), storage.size("c")) == (b"111", 3, 0)
    assert storage.size("nowhere") is None
    storage.delete("a")
    storage.delete("a")
    assert storage.list() == ["c"]


def test_child_is_a_prefix(storage: Storage) -> None:
    storage.child("x/y").put("z", b"1")
    assert storage.get("x/y/z") == b"1"
    assert storage.child("x").list() == ["y/z"]
    assert pickle.loads(pickle.dumps(storage.child("x"))).get("y/z") == b"1"


def test_append(storage: Storage) -> None:
    storage.append("log/one.jsonl", b"a\n")
    storage.append("log/one.jsonl", b"b\n")
    assert storage.get("log/one.jsonl") == b"a\nb\n"


def test_missing_object_is_named(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*nowhere/x: ") as caught:
        storage.get("nowhere/x")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_put_new_refuses_a_second_time(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put_new("once", b"first")
    with pytest.raises(FileExistsError, match="once exists already"):
        storage.put_new("once", b"second")
    assert storage.get("once") == b"first"
    assert storage.list() == ["once"]


def test_unfinished_write_is_not_listed_and_leaves_no_object(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("x", b"old")
    (tmp_path / ".partial-dead").write_bytes(b"half")
    assert storage.list() == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    target = tmp_path / "disk"
    target.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_full_disk_is_an_error_that_loses_nothing(small_disk: Path) -> None:
    storage = Storage(str(small_disk))
    storage.put("kept", b"k" * 1000)
    with pytest.raises(
        StorageError, match=r"cannot write .*/big \(2,000,000 bytes\): No space left.*Free space there"
    ) as caught:
        storage.put("big", b"b" * 2_000_000)
    assert not caught.value.restart_helps
    with pytest.raises(StorageError, match="No space left"):
        storage.put("kept", b"x" * 2_000_000)
    assert storage.list() == ["kept"]
    assert storage.get("kept") == b"k" * 1000
    storage.put("small", b"fits again, so the failed write left no litter")
    assert sorted(os.listdir(small_disk)) == ["kept", "small"]


def test_folder_that_cannot_be_read_is_an_error_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty answer here would start a run again from step 0."""
    storage = Storage(str(tmp_path))
    storage.put("manifests/a", b"")

    def stale(path: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(StorageError, match=r"cannot list .*: Stale file handle"):
        storage.list("manifests")


class PassingError(Exception):
    """Like botocore's: not an OSError."""


def test_remote_failure_that_passes_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.put("x", b"1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    failures = [PassingError("timeout"), OSError("reset")]
    original = storage._fs.cat_file

    def flaky(path: str) -> bytes:
        if failures:
            raise failures.pop()
        return original(path)

    monkeypatch.setattr(storage._fs, "cat_file", flaky)
    assert storage.get("x") == b"1"
    assert "try 2 of 4" in caplog.text
    assert "try 3 of 4" in caplog.text
    failures += [PassingError("down")] * 9
    with pytest.raises(StorageError, match=r"cannot read .*/x: PassingError: down") as caught:
        storage.get("x")
    assert caught.value.restart_helps
    assert len(failures) == 5
