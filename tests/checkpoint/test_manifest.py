"""Manifests, and the pure function that says what may be deleted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from relora_ray import clock
from relora_ray.checkpoint.history import (
    Removal,
    list_manifests,
    plan_prune,
    plan_removal,
    read_history,
    read_manifest,
    removal_path,
    removals_text,
)
from relora_ray.checkpoint.manifest import (
    Counters,
    HeldOut,
    Manifest,
    Part,
    Sign,
    StoredObject,
    best_of,
    keep_for_divergence,
)
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.storage import Storage

FIRST = "0001.0001-aaaaaaaa"


def part(kind: str, step: int, attempt: str) -> Part:
    stored = StoredObject(path="index.json", size_bytes=10, sha256="0" * 64)
    return Part(folder=f"{kind}/step-{step:08d}-{attempt}", objects=(stored,), digest=1)


def manifest(step: int, boundary: int | None = None, attempt: str = FIRST) -> Manifest:
    return Manifest(
        step=step, tokens=0, boundary=boundary or 0, base=None if boundary is None else part("base", boundary, attempt),
        delta=part("delta", step, attempt), counters=Counters(), identity="i", data_fingerprint="f", attempt=attempt,
        world_size=1, versions={}, unix_time=0.0,
    )  # fmt: skip


def folders(*manifests: Manifest) -> set[str]:
    return {p.folder for m in manifests for p in m.parts}


def plan(
    ms: list[Manifest],
    *,
    keep_last: int,
    keep_every_steps: int = 0,
    attempt: str = FIRST,
    there: set[str] | None = None,
) -> tuple[list[int], Removal]:
    """Steps of the manifests that are dropped, and what may be removed."""
    dropped = plan_prune(ms, keep_last=keep_last, keep_every_steps=keep_every_steps)
    paths, found = [m.path for m in ms], folders(*ms) if there is None else there
    return [m.step for m in dropped], plan_removal(ms, dropped, paths, found, pinned=(), attempt=attempt)


def test_newest_are_kept_and_the_rest_goes() -> None:
    steps, removal = plan([manifest(s) for s in (0, 10, 20, 30)], keep_last=2)
    assert steps == [0, 10]
    assert removal.folders == (f"delta/step-00000000-{FIRST}", f"delta/step-00000010-{FIRST}")
    assert removal.manifests == (f"manifests/step-00000000-{FIRST}.json", f"manifests/step-00000010-{FIRST}.json")


def test_base_that_a_kept_delta_needs_stays() -> None:
    ms = [manifest(14, 10), manifest(18, 10), manifest(20, 20)]  # that of the boundary at 10 was left out
    steps, removal = plan(ms, keep_last=2)
    assert steps == [14]
    assert not any(f.startswith("base/") for f in removal.folders)
    _, later = plan(ms, keep_last=1)
    assert f"base/step-00000010-{FIRST}" in later.folders


def test_multiples_are_kept_for_good() -> None:
    steps, _ = plan([manifest(s) for s in (0, 10, 20, 30, 40)], keep_last=1, keep_every_steps=20)
    assert steps == [10, 30]


def signed(step: int, boundary: int | None, *signs: int) -> Manifest:
    counters = Counters(signs=tuple(Sign(s, s) for s in signs))
    return manifest(step, boundary).model_copy(update={"counters": counters})


def test_what_a_diverging_run_may_go_back_to() -> None:
    assert keep_for_divergence([]) == set()
    assert keep_for_divergence([manifest(0), manifest(4), manifest(8)]) == {8}
    calm = [manifest(s, s // 10 * 10) for s in range(10, 40, 2)]
    assert keep_for_divergence(calm) == {38, 30, 20}
    assert keep_for_divergence(calm[::-1]) == {38, 30, 20}
    across = [*calm, signed(40, 40, 39), signed(42, 40, 39, 41)]
    assert keep_for_divergence(across) == {40, 38, 30, 20}


def test_run_with_frequent_spikes_keeps_what_it_would_go_back_to_now() -> None:
    """None of its manifests is without a sign, but the first that counts moves on."""
    spiky = [manifest(10, 10), *(signed(s, s // 10 * 10, s - 5) for s in range(12, 40, 2))]
    assert keep_for_divergence(spiky) == {10, 20, 30, 32}


def test_old_manifest_with_signs_is_not_sound() -> None:
    old = Counters.model_validate({"loss_average": 3.0, "losses_averaged": 100, "signs_of_divergence": 1})
    ms = [manifest(20, 20), manifest(24, 20), manifest(28, 20).model_copy(update={"counters": old})]
    assert keep_for_divergence(ms) == {20, 24}


def test_leftovers_of_earlier_attempts_go_and_those_of_this_one_stay() -> None:
    kept = manifest(10, attempt="0001.0002-bbbbbbbb")
    left = {
        "delta/step-00000008-0007-aaaaaaaa",  # of a version without terms
        f"delta/step-00000008-{FIRST}",
        "setup/0000-aaaaaaaa",
        "base/step-00000012-0001.0002-bbbbbbbb",
        "setup/0002-cccccccc",
        "delta/step-00000014-0002.0001-cccccccc",  # a later attempt's: this one is a zombie
    }
    _, removal = plan([kept], keep_last=3, attempt="0001.0002-bbbbbbbb", there=folders(kept) | left)
    expected = ("delta/step-00000008-0001.0001-aaaaaaaa", "delta/step-00000008-0007-aaaaaaaa", "setup/0000-aaaaaaaa")
    assert removal.folders == expected
    assert removal.deltas == ("step-00000008-0001.0001-aaaaaaaa", "step-00000008-0007-aaaaaaaa")


def test_pinned_folders_stay() -> None:
    ms = [manifest(14, 10), manifest(20, 20)]
    dropped = plan_prune(ms, keep_last=1, keep_every_steps=0)
    removal = plan_removal(ms, dropped, [], folders(*ms), pinned={f"base/step-00000010-{FIRST}"}, attempt=FIRST)
    assert removal.folders == (f"delta/step-00000014-{FIRST}",)


def test_what_is_off_the_line_goes_if_an_earlier_attempt_stored_it() -> None:
    """Of this attempt it may be a commit that was not acknowledged, and of a later one it is none of our business."""
    line = manifest(20, attempt="0002.0001-bbbbbbbb")
    off = [manifest(18), manifest(30), manifest(19, attempt="0002.0001-bbbbbbbb"), manifest(9, attempt="0003.0001-cc")]
    removal = plan_removal(
        [line], [], [m.path for m in (line, *off)], folders(line, *off), pinned=(), attempt="0002.0001-bbbbbbbb"
    )
    assert removal.manifests == (off[0].path, off[1].path)


def test_nothing_that_a_kept_manifest_names_is_ever_deleted() -> None:
    rng = random.Random(0)
    for _ in range(300):
        attempts = [f"0001.{i:04d}-{rng.getrandbits(32):08x}" for i in range(1, 4)]
        steps = sorted(rng.sample(range(100), rng.randint(1, 12)))
        ms = [manifest(s, rng.choice([None, s // 10 * 10]), rng.choice(attempts)) for s in steps]
        stray = {f"delta/step-{rng.randrange(100):08d}-{rng.choice(attempts)}" for _ in range(4)}
        keep = rng.randint(1, 5)
        every = rng.choice([0, 20])
        there = folders(*ms) | stray
        dropped, removal = plan(ms, keep_last=keep, keep_every_steps=every, attempt=rng.choice(attempts), there=there)
        kept = [m for m in ms if m.step not in dropped]
        assert len(kept) >= min(keep, len(ms))
        assert ms[-1] in kept
        assert not folders(*kept) & set(removal.folders)


def evaluated(losses: dict[int, float | None], tokens: int = 10) -> list[Manifest]:
    """A line of checkpoints; None: one that was not evaluated."""
    line, counters = [], Counters()
    for step, loss in losses.items():
        if loss is not None:
            counters = counters.after_evaluation(HeldOut(step=step, loss=loss, tokens=tokens))
        line.append(manifest(step).model_copy(update={"counters": counters}))
    return line


def test_best_is_the_lowest_that_can_be_compared_and_the_first_of_equal_ones() -> None:
    line = evaluated({0: 9.0, 10: 3.0, 15: None, 20: 3.0, 30: 4.0})
    assert best_of(line) is line[1]
    assert [m.held_out is None for m in line] == [False, False, True, False, False]
    assert [m.counters.best.step for m in line] == [0, 10, 10, 10, 10]
    more_text = line[-1].counters.after_evaluation(HeldOut(step=40, loss=5.0, tokens=20))
    assert more_text.best == more_text.held_out
    line.append(manifest(40).model_copy(update={"counters": more_text}))
    assert best_of(line) is line[-1]
    assert best_of([manifest(0), manifest(5)]) is None
    with pytest.raises(ValueError, match="finite"):
        HeldOut(step=0, loss=float("nan"), tokens=1)


def test_best_is_kept_and_what_was_the_best_where_the_run_may_go_back_to() -> None:
    def kept(line: list[Manifest], **keep: Any) -> list[int]:
        dropped = plan_prune(line, keep_last=1, keep_every_steps=0, **keep)
        return [m.step for m in line if m not in dropped]

    line = evaluated({0: 9.0, 10: 3.0, 20: 5.0, 30: 4.0, 40: 6.0})
    assert kept(line) == [40]
    assert kept(line, keep_best=True) == [10, 40]
    sign = {"signs": (Sign(step=35, number=1),)}
    line = evaluated({0: 9.0, 10: 3.0, 20: 5.0, 30: 4.0, 40: 2.0})
    line[-1] = line[-1].model_copy(update={"counters": line[-1].counters.model_copy(update=sign)})
    assert kept(line) == [30, 40], "it may go back to 30"
    assert kept(line, keep_best=True) == [10, 30, 40], "where 10 is the best again"
    unsaved = evaluated({0: 9.0, 10: 3.0, 20: 5.0, 30: 6.0})
    del unsaved[1]
    assert kept(unsaved, keep_best=True) == [20, 30], "the best of those that were stored"


def put(storage: Storage, *manifests: Manifest) -> None:
    for m in manifests:
        storage.put(m.path, m.model_dump_json().encode())


def following(*before: Manifest, step: int, attempt: str = FIRST) -> Manifest:
    return manifest(step, attempt=attempt).model_copy(update={"line": tuple(m.path for m in before)})


def test_round_trip_and_listing(tmp_path: Path) -> None:
    storage, first = Storage(str(tmp_path)), manifest(0)
    second = following(first, step=12_500)
    put(storage, first, second)
    storage.put("manifests/notes.txt", b"")
    assert list_manifests(storage) == [0, 12_500]
    assert read_manifest(storage, 12_500) == second


def test_newest_is_the_latest_attempts_and_not_the_highest_step(tmp_path: Path) -> None:
    """A manifest of an attempt that was given up arrives late, and has come further."""
    storage, two = Storage(str(tmp_path)), manifest(2)
    seven = following(two, step=7, attempt="0001.0002-aaaaaaaa")
    put(storage, two, seven, following(two, step=8), following(two, step=9))
    assert list_manifests(storage) == [2, 7]
    assert read_history(storage).head == seven


def test_attempts_are_compared_as_numbers(tmp_path: Path) -> None:
    storage, early = Storage(str(tmp_path)), manifest(9, attempt="0001.9999-aaaaaaaa")
    late = following(step=5, attempt="0001.10000-aaaaaaaa")
    put(storage, early, late)
    assert read_history(storage).head == late


def test_what_is_written_down_to_be_removed_is_not_gone_on_from(tmp_path: Path) -> None:
    storage, old = Storage(str(tmp_path)), manifest(4)
    put(storage, old, late := following(old, step=8))
    removal = Removal(deltas=(late.id,), folders=(late.delta.folder,))
    storage.put(removal_path("0001.0002-aaaaaaaa", 1), removals_text(removal).encode())
    assert list_manifests(storage) == [4]


def test_late_removal_does_not_count_against_a_later_attempt_that_went_on_from_it(tmp_path: Path) -> None:
    storage, old = Storage(str(tmp_path)), manifest(4)
    put(storage, old, following(old, step=8, attempt="0002.0001-bbbbbbbb"))
    storage.put(removal_path("0001.0002-aaaaaaaa", 1), removals_text(Removal(manifests=(old.path,))).encode())
    assert list_manifests(storage) == [4, 8]


def test_old_listing_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, old = Storage(str(tmp_path)), manifest(4)
    put(storage, old)
    new, looks = following(old, step=8), []
    monkeypatch.setattr(clock, "sleep", lambda s: (looks.append(s), put(storage, new)))
    history = read_history(storage, at_least=[new.path])
    assert looks
    assert history.head == new


@pytest.mark.parametrize("names", [{"folder": "../../delta"}, {"run": "../other"}, {"run": "a/b"}])
def test_names_that_lead_out_of_the_run_are_refused(names: dict[str, str], tmp_path: Path) -> None:
    storage, raw = Storage(str(tmp_path)), manifest(4).model_dump()
    raw["delta"] |= names
    storage.put(manifest(4).path, json.dumps(raw).encode())
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        read_manifest(storage, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "not a readable manifest"), (b'{"step": 1', "not a readable manifest"), (b"", "not a readable manifest")],
)
def test_damaged_manifest_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put(manifest(1).path, content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(storage, 1)


def test_manifest_of_another_format_says_which_version_wrote_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    newer = manifest(1).model_copy(update={"format": 9, "versions": {"relora_ray": "7.0"}})
    storage.put(newer.path, json.dumps({**newer.model_dump(), "a_new_key": 1}).encode())
    with pytest.raises(ConfigError, match=r"has format 9; this version reads 2.*7\.0"):
        read_manifest(storage, 1)
