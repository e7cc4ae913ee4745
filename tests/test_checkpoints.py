"""`python -m relora_ray.checkpoints`: list, show, verify, prune and copy, on a local folder and on S3."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from threading import Lock

import pytest

from relora_ray.checkpoint import list_manifests, ownership, parts, read_manifest
from relora_ray.checkpoint.manifest import Part, StoredObject
from relora_ray.checkpoint.ownership import Life, claim
from relora_ray.commands import checkpoints
from relora_ray.commands.export import export
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError, DamagedError, StorageError
from relora_ray.runs.fork import fork
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import export_model, load_trained
from relora_ray.runs.setting import Setting, check_run, find_setting, read_config
from relora_ray.storage import Storage
from tests.s3 import BUCKET, Server
from tests.tiny import losses, run, state_digest, tiny_config


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Checkpoints at 0, 2, 3, 4, 6, 8, 9, 10, 12; boundaries at 3, 6, 9 and 12. Not to be changed."""
    cfg = tiny_config(data, tmp_path_factory.mktemp("done"))
    run(cfg)
    return cfg


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and all output of one command."""

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, args)])
        code = checkpoints.main()
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def damage(storage: Storage, step: int) -> str:
    """Flip a bit in the largest object of a delta; its path."""
    part = read_manifest(storage, step).delta
    path = f"{part.folder}/{max(part.objects, key=lambda o: o.size_bytes).path}"
    raw = bytearray(storage.get(path))
    raw[len(raw) // 2] ^= 1
    storage.put(path, bytes(raw))
    return path


def test_list_has_a_line_for_every_checkpoint(done: RunConfig, cli) -> None:
    code, text = cli("list", run_storage(done).url)
    assert code == 0
    lines = text.splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list_manifests(run_storage(done))
    assert "none" in lines[0]
    assert "the same" in lines[3]


def test_show_says_what_a_checkpoint_holds_by_role(done: RunConfig, cli) -> None:
    code, text = cli("show", run_storage(done).url, "--step", 10)
    assert code == 0
    for words in ("after 10 updates", "base", "delta", "first moments of adapters", "embeddings and head", "merges 2"):
        assert words in text
    assert "first moments of adapters" not in cli("show", run_storage(done).url)[1], "a merge has just cleared them"


def test_verify_finds_a_flipped_bit_and_names_the_object(cfg: RunConfig, cli) -> None:
    run(cfg)
    storage = run_storage(cfg)
    assert cli("verify", storage.url)[0] == 0
    path = damage(storage, 8)
    code, text = cli("verify", storage.url)
    assert code == 1
    wrong = [line for line in text.splitlines() if "as recorded" not in line]
    assert len(wrong) == 1
    assert path in wrong[0]
    assert cli("verify", storage.url, "--step", 9)[0] == 0
    storage.put(unreadable := read_manifest(storage, 4).path, b"{")
    assert f"{unreadable} is not a readable manifest" in cli("verify", storage.url)[1]


def test_prune_is_a_dry_run_unless_told(cfg: RunConfig, cli) -> None:
    run(cfg)
    storage = run_storage(cfg)
    before = storage.list()
    code, text = cli("prune", storage.url, "--keep-last", 2, "--keep-every-steps", 4)
    assert (code, storage.list()) == (0, before)
    assert f"would remove {read_manifest(storage, 6).path}" in text
    assert "nothing was changed" in text
    assert cli("prune", storage.url, "--keep-last", 2, "--keep-every-steps", 4, "--yes")[0] == 0
    assert list_manifests(storage) == [0, 4, 8, 9, 10, 12]
    assert cli("verify", storage.url)[0] == 0
    assert load_trained(storage, 8).manifest.step == 8


def test_prune_removes_what_attempts_before_it_left_behind(cfg: RunConfig, cli) -> None:
    run(cfg)
    storage = run_storage(cfg)
    left = "delta/step-00000013-0001.0001-ffffffff/r00000-p000.safetensors"
    later = "delta/step-00000013-0009.0001-ffffffff/r00000-p000.safetensors"
    storage.put(left, b"never committed")
    storage.put(later, b"of an owner that came meanwhile")
    cli("prune", storage.url, "--keep-last", 1, "--yes")
    assert not storage.exists(left)
    assert storage.exists(later)
    assert list_manifests(storage) == [9, 12], "and those of the last two boundaries"


def test_prune_keeps_the_older_ones_while_the_newest_is_damaged(cfg: RunConfig, cli) -> None:
    run(cfg)
    storage = run_storage(cfg)
    path, before = damage(storage, 12), storage.list()
    code, text = cli("prune", storage.url, "--keep-last", 1, "--yes")
    assert (code, storage.list("manifests")) == (1, [p for p in before if p.startswith("manifests/")])
    assert path in text
    assert "step 12, is not whole" in text


def test_note_among_the_pins_is_no_pin(cfg: RunConfig, cli) -> None:
    run(cfg)
    storage = run_storage(cfg)
    storage.put("pins/readme", b"do not touch")
    storage.put("forks/readme.txt", b"do not touch")
    assert cli("prune", storage.url, "--keep-last", 1, "--yes")[0] == 0
    assert list_manifests(storage) == [9, 12]
    storage.put("pins/child.0.json", b"cut o")
    code, text = cli("prune", storage.url, "--keep-last", 1, "--yes")
    assert code == 1
    assert "pins/child.0.json is no readable pin" in text


@pytest.mark.parametrize("command", [("prune", "--keep-last", 1, "--yes"), ("own",), ("delete", "--yes")])
def test_run_that_is_being_trained_is_left_alone(
    cfg: RunConfig, cli, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], data: Path
) -> None:
    fork_of_it = command[0] == "own"
    run(cfg)
    if fork_of_it:
        cfg = tiny_config(data, Path(cfg.storage), "name=child")
        fork(cfg, "tiny", 6)
    storage = run_storage(cfg)
    life = Life(storage, claim(storage).driver)
    life.beat()
    monkeypatch.setattr(ownership, "_machine", lambda: "another")
    monkeypatch.setattr(ownership.clock, "sleep", lambda s: life.beat())
    before = storage.list()
    code, text = cli(command[0], storage.url, *command[1:])
    assert code == 2
    assert "RunBusyError" in text
    assert storage.list() == before


def test_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's retention takes what is being read."""
    run(cfg)
    storage, original, keep_last, lock = run_storage(cfg), parts.read_checked, {"delta": 0}, Lock()

    def read_late(run: Storage, part: Part, stored: StoredObject) -> bytes:
        with lock:
            number = keep_last["delta"] if part.folder.startswith(late) else 0
            if number:
                keep_last["delta"] = 0
                monkeypatch.setattr(parts, "read_checked", original)  # pruning reads, too
                list(checkpoints.prune(storage, keep_last=number, keep_every_steps=0, dry_run=False))
                monkeypatch.setattr(parts, "read_checked", read_late)
        return original(run, part, stored)

    monkeypatch.setattr(parts, "read_checked", read_late)
    late, keep_last["delta"] = "delta/step-00000004", 3
    assert list(checkpoints.verify(storage, None)) == [(step, "") for step in (0, 2, 3, 9, 10, 12)]
    late, keep_last["delta"] = "delta/step-00000010", 1
    with pytest.raises(CheckpointError, match=r"has no checkpoint at step 10\. It has 9, 12") as caught:
        checkpoints.copy(storage, Storage(str(tmp_path / "out")), 10)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("where", ["manifest", "set-up"])
def test_names_that_lead_out_of_the_run_are_refused(cfg: RunConfig, tmp_path: Path, cli, where: str) -> None:
    run(cfg)
    storage = run_storage(cfg)
    manifest = json.loads(storage.get(path := read_manifest(storage, 12).path))
    if where == "manifest":
        manifest["delta"]["objects"][0]["path"] = "../x"
    else:
        (tmp_path / "tiny/x").write_bytes(b"spoilt")
        entry = {"path": "tokenizer/../../../x", "size_bytes": 6, "sha256": sha256(b"spoilt").hexdigest()}
        manifest["setup"]["objects"].append(entry)
    storage.put(path, json.dumps(manifest).encode())
    before = set(os.listdir(tmp_path))
    code, text = cli("copy", storage.url, tmp_path / "out/copy", "--step", 12)
    assert code in (1, 2)
    assert ("is not a readable manifest" if where == "manifest" else "is no name of an object below") in text
    if where == "set-up":
        with pytest.raises(StorageError, match="is no name of an object below"):
            export(storage, Storage(str(tmp_path / "out/model")))
    assert set(os.listdir(tmp_path)) - before <= {"out"}
    assert list_manifests(Storage(str(tmp_path / "out/copy"))) == []


def test_tokenizer_names_of_an_earlier_version_are_checked_too(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what a listing says, and keys of an object store may hold dots."""
    run(cfg)
    storage, listing = run_storage(cfg), Storage.list
    out = Storage(str(tmp_path / "out"))
    setting = Setting(storage, "", None)
    for name in ("config.yaml", "data.json"):
        storage.put(name, find_setting(storage).get(name))
    storage.put("x", b"spoilt")
    monkeypatch.setattr(
        Storage, "list", lambda self, p="", **o: ["tokenizer/../x"] if p == "tokenizer" else listing(self, p, **o)
    )
    trained = load_trained(storage)
    with pytest.raises(StorageError, match="is no name of an object below"):
        export_model(setting, trained.cfg, trained.model, trained.method.dense_state_dict(trained.model), out)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["local", "s3"])
def test_copy_is_a_run_of_its_own(done: RunConfig, tmp_path: Path, moto: Server, to: str, cli) -> None:
    """Resumed where it was copied to, it goes on as the original did."""
    name = f"copy-{os.urandom(4).hex()}"
    parent = str(tmp_path) if to == "local" else f"s3://{BUCKET}/copies"
    options = moto.options if to == "s3" else {}
    flags = [flag for key, value in options.items() for flag in ("--storage-option", f"{key}={value}")]
    code, text = cli("copy", run_storage(done).url, f"{parent}/{name}", "--step", 8, *flags)
    assert code == 0, text
    out = Storage(f"{parent}/{name}", options)
    assert list_manifests(out) == [8]
    assert read_config(out).name == name
    moved = done.model_copy(update={"storage": parent, "name": name, "storage_options": options})
    state, after = run(check_run(moved))
    whole, records = run(done.model_copy(update={"storage": str(tmp_path / "whole")}))
    assert state_digest(state) == state_digest(whole)
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step > 8}
    code, text = cli("copy", run_storage(done).url, f"{parent}/{name}", *flags)
    assert code == 2
    assert "is not empty" in text


def test_copy_refuses_damage(cfg: RunConfig, tmp_path: Path, cli) -> None:
    run(cfg)
    path = damage(run_storage(cfg), 12)
    code, text = cli("copy", run_storage(cfg).url, tmp_path / "copy")
    assert code == 1
    assert path in text
    assert list_manifests(Storage(str(tmp_path / "copy"))) == []


@pytest.mark.parametrize("then", ["copy", "delete"])
def test_copy_that_was_cut_off_is_no_run_and_is_copied_again_or_removed(
    cfg: RunConfig, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    run(cfg)
    out, left, own = Storage(f"{tmp_path}/other/copy"), [3], Storage.put

    def put(self: Storage, path: str, data: bytes) -> None:
        if self.url == out.url and path.startswith(("base/", "delta/")):
            left[0] -= 1
            if left[0] < 0:
                raise StorageError("the disk is full")
        own(self, path, data)

    monkeypatch.setattr(Storage, "put", put)
    assert cli("copy", run_storage(cfg).url, out.url)[0] == 2
    monkeypatch.undo()
    moved = cfg.model_copy(update={"storage": f"{tmp_path}/other", "name": "copy"})
    with pytest.raises(ConfigError, match="is a copy that was not finished"):
        check_run(moved)
    args = [run_storage(cfg).url, out.url] if then == "copy" else [out.url, "--yes"]
    code, text = cli(then, *args)
    assert code == 0, text
    if then == "copy":
        assert cli("verify", out.url)[0] == 0
        assert list_manifests(out) == [12]
        assert not [path for path in out.list() if "copying" in path]
    else:
        assert out.list() == []


def test_run_inside_a_run_is_refused(done: RunConfig, cli) -> None:
    url = run_storage(done).url
    code, text = cli("copy", url, f"{url}/copy")
    assert code == 2
    assert "would lie inside a run" in text
    with pytest.raises(ConfigError, match="would lie inside a run"):
        check_run(done.model_copy(update={"storage": url, "name": "inner"}))


def test_link_to_a_run_is_not_deleted(done: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run_storage(done).url)
    with pytest.raises(ConfigError, match=r"is a link\. Give the run's own folder"):
        checkpoints.delete(Storage(str(tmp_path / "link")))
    assert list_manifests(run_storage(done))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["list", "nowhere"], "is not a run"),
        (["show", "RUN", "--step", "5"], "has no checkpoint at step 5. It has 0, 2, 3"),
        (["copy", "RUN", "bad name"], "name="),
    ],
)
def test_what_cannot_be_done_is_refused(done: RunConfig, cli, args: list[str], expected: str) -> None:
    code, text = cli(*[run_storage(done).url if arg == "RUN" else arg for arg in args])
    assert code == 2
    assert expected in text
    assert not Path("bad name").exists(), "nothing is written before all is known to fit"


def test_what_a_driver_wrote_after_its_folder_was_moved_is_no_new_run(data: Path, tmp_path: Path) -> None:
    """Without a word the run would begin anew, and whoever puts the folder back would put it into that one."""
    cfg = tiny_config(data, tmp_path, "name=moved")
    run(cfg)
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    (tmp_path / "moved/metrics/0001.0001-aa").mkdir(parents=True)
    (tmp_path / "moved/metrics/0001.0001-aa/00000.jsonl").write_text('{"kind": "train", "step": 7, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match=r"moved holds metrics of a run, but neither what"):
        check_run(cfg)
    (tmp_path / "moved/metrics/0001.0001-aa/00000.jsonl").unlink()
    assert check_run(cfg).name == "moved"
