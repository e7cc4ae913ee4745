"""Whole runs on S3: data, checkpoints, metrics and export on three servers; and on one that fails all the time."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.commands.checkpoints import verify
from relora_ray.commands.export import export
from relora_ray.commands.report import summary
from relora_ray.config import RunConfig
from relora_ray.data.tokens import cache_folder
from relora_ray.errors import ConfigError, DataError
from relora_ray.runs.metrics import Record, read
from relora_ray.runs.places import data_storage, run_storage
from relora_ray.storage import Storage
from tests.s3 import BUCKET, SECRET, FaultyProxy, Server, storage_options
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config


@pytest.fixture
def remote(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """A tiny run whose data and storage are on the server at an endpoint."""
    monkeypatch.setenv("RELORA_RAY_CACHE", str(tmp_path / "cache"))

    def make(endpoint: str, *overrides: str) -> RunConfig:
        options, prefix = storage_options(endpoint), f"s3://{BUCKET}/{os.urandom(4).hex()}"
        local, there = Storage(str(data)), Storage(f"{prefix}/data", options)
        for path in local.list():
            there.put(path, local.get(path))
        settings = [f"data.path={prefix}/data", f"storage_options={json.dumps(options)}", "checkpoint.save_async=true"]
        cfg = tiny_config(data, Path("unused"), *settings, *overrides)
        return cfg.model_copy(update={"storage": f"{prefix}/runs"})

    return make


@pytest.mark.parametrize("kind", ["moto", "rclone", "ceph"])
def test_whole_run_on_a_server(
    remote: Callable[..., RunConfig],
    server: Callable[[str], Server],
    kind: str,
    cfg: RunConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stopped, gone on with, reported and exported, all over the socket; the result is the local run's."""
    there = remote(server(kind).endpoint)
    with pytest.raises(Crash):
        run(there, crash_at(8, "train"))
    state, after = run(there)
    whole, records = run(cfg)
    assert state_digest(state) == state_digest(whole)
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step in losses(after)}
    assert {r["step"]: r["loss"] for r in read(run_storage(there), "train")} == losses(records), "no metrics are lost"
    assert [wrong for _, wrong in verify(run_storage(there), None) if wrong] == []
    assert "after step      12" in summary(run_storage(there))
    options = storage_options(server(kind).endpoint)
    out = Storage(f"{there.storage}/exported", options)
    assert export(run_storage(there), out) == 12
    local = Storage(str(tmp_path / "exported"))
    for path in out.list():
        local.put(path, out.get(path))
    _, info = transformers.AutoModelForCausalLM.from_pretrained(local.url, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    everything = Storage(there.storage.removesuffix("/runs"), options)
    assert [path for path in everything.list() if SECRET.encode() in everything.get(path)] == []
    assert SECRET not in caplog.text


def test_run_is_the_same_while_every_fifth_request_fails(
    remote: Callable[..., RunConfig], proxy: FaultyProxy, cfg: RunConfig
) -> None:
    """500, 503, connections that break off, answers that are lost, bodies that are cut short: seeded, any request."""
    there = remote(proxy.endpoint)
    choose, kinds = random.Random(7), ["500", "503", "reset", "lost", "truncated"]
    seen: list[str] = []

    def fail_at_times(method: str, path: str) -> None:
        if choose.random() < 0.2:
            kind = choose.choice(kinds)
            seen.append(kind)
            proxy.add(kind, method, path)

    proxy.on_request = fail_at_times
    with pytest.raises(Crash):
        run(there, crash_at(7, "train"))
    state, _ = run(there)
    proxy.on_request = lambda method, path: None
    whole, records = run(cfg)
    assert len(set(seen)) >= 3
    assert len(seen) > 10
    assert state_digest(state) == state_digest(whole)
    assert {r["step"]: r["loss"] for r in read(run_storage(there), "train")} == losses(records)
    assert list_manifests(run_storage(there))[-1] == 12
    assert [wrong for _, wrong in verify(run_storage(there), None) if wrong] == []


@pytest.fixture
def stopped(remote: Callable[..., RunConfig], proxy: FaultyProxy) -> tuple[RunConfig, Storage]:
    """A run with a checkpoint at step 9, and its folder, asked directly."""
    cfg = remote(proxy.endpoint, "storage_retry_s=3", "checkpoint.save_async=false")
    with pytest.raises(Crash):
        run(cfg, crash_at(10, "train"))
    direct = Storage(f"{cfg.storage}/{cfg.name}", storage_options(proxy.target))
    assert list_manifests(direct)[-1] == 9
    return cfg, direct


def test_one_missing_answer_to_every_question_while_resuming_loses_nothing(
    stopped: tuple[RunConfig, Storage], proxy: FaultyProxy, cfg: RunConfig
) -> None:
    """As behind a gateway that fails over: every first GET, of an object or a listing, says that there is none."""
    there, direct = stopped
    before, asked, found = set(direct.list()), set(), []

    def deny_once(method: str, path: str) -> None:
        if method == "GET" and there.name in path and path not in asked and not found:
            asked.add(path)
            proxy.add("404", method, path)

    def on_record(record: Record) -> None:
        if record["kind"] == "attempt":
            found.append(record["step"])
            assert before <= set(direct.list()), "nothing is deleted"

    proxy.on_request = deny_once
    state, after = run(there, on_record)
    assert {"manifests", "delta", "base", "setup"} <= {
        kind for path in asked for kind in ("manifests", "delta", "base", "setup") if f"/{there.name}/{kind}/" in path
    }
    assert any("list-type" in path for path in asked)
    assert found == [9]
    whole, records = run(cfg)
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step > 9}
    assert state_digest(state) == state_digest(whole)


@pytest.mark.parametrize("kind", ["delta", "base", "manifests"])
def test_checkpoint_that_stays_missing_is_passed_over_and_left(
    stopped: tuple[RunConfig, Storage], proxy: FaultyProxy, kind: str
) -> None:
    there, direct = stopped
    newest, before = read_manifest(direct, 9), set(direct.list())
    assert newest.base is not None
    denied = {"delta": newest.delta.folder, "base": newest.base.folder, "manifests": newest.path}[kind]
    fault = proxy.add("404", "GET", f"{there.name}/{denied}", times=float("inf"))

    def on_record(record: Record) -> None:
        if record["kind"] == "attempt":
            assert record["step"] == 8
            assert before <= set(direct.list())
        if record["kind"] == "train":
            raise Crash

    with pytest.raises(Crash):
        run(there, on_record)
    assert fault.seen > 1
    proxy.faults.remove(fault)
    state, after = run(there)
    assert [r["step"] for r in after if r["kind"] == "attempt"] == [9], "it is there after all"
    assert state.position.step == 12
    assert [wrong for _, wrong in verify(direct, None) if wrong] == []


def test_checkpoint_that_stays_missing_goes_with_later_commits(
    stopped: tuple[RunConfig, Storage], proxy: FaultyProxy
) -> None:
    there, direct = stopped
    newest = read_manifest(direct, 9)
    proxy.add("404", "GET", f"{there.name}/{newest.delta.folder}", times=float("inf"))
    run(there)
    assert newest.path not in direct.list("manifests")
    assert direct.list(newest.delta.folder) == []
    assert [wrong for _, wrong in verify(direct, None) if wrong] == []


def test_remote_shards_are_copied_once_and_checked(
    remote: Callable[..., RunConfig], proxy: FaultyProxy, tmp_path: Path
) -> None:
    there = remote(proxy.endpoint)
    run(there)
    shards = Storage(f"{cache_folder()}/shards").list()
    assert shards
    before = len(proxy.log)
    run(there.model_copy(update={"name": "again"}))
    assert [path for method, path in proxy.log[before:] if ".npy" in path and method == "GET"] == []
    storage = data_storage(there)
    path = next(path for path in storage.list() if path.startswith("train-"))
    storage.put(path, storage.get(path)[:-1] + b"\xff")
    Storage(cache_folder()).delete_below("shards")
    with pytest.raises(DataError, match=r"train-.* is damaged: its SHA-256 is not the index's"):
        run(there.model_copy(update={"name": "damaged"}))


@pytest.mark.parametrize(("kind", "expected"), [("403", "Access ?Denied|injected"), ("404", "injected|not exist")])
def test_storage_that_refuses_is_an_error_before_training(
    remote: Callable[..., RunConfig], proxy: FaultyProxy, kind: str, expected: str
) -> None:
    from relora_ray.errors import StorageError

    there = remote(proxy.endpoint)
    proxy.add(kind, "PUT", times=float("inf"))
    with pytest.raises(StorageError, match=f"cannot write s3://.*({expected})"):
        run(there)


def test_file_system_whose_package_is_missing_is_named(cfg: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/runs cannot be used as storage: .*gcsfs"):
        run(cfg.model_copy(update={"storage": "gs://bucket/runs"}))
