"""The commit record of a checkpoint, and which checkpoints may be deleted.

`manifests/step-00012500.json` names one base (weights that change only at boundaries; none for full-rank
training) and one delta (all else), with every object's size and checksum. It is written once, after all it
names is stored. "Checkpoint at s" is the state after everything that belongs to update s - 1, merge included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

from relora_ray.errors import CheckpointError, ConfigError, DamagedError
from relora_ray.storage import Storage

FORMAT = 3
READABLE = (2, FORMAT)
PINS = "forks"
"""`forks/<run>.json` in a run's folder: a run that was forked from it, and from which step."""
_PART = re.compile(r"/step-\d{8,}-\d{4,}-[0-9a-f]+$")
_NAME = re.compile(r"manifests/step-(\d{8,})\.json")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredObject(_Record):
    path: str
    """Relative to the part's folder."""
    size_bytes: int
    sha256: str


class Part(_Record):
    """A base or a delta: a folder of objects that are never overwritten."""

    folder: str
    """Relative to the run, such as delta/step-00012500-0003-1f2e3d4c."""
    run: str = ""
    """Of a fork: the run beside this one that has the folder. Empty: this run."""
    objects: tuple[StoredObject, ...]
    digest: int
    """Of its tensors, those that are all zero and not stored included: equal states have equal digests."""

    @property
    def size_bytes(self) -> int:
        return sum(o.size_bytes for o in self.objects)


class Counters(_Record):
    """What a run counts besides steps. Part of the state: a resumed run goes on counting."""

    skipped_steps: int = 0
    """Steps skipped for a loss or gradient that is not finite."""
    skipped_in_a_row: int = 0
    merges: int = 0
    loss_average: float = 0.0
    """Of the updates that are no sign of divergence: see rollback.py."""
    losses_averaged: int = 0
    signs_of_divergence: int = 0
    """In a row."""
    rollbacks: int = 0
    """Of the run, up to this attempt."""


class Manifest(_Record):
    format: int = FORMAT
    step: int
    """Finished updates; training goes on with the update of this number."""
    tokens: int
    boundary: int
    """Finished updates at the last boundary: the age of the base."""
    base: Part | None
    delta: Part
    counters: Counters
    identity: str
    """Digest of all settings that decide the run's result, its data among them."""
    data_fingerprint: str
    attempt: str
    world_size: int
    versions: dict[str, str]
    unix_time: float

    @property
    def path(self) -> str:
        return manifest_path(self.step)

    @property
    def parts(self) -> list[Part]:
        return [self.delta] if self.base is None else [self.base, self.delta]


def manifest_path(step: int) -> str:
    return f"manifests/step-{step:08d}.json"


def list_manifests(storage: Storage) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    return sorted(int(m[1]) for path in storage.list("manifests") if (m := _NAME.fullmatch(path)))


def existing_step(storage: Storage, step: int | None) -> int:
    """`step`, or the newest checkpoint's if it is None. CheckpointError if there is no such checkpoint."""
    steps = list_manifests(storage)
    if not steps:
        raise CheckpointError(f"{storage.url} has no checkpoint yet.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{storage.url} has no checkpoint at step {step}. It has {', '.join(map(str, steps))}.")
    return steps[-1] if step is None else step


def pin(storage: Storage, run: str, step: int) -> None:
    """Keep the checkpoint at `step` from being pruned, for the sake of another run, as long as this run exists."""
    storage.put(f"{PINS}/{run}.json", json.dumps({"step": step}).encode())


def pinned_steps(storage: Storage) -> set[int]:
    """Steps that runs have been forked from."""
    return {json.loads(storage.get(path))["step"] for path in storage.list(PINS)}


def part_folders(storage: Storage) -> set[str]:
    """Folders of all bases and deltas that are there, whether a manifest names them or not, whole or not."""
    paths = [path for kind in ("base", "delta") for path in storage.list(kind, unfinished=True)]
    return {"/".join(path.split("/")[:2]) for path in paths}


def read_manifest(storage: Storage, step: int) -> Manifest:
    """The manifest at `step`. DamagedError if it is not one, ConfigError if another version wrote it."""
    try:
        return _parse(storage, step)
    except DamagedError:  # it may have been spoilt on the way
        return _parse(storage, step)


def _parse(storage: Storage, step: int) -> Manifest:
    path = manifest_path(step)
    try:
        raw = json.loads(storage.get(path))
        if raw["format"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ConfigError(
                f"{storage.url}/{path} has format {raw['format']}; this version reads {known}. Use the version that "
                f"wrote it ({raw.get('versions', {}).get('relora_ray', 'unknown')})."
            )
        if raw["step"] != step:
            raise ValueError(f"it is that of step {raw['step']}")
        return Manifest.model_validate(raw)
    except (ValueError, KeyError, TypeError) as error:  # not JSON, or not a manifest
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DamagedError(f"{storage.url}/{path} is not a readable manifest: {problem}.") from error


def plan_prune(
    manifests: Iterable[Manifest],
    folders: Collection[str],
    *,
    keep_last: int,
    keep_every_steps: int,
    attempt: str,
    pinned: Collection[int] = (),
) -> tuple[list[Manifest], list[str]]:
    """Which manifests and part folders may be deleted: a pure function.

    Kept are the newest `keep_last` manifests, those at multiples of `keep_every_steps` and at `pinned` steps, and every
    folder that a kept manifest names. Where a run that diverges would go back to is kept too: the newest manifest
    without a sign of that, and that of the boundary before it. Folders that no manifest names go only if they are of an
    attempt before `attempt`, left behind by a crash: those of this one or a later one may be under way.
    """
    ordered = sorted(manifests, key=lambda m: m.step)
    newest = {m.step for m in ordered[-keep_last:]} | set(pinned)
    sound = next((m for m in reversed(ordered) if not m.counters.signs_of_divergence), None)
    if sound is not None:
        newest |= {sound.step, sound.boundary or sound.step}
    kept = [m for m in ordered if m.step in newest or (keep_every_steps and m.step % keep_every_steps == 0)]
    dropped = [m for m in ordered if m not in kept]
    needed = {part.folder for m in kept for part in m.parts}
    released = {part.folder for m in dropped for part in m.parts if not part.run}
    unneeded = [
        f
        for f in sorted(folders)
        if f not in needed and (f in released or (_PART.search(f) and attempt_number(f) < attempt_number(attempt)))
    ]
    return dropped, unneeded


def attempt_number(name: str) -> int:
    """7 for the attempt `0007-1f2e3d4c`, and for folders that end in its name."""
    return int(name.split("-")[-2])
