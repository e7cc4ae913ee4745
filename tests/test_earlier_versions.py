"""A run that a version without terms, lines and set-ups stored, format 3 of its manifests: this one goes on with it.

See fixtures/README.md. Nothing is faked.
"""

from __future__ import annotations

import json
import tarfile
import uuid
from pathlib import Path

import pytest
import transformers

from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.checkpoint.manifest import FORMAT
from relora_ray.commands.checkpoints import copy, list_lines, own, prune, show_lines, verify
from relora_ray.commands.export import export
from relora_ray.commands.status import status
from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.errors import RunBusyError
from relora_ray.loop import TrainState
from relora_ray.runs.fork import fork
from relora_ray.runs.metrics import read
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import read_config
from relora_ray.storage import Storage
from tests.conftest import ROOT
from tests.s3 import BUCKET, Server
from tests.tiny import losses, run, state_tensors

CONFIG = """
name: before
seed: 3
steps: 12
global_batch_rows: 6
model: {hidden_size: 8, intermediate_size: 12, num_layers: 1, num_heads: 2, vocab_size: 264}
data: {seq_len: 24}
method: {kind: relora, lora_rank: 2, alpha: 8, warm_start_steps: 3, merge_every_steps: 3}
optimizer: {learning_rate: 1.0e-2}
schedule: {kind: jagged_cosine, warmup_steps: 1, restart_warmup_steps: 1}
train: {micro_batch_rows: 3, eval_rows: 5}
checkpoint: {save_every_steps: 2, keep_last: 2, save_async: false}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with tarfile.open(ROOT / "tests/fixtures/run-format-3.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def config(place: Path, *overrides: str) -> RunConfig:
    return parse_config(CONFIG, [f"storage={place}", f"data.path={place}/data", *overrides])


def undisturbed(place: Path) -> tuple[dict[int, float], TrainState]:
    """Of a run that this version trained from its start: losses by step, and its last state."""
    state, records = run(config(place, "name=undisturbed"))
    return losses(records), state


def assert_went_on(cfg: RunConfig, expected: tuple[dict[int, float], TrainState]) -> None:
    """Not bit for bit: another processor than this one may have stored the run."""
    state, after = run(cfg)
    assert losses(after).keys() == {8, 9, 10, 11, 12}
    assert [r["step"] for r in after if r["kind"] == "attempt"] == [7]
    whole = {r["step"]: r["loss"] for r in read(run_storage(cfg), "train")}
    assert whole == pytest.approx(expected[0], rel=1e-5)
    assert_close(state, expected[1])


def assert_close(state: TrainState, expected: TrainState) -> None:
    """Measured between two processors: 5e-7. An update more or less is 1e-2."""
    for ours, theirs in zip(state_tensors(state), state_tensors(expected), strict=True):
        difference = (ours.double() - theirs.double()).abs().max().item()
        assert difference <= 1e-5 * theirs.abs().max().item()


def test_it_goes_on_to_the_end(place: Path) -> None:
    cfg = config(place)
    assert_went_on(cfg, undisturbed(place))
    storage = run_storage(cfg)
    assert [problem for _, problem in verify(storage, None) if problem] == []
    newest = read_manifest(storage, 12)
    assert newest.setup is None, "what the run is stays where it was"
    assert newest.attempt.startswith("0001.0001-")
    assert list_manifests(storage) == [9, 10, 12]
    assert not storage.exists("manifests/step-00000007.json"), "what is no longer needed goes, by either format's name"
    assert storage.exists("model/config.json")
    list(prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert [name[:13] for name in storage.folders("delta")] == ["step-00000009", "step-00000012"]


def test_it_goes_on_on_a_server(place: Path, moto: Server) -> None:
    there = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    storage = Storage(f"{there}/before", moto.options)
    for path in (local := Storage(f"{place}/before")).list():
        storage.put(path, local.get(path))
    cfg = config(place, f"storage={there}", f"storage_options={json.dumps(moto.options)}", "storage_retry_s=2")
    assert_went_on(cfg, undisturbed(place))
    assert [problem for _, problem in verify(storage, None) if problem] == []


def test_commands_know_it(place: Path) -> None:
    storage, before = Storage(f"{place}/before"), Storage(f"{place}/before").list()
    assert list_manifests(storage) == [6, 7]
    assert [line.split()[0] for line in list_lines(storage)][1:] == ["6", "7"]
    assert "after 7 updates" in "\n".join(show_lines(storage, None))
    assert list(verify(storage, None)) == [(6, ""), (7, "")]
    assert "saved     step 7," in "\n".join(status(storage, 0.0))
    assert read_config(storage).train.stop_after_steps == 7
    assert export(storage, Storage(f"{place}/out")) == 7
    assert len(transformers.AutoTokenizer.from_pretrained(f"{place}/out")) == 260
    assert storage.list() == before


def test_it_is_copied_and_forked(place: Path) -> None:
    expected = undisturbed(place)
    copied = config(place, "name=copied")
    copy(Storage(f"{place}/before"), run_storage(copied), None)
    _, after = run(copied)
    assert losses(after) == pytest.approx({s: v for s, v in expected[0].items() if s > 7}, rel=1e-5)
    forked = config(place, "name=forked", "method.lora_rank=3")
    fork(forked, "before", 6)
    run(config(place))  # the parent goes on, and removes what it no longer needs
    assert [problem for _, problem in verify(run_storage(forked), None)] == [""]
    assert "has a base of its own" in own(run_storage(forked))
    assert [problem for _, problem in verify(run_storage(forked), None)] == [""]
    assert run(forked)[0].position.step == 12


def test_driver_of_an_earlier_version_is_not_trampled_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trains shows it at another place."""
    storage, beats = Storage(f"{place}/before"), iter(range(1000))
    monkeypatch.setattr(
        "relora_ray.checkpoint.ownership.clock.sleep",
        lambda s: storage.put("driver.json", json.dumps({"id": "x", "host": "there", "beat": next(beats)}).encode()),
    )
    storage.put("driver.json", b'{"id": "x", "host": "there", "beat": -1}')
    with pytest.raises(RunBusyError, match="is being trained by another driver"):
        run(config(place))
    assert storage.list("terms") == []


def test_it_goes_on_from_where_it_had_gone_back_to(place: Path) -> None:
    """It diverged with its last update, and ended before it was begun again."""
    record = {"number": 1, "to_step": 6, "skip_from": 6, "skip_until": 7, "why": "it diverged", "unix_time": 0.0}
    Storage(f"{place}/before").put("rollbacks/0001.json", json.dumps(record).encode())
    state, after = run(config(place))
    assert [r["step"] for r in after if r["kind"] == "attempt"] == [6]
    by_hand, _ = run(config(place, "name=hand", "train.skip_steps=[6]"))
    assert state.position.counters.rollbacks == 1
    assert_close(state, by_hand)
    assert read_manifest(run_storage(config(place)), 12).rollbacks[0].to_step == 6
    assert [r["step"] for r in run(config(place))[1] if r["kind"] == "attempt"] == [12]


def test_run_of_format_4_goes_on(tmp_path: Path) -> None:
    """It named no tensors that hold zeros only."""
    with tarfile.open(ROOT / "tests/fixtures/run-format-4.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    cfg = config(tmp_path)
    assert read_manifest(run_storage(cfg), 7).format == 4
    assert_went_on(cfg, undisturbed(tmp_path))
    assert read_manifest(run_storage(cfg), 12).format == FORMAT
    assert [problem for _, problem in verify(run_storage(cfg), None) if problem] == []
