"""Runs that diverge: where they go on, and that it depends on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ray import loop
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.checkpoint.manifest import Counters
from relora_ray.checkpoints import copy
from relora_ray.config import RunConfig
from relora_ray.errors import DivergedError, RolledBackError
from relora_ray.methods import build_method
from relora_ray.metrics import read
from relora_ray.rollback import Rollback, observe, read_rollbacks, roll_back
from relora_ray.runs import run_storage
from relora_ray.schedule import lr_multiplier
from relora_ray.status import status
from relora_ray.storage import Storage
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config

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
        match=r"above its average of 7\.\d+ in 3 updates in a row: back to step 15; updates 15 to 19 are",
    ):
        run(cfg)
    storage = run_storage(cfg)
    assert list_manifests(storage)[-1] > 15, "what lies behind is still there"
    state, records = run(cfg)
    assert next(r["step"] for r in records if r["kind"] == "attempt") == 15
    assert state.position.counters.skipped_steps == 5
    assert state.position.counters.rollbacks == 1
    assert len(storage.list("set-aside")) >= 1
    by_hand, _ = run(
        cfg.model_copy(
            update={"name": "hand", "train": cfg.train.model_copy(update={"skip_steps": (15, 16, 17, 18, 19)})}
        )
    )
    assert state_digest(state) == state_digest(by_hand), "the same as to leave those updates out from the start"
    assert "  diverged  back to step 15; updates 15 to 19 are passed over (rollback 1)" in status(storage, 0.0)


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


def test_no_checkpoint_from_before_ends_the_run(cfg: RunConfig, tmp_path: Path) -> None:
    counters = Counters(signs_of_divergence=3)
    with pytest.raises(DivergedError, match=r"no checkpoint from before update 16.*checkpoint\.keep_last"):
        roll_back(cfg, Storage(str(tmp_path / "empty")), build_method(cfg), counters, 19, "it exploded")


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


def test_losses_are_averaged_until_one_is_a_sign(cfg: RunConfig) -> None:
    counters = Counters()
    for loss in [8.0, 6.0] + [5.0] * 500:
        counters = observe(cfg.train, counters, loss)
    assert counters.loss_average == pytest.approx(5.0, abs=0.05)
    for number, loss in enumerate((7.5, float("nan"), float("inf"), 9.0), start=1):
        counters = observe(cfg.train, counters, loss)
        assert counters.signs_of_divergence == number
        assert counters.loss_average == pytest.approx(5.0, abs=0.05), "a sign does not raise the bar for the next"
    assert observe(cfg.train, counters, 5.3).signs_of_divergence == 0


def test_rollback_abandons_what_was_made_before_it_and_nothing_after(cfg: RunConfig) -> None:
    run(cfg)
    newest = read_manifest(run_storage(cfg), 30)
    back = Rollback(number=2, to_step=29, skip_from=29, skip_until=30, why="", unix_time=0)
    for rollbacks, abandoned in ((0, True), (1, True), (2, False), (3, False)):
        made = newest.model_copy(update={"counters": newest.counters.model_copy(update={"rollbacks": rollbacks})})
        assert back.abandons(made) == abandoned
    assert not back.abandons(newest.model_copy(update={"step": 29}))


def test_state_is_the_same_with_and_without_the_guard(cfg: RunConfig) -> None:
    guarded, _ = run(cfg)
    assert state_digest(guarded) == state_digest(run(trained_with(cfg, "off", max_rollbacks=0))[0])
