"""Retention beside commits. On a local folder; the training is played, or, for the best checkpoint, the held-out losses
alone are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from relora_ray import clock, loop
from relora_ray.checkpoint import Commits, Manifest, Share, best_step, list_manifests
from relora_ray.checkpoint.history import read_history
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, Part, StoredObject
from relora_ray.checkpoint.ownership import claim
from relora_ray.commands import checkpoints
from relora_ray.commands.report import summary
from relora_ray.commands.status import status
from relora_ray.config import CheckpointConfig, RunConfig
from relora_ray.conformance.ours import Crash
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.tiny import crash_at, run, tiny_config


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


def test_manifest_that_arrives_after_its_parts_were_removed_is_no_checkpoint(tmp_path: Path) -> None:
    """Nobody was told of it. While no later attempt has committed it would be the newest, without parts, and the run
    could not go on: what was written down about it stays until it can be that no more."""
    storage, term = Storage(str(tmp_path)), claim(Storage(str(tmp_path)))
    cfg = CheckpointConfig(save_every_steps=1)
    lost = Lineage(term.attempt(1))
    late = commit(Commits(storage, cfg), storage, lost, 0)
    storage.delete(late.path)  # the put is still on its way
    for number in (2, 3, 4):  # attempts that end before their first commit
        Commits(storage, cfg).remove_orphans(term.attempt(number), ())
    assert not storage.list("delta")
    storage.put(late.path, late.model_dump_json().encode())
    history = read_history(storage)
    assert (history.head, history.line, history.standing) == (None, (), [])
    going_on, commits = Lineage(term.attempt(5)), Commits(storage, cfg)
    for step in range(2):
        newest = commit(commits, storage, going_on, step)
        commits.prune(newest)
    assert storage.list("removals") == [], "and no longer"
    assert read_history(storage).head == newest


def played(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    real = loop.evaluate

    def evaluate(cfg: RunConfig, world: Any, state: Any, validation: Any, **named: str) -> dict[str, Any]:
        record = real(cfg, world, state, validation, **named)
        return record | {"loss": losses.get(record["step"], 9.0)}

    monkeypatch.setattr(loop, "evaluate", evaluate)


def test_best_checkpoint_is_saved_kept_and_told_of(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations after 5 and 10 fall on no save, and of the two 5 is the best. A crash before its save is no loss."""
    played(monkeypatch, {0: 8.0, 5: 4.0, 10: 5.0, 12: 6.0})
    keep = ("checkpoint.keep_best=true", "checkpoint.keep_last=1", "checkpoint.save_every_steps=4")
    cfg = tiny_config(data, tmp_path, "train.eval_every_steps=5", *keep)
    with pytest.raises(Crash):
        run(cfg, crash_at(5, "eval"))
    run(cfg)
    storage = run_storage(cfg)
    assert best_step(storage) == 5
    assert 5 in list_manifests(storage)
    assert 10 not in list_manifests(storage), "no best, and so no save"
    listed = list(checkpoints.list_lines(storage))
    assert [line.split()[0] for line in listed if line.endswith("4.0000  best")] == ["5"]
    assert "  best      step 5, held-out loss 4.0000" in list(status(storage, 0.0))
    assert [line.split()[2] for line in summary(storage).splitlines() if line.endswith("best")] == ["5"]
    list(checkpoints.prune(storage, keep_last=1, keep_every_steps=0, keep_best=True, dry_run=False))
    assert best_step(storage) == 5
    assert all(not problem for _, problem in checkpoints.verify(storage, None)), "its base is there"
    list(checkpoints.prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert best_step(storage) == 12
    assert "  best      step 5, held-out loss 4.0000; there is no checkpoint of it" in list(status(storage, 0.0))


def test_best_of_what_is_not_evaluated_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_best=true with train.eval_every_steps=0.*such as to"):
        tiny_config(data, tmp_path, "checkpoint.keep_best=true")
    storage, lineage = Storage(str(tmp_path)), Lineage(claim(Storage(str(tmp_path))).attempt(1))
    commit(Commits(storage, CheckpointConfig(save_every_steps=1)), storage, lineage, 0)
    with pytest.raises(CheckpointError, match=r"no checkpoint whose held-out loss is known.*--step"):
        best_step(storage)
