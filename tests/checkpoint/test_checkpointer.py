"""Checkpoints that are damaged, half-written, foreign or out of room. One process; ranks are in test_distributed."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relora_ray.checkpoint import layout, list_manifests, read_manifest
from relora_ray.checkpoint import parts as parts_module
from relora_ray.checkpoint.ownership import Term, new_driver
from relora_ray.checkpoint.parts import read_index
from relora_ray.commands.checkpoints import prune, verify
from relora_ray.commands.export import export
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError, DataError, NotSavedError, RankFailedError, StorageError
from relora_ray.loop import run_attempt
from relora_ray.modeling.parallel import World
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained
from relora_ray.runs.setting import find_setting
from relora_ray.storage import Storage
from relora_ray.verdict import verdict
from tests.test_storage import small_disk  # noqa: F401
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config


@pytest.fixture
def interrupted(cfg: RunConfig) -> RunConfig:
    """Stopped after step 9: checkpoints at 0, 2, 3, 4, 6, 8, 9, whose newest base is from step 9."""
    with pytest.raises(Crash):
        run(cfg, crash_at(10, "train"))
    assert list_manifests(run_storage(cfg)) == [0, 2, 3, 4, 6, 8, 9]
    return cfg


def part_files(cfg: RunConfig, step: int, kind: str) -> list[Path]:
    manifest = read_manifest(run_storage(cfg), step)
    part = manifest.base if kind == "base" else manifest.delta
    assert part is not None
    return [Path(run_storage(cfg).url, part.folder, o.path) for o in part.objects]


def manifest_path(cfg: RunConfig, step: int) -> Path:
    return Path(run_storage(cfg).url, read_manifest(run_storage(cfg), step).path)


def steps_of(storage: Storage, kind: str) -> list[int]:
    """Of the folders of all parts of a kind."""
    return sorted(int(name.split("-")[1]) for name in storage.folders(kind))


def new_term() -> Term:
    return Term(1, new_driver())


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("kind", ["base", "delta"])
@pytest.mark.parametrize("file", [0, 1])
def test_damaged_checkpoint_is_passed_over_and_named(
    interrupted: RunConfig, harm, kind: str, file: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole, records = run(interrupted.model_copy(update={"name": "whole"}))
    storage, damaged = run_storage(interrupted), read_manifest(run_storage(interrupted), 9)
    harm(spoilt := part_files(interrupted, 9, kind)[file])
    with caplog.at_level(logging.WARNING):
        state, after = run(interrupted)
    assert next(r["step"] for r in after if r["kind"] == "attempt") == 8
    assert f"{damaged.path} is passed over, and the run goes on from step 8: " in caplog.text
    assert spoilt.name in caplog.text
    assert state_digest(state) == state_digest(whole)
    assert losses(after) == {s: v for s, v in losses(records).items() if s > 8}
    assert read_manifest(storage, 9).attempt.startswith("0002.0001-")
    assert damaged.path not in storage.list("manifests"), "what is off the line goes with a later commit"
    assert [problem for _, problem in verify(storage, None) if problem] == []


def test_unreadable_manifest_is_passed_over(interrupted: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    path = manifest_path(interrupted, 9)
    path.write_text(path.read_text()[:50])
    with caplog.at_level(logging.WARNING):
        _, after = run(interrupted)
    assert next(r["step"] for r in after if r["kind"] == "attempt") == 8
    assert f"{path.name} is not a readable manifest" in caplog.text


def test_only_unreadable_manifests_are_an_error_and_not_a_new_start(interrupted: RunConfig) -> None:
    storage = run_storage(interrupted)
    for path in storage.list("manifests"):
        storage.put(path, b"")
    before = storage.list()
    with pytest.raises(
        CheckpointError, match=r"none of the 7 checkpoints is whole; the newest: .*not a readable manifest"
    ):
        run(interrupted)
    assert set(storage.list()) - set(before) == {"terms/0002.json"}
    assert set(before) <= set(storage.list())


def test_older_unreadable_manifest_does_no_harm(interrupted: RunConfig) -> None:
    manifest_path(interrupted, 4).write_text("{")
    state, after = run(interrupted)
    assert next(r["step"] for r in after if r["kind"] == "attempt") == 9
    assert state.position.step == 12


def test_failure_that_is_no_damage_does_not_fall_back(interrupted: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while loading says nothing about the checkpoint: it must stay the newest."""

    def exhausted(data: bytes) -> None:
        raise MemoryError("no memory")

    before = run_storage(interrupted).list("manifests")
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.safetensors.torch, "load", exhausted)
        with pytest.raises(RankFailedError, match=r"cannot load base/.*MemoryError: no memory") as caught:
            run(interrupted)
    assert verdict(caught.value) == "unknown", "another attempt is not refused"
    assert run_storage(interrupted).list("manifests") == before
    _, after = run(interrupted)
    assert next(r["step"] for r in after if r["kind"] == "attempt") == 9


def test_commit_whose_answer_was_lost_is_known_again(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client put the manifest, lost the answer, put it again and was refused by its own object."""
    original = Storage.put_new

    def twice(self: Storage, path: str, data: bytes) -> None:
        original(self, path, data)
        if path.startswith("manifests/"):
            original(self, path, data)

    monkeypatch.setattr(Storage, "put_new", twice)
    state, _ = run(cfg)
    assert state.position.step == 12


def test_metrics_and_pruning_that_fail_do_not_end_the_run(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Storage, *args: object) -> None:
        raise StorageError("no permission")

    put = Storage.put
    monkeypatch.setattr(Storage, "put", lambda self, *a: (refuse if "/metrics/" in self.url else put)(self, *a))
    monkeypatch.setattr(Storage, "delete", refuse)
    state, _ = run(cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"keep_last": 1})}))
    assert state.position.step == 12
    assert "metrics records wait: no permission" in caplog.text
    assert "could not remove what is no longer needed: no permission" in caplog.text


def test_interrupted_export_is_done_again(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Storage.put_file

    def die_at_weights(self: Storage, path: str, *given: Any, **more: Any) -> None:
        if path == "model.safetensors":
            raise Crash
        original(self, path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put_file", die_at_weights)
        with pytest.raises(Crash):
            run(cfg)
    assert not run_storage(cfg).exists("model/config.json")
    run(cfg)
    assert run_storage(cfg).exists("model/model.safetensors")
    assert run_storage(cfg).exists("model/config.json")


def test_storage_that_is_not_the_same_everywhere_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    """A worker on another machine, whose local path of that name is empty."""
    run(cfg)
    elsewhere = cfg.model_copy(update={"storage": str(tmp_path / "another-machine")})
    with pytest.raises(ConfigError, match="its storage is not the same place on all of them"):
        run_attempt(elsewhere, World(), attempt=new_term().attempt(1))
    assert not (tmp_path / "another-machine").exists()


def test_parts_without_a_manifest_are_no_checkpoint(interrupted: RunConfig) -> None:
    """What a crash between upload and commit leaves behind."""
    manifest_path(interrupted, 9).unlink()
    _, after = run(interrupted)
    assert next(r["step"] for r in after if r["kind"] == "attempt") == 8


def test_what_crashes_left_behind_goes_before_anything_is_stored(interrupted: RunConfig) -> None:
    """Attempts that never come to a commit, on a full disk say, do not fill it further: one writes down what is left
    behind, the next removes it."""
    storage = run_storage(interrupted)
    before = set(storage.list(unfinished=True))
    left = ["base/step-00000003-0001-aaaaaaaa/00000.safetensors", "delta/step-00000012-0001-aaaaaaaa/.partial-1f"]
    for path in left:
        Path(storage.url, path).parent.mkdir(parents=True)
        Path(storage.url, path).write_bytes(b"half")
    for written in (True, False):
        with pytest.raises(Crash):
            run(interrupted, crash_at(9, "attempt"))
        for thread in threading.enumerate():
            if thread.name.startswith("relora-ray-save"):
                thread.join(60)
        after = set(storage.list(unfinished=True))
        assert before <= after
        assert set(left) <= after if written else not after & set(left)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(interrupted: RunConfig) -> None:
    for path in Path(run_storage(interrupted).url, "delta").rglob("*.safetensors"):
        flip_bit(path)
    before = run_storage(interrupted).list("manifests")
    with pytest.raises(CheckpointError, match=r"none of the 7 checkpoints is whole; the newest: .*damaged"):
        run(interrupted)
    assert run_storage(interrupted).list("manifests") == before


def test_base_is_written_once_per_cycle(interrupted: RunConfig) -> None:
    storage = run_storage(interrupted)
    bases = {s: read_manifest(storage, s).base for s in list_manifests(storage)}
    assert bases[0] is None
    assert bases[2] is None
    folders = {s: b.folder.split("-")[1] for s, b in bases.items() if b is not None}
    assert folders == {3: "00000003", 4: "00000003", 6: "00000006", 8: "00000006", 9: "00000009"}


def test_nothing_stored_is_a_pickle(interrupted: RunConfig) -> None:
    for path in run_storage(interrupted).list():
        assert path.endswith((".json", ".jsonl", ".safetensors", ".yaml")), path
        if path.endswith(".json"):
            json.loads(run_storage(interrupted).get(path))


def test_zero_moments_are_not_stored(cfg: RunConfig) -> None:
    run(cfg)
    storage = run_storage(cfg)
    merged, inside = read_manifest(storage, 12), read_manifest(storage, 10)
    stored = read_index(storage, merged.delta)
    assert not [n for n in stored if "lora_" in n and n.endswith("exp_avg")]
    assert [n for n in read_index(storage, inside.delta) if "lora_B" in n and n.endswith("exp_avg")]
    assert merged.delta.size_bytes < inside.delta.size_bytes


def test_retention_keeps_the_newest_and_the_last_two_boundaries(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path, "checkpoint.keep_last=2")
    run(cfg)
    storage = run_storage(cfg)
    assert list_manifests(storage) == [9, 10, 12]
    assert steps_of(storage, "delta") == [6, 9, 10, 12], "6 is written down, and goes with the next commit"
    assert steps_of(storage, "base") == [6, 9, 12]
    list(prune(storage, keep_last=2, keep_every_steps=0, dry_run=False))
    assert steps_of(storage, "delta") == [9, 10, 12]
    assert steps_of(storage, "base") == [9, 12]


def test_large_states_are_cut_into_files(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(Crash):
        run(cfg, crash_at(5, "train"))
    files = [path for kind in ("base", "delta") for path in part_files(cfg, 4, kind) if path.suffix == ".safetensors"]
    assert max(path.stat().st_size for path in files) <= 100_000, "the embedding alone is 262,144 bytes"
    state, _ = run(cfg)
    whole, _ = run(cfg.model_copy(update={"name": "whole"}))
    assert state_digest(state) == state_digest(whole)


def test_full_disk_stops_the_run_and_loses_nothing(data: Path, small_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    """1 MB holds the first checkpoints only."""
    cfg = tiny_config(data, small_disk)
    with pytest.raises(NotSavedError, match=r"not stored.*No space left on device.*could resume from step \d"):
        run(cfg)
    kept = list_manifests(run_storage(cfg))
    assert kept
    moved = tmp_path / "larger"
    shutil.copytree(small_disk, moved)
    state, after = run(cfg.model_copy(update={"storage": str(moved)}))
    assert next(r["step"] for r in after if r["kind"] == "attempt") == kept[-1]
    whole, _ = run(cfg.model_copy(update={"storage": str(tmp_path), "name": "whole"}))
    assert state_digest(state) == state_digest(whole)


def test_second_commit_under_one_name_is_refused(cfg: RunConfig) -> None:
    """Two processes that take themselves for one attempt: the later one stops, the earlier one's checkpoint stays."""

    def interfere(record) -> None:
        if record["kind"] == "train" and record["step"] == 4:
            storage = run_storage(cfg)
            theirs = read_manifest(storage, 3).model_copy(update={"step": 4})
            storage.put(theirs.path, theirs.model_dump_json().encode())

    with pytest.raises(CheckpointError, match=r"exists, with other content: two processes take themselves for attempt"):
        run(cfg, interfere)
    assert read_manifest(run_storage(cfg), 4).tokens == 3 * cfg.tokens_per_step


def test_run_of_another_config_is_refused_with_the_difference(
    interrupted: RunConfig, data: Path, tmp_path: Path
) -> None:
    before = run_storage(interrupted).list()
    other = tiny_config(data, tmp_path, "optimizer.learning_rate=5e-3", "seed=4")
    with pytest.raises(ConfigError) as caught:
        run(other)
    assert "optimizer.learning_rate: 0.01 there, 0.005 here" in str(caught.value)
    assert "seed: 3 there, 4 here" in str(caught.value)
    assert "set another name" in str(caught.value)
    assert run_storage(interrupted).list() == before


def test_checkpoint_of_another_config_is_not_gone_on_from(interrupted: RunConfig) -> None:
    storage, newest = run_storage(interrupted), read_manifest(run_storage(interrupted), 9)
    storage.put(newest.path, newest.model_copy(update={"identity": "0" * 16}).model_dump_json().encode())
    with pytest.raises(CheckpointError, match="was made by a run of another config or other data"):
        run(interrupted)


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "tokenizer/tokenizer.json"])
def test_what_a_run_is_cannot_be_changed_unnoticed(interrupted: RunConfig, tmp_path: Path, name: str) -> None:
    setting = find_setting(run_storage(interrupted))
    assert setting.recorded is not None, "the first checkpoint has named it"
    setting.place.put(name, setting.get(name).replace(b"0", b"1", 1))
    with pytest.raises(CheckpointError, match=f"{name} is not the one that the run's checkpoints were made with"):
        export(run_storage(interrupted), Storage(str(tmp_path / "out")))


def test_operational_keys_may_change_between_attempts(interrupted: RunConfig, data: Path, tmp_path: Path) -> None:
    other = tiny_config(
        data, tmp_path, "train.micro_batch_rows=6", "checkpoint.save_every_steps=5", "cluster.workers=3"
    )
    state, after = run(other)
    assert state.position.step == 12
    assert losses(after).keys() == {10, 11, 12}


def test_other_data_is_refused(interrupted: RunConfig, data: Path, tmp_path: Path) -> None:
    from relora_ray.data.tokens import read_index as read_data_index
    from relora_ray.data.tokens import write_index

    other = Path(shutil.copytree(data, tmp_path / "other-data"))
    index = read_data_index(Storage(str(other)))
    write_index(Storage(str(other)), index.model_copy(update={"end_token_id": 1}))
    with pytest.raises(DataError, match=r"has fingerprint [0-9a-f]{16}, but the run needs [0-9a-f]{16}"):
        run(tiny_config(other, tmp_path))


def test_vocabulary_too_small_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.vocab_size=2000 is less than the 2048 token ids.*vocab_size=2048"):
        run(tiny_config(data, tmp_path, "model.vocab_size=2000"))
    assert not (tmp_path / "tiny").exists()


def test_config_may_be_corrected_until_there_is_a_checkpoint(cfg: RunConfig, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(tiny_config(data, tmp_path, "seed=77"), crash_at(0, "eval"))
    state, _ = run(cfg)
    assert state.position.step == 12


def test_run_is_exported_without_its_data(data: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(data, tmp_path / "data"))
    cfg = tiny_config(copied, tmp_path)
    with pytest.raises(Crash):
        run(cfg, crash_at(10, "train"))
    shutil.rmtree(copied)
    moved = Path(shutil.move(run_storage(cfg).url, tmp_path / "moved"))
    assert export(Storage(str(moved)), Storage(str(tmp_path / "out"))) == 9
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 2048
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == 0


def test_load_trained_names_the_steps_there_are(interrupted: RunConfig) -> None:
    storage = run_storage(interrupted)
    assert load_trained(storage).manifest.step == 9
    assert load_trained(storage, 2).manifest.step == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint at step 5\. It has 0, 2, 3, 4, 6, 8, 9"):
        load_trained(storage, 5)
    with pytest.raises(ConfigError, match="is not a run"):
        load_trained(storage.child("nowhere"))


def test_attempts_have_names_of_their_own(cfg: RunConfig) -> None:
    with pytest.raises(Crash):
        run(cfg, crash_at(3, "train"))
    run(cfg)
    storage = run_storage(cfg)
    names = [p.split("/")[1] for p in storage.list("metrics")]
    assert [n.split("-")[0] for n in names] == ["0001.0001", "0002.0001"]
    assert read_manifest(storage, 0).attempt == names[0]
    assert read_manifest(storage, 12).attempt == names[1]


def test_state_of_another_shape_is_refused(interrupted: RunConfig) -> None:
    """A checkpoint whose tensors do not fit the model says which."""
    trained = load_trained(run_storage(interrupted), 9)
    storage, manifest = run_storage(interrupted), trained.manifest
    from relora_ray.checkpoint import restore_model

    trained.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"differ in tensors: model\.extra"):
        restore_model(storage, manifest, trained.model, trained.method.frozen_names(trained.model))
