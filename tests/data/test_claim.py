"""Who prepares a dataset: two processes on one --out, killed ones, and one that wakes up late. Real processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import pytest

from relora_ray.data import pack as pack_module
from relora_ray.data import prepare as prepare_module
from relora_ray.data.claim import claiming
from relora_ray.data.prepare import Request, prepare
from relora_ray.data.tokenizer import load_tokenizer
from relora_ray.data.tokens import read_index
from relora_ray.errors import DataError
from relora_ray.storage import Storage
from tests.conftest import TOKENIZER
from tests.s3 import BUCKET, Server


def lines(word: str, number: int) -> str:
    return "".join(json.dumps({"text": f"{word} document {i} of some words."}) + "\n" for i in range(number))


def request(out: Path | str, *sources: Path | str, **settings: object) -> Request:
    base = Request(
        sources=tuple(map(str, sources)), out=str(out), tokenizer=str(TOKENIZER), validation_fraction=0.3, num_workers=1
    )
    return dataclasses.replace(base, **settings)


def words(out: Path) -> set[str]:
    ids = np.concatenate([np.load(path) for path in out.glob("*.npy")]).tolist()
    text = load_tokenizer(str(TOKENIZER)).decode(ids)
    return {document.split()[0] for document in text.split("<|endoftext|>")[:-1]}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@dataclasses.dataclass
class Owner:
    process: BaseProcess
    pipe: BinaryIO

    @property
    def pid(self) -> int:
        return self.process.pid

    def finish(self) -> None:
        self.pipe.close()
        self.process.join(60)


def prepare_in_front(wanted: Request) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    prepare(wanted, quiet=True)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """A prepare on `out` that has stored a part, and waits for the rest of its input, a named pipe."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    wanted = request(tmp_path / "out", tmp_path / "pipe.jsonl", num_workers=2, batch_mb=0.005)
    fork = multiprocessing.get_context("fork")  # a new interpreter would take many seconds for its imports
    process = fork.Process(target=prepare_in_front, args=(wanted,))
    process.start()
    with open(tmp_path / "pipe.jsonl", "wb", buffering=0) as pipe:
        pipe.write(lines("alpha", 4_000).encode())
        wait_for(lambda: list((tmp_path / "out/.prepare/parts").glob("*.json")) or not process.is_alive())
        assert process.is_alive()
        yield Owner(process, pipe)
    process.kill()
    process.join()


def test_the_second_of_two_is_refused_and_the_first_undisturbed(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "omega.jsonl").write_text(lines("omega", 40))
    with pytest.raises(DataError, match=rf"out is being prepared by process {owner.pid} on \S+, which lives"):
        prepare(request(tmp_path / "out", tmp_path / "omega.jsonl"), quiet=True)
    owner.pipe.write(lines("beta", 5).encode())
    owner.finish()
    assert owner.process.exitcode == 0
    assert words(tmp_path / "out") == {"alpha", "beta"}
    assert not (tmp_path / "out/.prepare").exists()


def test_one_that_waits_while_the_first_finishes_is_refused(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "omega.jsonl").write_text(lines("omega", 40))
    finishing = threading.Timer(1, owner.finish)
    finishing.start()
    with pytest.raises(DataError, match=rf"(being|was) prepared by process {owner.pid} on"):
        prepare(request(tmp_path / "out", tmp_path / "omega.jsonl"), quiet=True)
    finishing.join()
    assert words(tmp_path / "out") == {"alpha"}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_prepare_leaves_no_process_and_its_folder_is_free(
    sign: signal.Signals, owner: Owner, tmp_path: Path
) -> None:
    children = psutil.Process(owner.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(owner.pid, sign)
    owner.process.join(30)
    wait_for(lambda: not any(lives(child) for child in children))
    (tmp_path / "omega.jsonl").write_text(lines("omega", 40))
    prepare(request(tmp_path / "out", tmp_path / "omega.jsonl"), quiet=True)
    assert words(tmp_path / "out") == {"omega"}


def test_one_that_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    with claiming(storage) as claim:
        claim.check()
        storage.put_new(".prepare/terms/0002.json", b'{"driver": "beef"}')
        with pytest.raises(DataError, match="was taken over by another process"):
            claim.check()


def test_one_that_stood_still_replaces_nothing_of_who_took_over(tmp_path: Path) -> None:
    """It looks, stands still, and goes on to write."""
    storage = Storage(str(tmp_path / "out"))
    storage.put("train-00000.npy", b"theirs")
    looks = iter([None, DataError("taken over")])

    def check() -> None:
        if (error := next(looks)) is not None:
            raise error

    with pytest.raises(DataError, match="taken over"):
        pack_module._put_own(storage, "train-00000.npy", b"mine", check)
    assert storage.get("train-00000.npy") == b"theirs"


@pytest.mark.parametrize("left", ["index.json", ""])
def test_one_that_sleeps_until_another_has_finished_writes_nothing_more(left: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    with claiming(storage) as claim:
        storage.delete_below(".prepare")
        if left:
            storage.put(left, b"{}")
        with pytest.raises(DataError, match="was taken over by another process"):
            claim.check()


def test_a_dataset_that_comes_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it comes after the last look."""
    (tmp_path / "docs.jsonl").write_text(lines("alpha", 40))
    with monkeypatch.context() as patch:
        patch.setattr("relora_ray.data.claim.Claim.check", lambda self: None)
        patch.setattr(
            prepare_module, "store_tokenizer", lambda storage, *others: storage.put("index.json", b"theirs") or []
        )
        with pytest.raises(DataError, match="holds a dataset by now"):
            prepare(request(tmp_path / "out", tmp_path / "docs.jsonl"), quiet=True)
    assert (tmp_path / "out/index.json").read_bytes() == b"theirs"


def test_what_a_broken_off_preparation_left_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards than the next has, and files of another tokenizer."""
    (tmp_path / "long.jsonl").write_text(lines("alpha", 400))
    (tmp_path / "short.jsonl").write_text(lines("omega", 40))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_index", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(request(out, tmp_path / "long.jsonl", shard_tokens=500), quiet=True)
    assert len(list(out.glob("train-*.npy"))) > 3
    (out / "tokenizer/vocab.txt").write_text("of another one")
    index = prepare(request(out, tmp_path / "short.jsonl", shard_tokens=500), quiet=True)
    assert words(out) == {"omega"}
    assert len(list(out.glob("*.npy"))) == sum(len(split.shards) for split in index.splits.values())
    assert sorted(p.name for p in (out / "tokenizer").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_from_object_storage_to_object_storage(moto: Server, tmp_path: Path) -> None:
    """With options for both, and resumed."""
    options = tuple(f"{name}={value}" for name, value in moto.options.items())
    url = f"s3://{BUCKET}/{tmp_path.name}"
    storage = Storage(url, moto.options)
    storage.put("in/a.jsonl", lines("alpha", 40).encode())
    wanted = request(f"{url}/out", f"{url}/in/*.jsonl", storage_option=options)
    index = prepare(wanted, quiet=True)
    assert index == read_index(storage.child("out"))
    assert sorted(storage.list("out")) == [
        "out/index.json", "out/tokenizer/tokenizer.json", "out/tokenizer/tokenizer_config.json",
        "out/train-00000.npy", "out/validation-00000.npy",
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines("alpha", 40))
    assert prepare(request(tmp_path / "out", tmp_path / "a.jsonl"), quiet=True) == index
    local = request(tmp_path / "out2", f"{url}/in/a.jsonl", storage_option=options)
    assert prepare(local, quiet=True) == index
    other = request(tmp_path / "out3", f"{url}/in/a.jsonl", storage_option=("key=wrong",), source_option=options)
    assert prepare(other, quiet=True) == index
