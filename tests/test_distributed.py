"""Several ranks: real processes, real gloo. Each group of processes plays several scenes, for its start is dear."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from relora_ray import loop
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.config import RunConfig
from relora_ray.config.planned import Plan
from relora_ray.conformance.processes import run_ranks
from relora_ray.errors import CheckpointError, RanksDisagreeError, StorageError
from relora_ray.loop import TrainState, run_attempt
from relora_ray.modeling.parallel import World
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config


def attempt(cfg: RunConfig, on_record: Any = None) -> dict[str, Any]:
    """One attempt on the current ranks; what it did, or how it ended."""
    records: list[Record] = []

    def collect(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    try:
        state = run_attempt(cfg, World.current(), on_record=collect)
    except (Crash, RanksDisagreeError, StorageError, CheckpointError) as error:
        return {"error": f"{type(error).__name__}: {error}", "losses": losses(records)}
    return {
        "losses": losses(records),
        "evals": {r["step"]: r["loss"] for r in records if r["kind"] == "eval"},
        "boundaries": {r["step"]: r["digest"] for r in records if r["kind"] == "boundary"},
        "resumed_at": next(r["step"] for r in records if r["kind"] == "attempt"),
        "digest": state_digest(state),
    }


def renamed(cfg: RunConfig, name: str, **train: Any) -> RunConfig:
    return cfg.model_copy(update={"name": name, "train": cfg.train.model_copy(update=train)})


def by_device(cfg: RunConfig, name: str) -> RunConfig:
    """Rank 1 has a device of its own kind, which takes less at a time."""
    return renamed(cfg, name, micro_batch_rows_by_device={"small": 1})


def device_name(world: World) -> str:
    return "a small one" if world.rank == 1 else "cpu"


def planned(cfg: RunConfig, name: str) -> RunConfig:
    """Rank 4, and 6 in the last cycle."""
    method = cfg.method.model_copy(update={"lora_rank": Plan({0: 4, 9: 6})})
    return cfg.model_copy(update={"name": name, "method": method})


CRASHES = ((5, "train"), (6, "boundary"), (3, "checkpoint"))


def scene_names(world_size: int) -> list[str]:
    return [f"{name}-{world_size}" for name in ("whole", "micro", *(f"broken-{step}" for step, _ in CRASHES))]


def claim_scenes(cfg: RunConfig, world_size: int) -> None:
    for name in scene_names(world_size):
        check_run(renamed(cfg, name))
    check_run(by_device(cfg, f"mixed-{world_size}"))
    for name in ("planned", "planned-broken"):
        check_run(planned(cfg, f"{name}-{world_size}"))


def scenes(cfg: RunConfig) -> dict[str, Any]:
    """Uninterrupted; interrupted inside a cycle, at a boundary, at the switch; another micro-batch."""
    world = World.current()
    played = {"whole": attempt(renamed(cfg, f"whole-{world.size}"))}
    for step, phase in CRASHES:
        broken = renamed(cfg, f"broken-{step}-{world.size}")
        attempt(broken, crash_at(step, phase))
        played[f"resumed-{step}"] = attempt(broken)
    played["micro-1"] = attempt(renamed(cfg, f"micro-{world.size}", micro_batch_rows=1))
    with patch.object(World, "device_name", property(device_name)):
        played["mixed"] = attempt(by_device(cfg, f"mixed-{world.size}"))
    played["planned"] = attempt(planned(cfg, f"planned-{world.size}"))
    attempt(planned(cfg, f"planned-broken-{world.size}"), crash_at(11, "train"))
    played["planned-resumed"] = attempt(planned(cfg, f"planned-broken-{world.size}"))
    return played


def flip_bit_on_rank_1(cfg: RunConfig, kind: str) -> dict[str, Any]:
    """A single bit of an adapter (or of a moment) changes on rank 1 after step 5."""
    world, train, held = World.current(), loop.train, {}

    def hold_state(cfg: RunConfig, world: World, method: Any, state: TrainState, *args: Any, **kwargs: Any) -> None:
        held["state"] = state
        train(cfg, world, method, state, *args, **kwargs)

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 5 and world.rank == 1:
            state = held["state"]
            parameters = dict(state.model.named_parameters())
            target = parameters["model.layers.1.mlp.up_proj.lora_B"].detach()
            if kind == "moment":
                target = state.optimizer.state[parameters["lm_head.weight"]]["exp_avg"]
            target.view(torch.int32)[3, 1] ^= 1 << 20  # the lowest bits may round away before anybody looks

    loop.train = hold_state
    try:
        return attempt(renamed(cfg, f"flip-{kind}"), on_record)
    finally:
        loop.train = train


def from_two_ranks(cfg: RunConfig) -> dict[str, Any]:
    return attempt(cfg)


def corruption(cfg: RunConfig) -> dict[str, Any]:
    return {kind: flip_bit_on_rank_1(cfg, kind) for kind in ("weight", "moment")}


def stop_after_save(cfg: RunConfig) -> dict[str, Any]:
    return attempt(cfg, crash_at(8, "checkpoint"))


def unwritable_on_rank_1(cfg: RunConfig) -> dict[str, Any]:
    """Rank 1 cannot write after step 4; rank 0 must hear of it and not commit."""
    from relora_ray.storage import Storage

    world = World.current()
    original = Storage.put

    def put(self: Storage, path: str, data: bytes) -> None:
        if world.rank == 1 and path.endswith(".safetensors"):
            raise StorageError(f"cannot write {path}: No space left on device.")
        original(self, path, data)

    def on_record(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 4:
            Storage.put = put

    try:
        return attempt(renamed(cfg, "unwritable"), on_record)
    finally:
        Storage.put = original


def scenes_of_three(cfg: RunConfig) -> dict[str, Any]:
    return scenes(cfg) | {"corruption": corruption(cfg), "from-2": from_two_ranks(renamed(cfg, "made-at-2-for-3"))}


def scenes_of_two(cfg: RunConfig) -> dict[str, Any]:
    for name in ("made-at-2-for-1", "made-at-2-for-3"):
        stop_after_save(renamed(cfg, name))
    return scenes(cfg) | {"unwritable": unwritable_on_rank_1(cfg)}


@pytest.fixture(scope="module")
def cfg(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """3 warm-start updates and 3 cycles of 3, fp32. 6 rows: 4 ranks would not divide them, 3 and 2 do."""
    return tiny_config(data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one(cfg: RunConfig) -> dict[str, Any]:
    state, records = run(renamed(cfg, "whole-1"))
    return {
        "losses": losses(records),
        "evals": {r["step"]: r["loss"] for r in records if r["kind"] == "eval"},
        "digest": state_digest(state),
    }


@pytest.fixture(scope="module")
def two(cfg: RunConfig) -> list[dict[str, Any]]:
    for name in ("made-at-2-for-1", "made-at-2-for-3", "unwritable"):
        check_run(renamed(cfg, name))
    claim_scenes(cfg, 2)
    return run_ranks(2, scenes_of_two, cfg)


@pytest.fixture(scope="module")
def three(cfg: RunConfig, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for name in ("flip-weight", "flip-moment"):
        check_run(renamed(cfg, name))
    claim_scenes(cfg, 3)
    return run_ranks(3, scenes_of_three, cfg)


@pytest.fixture(scope="module")
def four(cfg: RunConfig) -> list[dict[str, Any]]:
    return run_ranks(4, attempt, check_run(renamed(cfg, "whole-4")))


def assert_close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-5), step


def test_two_and_three_processes_agree_with_one(one: Any, two: Any, three: Any) -> None:
    for group in (two, three):
        for rank in group:
            assert_close(rank["whole"]["losses"], one["losses"])
            assert_close(rank["whole"]["evals"], one["evals"])


def test_world_that_does_not_divide_the_batch_agrees_too(one: Any, four: Any) -> None:
    """6 rows on 4 ranks: two ranks pad with a row of weight zero."""
    for rank in four:
        assert_close(rank["losses"], one["losses"])
        assert_close(rank["evals"], one["evals"])


def test_ranks_hold_equal_bits(two: Any, three: Any, four: Any) -> None:
    for group in ([r["whole"] for r in two], [r["whole"] for r in three], four):
        assert len({r["digest"] for r in group}) == 1
        assert len({tuple(r["boundaries"].items()) for r in group}) == 1
        assert group[0]["boundaries"].keys() == {3, 6, 9, 12}


@pytest.mark.parametrize(("step", "resumed_at"), [(5, 4), (6, 4), (3, 3)])
def test_resume_is_bitwise_at_two_and_three_processes(two: Any, three: Any, step: int, resumed_at: int) -> None:
    """At three a ring all-reduce adds in an order that depends on DDP's buckets, which a restart lays out anew."""
    for group in (two, three):
        for rank in group:
            whole, resumed = rank["whole"], rank[f"resumed-{step}"]
            assert resumed["resumed_at"] == resumed_at
            assert resumed["losses"] == {s: v for s, v in whole["losses"].items() if s > resumed_at}
            assert resumed["digest"] == whole["digest"]


def test_kinds_of_devices_may_take_micro_batches_of_their_own_size(one: Any, two: Any, three: Any) -> None:
    for rank in two + three:
        assert_close(rank["mixed"]["losses"], one["losses"])
        assert_close(rank["mixed"]["evals"], one["evals"])
    assert len({rank["mixed"]["digest"] for rank in two}) == 1


def test_rank_may_change_at_any_world_size(cfg: RunConfig, two: Any, three: Any) -> None:
    _, records = run(planned(cfg, "planned-1"))
    for rank in two + three:
        assert_close(rank["planned"]["losses"], losses(records))
        assert rank["planned-resumed"]["resumed_at"] == 10
        assert rank["planned-resumed"]["digest"] == rank["planned"]["digest"]


def test_micro_batch_changes_only_rounding(one: Any, two: Any, three: Any) -> None:
    for rank in two + three:
        assert_close(rank["micro-1"]["losses"], one["losses"])


def test_saved_at_two_loads_at_one_and_three(cfg: RunConfig, one: Any, three: Any) -> None:
    storage = run_storage(renamed(cfg, "made-at-2-for-1"))
    parts = [p for p in storage.list("delta") if "step-00000008" in p and p.endswith(".safetensors")]
    assert len(parts) == 2, "both ranks wrote"
    sizes = [storage.size(p) for p in parts]
    assert max(sizes) < 1.5 * min(sizes), "spread by bytes"  # type: ignore[type-var]
    assert read_manifest(storage, 8).world_size == 2
    _, records = run(renamed(cfg, "made-at-2-for-1"))
    alone, triple = losses(records), three[0]["from-2"]
    assert alone.keys() == triple["losses"].keys() == {9, 10, 11, 12}
    assert triple["resumed_at"] == 8
    for resumed in (alone, triple["losses"]):
        assert_close(resumed, {s: v for s, v in one["losses"].items() if s > 8})


def test_flipped_bit_is_caught_at_the_next_boundary_and_nothing_is_saved(cfg: RunConfig, three: Any) -> None:
    for rank in three:
        for kind in ("weight", "moment"):
            error = rank["corruption"][kind]["error"]
            assert re.match(
                r"RanksDisagreeError: before the boundary at step 6: rank\(s\) \[1\] hold other values", error
            ), error
    for kind in ("weight", "moment"):
        assert list_manifests(run_storage(renamed(cfg, f"flip-{kind}"))) == [0, 2, 3, 4]


def test_failed_share_of_one_rank_is_told_to_all_and_not_committed(cfg: RunConfig, two: Any) -> None:
    for rank in two:
        error = rank["unwritable"]["error"]
        assert error.startswith("NotSavedError: 9 updates, up to step 12, are not stored, and checkpoint.max_"), error
        assert "rank 1: cannot write" in error
    assert list_manifests(run_storage(renamed(cfg, "unwritable"))) == [0, 2, 3]
