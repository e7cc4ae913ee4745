"""Forks: a run that goes on from another's checkpoint at a boundary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from relora_ray.checkpoint import Rollback, list_manifests, read_manifest
from relora_ray.checkpoint.commit import rollback_path
from relora_ray.checkpoint.history import read_pins
from relora_ray.checkpoint.ownership import claim
from relora_ray.commands.checkpoints import copy, delete, list_lines, own, prune, show_lines, verify
from relora_ray.commands.report import summary
from relora_ray.config import RunConfig
from relora_ray.errors import CheckpointError, ConfigError, DamagedError
from relora_ray.loop import build_state
from relora_ray.methods.base import build_method
from relora_ray.modeling.parallel import World
from relora_ray.runs.fork import fork
from relora_ray.runs.forkable import warm_start_digest
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained
from relora_ray.storage import Storage
from tests.s3 import BUCKET, Server
from tests.tiny import losses, run, state_digest, tiny_config

WARM = ("name=warm", "train.stop_after_steps=3")
OTHER = (
    "method.lora_rank=8",
    "method.merge_every_steps=9",
    "schedule.restart_warmup_steps=2",
    "method.reset.kind=none",
)


def warm(data: Path, folder: Path) -> RunConfig:
    cfg = tiny_config(data, folder, *WARM)
    run(cfg)
    return cfg


def test_run_stops_where_it_is_told_and_goes_on(data: Path, tmp_path: Path) -> None:
    expected, records = run(tiny_config(data, tmp_path / "whole"))
    first, begun = run(tiny_config(data, tmp_path, "train.stop_after_steps=5"))
    assert first.position.step == 5
    assert list_manifests(run_storage(tiny_config(data, tmp_path)))[-1] == 5
    assert not (tmp_path / "tiny/model").exists(), "only a whole run is exported"
    again, nothing = run(tiny_config(data, tmp_path, "train.stop_after_steps=5"))
    assert again.position.step == 5
    assert losses(nothing) == {}
    state, rest = run(tiny_config(data, tmp_path))
    assert losses(begun) | losses(rest) == losses(records)
    assert state_digest(state) == state_digest(expected)
    assert (tmp_path / "tiny/model").exists()
    with pytest.raises(ConfigError, match="stop_after_steps=13 is more than steps=12, the whole run"):
        tiny_config(data, tmp_path, "train.stop_after_steps=13")


def test_fork_of_a_warm_start_is_the_run_that_trained_it_itself(data: Path, tmp_path: Path) -> None:
    """Other rank, cycle and re-warm-up than the run that trained it: the same losses and weights, bit for bit."""
    expected, records = run(tiny_config(data, tmp_path / "alone", "name=other", *OTHER))
    cfg = tiny_config(data, tmp_path, "name=other", *OTHER)
    assert warm_start_digest(cfg) == warm_start_digest(warm(data, tmp_path))
    fork(cfg, "warm", 3)
    base = read_manifest(run_storage(cfg), 3).base
    assert base is not None
    assert base.run == "warm"
    assert not (tmp_path / "other/base").exists()
    state, after = run(cfg)
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step > 3}
    assert state_digest(state) == state_digest(expected)


def test_fork_on_a_server(data: Path, tmp_path: Path, moto: Server) -> None:
    place = (f"storage=s3://{BUCKET}/forks", f"storage_options={json.dumps(moto.options)}")
    run(tiny_config(data, tmp_path, *WARM, *place))
    cfg = tiny_config(data, tmp_path, "name=child", "method.lora_rank=8", *place)
    fork(cfg, "warm", 3)
    assert [problem for _, problem in verify(run_storage(cfg), None)] == [""]
    _, after = run(cfg)
    _, records = run(tiny_config(data, tmp_path, "method.lora_rank=8"))
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step > 3}


def test_fork_at_a_merge_has_its_parents_function(data: Path, tmp_path: Path) -> None:
    run(tiny_config(data, tmp_path, "name=parent"))
    cfg = tiny_config(data, tmp_path, "name=child", "method.lora_rank=2", "optimizer.learning_rate=5e-3")
    fork(cfg, "parent", 6)
    parent, child = (load_trained(Storage(f"{tmp_path}/{name}"), 6) for name in ("parent", "child"))
    dense = parent.method.dense_state_dict(parent.model)
    forked = child.method.dense_state_dict(child.model)
    assert dense.keys() == forked.keys()
    assert all(torch.equal(dense[name], forked[name]) for name in dense)
    state, after = run(cfg)
    assert state.position.step == 12
    assert min(losses(after)) == 7
    assert state.position.counters.merges == 3
    # A fork of a fork names the base where it lies.
    third = tiny_config(data, tmp_path, "name=third", "method.lora_rank=3")
    fork(third, "child", 6)
    base = read_manifest(run_storage(third), 6).base
    assert base is not None
    assert base.run == "parent"
    run(third)


KEEP = "checkpoint.keep_last=1"


def forked(data: Path, folder: Path) -> tuple[Storage, RunConfig]:
    """A parent that has gone on to its end since, and all but the last of its checkpoints removed; and its fork."""
    run(tiny_config(data, folder, "name=parent", "train.stop_after_steps=6", KEEP))
    child = tiny_config(data, folder, "name=child", KEEP)
    fork(child, "parent", 6)
    parent = tiny_config(data, folder, "name=parent", KEEP)
    run(parent)
    list(prune(run_storage(parent), keep_last=1, keep_every_steps=0, dry_run=False))
    return run_storage(parent), child


def test_parent_keeps_the_base_of_a_fork_and_no_more(data: Path, tmp_path: Path) -> None:
    parent, child = forked(data, tmp_path)
    assert list_manifests(parent) == [9, 12]
    base = read_manifest(run_storage(child), 6).base
    assert base is not None
    pins = read_pins(parent)
    assert [(pin.run, pin.folders, pin.manifests) for pin in pins.values()] == [("child", (base.folder,), ())]
    assert [name[:13] for name in parent.folders("base")] == ["step-00000006", "step-00000009", "step-00000012"]
    assert [name[:13] for name in parent.folders("delta")] == ["step-00000009", "step-00000012"]
    assert [problem for _, problem in verify(run_storage(child), None)] == [""]
    run(child)
    assert read_pins(parent) == {}, "no checkpoint of the fork needs it any more"
    list(prune(parent, keep_last=1, keep_every_steps=0, dry_run=False))
    assert [name[:13] for name in parent.folders("base")] == ["step-00000009", "step-00000012"]


def test_forks_base_outlives_the_parents_rollback(data: Path, tmp_path: Path) -> None:
    """The fork is of a checkpoint that the parent gives up: it went back to before."""
    parent, child = (tiny_config(data, tmp_path, f"name={name}") for name in ("parent", "child"))
    run(tiny_config(data, tmp_path, "name=parent", "train.stop_after_steps=9"))
    fork(child, "parent", 9)
    storage = run_storage(parent)
    who = claim(storage).attempt(1)
    back = Rollback(number=1, to_step=6, skip_from=6, skip_until=8, why="", unix_time=0, attempt=who)
    storage.put(rollback_path(back), back.model_dump_json().encode())
    run(tiny_config(data, tmp_path, "name=parent", KEEP))
    list(prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert list_manifests(storage) == [9, 12]
    assert read_manifest(storage, 12).counters.rollbacks == 1
    assert [problem for _, problem in verify(run_storage(child), None)] == [""]
    run(child)


def test_parent_is_not_deleted_while_a_fork_needs_it(data: Path, tmp_path: Path) -> None:
    parent, child = forked(data, tmp_path)
    before = parent.list()
    with pytest.raises(ConfigError, match=r"parent is needed by child: forked from it.*checkpoints own RUN"):
        delete(parent)
    assert parent.list() == before
    assert "has a base of its own after step 6" in own(run_storage(child))
    assert own(run_storage(child)).endswith("needs nothing of other runs.")
    delete(parent)
    assert parent.list() == []
    assert [problem for _, problem in verify(run_storage(child), None)] == [""]
    _, records = run(child)
    _, expected = run(tiny_config(data, tmp_path, "name=whole"))
    assert losses(records) == {step: loss for step, loss in losses(expected).items() if step > 6}


@pytest.mark.parametrize("pin_is_left", [False, True])
def test_parent_is_deleted_once_the_fork_has_a_base_of_its_own(data: Path, tmp_path: Path, pin_is_left: bool) -> None:
    """Also if the fork ended between the two: nothing that it goes on from is the parent's."""
    parent, child = forked(data, tmp_path)
    pins = {path: parent.get(path) for path in parent.list("pins")}
    run(child)
    for path, record in pins.items() if pin_is_left else ():
        parent.put(path, record)
    delete(parent)
    assert parent.list() == []
    assert [problem for _, problem in verify(run_storage(child), None)] == ["", ""]


def test_fork_that_is_deleted_lets_go(data: Path, tmp_path: Path) -> None:
    parent, child = forked(data, tmp_path)
    delete(run_storage(child))
    assert run_storage(child).list() == []
    assert read_pins(parent) == {}
    delete(parent, dry_run=True)
    assert parent.list()


def test_commands_know_forks(data: Path, tmp_path: Path) -> None:
    warm(data, tmp_path)
    cfg = tiny_config(data, tmp_path, "name=child")
    fork(cfg, "warm", 3)
    child = run_storage(cfg)
    assert "elsewhere" in "\n".join(list_lines(child))
    assert "of run warm" in "\n".join(show_lines(child, None))
    copied = Storage(f"{tmp_path}/copied")
    copy(child, copied, None)
    base = read_manifest(copied, 3).base
    assert base is not None
    assert base.run == ""
    assert [problem for _, problem in verify(copied, None)] == [""]
    run(cfg)
    assert "forked    from warm after step 3" in summary(child)
    for path in (tmp_path / "warm/base").rglob("*.safetensors"):
        path.write_bytes(b"spoilt")
    assert [bool(problem) for _, problem in verify(child, 3)] == [True]


def test_fork_is_made_once(data: Path, tmp_path: Path) -> None:
    warm(data, tmp_path)
    cfg = tiny_config(data, tmp_path, "name=child")
    fork(cfg, "warm", 3)
    run(cfg)
    shutil.rmtree(tmp_path / "warm/manifests")
    fork(cfg, "warm", 3)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        fork(tiny_config(data, tmp_path, "name=late"), "warm", 3)


@pytest.mark.parametrize(
    ("overrides", "step", "message"),
    [
        (("seed=4",), 3, "seed: 3 in warm, 4 here"),
        (("method.target_modules=[q_proj]",), 3, "method.target_modules"),
        (("method.merge_every_steps=9",), 6, r"child has no boundary there\. Its boundaries are after 3, 12\."),
        ((), 4, "has no boundary there"),
        (("method={kind: full}", "schedule={kind: cosine}"), 3, "method.kind: 'relora' in warm, 'full' here"),
    ],
)
def test_misfit_is_refused(data: Path, tmp_path: Path, overrides: tuple[str, ...], step: int, message: str) -> None:
    warm(data, tmp_path)
    with pytest.raises(ConfigError, match=message):
        fork(tiny_config(data, tmp_path, "name=child", *overrides), "warm", step)


def test_fork_of_a_damaged_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    warm(data, tmp_path)
    for path in (tmp_path / "warm/delta").rglob("*.safetensors"):
        path.write_bytes(b"spoilt")
    cfg = tiny_config(data, tmp_path, "name=child")
    with pytest.raises(DamagedError):
        fork(cfg, "warm", 3)
    assert list_manifests(run_storage(cfg)) == []


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("method.lora_rank=8", True),
        ("method.merge_every_steps=9", True),
        ("method.reset.kind=none", True),
        ("train.skip_steps=[5]", True),
        ("train.skip_steps=[1]", False),
        ("optimizer.learning_rate=2e-2", False),
        ("optimizer.weight_decay=0", False),
        ("schedule.warmup_steps=2", False),
        ("method.warm_start_lr_ratio=0.5", False),
        ("steps=15", False),
        ("seed=4", False),
        ("method.frozen_weights=bf16", False),
        ("global_batch_rows=12", False),
    ],
)
def test_warm_start_is_shared_if_its_updates_are_the_same(
    data: Path, tmp_path: Path, override: str, same: bool
) -> None:
    first, second = (warm_start_digest(tiny_config(data, tmp_path, *o)) for o in ((), (override,)))
    assert (first == second) is same


def test_names_that_are_fresh_are_all_that_depends_on_the_rank(data: Path, tmp_path: Path) -> None:
    shapes = []
    for rank in (2, 8):
        cfg = tiny_config(data, tmp_path, f"method.lora_rank={rank}", "method.trainable_scaling=true")
        method = build_method(cfg)
        model = build_state(cfg, method, World(), 3).model
        fresh = method.fresh_names(model)
        assert fresh
        shapes.append({n: p.shape for n, p in model.state_dict().items() if n not in fresh})
    assert shapes[0] == shapes[1]
