"""Runs that diverge: where they go on, and that it depends on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ray import loop
from relora_ray.checkpoint import Rollback, list_manifests, read_history, read_manifest
from relora_ray.checkpoint.commit import rollback_path
from relora_ray.checkpoint.manifest import Counters, HeldOut, Sign
from relora_ray.commands.checkpoints import copy
from relora_ray.commands.status import status
from relora_ray.config import RunConfig
from relora_ray.errors import DivergedError, RolledBackError
from relora_ray.methods.base import build_method
from relora_ray.modeling.schedule import lr_multiplier
from relora_ray.runs.divergence import begin_cycle, observe
from relora_ray.runs.metrics import read
from relora_ray.runs.places import run_storage
from relora_ray.runs.rollback import (
    _abandons,
    checkpoint_step,
    read_rollbacks,
    roll_back,
)
from relora_ray.runs.run import load_trained
from relora_ray.storage import Storage
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config

WHO = "0001.0001-aaaaaaaa"
GUARD = (
    "steps=30", "train.divergence_steps=3", "train.divergence_nats=0.4", "checkpoint.save_every_steps=1",
    "checkpoint.keep_last=2",
)  # fmt: skip


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(data, tmp_path, *GUARD)


def trained_with(cfg: RunConfig, name: str, **train: object) -> RunConfig:
    return cfg.model_copy(update={"name": name, "train": cfg.train.model_copy(update=train)})


def explode_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """These updates are so large that the model is lost, if they are made."""
    monkeypatch.setattr(loop, "lr_multiplier", lambda step, cfg: 1e4 if step in steps else lr_multiplier(step, cfg))


def test_diverged_run_goes_back_to_the_boundary_and_passes_over_the_rows(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode_at(monkeypatch, 16)
    with pytest.raises(
        RolledBackError,
        match=r"in 3 of the last 6 updates up to 19, the first of them 17, .* above its best average since the last "
        r"boundary, 7\.\d+: back to step 15; updates 15 to 19 are",
    ):
        run(cfg)
    storage = run_storage(cfg)
    assert list_manifests(storage)[-1] > 15, "what lies behind is still there"
    assert load_trained(storage).manifest.step == 15, "and taken by nobody"
    assert checkpoint_step(storage) == 15
    state, records = run(cfg)
    assert next(r["step"] for r in records if r["kind"] == "attempt") == 15
    assert state.position.counters.skipped_steps == 5
    assert state.position.counters.rollbacks == 1
    assert all("-0002.0001-" in path for path in storage.list("manifests")), "what was given up is removed"
    by_hand, _ = run(
        cfg.model_copy(
            update={"name": "hand", "train": cfg.train.model_copy(update={"skip_steps": (15, 16, 17, 18, 19)})}
        )
    )
    assert state_digest(state) == state_digest(by_hand), "the same as to leave those updates out from the start"
    assert "  diverged  back to step 15; updates 15 to 19 are passed over (rollback 1)" in status(storage, 0.0)


def test_first_sign_is_found_behind_updates_that_are_passed_over(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three signs, at 17, 19 and 20: counted back from the end, they would begin at 18, behind the boundary there."""
    explode_at(monkeypatch, 16)
    with pytest.raises(RolledBackError, match="back to step 15; updates 15 to 20 are passed over"):
        run(trained_with(cfg, "skipping", skip_steps=(18,)))


@pytest.mark.parametrize(("step", "phase"), [(16, "train"), (18, "boundary"), (18, "checkpoint"), (21, "train")])
def test_crash_after_a_rollback_changes_nothing(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, step: int, phase: str
) -> None:
    explode_at(monkeypatch, 16)
    digests = []
    for name in ("whole", "broken"):
        mine = cfg.model_copy(update={"name": name})
        with pytest.raises(RolledBackError):
            run(mine)
        if name == "broken":
            with pytest.raises(Crash):
                run(mine, crash_at(step, phase))
        digests.append(state_digest(run(mine)[0]))
    assert digests[0] == digests[1]


def test_crash_before_the_divergence_is_noticed_changes_nothing(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signs are counted in the checkpoint."""
    explode_at(monkeypatch, 16)
    with pytest.raises(Crash):
        run(cfg, crash_at(19, "train"))
    with pytest.raises(RolledBackError):
        run(cfg)
    assert [(r.to_step, r.skip_from, r.skip_until) for r in read_rollbacks(run_storage(cfg))] == [(15, 15, 20)]


def test_run_goes_back_so_often_and_then_ends(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    explode_at(monkeypatch, *range(16, 30))
    cfg = trained_with(cfg, "twice", max_rollbacks=2)
    for _ in range(2):
        with pytest.raises(RolledBackError):
            run(cfg)
    for _ in range(2):  # and stays so
        with pytest.raises(DivergedError, match=r"train\.max_rollbacks=2 allows no more\. Raise that"):
            run(cfg)
    first, second = read_rollbacks(run_storage(cfg))
    assert first.number == 1
    assert second.number == 2
    assert second.to_step >= first.to_step
    assert second.skip_until > first.skip_until


def test_guard_that_is_off_lets_a_loss_be_as_high_as_it_likes(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    explode_at(monkeypatch, 16)
    cfg = trained_with(cfg, "off", max_rollbacks=0)
    _, records = run(cfg)
    assert max(losses(records).values()) > losses(records)[1] + 2
    assert not run_storage(cfg).list("rollbacks")


def test_full_training_goes_back_to_the_newest_checkpoint_from_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [o for o in GUARD if "checkpoint." not in o]
    plain = {"kind": "cosine", "warmup_steps": 1}
    cfg = tiny_config(data, tmp_path, *overrides, method={"kind": "full"}, schedule=plain)  # saves every 2 updates
    explode_at(monkeypatch, 15)
    with pytest.raises(RolledBackError, match=r"back to step 14; updates 14 to 18 are passed over"):
        run(cfg)


def test_no_checkpoint_from_before_ends_the_run(cfg: RunConfig) -> None:
    counters = Counters(signs=(Sign(16, 1), Sign(17, 2), Sign(18, 3)))
    with pytest.raises(DivergedError, match=r"no checkpoint from before update 16.*checkpoint\.keep_last"):
        roll_back(cfg, build_method(cfg), [], counters, 19, "it exploded", attempt=WHO)


def test_copied_run_leaves_out_the_same_updates(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    explode_at(monkeypatch, 16)
    with pytest.raises(RolledBackError):
        run(cfg)
    with pytest.raises(Crash):
        run(cfg, crash_at(16, "checkpoint"))
    copy(run_storage(cfg), Storage(str(tmp_path / "copy")), 16)
    there = cfg.model_copy(update={"name": "copy"})
    assert state_digest(run(there)[0]) == state_digest(run(cfg)[0])
    assert [r["step"] for r in read(run_storage(there), "train")] == list(range(17, 31))


def test_counters_of_a_run_follow_from_its_losses_and_boundaries(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(
        data, tmp_path, "steps=24", "optimizer.learning_rate=1e-9", "checkpoint.save_every_steps=1"
    )  # so small that the average goes up as well as down, and the best is not always the last
    _, records = run(cfg)
    is_boundary = build_method(cfg).is_boundary
    counters, num_above = Counters(), 0
    evals = [record for record in records if record["kind"] == "eval"]
    held_out = {r["step"]: HeldOut(step=r["step"], loss=r["loss"], tokens=r["tokens"]) for r in evals}
    for done, loss in losses(records).items():
        counters = observe(cfg.train, counters, done - 1, loss)
        if is_boundary(done):
            num_above += counters.loss_best is not None and counters.loss_best < counters.loss_average
            counters = begin_cycle(counters)
        so_far = [found for step, found in held_out.items() if step <= done]
        evaluated = {"held_out": so_far[-1], "best": min(so_far, key=lambda found: found.loss)}
        stored = read_manifest(run_storage(cfg), done).counters
        assert stored == counters.model_copy(update=evaluated | {"merges": stored.merges})
    assert num_above, "else the boundaries say nothing"


def test_rollback_abandons_what_was_made_before_it_and_nothing_after(cfg: RunConfig) -> None:
    """Of versions whose manifests do not name what they follow."""
    run(cfg)
    newest = read_manifest(run_storage(cfg), 30)
    back = Rollback(number=2, to_step=29, skip_from=29, skip_until=30, why="", unix_time=0)
    for rollbacks, abandoned in ((0, True), (1, True), (2, False), (3, False)):
        made = newest.model_copy(update={"counters": newest.counters.model_copy(update={"rollbacks": rollbacks})})
        assert _abandons(back, made) == abandoned
    assert not _abandons(back, newest.model_copy(update={"step": 29}))


def test_rollback_of_an_attempt_that_was_given_up_counts_for_nothing(cfg: RunConfig) -> None:
    """Its record arrives when a later attempt has gone on, and committed."""
    with pytest.raises(Crash):
        run(cfg, crash_at(8, "train"))
    storage = run_storage(cfg)
    first = read_history(storage).head
    assert first is not None
    back = Rollback(number=1, to_step=3, skip_from=3, skip_until=5, why="", unix_time=0, attempt=first.attempt)
    storage.put(rollback_path(back), back.model_dump_json().encode())
    assert read_rollbacks(storage) == (back,), "nobody has committed anything since"
    storage.delete(rollback_path(back))
    with pytest.raises(Crash):
        run(cfg, crash_at(12, "train"))
    storage.put(rollback_path(back), back.model_dump_json().encode())
    assert read_rollbacks(storage) == ()
    state, records = run(cfg)
    assert next(r["step"] for r in records if r["kind"] == "attempt") == 11
    assert state.position.counters.rollbacks == 0
    assert state.position.counters.skipped_steps == 0


def test_state_is_the_same_with_and_without_the_guard(cfg: RunConfig) -> None:
    guarded, _ = run(cfg)
    assert state_digest(guarded) == state_digest(run(trained_with(cfg, "off", max_rollbacks=0))[0])
