"""Manifests, and the pure function that says what may be deleted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from relora_ray.checkpoint.manifest import (
    Counters,
    Manifest,
    Part,
    StoredObject,
    list_manifests,
    manifest_path,
    plan_prune,
    read_manifest,
)
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.storage import Storage


def part(kind: str, step: int, attempt: str) -> Part:
    stored = StoredObject(path="index.json", size_bytes=10, sha256="0" * 64)
    return Part(folder=f"{kind}/step-{step:08d}-{attempt}", objects=(stored,), digest=1)


def manifest(step: int, boundary: int | None = None, attempt: str = "0001-aaaaaaaa") -> Manifest:
    return Manifest(
        step=step, tokens=0, boundary=boundary or 0, base=None if boundary is None else part("base", boundary, attempt),
        delta=part("delta", step, attempt), counters=Counters(), identity="i", data_fingerprint="f", attempt=attempt,
        world_size=1, versions={}, unix_time=0.0,
    )  # fmt: skip


def folders(*manifests: Manifest) -> set[str]:
    return {p.folder for m in manifests for p in m.parts}


def test_newest_are_kept_and_the_rest_goes() -> None:
    ms = [manifest(s) for s in (0, 10, 20, 30)]
    dropped, unneeded = plan_prune(ms, folders(*ms), keep_last=2, keep_every_steps=0, attempt="0001-aaaaaaaa")
    assert [m.step for m in dropped] == [0, 10]
    assert unneeded == ["delta/step-00000000-0001-aaaaaaaa", "delta/step-00000010-0001-aaaaaaaa"]


def test_base_that_a_kept_delta_needs_stays() -> None:
    ms = [manifest(10, 10), manifest(14, 10), manifest(18, 10), manifest(20, 20)]
    dropped, unneeded = plan_prune(ms, folders(*ms), keep_last=2, keep_every_steps=0, attempt="0001-aaaaaaaa")
    assert [m.step for m in dropped] == [10, 14]
    assert not any(f.startswith("base/") for f in unneeded)
    _, later = plan_prune(ms, folders(*ms), keep_last=1, keep_every_steps=0, attempt="0001-aaaaaaaa")
    assert "base/step-00000010-0001-aaaaaaaa" in later


def test_multiples_are_kept_for_good() -> None:
    ms = [manifest(s) for s in (0, 10, 20, 30, 40)]
    dropped, _ = plan_prune(ms, folders(*ms), keep_last=1, keep_every_steps=20, attempt="0001-aaaaaaaa")
    assert [m.step for m in dropped] == [10, 30]


def test_place_to_go_back_to_is_kept_while_a_run_may_be_diverging() -> None:
    """Saves on the way to the end must not drive out what was before it."""
    sign = Counters(signs_of_divergence=1)
    ms = [manifest(20, 20), manifest(24, 20), manifest(28, 20)]
    ms += [manifest(s, b).model_copy(update={"counters": sign}) for s, b in ((29, 20), (30, 30), (31, 30), (32, 30))]
    dropped, unneeded = plan_prune(ms, folders(*ms), keep_last=1, keep_every_steps=0, attempt="0001-aaaaaaaa")
    assert [m.step for m in dropped] == [24, 29, 30, 31]
    assert "base/step-00000020-0001-aaaaaaaa" not in unneeded


def test_last_boundary_is_kept() -> None:
    ms = [manifest(10, 10), manifest(20, 20), manifest(24, 20), manifest(28, 20)]
    dropped, _ = plan_prune(ms, folders(*ms), keep_last=1, keep_every_steps=0, attempt="0001-aaaaaaaa")
    assert [m.step for m in dropped] == [10, 24]


def test_leftovers_of_earlier_attempts_go_and_those_of_this_one_stay() -> None:
    kept = manifest(10, attempt="0002-bbbbbbbb")
    left = {
        "delta/step-00000008-0001-aaaaaaaa",
        "base/step-00000012-0002-bbbbbbbb",
        "delta/step-00000014-0003-cccccccc",  # a later attempt's: this one is a zombie
    }
    _, unneeded = plan_prune([kept], folders(kept) | left, keep_last=3, keep_every_steps=0, attempt="0002-bbbbbbbb")
    assert unneeded == ["delta/step-00000008-0001-aaaaaaaa"]


def test_nothing_that_a_kept_manifest_names_is_ever_deleted() -> None:
    rng = random.Random(0)
    for _ in range(300):
        attempts = [f"{i:04d}-{rng.getrandbits(32):08x}" for i in range(1, 4)]
        steps = sorted(rng.sample(range(100), rng.randint(1, 12)))
        ms = [manifest(s, rng.choice([None, s // 10 * 10]), rng.choice(attempts)) for s in steps]
        stray = {f"delta/step-{rng.randrange(100):08d}-{rng.choice(attempts)}" for _ in range(4)}
        keep = rng.randint(1, 5)
        dropped, unneeded = plan_prune(
            ms, folders(*ms) | stray, keep_last=keep, keep_every_steps=rng.choice([0, 20]), attempt=rng.choice(attempts)
        )
        kept = [m for m in ms if m not in dropped]
        assert len(kept) >= min(keep, len(ms))
        assert ms[-1] in kept
        assert not folders(*kept) & set(unneeded)


def test_round_trip_and_listing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for m in (manifest(0), manifest(12_500, 12_000)):
        storage.put(m.path, m.model_dump_json().encode())
    storage.put("manifests/notes.txt", b"")
    assert list_manifests(storage) == [0, 12_500]
    assert read_manifest(storage, 12_500) == manifest(12_500, 12_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "not a readable manifest"), (b'{"step": 1', "not a readable manifest"), (b"", "not a readable manifest")],
)
def test_damaged_manifest_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put(manifest_path(1), content)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(storage, 1)


def test_manifest_of_another_format_says_which_version_wrote_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    newer = manifest(1).model_copy(update={"format": 9, "versions": {"relora_ray": "7.0"}})
    storage.put(newer.path, json.dumps({**newer.model_dump(), "a_new_key": 1}).encode())
    with pytest.raises(ConfigError, match=r"has format 9; this version reads 2.*7\.0"):
        read_manifest(storage, 1)
