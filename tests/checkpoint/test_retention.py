"""Retention beside commits. On a local folder; the training is played."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from relora_ray import clock
from relora_ray.checkpoint import Commits, Manifest, Share
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, Part, StoredObject
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import CheckpointConfig
from relora_ray.storage import Storage


def commit(commits: Commits, storage: Storage, lineage: Lineage, step: int) -> Manifest:
    folder = lineage.folder("delta", step)
    storage.put(f"{folder}/part", b"x")
    stored = StoredObject(path="part", size_bytes=1, sha256=sha256(b"x").hexdigest())
    manifest = Manifest(
        step=step, tokens=step, boundary=0, base=None, delta=Part(folder=folder, objects=(stored,), digest=0),
        counters=Counters(), identity="i", data_fingerprint="f", attempt=lineage.attempt, world_size=1, versions={},
        unix_time=1, line=lineage.line,
    )  # fmt: skip
    outcome = commits.commit([Share(rank=0, manifest=manifest, writers=(0,))])
    assert outcome.manifest is not None, outcome.error
    lineage.committed(outcome.manifest)
    return outcome.manifest


def test_prunes_that_queue_up_do_not_wait_for_what_the_first_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits came faster than their prunes. Each looked for a manifest that was gone for `storage_retry_s` seconds,
    a thread of the coordinator's each, and while the removal's record was gone too, to the end."""
    storage, passed = Storage(str(tmp_path)), []
    monkeypatch.setattr(clock, "sleep", passed.append)
    monkeypatch.setattr(clock, "monotonic", lambda: float(sum(passed)))
    lineage = Lineage(claim(storage).attempt(1))
    commits = Commits(storage, CheckpointConfig(save_every_steps=1, keep_last=1))
    committed = [commit(commits, storage, lineage, step) for step in range(6)]
    for manifest in committed:
        commits.prune(manifest)
    assert storage.list("manifests") == [committed[-1].path]
    assert sum(passed) == 0


def test_prunes_do_not_pile_up_behind_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each commit's prune held a thread until those before it were done, in the pool in which the coordinator commits:
    with storage that deletes slowly, no commit had a thread any more."""
    storage, original = Storage(str(tmp_path)), Storage.delete
    lineage = Lineage(claim(storage).attempt(1))
    commits = Commits(storage, CheckpointConfig(save_every_steps=1, keep_last=1))
    deleting, go_on = threading.Event(), threading.Event()

    def slow(self: Storage, path: str) -> None:
        deleting.set()
        assert go_on.wait(60)
        original(self, path)

    committed = [commit(commits, storage, lineage, step) for step in range(2)]
    monkeypatch.setattr(Storage, "delete", slow)
    with ThreadPoolExecutor(4) as pool:
        try:
            first = pool.submit(commits.prune, committed[-1])
            assert deleting.wait(60)
            for step in range(2, 6):
                newest = commit(commits, storage, lineage, step)
                pool.submit(commits.prune, newest).result(timeout=20)
            assert not first.done()
        finally:
            go_on.set()
        first.result(timeout=60)
    assert storage.list("manifests") == [newest.path], "the one at work did it for all"
