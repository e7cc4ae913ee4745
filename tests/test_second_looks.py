"""Odd places and wrong answers around a run's folder: nothing that is needed goes, and nobody trains into the void."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint import list_manifests, owner, read_manifest
from relora_ray.checkpoint.history import old_pins, read_pins
from relora_ray.checkpoint.owner import owning
from relora_ray.checkpoint.ownership import claim, refuse_if_superseded
from relora_ray.cli import printable
from relora_ray.commands import checkpoints
from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError, RunBusyError, StorageError, SupersededError
from relora_ray.location import secret_in_url
from relora_ray.runs.fork import fork
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import find_setting, read_config
from relora_ray.runtime.failures import MOST_PAUSE_S, Failures
from relora_ray.storage import Storage
from tests.tiny import run, tiny_config

ONE = "checkpoint.keep_last=1"


def forked(data: Path, folder: Path, child: str = "child") -> tuple[RunConfig, RunConfig]:
    """A parent at step 6 and its fork there."""
    parent = tiny_config(data, folder, "name=parent", ONE)
    run(tiny_config(data, folder, "name=parent", "train.stop_after_steps=6", ONE))
    cfg = tiny_config(data, folder, f"name={child}", ONE)
    fork(cfg, "parent", 6)
    return parent, cfg


def test_fork_may_be_called_what_unfinished_files_are(data: Path, tmp_path: Path) -> None:
    parent, child = forked(data, tmp_path, "lora.partial-merge")
    assert len(read_pins(run_storage(parent))) == 1
    run(parent)
    run(child)


def test_parent_is_not_deleted_by_another_name(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forked(data, tmp_path)
    (tmp_path / "latest").symlink_to(tmp_path / "parent")
    assert checkpoints.main(["delete", str(tmp_path / "latest"), "--yes"]) == 2
    assert "is needed by child" in capsys.readouterr().err
    assert (tmp_path / "parent/manifests").is_dir()


def test_what_a_link_in_the_run_leads_to_stays(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/p.txt").write_text("mine")
    (tmp_path / "tiny/corpus").symlink_to(tmp_path / "precious")
    checkpoints.delete(run_storage(cfg))
    assert (tmp_path / "precious/p.txt").read_text() == "mine"
    assert not list((tmp_path / "tiny").iterdir())


def test_run_that_is_being_deleted_is_not_begun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever deletes lives, and shows it."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    monkeypatch.setattr(owner, "BEAT_S", 0.01)
    seen: list[bool] = []
    own = Storage.delete_below

    def delete_below(self: Storage, prefix: str) -> None:
        if prefix == "metrics":
            with pytest.raises(RunBusyError):
                claim(run_storage(cfg))
            seen.append(True)
        own(self, prefix)

    monkeypatch.setattr(Storage, "delete_below", delete_below)
    checkpoints.delete(run_storage(cfg))
    assert seen


def test_fork_of_a_fork_that_is_deleted_lets_go(data: Path, tmp_path: Path) -> None:
    parent, child = forked(data, tmp_path)
    grandchild = tiny_config(data, tmp_path, "name=grandchild", ONE)
    fork(grandchild, "child", 6)
    assert {pin.run for pin in read_pins(run_storage(parent)).values()} == {"child", "grandchild"}
    checkpoints.delete(run_storage(grandchild))
    assert {pin.run for pin in read_pins(run_storage(parent)).values()} == {"child"}
    run(child)


@pytest.mark.parametrize("name", ["2024", "1e3", "true", "null", "a #b"])
def test_copy_may_be_called_anything(name: str, data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    out = Storage(f"{tmp_path}/{name}/copy" if "#" in name else f"{tmp_path}/{name}")
    if "#" in name:
        with pytest.raises(ConfigError, match="has a #"):
            checkpoints.copy(run_storage(cfg), out, None)
        return
    checkpoints.copy(run_storage(cfg), out, None)
    assert read_config(out).name == name
    run(tiny_config(data, tmp_path, f"name='{name}'"))


def test_verify_looks_at_what_the_run_is_and_at_runs_only(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    storage = run_storage(cfg)
    assert not [wrong for _, wrong in checkpoints.verify(storage, None) if wrong]
    path = f"{find_setting(storage).folder}/tokenizer/tokenizer.json"
    storage.put(path, storage.get(path) + b" ")
    assert all("tokenizer.json is not the one" in wrong for _, wrong in checkpoints.verify(storage, None))
    storage.delete(path)
    assert all("tokenizer.json" in wrong for _, wrong in checkpoints.verify(storage, None))
    assert checkpoints.main(["verify", storage.sibling("typo").url]) == 2


def test_manifest_that_cannot_be_read_stays(data: Path, tmp_path: Path) -> None:
    """One on the line, too."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    storage = run_storage(cfg)
    path = read_manifest(storage, 6).path
    storage.put(path, b"{")
    delta = storage.folders("delta")
    said = list(checkpoints.prune(storage, keep_last=1, keep_every_steps=2, dry_run=False))
    assert f"stays: {path} cannot be read" in said
    assert not [line for line in said if line.startswith("removes") and path in line]
    assert storage.get(path) == b"{"
    assert next(name for name in delta if "00000006" in name) in storage.folders("delta")


# Terms.


def test_driver_whose_folder_was_moved_stops(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    term = claim(storage)
    refuse_if_superseded(storage, term.attempt(1))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with pytest.raises(SupersededError, match="is gone: the run's folder was moved or removed"):
        refuse_if_superseded(storage, term.attempt(1))


def test_owner_hears_that_its_folder_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.01)
    told: list[str] = []
    storage = Storage(str(tmp_path / "run"))
    with owning(storage) as hold:
        hold.when_lost(told.append)
        shutil.rmtree(tmp_path / "run/terms")
        for _ in range(500):
            if told:
                break
            owner.threading.Event().wait(0.01)
    assert "is gone" in told[0]


def test_terms_that_were_removed_are_not_counted_anew(data: Path, tmp_path: Path) -> None:
    """Else what is stored now would be older than what was stored before, and ignored."""
    for stop in (4, 6):
        run(tiny_config(data, tmp_path, f"train.stop_after_steps={stop}"))
    shutil.rmtree(tmp_path / "tiny/terms")
    cfg = tiny_config(data, tmp_path)
    state, _ = run(cfg)
    assert state.position.step == 12
    assert list_manifests(run_storage(cfg))[-1] == 12


def test_sign_of_life_goes_on_while_a_look_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are not tried again for as long as others take a driver without a sign for dead."""
    waited: list[float] = []
    monkeypatch.setattr(owner, "BEAT_S", 0.01)
    own = owner.refuse_if_taken_over

    def look(storage: Storage, term: Any) -> None:
        waited.append(storage.retry_s)
        own(storage, term)

    monkeypatch.setattr(owner, "refuse_if_taken_over", look)
    with owning(Storage(str(tmp_path / "run"), retry_s=60)):
        while not waited:
            owner.threading.Event().wait(0.01)
    assert set(waited) == {0.0}


# Wrong once.


@pytest.fixture
def wrong_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[str]]:
    """`wrong_once("list", "forks")`: the next listing of that folder is empty; `("size", ...)`: the next look-up says
    that there is none. Of a storage that is not a disk, as a disk is believed."""

    def begin(method: str, begins: str) -> list[str]:
        left = [begins]
        own = getattr(Storage, method)

        def call(self: Storage, path: str = "", **kwargs: Any) -> Any:
            if left and path.startswith(left[0]):
                left.clear()
                return []
            return own(self, path, **kwargs)

        monkeypatch.setattr(Storage, method, call)
        return left

    return begin


def remote() -> Storage:
    return Storage(f"memory://second-looks-{os.urandom(4).hex()}")


def test_old_pin_is_seen_though_a_listing_is_old(wrong_once: Callable[[str, str], list[str]]) -> None:
    storage = remote()
    storage.put("forks/child.json", json.dumps({"step": 6}).encode())
    left = wrong_once("list", "forks")
    assert old_pins(storage) == {"child": 6}
    assert not left


def test_object_that_is_denied_once_has_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, denied = remote(), []
    storage.put("a/b", b"123")
    own = Storage._call

    def call(self: Storage, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "size" and not denied:
            denied.append(name)
            raise FileNotFoundError(args[0])
        return own(self, name, *args, **kwargs)

    monkeypatch.setattr(Storage, "_call", call)
    assert storage.size("a/b") == 3
    assert denied
    assert storage.size("a/c") is None


def test_index_that_is_known_to_be_there_is_asked_for_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a storage that fails is not data that is wrong."""
    from relora_ray.data.tokens import read_index

    storage = remote()
    storage.put("index.json", (data / "index.json").read_bytes())
    own, left = Storage._call, [2]

    def call(self: Storage, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("cat_file", "cat") and left[0]:
            left[0] -= 1
            raise FileNotFoundError(args[0])
        return own(self, name, *args, **kwargs)

    monkeypatch.setattr(Storage, "_call", call)
    assert read_index(storage, expected=True).fingerprint
    assert left == [0]

    def fails(self: Storage, name: str, *args: Any, **kwargs: Any) -> Any:
        raise TimeoutError("503")

    monkeypatch.setattr(Storage, "_call", fails)
    storage.retry_s = 0.0
    with pytest.raises(StorageError):
        read_index(storage)


# Small ones.


def test_pauses_do_not_overflow() -> None:
    failures = Failures(-1)
    for now in range(1_100):
        failures.failed(float(now), stepped=False)
    assert failures.pause_s() == MOST_PAUSE_S


@pytest.mark.parametrize(
    "url",
    [
        "https://AKIA:9/xyzSecretKey@minio:9000",
        "https://AKIA:99999/a/b@host",
        "s3://key:secret@bucket/run",
        "https://user%3Apw%40h/x",
    ],
)
def test_password_that_looks_like_a_port_is_a_password(url: str) -> None:
    assert secret_in_url(url)
    assert not secret_in_url("http://minio:9000/bucket")


def test_text_from_storage_moves_no_cursor() -> None:
    assert printable("step 3\x1b[2J\n\tnext\r") == "step 3\ufffd[2J\n\tnext\ufffd"
