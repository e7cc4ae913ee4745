"""The commit record of a checkpoint, and the names of what belongs to it.

`manifests/step-00012500-0003.0002-1f2e3d4c.json` names one base (weights that change only at boundaries; none for
full-rank training) and one delta (all else), with every object's size and checksum. It is written once, after all it
names is stored. "Checkpoint at s" is the state after everything that belongs to update s - 1, merge included.

Records come from storage, where others may write: names in them are checked here, once, and numbers and lengths are
bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ray.checkpoint.ownership import ATTEMPT, AttemptKey, attempt_key
from relora_ray.errors import ConfigError, DamagedError, StorageError
from relora_ray.storage import Storage

FORMAT = 6
READABLE = (2, 3, 4, 5, FORMAT)
MAX_BYTES = 2**26
"""Of one record."""

ID = rf"step-\d{{8,12}}-{ATTEMPT}"
"""Names a checkpoint: its step, and the attempt that stored it. No two have one name."""
_NAME = re.compile(rf"manifests/(?:({ID})|step-(\d{{8,12}}))\.json")

Count = Annotated[int, Field(ge=0, le=2**53)]
Step = Annotated[int, Field(ge=0, le=10**12)]
CheckpointId = Annotated[str, Field(pattern=rf"^{ID}$")]
RunName = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=255)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredObject(_Record):
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=255)]
    """Relative to the part's folder."""
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(_Record):
    """A base or a delta: a folder of objects that are never overwritten."""

    folder: Annotated[str, Field(pattern=rf"^(base|delta)/{ID}$")]
    """Relative to the run, such as delta/step-00012500-0003.0002-1f2e3d4c."""
    run: RunName = ""
    """Of a fork: the run beside this one that has the folder. Empty: this run."""
    objects: tuple[StoredObject, ...]
    digest: int
    """Of its tensors, those that are all zero and not stored included: equal states have equal digests."""

    @property
    def size_bytes(self) -> int:
        return sum(o.size_bytes for o in self.objects)


class SetupObject(StoredObject):
    path: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]+(/[^/\\\x00-\x1f]+)*$", max_length=1000)]
    """Relative to the folder: tokenizers have names of their own."""


class Setup(_Record):
    """What a run is: its config, the index of its data and its tokenizer, as they were when it began."""

    folder: Annotated[str, Field(pattern=r"^setup/\d{4,9}-[0-9a-f]{1,32}$")]
    objects: tuple[SetupObject, ...]


class Rollback(_Record):
    """That a run which diverged went back: see rollback.py."""

    number: Annotated[int, Field(gt=0, le=10**6)]
    """From 1."""
    to_step: Step
    """Finished updates of the checkpoint to go on from."""
    skip_from: Step
    """First update that is not made, ..."""
    skip_until: Step
    """... and the first after it that is made again."""
    why: Annotated[str, Field(max_length=10_000)]
    unix_time: float
    attempt: Annotated[str, Field(pattern=rf"^({ATTEMPT})?$")] = ""
    """Who went back; empty for versions that did not say."""

    def __str__(self) -> str:
        return (
            f"back to step {self.to_step}; updates {self.skip_from} to {self.skip_until - 1} are passed over "
            f"(rollback {self.number})"
        )


class Sign(NamedTuple):
    """An update whose loss is a sign of divergence."""

    step: int
    """Finished updates before it."""
    number: int
    """As `Counters.losses_seen` counts it."""


class HeldOut(_Record):
    """An evaluation."""

    step: Step
    """Finished updates."""
    loss: Annotated[float, Field(allow_inf_nan=False)]
    """Per token, in nats."""
    tokens: Count
    """How many it is the mean of: losses over another number of tokens are of other text, and no measure."""


class Counters(_Record):
    """What a run counts besides steps. Part of the state: a resumed run goes on counting."""

    skipped_steps: int = 0
    """Steps skipped for a loss or gradient that is not finite."""
    skipped_in_a_row: int = 0
    merges: int = 0
    loss_average: float = 0.0
    """Of the updates that are no sign of divergence: see divergence.py."""
    losses_averaged: int = 0
    loss_best: float | None = None
    """The lowest that `loss_average` has been since the last boundary. None: too few losses so far."""
    losses_seen: int = 0
    """Updates that were made or skipped for what is not finite; those passed over do not count."""
    signs: tuple[Sign, ...] = ()
    """Among the last updates, oldest first, at most `train.divergence_steps`."""
    signs_of_divergence: int = 0
    """In a row. Only in manifests from before `signs`; read, and then 0."""
    rollbacks: int = 0
    """Of the run, up to this attempt."""
    held_out: HeldOut | None = None
    """The last evaluation."""
    best: HeldOut | None = None
    """The one with the lowest loss so far, of those over as many tokens as the last."""

    def after_evaluation(self, found: HeldOut) -> Counters:
        best = self.best
        is_best = best is None or best.tokens != found.tokens or found.loss < best.loss
        return self.model_copy(update={"held_out": found, "best": found if is_best else best})

    @property
    def has_sign(self) -> bool:
        """Whether the run may be diverging."""
        return bool(self.signs or self.signs_of_divergence)

    @property
    def first_sign(self) -> int | None:
        """The update that a divergence of this moment began with."""
        return self.signs[0].step if self.signs else None


class Manifest(_Record):
    format: int = FORMAT
    step: Step
    """Finished updates; training goes on with the update of this number."""
    tokens: Count
    boundary: Step
    """Finished updates at the last boundary (0: none yet)."""
    base: Part | None
    delta: Part
    counters: Counters
    identity: str
    """Digest of all that decides the run's result, its data among them."""
    data_fingerprint: str
    attempt: Annotated[str, Field(pattern=rf"^{ATTEMPT}$")]
    world_size: Annotated[int, Field(gt=0, le=10**7)]
    versions: dict[str, str]
    unix_time: float
    line: tuple[str, ...] = ()
    """Paths of the manifests that this one follows, oldest first: those that were kept when it was committed. Of two
    attempts that both came to a step, the line says which one was gone on from."""
    rollbacks: tuple[Rollback, ...] = ()
    """All that happened on the way here."""
    setup: Setup | None = None
    """None in manifests of versions that kept config.yaml and the tokenizer at the top of the run's folder."""

    @property
    def id(self) -> str:
        return f"step-{self.step:08d}-{self.attempt}"

    @property
    def path(self) -> str:
        return f"manifests/{self.id}.json" if self.format >= 4 else f"manifests/step-{self.step:08d}.json"

    @property
    def parts(self) -> list[Part]:
        return [self.delta] if self.base is None else [self.base, self.delta]

    @property
    def key(self) -> tuple[AttemptKey, int]:
        return attempt_key(self.attempt), self.step

    @property
    def held_out(self) -> HeldOut | None:
        """The evaluation of this very state; None if there was none."""
        found = self.counters.held_out
        return found if found is not None and found.step == self.step else None


def key_of(path: str) -> tuple[AttemptKey, int] | None:
    """When a manifest was stored, by its path: attempt, then step. Later ones are greater. None if it is no manifest.
    Of versions whose paths do not say the attempt, all are before all others."""
    if not (found := _NAME.fullmatch(path)):
        return None
    if found[2]:
        return (0, 0), int(found[2])
    _, step, attempt = found[1].split("-", 2)
    return attempt_key(attempt), int(step)


def read_record(storage: Storage, path: str) -> Manifest:
    """The manifest at `path`, which was listed. DamagedError if it is gone or is not one, ConfigError if it is of
    another version."""
    try:
        try:
            return _parse(storage, path)
        except DamagedError:  # it may have been spoilt on the way
            return _parse(storage, path)
    except StorageError as error:
        if error.missing:
            raise DamagedError(f"{storage.url}/{path} is gone, though it was listed.") from error
        raise


def _parse(storage: Storage, path: str) -> Manifest:
    try:
        raw = json.loads(storage.get_expected(path, at_most=MAX_BYTES))
        if raw["format"] not in READABLE:
            known = ", ".join(map(str, READABLE))
            raise ConfigError(
                f"{storage.url}/{path} has format {raw['format']}; this version reads {known}. Use the version that "
                f"wrote it ({raw.get('versions', {}).get('relora_ray', 'unknown')})."
            )
        manifest = Manifest.model_validate(raw)
        if manifest.path != path:
            raise ValueError(f"it is that of {manifest.path}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # not JSON, or not a manifest
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DamagedError(f"{storage.url}/{path} is not a readable manifest: {problem}.") from error
    return manifest


def best_of(line: Sequence[Manifest]) -> Manifest | None:
    """The checkpoint with the lowest held-out loss, the first of equal ones; None if none was evaluated: a pure
    function. Those that were evaluated on as much text as the last are compared."""
    evaluated = [(m.held_out, m) for m in line if m.held_out is not None]
    comparable = [(found.loss, m.step, m) for found, m in evaluated if found.tokens == evaluated[-1][0].tokens]
    return min(comparable, key=lambda item: item[:2])[2] if comparable else None


def keep_for_divergence(manifests: Sequence[Manifest]) -> set[int]:
    """Steps that a run which diverges may go back to, now or later: a pure function.

    The newest manifest without a sign of divergence, and those of the last two boundaries up to it: what shows only
    after a boundary may have begun before it. While there are signs, the same up to the first that counts, and every
    boundary since: signs are forgotten, so that the first moves on, and for long no manifest may be without one.
    """
    ordered = sorted(manifests, key=lambda m: m.step)
    boundaries = [m.step for m in ordered if 0 < m.step == m.boundary]
    kept: set[int] = set()
    for sound in [m.step for m in ordered if not m.counters.has_sign][-1:]:
        kept.update([sound], [b for b in boundaries if b <= sound][-2:])
    first = ordered[-1].counters.first_sign if ordered else None
    if first is not None:
        kept.update([m.step for m in ordered if m.step < first][-1:])
        kept.update([b for b in boundaries if b <= first][-2:], [b for b in boundaries if b > first])
    return kept
