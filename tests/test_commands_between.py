"""What `python -m relora_ray.checkpoints` and forks do when others write at the same moment, or have just written.

Others are played: they write where the code under test is about to claim, read or release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint import Rollback, commit, list_manifests, owner, read_history, read_manifest
from relora_ray.checkpoint.commit import rollback_path
from relora_ray.checkpoint.history import Removal, pin, pin_base_only, read_pins, removal_path, removals_text
from relora_ray.checkpoint.ownership import Term, claim
from relora_ray.commands.checkpoints import copy, delete, own, prune, verify
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError, DamagedError, StorageError
from relora_ray.runs import fork as forks
from relora_ray.runs.fork import fork
from relora_ray.runs.places import run_storage
from relora_ray.runs.rollback import read_rollbacks, where_to_go_on
from relora_ray.storage import Storage
from tests.tiny import run, tiny_config

KEEP = "checkpoint.keep_last=1"


def go_back(storage: Storage, to_step: int) -> Rollback:
    """As an attempt of the newest owner does that diverges, after its last commit."""
    head = read_history(storage).head
    assert head is not None
    back = Rollback(
        number=1, to_step=to_step, skip_from=to_step, skip_until=head.step, why="", unix_time=0, attempt=head.attempt
    )
    storage.put_new(rollback_path(back), back.model_dump_json().encode())
    return back


def forked(data: Path, folder: Path) -> tuple[Storage, RunConfig]:
    run(tiny_config(data, folder, "name=parent", "train.stop_after_steps=6", KEEP))
    child = tiny_config(data, folder, "name=child", KEEP)
    fork(child, "parent", 6)
    return run_storage(tiny_config(data, folder, "name=parent")), child


def test_prune_keeps_what_was_committed_before_it_owned_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked at the run, then waited for a driver's end, and took what that one had committed meanwhile for
    leftovers of a crash."""
    run(tiny_config(data, tmp_path, "train.stop_after_steps=6"))
    storage = run_storage(tiny_config(data, tmp_path))

    def after_the_other(*args: Any, **kwargs: Any) -> Term:
        monkeypatch.undo()
        run(tiny_config(data, tmp_path, "train.stop_after_steps=9"))
        return claim(*args, **kwargs)

    monkeypatch.setattr(owner, "claim", after_the_other)
    list(prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert list_manifests(storage)[-1] == 9
    assert [problem for _, problem in verify(storage, None) if problem] == []


def test_prune_keeps_a_newest_checkpoint_that_it_cannot_read(data: Path, tmp_path: Path) -> None:
    """The manifest can be restored; what it names could not be."""
    run(tiny_config(data, tmp_path))
    storage = run_storage(tiny_config(data, tmp_path))
    newest = read_manifest(storage, 12)
    record = storage.get(newest.path)
    storage.put(newest.path, record[:-10])
    lines = list(prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert storage.exists(newest.path), lines
    storage.put(newest.path, record)
    assert list_manifests(storage)[-1] == 12
    assert [problem for _, problem in verify(storage, None) if problem] == []


def test_own_keeps_a_rollback_that_no_checkpoint_knows_yet(data: Path, tmp_path: Path) -> None:
    """It copied the newest checkpoint, from which the run had gone back, and made it the newest again."""
    _, child = forked(data, tmp_path)
    run(tiny_config(data, tmp_path, "name=child", "train.stop_after_steps=8", "checkpoint.keep_last=9"))
    storage = run_storage(child)
    back = go_back(storage, 6)
    expected = where_to_go_on(storage)
    own(storage)
    paths, rollbacks, _ = where_to_go_on(storage)
    assert rollbacks == expected[1] == (back,)
    assert [read_history(storage).read(path).step for path in paths[-1:]] == [6]


def test_own_refuses_a_newest_checkpoint_that_is_damaged(data: Path, tmp_path: Path) -> None:
    """It gave it a new name and cut it off from the older ones, so that no checkpoint was whole any more."""
    _, child = forked(data, tmp_path)
    cfg = tiny_config(data, tmp_path, "name=child", "train.stop_after_steps=8", "checkpoint.keep_last=9")
    run(cfg)
    storage = run_storage(child)
    for path in (tmp_path / "child/delta").glob("step-00000008-*/*.safetensors"):
        path.write_bytes(b"spoilt")
    with pytest.raises(DamagedError, match="may go on from an older checkpoint"):
        own(storage)
    assert run(cfg)[0].position.step == 8


def test_copy_is_of_where_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    """It was the newest checkpoint, from which the run had gone back, with the rollback entered as if it knew it."""
    run(tiny_config(data, tmp_path, "train.stop_after_steps=8"))
    storage, out = run_storage(tiny_config(data, tmp_path)), Storage(f"{tmp_path}/out")
    back = go_back(storage, 6)
    copy(storage, out, None)
    assert list_manifests(out) == [6]
    assert read_rollbacks(out) == (back,)


def test_delete_sees_a_fork_that_came_while_it_claimed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins were looked at before the claim, which may take 45 s, and not again."""
    run(tiny_config(data, tmp_path, "name=parent", "train.stop_after_steps=6"))
    parent, child = run_storage(tiny_config(data, tmp_path, "name=parent")), tiny_config(data, tmp_path, "name=child")

    def after_the_fork(*args: Any, **kwargs: Any) -> Term:
        monkeypatch.undo()
        fork(child, "parent", 6)
        return claim(*args, **kwargs)

    monkeypatch.setattr(owner, "claim", after_the_fork)
    with pytest.raises(ConfigError, match="is needed by child"):
        delete(parent)
    assert [problem for _, problem in verify(run_storage(child), None)] == [""]
    assert [problem for _, problem in verify(parent, None) if problem] == [], "and it is still a run"


def test_delete_leaves_a_run_that_is_being_forked(data: Path, tmp_path: Path) -> None:
    """A fork that reads its parent has a pin, and no checkpoint yet: it did not count."""
    run(tiny_config(data, tmp_path, "name=parent", "train.stop_after_steps=6"))
    parent = run_storage(tiny_config(data, tmp_path, "name=parent"))
    claim(parent.sibling("child"))
    pin(parent, "child", 6, 1)
    with pytest.raises(ConfigError, match="is needed by child"):
        delete(parent)


def test_fork_that_fails_and_is_deleted_lets_go(data: Path, tmp_path: Path) -> None:
    """Its pin stayed for ever: the parent kept the checkpoint whole."""
    run(tiny_config(data, tmp_path, "name=parent", "train.stop_after_steps=6"))
    parent, child = run_storage(tiny_config(data, tmp_path, "name=parent")), tiny_config(data, tmp_path, "name=child")
    for path in (tmp_path / "parent/delta").glob("step-00000006-*/*.safetensors"):
        path.write_bytes(b"spoilt")
    with pytest.raises(DamagedError):
        fork(child, "parent", 6)
    delete(run_storage(child))
    assert read_pins(parent) == {}


def test_pin_is_refused_if_the_base_is_being_removed_from_a_grandparent(data: Path, tmp_path: Path) -> None:
    """Only what the parent is about to remove was looked at."""
    parent, child = forked(data, tmp_path)
    base = read_manifest(run_storage(child), 6).base
    assert base is not None
    going = Removal(folders=(base.folder,))
    parent.put(removal_path(claim(parent).attempt(1), 1), removals_text(going).encode())
    with pytest.raises(CheckpointError, match="is about to remove"):
        pin(run_storage(child), "third", 6)


def test_earlier_fork_that_ends_late_leaves_the_later_ones_pin(data: Path, tmp_path: Path) -> None:
    """Two begin to fork at the same moment; the second has the run. The first deleted the other's pin."""
    run(tiny_config(data, tmp_path, "name=parent"))
    parent = run_storage(tiny_config(data, tmp_path, "name=parent"))
    first = pin(parent, "child", 6, 1)
    second = pin(parent, "child", 9, 2)
    pin_base_only(parent, "child", second, 2)
    pin_base_only(parent, "child", first, 1)
    assert second.base is not None
    assert second.base.folder in {folder for found in read_pins(parent).values() for folder in found.folders}


def test_fork_does_not_begin_again_what_another_has_begun_meanwhile(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw no checkpoint, waited for the claim, and put the run back to its start."""
    run(tiny_config(data, tmp_path, "name=parent"))
    child = tiny_config(data, tmp_path, "name=child")

    def after_the_other(storage: Storage) -> Term:
        monkeypatch.undo()
        fork(child, "parent", 6)
        run(tiny_config(data, tmp_path, "name=child", "train.stop_after_steps=8"))
        return claim(storage)

    monkeypatch.setattr(forks, "claim", after_the_other)
    fork(child, "parent", 6)
    assert list_manifests(run_storage(child))[-1] == 8


def test_pin_that_could_not_be_released_is_no_reason_to_keep_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once, when the last manifest that needs the parent is removed; nothing released it afterwards, and
    the parent could never be deleted."""
    parent, child = forked(data, tmp_path)
    original, failed = commit.release, []

    def fails_once(storage: Storage, name: str) -> None:
        if not failed:
            failed.append(name)
            raise StorageError("the service is down")
        original(storage, name)

    monkeypatch.setattr(commit, "release", fails_once)
    run(child)
    assert failed
    assert read_pins(parent)
    delete(parent, dry_run=True)
    own(run_storage(child))
    assert read_pins(parent) == {}


def test_pins_of_a_version_before_are_released_too(data: Path, tmp_path: Path) -> None:
    """`own`, which is the advice, did not remove it, so that the parent could never be deleted."""
    parent, child = forked(data, tmp_path)
    parent.put("forks/child.json", b'{"step": 6}')
    own(run_storage(child))
    delete(parent)
    assert parent.list() == []
