"""Which checkpoints a run has, which of them it goes on from, and which may be removed.

The head is the manifest of the latest attempt, and of its latest step: not simply of the highest step, since an attempt
that was given up may have come further, or its manifest may arrive late. The head names the line that it stands on.
What is not on the line is of no account: nobody resumes from it, and later commits remove it.

    removals/<attempt>-<n>.json    what is about to be removed, written before anything is

Removing takes two commits. One writes down what is no longer needed and takes its manifests away; the next removes the
objects. So whoever reads a checkpoint meanwhile has that long, and an attempt that looks for a checkpoint to go on from
does not choose one that another is about to remove.

    pins/<run>.<n>.json            folders here that another run needs: a fork, which goes on from a base of this run
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ray import clock
from relora_ray.checkpoint.manifest import (
    ID,
    MAX_BYTES,
    CheckpointId,
    Manifest,
    Part,
    RunName,
    Step,
    best_of,
    keep_for_divergence,
    key_of,
    read_record,
)
from relora_ray.checkpoint.ownership import ATTEMPT, AttemptKey, attempt_key
from relora_ray.errors import CheckpointError, DamagedError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

FORK = "fork.json"
"""Of a fork: from which run, and after which step."""
REMOVALS = "removals"
PINS = "pins"
OLD_PINS = "forks"
"""`forks/<run>.json` {"step": N}: pins of versions that kept the manifest itself for a fork."""
FOLDER = rf"((base|delta)/{ID}|setup/\d{{4,9}}-[0-9a-f]{{1,32}})"
_FOLDER = re.compile(FOLDER)
_REMOVAL = re.compile(rf"{REMOVALS}/({ATTEMPT})-(\d+)\.json")
_PIN_NAME = re.compile(rf"{PINS}/.+\.\d+\.json")
_OLD_PIN_NAME = re.compile(rf"{OLD_PINS}/.+\.json")
LOOK_AGAIN_S = 1.0

Folder = Annotated[str, Field(pattern=rf"^{FOLDER}$")]
ManifestPath = Annotated[str, Field(pattern=rf"^manifests/(step-\d{{8,12}}|{ID})\.json$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Removal(_Record):
    """What an attempt is about to remove."""

    manifests: tuple[ManifestPath, ...] = ()
    folders: tuple[Folder, ...] = ()
    deltas: tuple[CheckpointId, ...] = ()
    """Checkpoints that have no manifest and must not get one any more: a manifest that arrives late would name what is
    being removed."""

    def __bool__(self) -> bool:
        return bool(self.manifests or self.folders)


class Pin(_Record):
    run: RunName
    folders: tuple[Folder, ...]
    manifests: tuple[ManifestPath, ...] = ()
    """Of a fork that is yet to be made."""


class _OldPin(_Record):
    step: Step


AnyPin = TypeVar("AnyPin", Pin, _OldPin)


class History:
    """A run's checkpoints as one look at storage shows them. Manifests are read when they are asked for."""

    def __init__(self, storage: Storage, known: dict[str, Manifest] | None = None) -> None:
        """`known`: manifests that need not be read again, by path."""
        self._storage, self._known = storage, {} if known is None else known
        self.paths = sorted((p for p in storage.list_surely("manifests") if key_of(p)), key=_key)
        """All manifests there are, the latest last."""
        self.removals = read_removals(storage)
        self.unreadable: list[tuple[str, DamagedError]] = []
        """Manifests later than the head that cannot be read."""
        self.head: Manifest | None = None
        """None if there is no checkpoint."""
        for path in reversed(self.paths):
            try:
                found = self.read(path)
            except DamagedError as error:
                self.unreadable.append((path, error))
                continue
            if not self._is_going(path, ()):
                self.head = found
                break
        self.line = self._line()
        """Paths of the head and of all before it on its line, oldest first."""
        self.standing = [path for path in self.paths if not self._is_going(path, self.line)]
        """All that are not about to be removed, on the line or not."""

    def read(self, path: str) -> Manifest:
        if path not in self._known:
            self._known[path] = read_record(self._storage, path)
        return self._known[path]

    def void(self, line: Sequence[Manifest]) -> list[str]:
        """Records of removals that name something which a line needs."""
        names = {m.path for m in line} | needed_folders(line)
        return [path for path, (_, removal) in self.removals.items() if names & {*removal.manifests, *removal.folders}]

    def would_lead(self, checkpoint: CheckpointId) -> bool:
        """Whether a manifest of it would be the head, if it came now."""
        path = f"manifests/{checkpoint}.json"
        return self.head is None or _key(path) > _key(self.head.path)

    def path_at(self, step: int) -> str | None:
        return next((path for path in self.line if _key(path)[1] == step), None)

    @property
    def steps(self) -> list[int]:
        return [_key(path)[1] for path in self.line]

    def read_line(self) -> tuple[list[Manifest], bool]:
        """The line's manifests that can be read, and whether that is all of them."""
        found = self.read_those(self.line)
        return found, len(found) == len(self.line)

    def read_those(self, paths: Iterable[str]) -> list[Manifest]:
        """Of these manifests those that can be read."""
        found = []
        for path in paths:
            try:
                found.append(self.read(path))
            except DamagedError as error:
                logger.warning("what no manifest names is kept, because one cannot be read: %s", error)
        return found

    def _line(self) -> tuple[str, ...]:
        if self.head is None:
            return ()
        before = self.head.line if self.head.format >= 4 else [p for p in self.paths if _key(p) < _key(self.head.path)]
        there, vouched = set(self.paths), before if self.head.format >= 4 else ()
        return (*(p for p in before if p in there and not self._is_going(p, vouched)), self.head.path)

    def _is_going(self, path: str, vouched: Collection[str]) -> bool:
        """Whether a manifest is about to be removed. A later attempt than the one that would do so may have gone on
        from it since, and `vouched` for it: what the earlier one wrote down late does not count then."""
        key = _key(path)
        return any(
            (path in removal.manifests or _id_of(path) in removal.deltas)
            and not (path in vouched and self.head is not None and attempt_key(self.head.attempt) > attempt)
            for attempt, removal in self.removals.values()
            if key[0] <= attempt
        )


def read_history(
    storage: Storage, *, at_least: Iterable[str] = (), known: dict[str, Manifest] | None = None
) -> History:
    """`at_least`: manifests that are known to be committed. A listing without them is old: it is asked for again."""
    history = History(storage, known)
    until = clock.monotonic() + storage.retry_s
    while (absent := [p for p in at_least if p not in history.paths]) and clock.monotonic() < until:
        if not storage.exists(absent[0]) and absent[0] in {
            p for _, r in history.removals.values() for p in r.manifests
        }:
            break
        clock.sleep(LOOK_AGAIN_S)
        history = History(storage, known)
    return history


class Origin(_Record):
    """What a fork's FORK says."""

    parent: RunName
    step: Step


def read_origin(storage: Storage) -> Origin | None:
    """From which run this one was forked; None if from none. DamagedError if that cannot be read."""
    if (record := storage.find(FORK, at_most=MAX_BYTES)) is None:
        return None
    try:
        return Origin.model_validate_json(record)
    except ValidationError as error:
        raise DamagedError(
            f"{storage.url}/{FORK} does not say from which run this is a fork. Restore it, or write it anew: "
            f'{{"parent": "NAME", "step": N}}.'
        ) from error


def list_manifests(storage: Storage) -> list[int]:
    """Steps of all checkpoints on the run's line, ascending."""
    return read_history(storage).steps


def existing_step(storage: Storage, step: int | None) -> int:
    """`step`, or the newest checkpoint's if it is None. CheckpointError if there is no such checkpoint, DamagedError if
    its manifest cannot be read."""
    history = read_history(storage)
    steps = history.steps
    for path, error in history.unreadable:
        if not steps or (step not in steps and _key(path)[1] == step):
            raise error
    if not steps:
        raise CheckpointError(f"{storage.url} has no checkpoint yet.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{storage.url} has no checkpoint at step {step}. It has {', '.join(map(str, steps))}.")
    return steps[-1] if step is None else step


def best_step(storage: Storage, until: int | None = None) -> int:
    """Of the checkpoint with the lowest held-out loss, after `until` updates at most. CheckpointError if none was
    evaluated."""
    line, _ = read_history(storage).read_line()
    best = best_of([manifest for manifest in line if until is None or manifest.step <= until])
    if best is None:
        raise CheckpointError(
            f"{storage.url} has no checkpoint whose held-out loss is known: no evaluation fell on one that is kept, or "
            f"they are of a version that did not record it. Name one by --step; runs with train.eval_every_steps and "
            f"checkpoint.keep_best=true keep the best."
        )
    return best.step


def read_manifest(storage: Storage, step: int) -> Manifest:
    """The manifest at `step`, on the run's line. DamagedError if it is not one, CheckpointError if there is none."""
    history = read_history(storage)
    path = history.path_at(step)
    if path is None:
        for path, error in history.unreadable:
            if _key(path)[1] == step:
                raise error
        raise CheckpointError(f"{storage.url} has no checkpoint at step {step}.")
    return history.read(path)


def read_removals(storage: Storage) -> dict[str, tuple[AttemptKey, Removal]]:
    """By path, with the attempt that wrote each; one that cannot be read does not count."""
    found = {}
    for path in storage.list_surely(REMOVALS):
        name = _REMOVAL.fullmatch(path)
        if name is None or (record := storage.get_listed(path, at_most=MAX_BYTES)) is None:
            continue
        with contextlib.suppress(ValidationError):
            found[path] = attempt_key(name[1]), Removal.model_validate_json(record)
    return found


def pin(storage: Storage, run: str, step: int, number: int = 0) -> Manifest:
    """Keep the checkpoint at `step` for the sake of `run`, and return its manifest. A pin of this `run` and `number` is
    replaced. CheckpointError if there is no such checkpoint, or if it is being removed."""
    for _ in range(2):  # the pin first, as whoever removes something looks at the pins after writing down what
        manifest = read_manifest(storage, existing_step(storage, step))
        for owner, folders in _by_owner(storage, manifest.parts):
            paths = (manifest.path,) if owner is storage else ()
            _put_pin(owner, run, number, Pin(run=run, folders=folders, manifests=paths))
        if not any(
            {manifest.path, *folders} & {*removal.folders, *removal.manifests}
            for owner, folders in _by_owner(storage, manifest.parts)
            for _, removal in read_removals(owner).values()
        ):
            return manifest
    raise CheckpointError(
        f"{storage.url} is about to remove its checkpoint at step {step}. Choose a later one, or have more of them "
        f"kept (checkpoint.keep_last, checkpoint.keep_every_steps)."
    )


def pin_base_only(storage: Storage, run: str, manifest: Manifest, number: int) -> None:
    """Let go of all that `pin` kept up to this `number`, but the base."""
    release(storage, run, before=number)
    if manifest.base is None:
        release(storage, run, before=number + 1)
        return
    for owner, folders in _by_owner(storage, [manifest.base]):
        _put_pin(owner, run, number, Pin(run=run, folders=folders))
        if owner is not storage:
            release(storage, run, before=number + 1)


def release(storage: Storage, run: str, *, before: int | None = None) -> None:
    """Delete the pins of `run` here; those of lower numbers only, if one is given: a later one is of another owner."""
    for path, pin in read_pins(storage).items():
        if pin.run == run and (before is None or int(path.split(".")[-2]) < before):
            storage.delete(path)
    if before is None:
        storage.delete(f"{OLD_PINS}/{run}.json")


def _by_owner(storage: Storage, parts: Iterable[Part]) -> list[tuple[Storage, tuple[str, ...]]]:
    """Whose the folders are, and which: a run's own come first."""
    folders: dict[str, list[str]] = {"": []}
    for part in parts:
        folders.setdefault(part.run, []).append(part.folder)
    return [(storage.sibling(run) if run else storage, tuple(names)) for run, names in folders.items() if names]


def _put_pin(storage: Storage, run: str, number: int, pin: Pin) -> None:
    storage.put(_pin_path(run, number), pin.model_dump_json().encode())


def _pin_path(run: str, number: int) -> str:
    return f"{PINS}/{run}.{number}.json"


def read_pins(storage: Storage) -> dict[str, Pin]:
    """Who needs what of this run, by the pin's path. DamagedError if one cannot be read: it may name anything."""
    return _read_pins(storage, PINS, _PIN_NAME, Pin)


def old_pins(storage: Storage) -> dict[str, int]:
    """Steps whose checkpoints are kept whole for forks that were made by a version before, by the fork's name."""
    found = _read_pins(storage, OLD_PINS, _OLD_PIN_NAME, _OldPin)
    return {path.removeprefix(f"{OLD_PINS}/").removesuffix(".json"): pin.step for path, pin in found.items()}


def _read_pins(storage: Storage, folder: str, name: re.Pattern[str], kind: type[AnyPin]) -> dict[str, AnyPin]:
    pins = {}
    for path in filter(name.fullmatch, storage.list_surely(folder)):  # a note that somebody left there is none
        if (record := storage.get_listed(path, at_most=MAX_BYTES)) is None:
            continue
        try:
            pins[path] = kind.model_validate_json(record)
        except ValidationError as error:
            raise DamagedError(
                f"{storage.url}/{path} is no readable pin: {error.errors()[0]['msg']}. Restore it, or, if there is no "
                f"such fork any more, remove it."
            ) from error
    return pins


def part_folders(storage: Storage) -> set[str]:
    """Folders of all bases, deltas and set-ups, whether a manifest names them or not, whole or not."""
    folders = {f"{kind}/{name}" for kind in ("base", "delta", "setup") for name in storage.folders(kind)}
    return {folder for folder in folders if _FOLDER.fullmatch(folder)}


def attempt_of_folder(folder: str) -> AttemptKey:
    if folder.startswith("setup/"):  # of a term, made before its first attempt
        return int(folder[len("setup/") :].partition("-")[0]), 0
    return attempt_key(folder.split("-", 2)[2])


def plan_prune(
    line: Sequence[Manifest],
    *,
    keep_last: int,
    keep_every_steps: int,
    keep_best: bool = False,
    pinned_steps: Collection[int] = (),
) -> list[Manifest]:
    """Which manifests of a line are no longer needed: a pure function. The newest is always kept.

    Kept are the newest `keep_last`, those at multiples of `keep_every_steps` and at `pinned_steps`, and those that a
    run that diverges would go back to. With `keep_best` so is the best of the line, and what was the best when one of
    those was stored that the run may go back to: it would be again.
    """
    kept = {m.step for m in line[-keep_last:]} | keep_for_divergence(line)
    if keep_best:
        kept |= {m.counters.best.step for m in line if m.step in kept and m.counters.best is not None}
        kept |= {m.step for m in [best_of(line)] if m is not None}
    kept |= set(pinned_steps)
    return [m for m in line if m.step not in kept and not (keep_every_steps and m.step % keep_every_steps == 0)]


def plan_removal(
    line: Sequence[Manifest],
    dropped: Sequence[Manifest],
    paths: Iterable[str],
    folders: Collection[str],
    *,
    pinned: Collection[str],
    attempt: str,
) -> Removal:
    """What may be removed, of all manifests and folders that are there: a pure function.

    Everything that is not on the `line`, or `dropped` from it, and that no kept manifest and no pin needs. But only
    what attempts before `attempt` stored, or what this one has dropped: its other folders may be those of a save under
    way.
    """
    mine, gone = attempt_key(attempt), {m.path for m in dropped}
    needed = needed_folders(m for m in line if m.path not in gone) | set(pinned)
    released = {part.folder for m in dropped for part in m.parts if not part.run}
    on_line = {m.path for m in line}
    manifests = [p for p in paths if p in gone or (p not in on_line and _key(p)[0] < mine)]
    unneeded = [f for f in sorted(folders) if f not in needed and (f in released or attempt_of_folder(f) < mine)]
    deltas = [f.removeprefix("delta/") for f in unneeded if f.startswith("delta/")]
    return Removal(manifests=tuple(manifests), folders=tuple(unneeded), deltas=tuple(deltas))


def needed_folders(manifests: Iterable[Manifest]) -> set[str]:
    """Folders of this run that these manifests name."""
    manifests = list(manifests)
    parts = {part.folder for m in manifests for part in m.parts if not part.run}
    return parts | {m.setup.folder for m in manifests if m.setup is not None}


def removal_path(attempt: str, number: int) -> str:
    return f"{REMOVALS}/{attempt}-{number:06d}.json"


def _key(path: str) -> tuple[AttemptKey, int]:
    key = key_of(path)
    assert key is not None, path
    return key


def _id_of(path: str) -> str:
    return path.removeprefix("manifests/").removesuffix(".json")


def removals_text(removal: Removal) -> str:
    return json.dumps(removal.model_dump(exclude_defaults=True), indent=1)
