"""Saving behind training: what is skipped, what is waited for, what happens when storage fails. One process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ray import loop
from relora_ray.checkpoint import Commits, Share, list_manifests, read_manifest
from relora_ray.checkpoint.checkpointer import HostCopies
from relora_ray.checkpoint.commit import merge_shares
from relora_ray.checkpoint.manifest import Manifest, StoredObject
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, NotSavedError, StorageError
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config


@pytest.fixture
def behind(data: Path, tmp_path: Path) -> RunConfig:
    """As `cfg`, saving behind training: boundaries after 3, 6, 9 and 12, saves after every second update too."""
    return tiny_config(data, tmp_path, "checkpoint.save_async=true", "name=behind")


def of_kind(records: list[Record], kind: str) -> list[int]:
    return [record["step"] for record in records if record["kind"] == kind]


def intercept(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Call `before` with the path of every object of a checkpoint that is about to be put."""
    original = Storage.put

    def put(self: Storage, path: str, data: bytes) -> None:
        if path.startswith(("base/", "delta/")):
            before(path)
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", put)


def test_saving_behind_training_changes_no_bit(behind: RunConfig, cfg: RunConfig) -> None:
    waiting, expected = run(cfg)
    state, records = run(behind)
    assert losses(records) == losses(expected)
    assert state_digest(state) == state_digest(waiting)
    theirs, ours = (read_manifest(run_storage(c), 12).parts for c in (cfg, behind))
    assert [part.digest for part in theirs] == [part.digest for part in ours]


def test_boundaries_are_never_left_out_and_deltas_are(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is slower than training."""
    intercept(monkeypatch, lambda path: time.sleep(0.3))
    _, records = run(behind)
    missed = of_kind(records, "checkpoint_missed")
    assert missed
    assert set(missed) <= {2, 4, 8, 10}
    assert sorted(missed + of_kind(records, "checkpoint")) == [0, 2, 3, 4, 6, 8, 9, 10, 12]
    assert list_manifests(run_storage(behind)) == of_kind(records, "checkpoint")


def test_training_goes_on_while_a_save_is_under_way(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A boundary's upload that ends only when the update after next is done."""
    seen = threading.Event()

    def wait(path: str) -> None:
        if path.startswith("delta/step-00000006"):
            assert seen.wait(60), "training did not go on"

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 8:
            seen.set()

    intercept(monkeypatch, wait)
    _, records = run(behind, on_record)
    stored = next(r for r in records if r["kind"] == "checkpoint" and r["step"] == 6)
    assert stored["blocked_s"] < stored["save_s"]


def test_what_is_stored_is_the_state_at_the_save(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy, and not what training has made of it meanwhile: a resume checks the digest."""
    updates = threading.Semaphore(0)

    def wait(path: str) -> None:
        if "step-00000006" in path:
            updates.acquire(timeout=60)

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] >= 7:
            for _ in range(9):
                updates.release()
        if record["kind"] == "train" and record["step"] == 8:
            raise Crash

    with monkeypatch.context() as patch:
        intercept(patch, wait)
        with pytest.raises(Crash):
            run(behind, on_record)
    assert list_manifests(run_storage(behind))[-1] == 6
    state, after = run(behind)
    assert of_kind(after, "attempt") == [6]
    whole, _ = run(behind.model_copy(update={"name": "whole"}))
    assert state_digest(state) == state_digest(whole)


def test_failing_storage_is_survived_and_made_good(
    behind: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be stored from step 3 to 6, the base of step 6 neither: it is written with the delta of step 8."""
    down = False

    def refuse(path: str) -> None:
        if down:
            raise StorageError("the service is down")

    def on_record(record: Record) -> None:
        nonlocal down
        if record["kind"] == "train":
            down = 3 <= record["step"] <= 6

    waiting = behind.model_copy(update={"checkpoint": behind.checkpoint.model_copy(update={"save_async": False})})
    with monkeypatch.context() as patch:
        intercept(patch, refuse)
        state, records = run(waiting, on_record)
    assert of_kind(records, "checkpoint_missed") == [3, 4, 6]
    failure = "the checkpoint at step 6 was not stored: rank 0: the service is down."
    assert f"{failure} The run could resume from step 2." in caplog.text
    storage = run_storage(waiting)
    assert list_manifests(storage) == [0, 2, 8, 9, 10, 12]
    assert read_manifest(storage, 8).base.folder.startswith("base/step-00000008")
    whole, _ = run(waiting.model_copy(update={"name": "whole"}))
    assert state_digest(state) == state_digest(whole)


@pytest.mark.parametrize("save_async", ["true", "false"])
def test_too_much_unsaved_ends_the_run_with_a_named_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_async: str
) -> None:
    cfg = tiny_config(data, tmp_path, f"checkpoint.save_async={save_async}", "checkpoint.max_unsaved_steps=5")

    def refuse(path: str) -> None:
        if not path.startswith("delta/step-00000000"):
            raise StorageError("the service is down")

    with monkeypatch.context() as patch:
        intercept(patch, refuse)
        with pytest.raises(
            NotSavedError, match=r"\d+ updates, up to step \d+, are not stored, and .*max_unsaved_steps=5"
        ):
            run(cfg)
    state, after = run(cfg)
    assert of_kind(after, "attempt") == [0]
    assert state.position.step == 12


@pytest.mark.parametrize("save_async", ["true", "false"])
def test_last_checkpoint_that_fails_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_async: str
) -> None:
    cfg = tiny_config(data, tmp_path, f"checkpoint.save_async={save_async}")

    def refuse(path: str) -> None:
        if path.startswith("delta/step-00000012"):
            raise StorageError("the service is down")

    with monkeypatch.context() as patch:
        intercept(patch, refuse)
        with pytest.raises(NotSavedError, match=r"the last checkpoint was not stored: .*down.*resume from step \d+"):
            run(cfg)
    assert not run_storage(cfg).exists("model/config.json")
    assert run(cfg)[0].position.step == 12


def test_save_under_way_when_a_run_fails_is_still_stored(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def slow(path: str) -> None:
        if path.startswith("delta/step-00000006"):
            started.set()
            time.sleep(0.5)

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 7:
            assert started.wait(60)
            raise Crash

    intercept(monkeypatch, slow)
    with pytest.raises(Crash):
        run(behind, on_record)
    assert list_manifests(run_storage(behind))[-1] == 6


def test_older_of_two_drivers_stops(behind: RunConfig) -> None:
    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            claim(run_storage(behind), "cccccccc")

    with pytest.raises(
        CheckpointError, match=r"belongs to driver cccccccc since term 2; this is driver \w+ of term 1,"
    ):
        run(behind, on_record)
    assert list_manifests(run_storage(behind))[-1] <= 4


def test_of_two_drivers_with_one_number_only_the_owner_commits(behind: RunConfig) -> None:
    """Both claimed term 1 at the same moment, on a server that has no create-once put."""

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            run_storage(behind).put("terms/0001.json", b'{"driver": "cccccccc"}')

    with pytest.raises(CheckpointError, match=r"belongs to driver cccccccc since term 1"):
        run(behind, on_record)


def test_late_commit_of_an_earlier_attempt_is_of_no_account(behind: RunConfig) -> None:
    """It was under way when its attempt was given up, and has come further than the next one had: nobody goes on from
    it, and the next commit removes it."""
    with pytest.raises(Crash):
        run(behind, crash_at(5, "train"))
    storage = run_storage(behind)
    earlier = read_manifest(storage, 3)

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            storage.put(late.path, late.model_dump_json().encode())
        if record["kind"] == "train" and record["step"] == 7:
            raise Crash

    late = earlier.model_copy(update={"step": 11})
    with pytest.raises(Crash):
        run(behind, on_record)
    steps = list_manifests(storage)
    assert steps[-1] in (4, 6)
    _, after = run(behind)
    assert of_kind(after, "attempt") == [steps[-1]]
    assert list_manifests(storage)[-1] == 12
    assert late.path not in storage.list("manifests")


def test_failure_that_is_over_does_not_end_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One save failed and nothing is stored for too long, but storage is back: the state now is stored first."""
    cfg = tiny_config(data, tmp_path, "checkpoint.save_async=true", "checkpoint.max_unsaved_steps=2")
    down = True

    def refuse(path: str) -> None:
        if down and "step-00000000" not in path:
            raise StorageError("the service is down")

    def on_record(record: Record) -> None:
        nonlocal down
        if record["kind"] == "train":
            down = record["step"] < 3

    intercept(monkeypatch, refuse)
    state, _ = run(cfg, on_record)
    assert state.position.step == 12


def test_foreign_objects_do_no_harm(behind: RunConfig) -> None:
    storage = run_storage(behind)
    storage.put("delta/.DS_Store", b"")
    for path in ("terms/.keep", "setup/.keep", "setup/notes/x", "removals/.keep", "manifests/.keep", "rest/.keep"):
        storage.put(path, b"")
    state, _ = run(behind)
    assert state.position.step == 12
    assert storage.exists("delta/.DS_Store")


def test_host_buffers_are_used_again() -> None:
    copies = HostCopies()
    tensor = torch.arange(6.0)
    first = copies.take("delta", {"a": tensor, "b": torch.ones(2)})
    tensor += 1
    assert first["a"].tolist() == [0, 1, 2, 3, 4, 5]
    base = copies.take("base", {"a": torch.zeros(6)})
    second = copies.take("delta", {"a": tensor})
    assert second["a"].data_ptr() == first["a"].data_ptr() != base["a"].data_ptr()
    assert second["a"].tolist() == [1, 2, 3, 4, 5, 6]
    assert copies.take("delta", {"a": torch.zeros(3)})["a"].shape == (3,)


def share_of(rank: int, **changes: Any) -> Share:
    def part(kind: str) -> dict[str, Any]:
        stored = StoredObject(path=f"r{rank:05d}-p000.safetensors", size_bytes=1, sha256="0" * 64)
        return {"folder": f"{kind}/step-00000004-0001-aa", "objects": (stored,), "digest": 5}

    manifest = {
        "step": 4, "tokens": 8, "boundary": 3, "base": part("base"), "delta": part("delta"), "counters": {},
        "identity": "i", "data_fingerprint": "f", "attempt": "0001-aa", "world_size": 2,
        "versions": {"rank": str(rank)}, "unix_time": 1,
    }  # fmt: skip
    return Share(rank=rank, manifest=Manifest.model_validate(manifest | changes), writers=(0, 1))


def test_shares_become_one_manifest() -> None:
    merged = merge_shares([share_of(0), share_of(1)])
    assert [o.path for o in merged.delta.objects] == ["r00000-p000.safetensors", "r00001-p000.safetensors"]
    assert merged.base is not None
    assert len(merged.base.objects) == 2


@pytest.mark.parametrize("change", [{"step": 5}, {"attempt": "0002-bb"}, {"boundary": 0}, {"tokens": 9}])
def test_shares_of_different_saves_are_not_committed(change: dict[str, Any], tmp_path: Path, cfg: RunConfig) -> None:
    outcome = Commits(Storage(str(tmp_path)), cfg.checkpoint).commit([share_of(0), share_of(1, **change)])
    assert outcome.fatal
    assert "rank 1 stored step" in outcome.error
    assert Storage(str(tmp_path)).list() == []


def test_share_that_failed_or_is_missing_prevents_the_commit(tmp_path: Path, cfg: RunConfig) -> None:
    commits = Commits(Storage(str(tmp_path)), cfg.checkpoint)
    failed = share_of(1).model_copy(update={"error": "disk full"})
    outcome = commits.commit([share_of(0), failed])
    assert (outcome.manifest, outcome.error, outcome.fatal) == (None, "rank 1: disk full", False)
    assert "there are no shares of ranks [1]" in commits.commit([share_of(0)]).error
    assert Storage(str(tmp_path)).list() == []


def test_manifests_are_read_once(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Storage._get

    def get(self: Storage, path: str, *args: Any) -> bytes:
        read.append(path)
        return original(self, path, *args)

    monkeypatch.setattr(Storage, "_get", get)
    run(behind)
    found = [path for path in read if path.startswith("manifests/")]
    assert found == [read_manifest(run_storage(behind), 12).path], "by the export, which asks what the run is"


def test_poll_is_not_needed_for_the_result(behind: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Checkpointer, "poll", lambda self: [])
    _, records = run(behind)
    assert {0, 3, 6, 9, 12} <= set(of_kind(records, "checkpoint"))


def test_log_names_what_was_not_stored(behind: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Once, whether it is heard of between steps or at the next save."""

    def refuse(path: str) -> None:
        if path.startswith("delta/step-00000003"):
            raise StorageError("the service is down")

    intercept(monkeypatch, refuse)
    with caplog.at_level(logging.WARNING):
        run(behind)
    assert caplog.text.count("the checkpoint at step 3 was not stored") == 1
