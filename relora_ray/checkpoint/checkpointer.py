"""Saving and resuming a training state: the tensors of a model and its optimizer, and a position.

`save` is called by every rank at the same step; rank 0 commits the manifest after all ranks' objects are
stored. `resume` restores the newest checkpoint that is whole, in place, and says what was wrong with newer
ones. Start, crash and restart are one path: the state after 0 updates is saved too.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from relora_ray import __version__
from relora_ray.checkpoint.manifest import (
    Counters,
    Manifest,
    Part,
    list_manifests,
    manifest_path,
    plan_prune,
    read_manifest,
)
from relora_ray.checkpoint.parts import PartReader, PartWriter, read_index
from relora_ray.config import CheckpointConfig
from relora_ray.errors import CheckpointError, DamagedError, ReloraError, StorageError
from relora_ray.optim import MOMENTS, STATE_NAMES
from relora_ray.parallel import World, digest
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    """Finished updates."""
    boundary: int = 0
    """Finished updates at the last boundary."""
    counters: Counters = field(default_factory=Counters)


class Checkpointer:
    """One attempt's checkpoints of one run. Made by every rank, at the same time."""

    def __init__(
        self,
        storage: Storage,
        cfg: CheckpointConfig,
        world: World,
        *,
        data_fingerprint: str,
        tokens_per_step: int,
    ) -> None:
        self._storage, self._cfg, self._world = storage, cfg, world
        self._data_fingerprint, self._tokens_per_step = data_fingerprint, tokens_per_step
        self.attempt = self._on_first(lambda: _new_attempt(storage))
        self._base: Part | None = None
        self._base_boundary = -1

    def newest(self) -> list[tuple[int, Manifest | DamagedError]]:
        """Steps and manifests, newest first; in place of an unreadable one, why. The same list on every rank."""

        def read_all() -> list[tuple[int, Manifest | DamagedError]]:
            found: list[tuple[int, Manifest | DamagedError]] = []
            for step in reversed(list_manifests(self._storage)):
                try:
                    found.append((step, read_manifest(self._storage, step)))
                except DamagedError as error:
                    found.append((step, error))
            return found

        return self._on_first(read_all)

    def restore(
        self, manifest: Manifest, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: set[str]
    ) -> Position:
        """Copy a checkpoint into `model` and `optimizer` in place (every rank). DamagedError if it is not whole,
        CheckpointError if it does not fit; the tensors are then in an undefined state."""
        base, delta = split_state(model, optimizer, frozen)
        if bool(base) != (manifest.base is not None):
            raise CheckpointError(f"{manifest.path} and the model disagree on whether there are frozen weights.")
        for part, tensors in ((manifest.base, base), (manifest.delta, delta)):
            if part is not None:
                index = self._on_first(lambda part=part: read_index(self._storage, part))  # type: ignore[misc]
                _load_part(self._storage, part, index, tensors, no_dist=self._world.size == 1)
        state_digest = digest(list((base | delta).values()))
        self._world.assert_same(state_digest, f"after loading {manifest.path}")
        if state_digest != manifest.digest:
            raise DamagedError(f"{manifest.path} restored to another digest than it was saved with.")
        self._base, self._base_boundary = manifest.base, manifest.boundary
        return Position(manifest.step, manifest.boundary, manifest.counters)

    def save(
        self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: set[str]
    ) -> tuple[Manifest, bool]:
        """Store and commit the state at `position` (every rank, same step); prune what is no longer needed.

        Returns the manifest and whether a base was written for it.
        The base is written only if a boundary changed it since the last checkpoint. StorageError if an object
        cannot be written: the run can still resume from the checkpoint before.
        """
        base, delta = split_state(model, optimizer, frozen)
        state_digest = digest(list((base | delta).values()))
        self._world.assert_same(state_digest, f"before the checkpoint at step {position.step}")
        base_is_new = bool(base) and (self._base is None or self._base_boundary != position.boundary)
        if base_is_new:
            self._base = self._store(f"base/step-{position.boundary:08d}-{self.attempt}", base)
        self._base_boundary = position.boundary
        manifest = Manifest(
            step=position.step,
            tokens=position.step * self._tokens_per_step,
            boundary=position.boundary,
            base=self._base,
            delta=self._store(f"delta/step-{position.step:08d}-{self.attempt}", _without_zeros(delta)),
            digest=state_digest,
            counters=position.counters,
            data_fingerprint=self._data_fingerprint,
            attempt=self.attempt,
            world_size=self._world.size,
            versions=_versions(),
            unix_time=time.time(),
        )
        self._on_first(lambda: self._commit(manifest))
        return manifest, base_is_new

    def set_aside(self, step: int, reason: DamagedError) -> None:
        """Take the manifest of a damaged checkpoint out of the way of the one that will replace it (every rank)."""

        def move() -> None:
            path = manifest_path(step)
            logger.warning("the checkpoint at step %d is set aside: %s", step, reason)
            self._storage.put(f"damaged/{self.attempt}/{path}", self._storage.get(path))
            self._storage.delete(path)

        self._on_first(move)

    def _commit(self, manifest: Manifest) -> None:
        record = manifest.model_dump_json(indent=1).encode()
        try:
            self._storage.put_new(manifest.path, record)
        except FileExistsError as error:
            # A client that repeats a put whose answer was lost is refused by its own object.
            if self._storage.get(manifest.path) != record:
                raise CheckpointError(
                    f"{self._storage.url}/{manifest.path} was committed by somebody else: two drivers are on one run. "
                    f"Stop one of them; this one stops now."
                ) from error
        try:
            self._prune()
        except StorageError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _prune(self) -> None:
        manifests = []
        for step in list_manifests(self._storage):
            with contextlib.suppress(DamagedError):  # one that nobody could resume from needs no folder
                manifests.append(read_manifest(self._storage, step))
        folders = {"/".join(p.split("/")[:2]) for kind in ("base", "delta") for p in self._storage.list(kind)}
        dropped, unneeded = plan_prune(
            manifests,
            folders,
            keep_last=self._cfg.keep_last,
            keep_every_steps=self._cfg.keep_every_steps,
            attempt=self.attempt,
        )
        for path in [m.path for m in dropped] + unneeded:  # manifests first: none ever names what is gone
            self._storage.delete(path)

    def _store(self, folder: str, tensors: Tensors) -> Part:
        writer = PartWriter(self._storage, folder, self._world.rank)
        try:
            with _quiet():
                dcp.save(tensors, storage_writer=writer, no_dist=self._world.size == 1)
        except CheckpointException as error:
            raise _first_cause(error, f"cannot save {folder}") from error
        part: Part = self._world.broadcast(writer.part)
        return part

    def _on_first(self, action: Callable[[], T]) -> T:
        """The result of `action` on rank 0, on every rank; its error is raised on every rank too."""
        result: Any = None
        error: Exception | None = None
        if self._world.is_first:
            try:
                result = action()
            except ReloraError as caught:
                error = caught
            except Exception as caught:  # may not survive the journey: its text does
                logger.exception("rank 0 failed")
                error = RuntimeError(f"rank 0: {type(caught).__name__}: {caught}")
        result, error = self._world.broadcast((result, error))
        if error is not None:
            raise error
        return cast(T, result)


def restore_model(storage: Storage, manifest: Manifest, model: nn.Module, frozen: set[str]) -> None:
    """Copy a checkpoint's weights, without optimizer state, into `model` in place. One process."""
    for part, tensors in zip((manifest.base, manifest.delta), split_state(model, None, frozen), strict=True):
        if part is not None:
            index = {n: e for n, e in read_index(storage, part).items() if not n.startswith("optimizer.")}
            _load_part(storage, part, index, tensors, no_dist=True)


def split_state(model: nn.Module, optimizer: torch.optim.Optimizer | None, frozen: set[str]) -> tuple[Tensors, Tensors]:
    """All live tensors of a training state as (base, delta), under stable names, sharing their memory.

    `model.<name>` for parameters and persistent buffers, `optimizer.<parameter>.{step,exp_avg,exp_avg_sq}`.
    """
    own = {id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))}
    tensors = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if own[id(t)] == name}
    base = {f"model.{name}": t for name, t in tensors.items() if name in frozen}
    delta = {f"model.{name}": t for name, t in tensors.items() if name not in frozen}
    for name, parameter in model.named_parameters():
        if optimizer is not None and parameter in optimizer.state:
            delta |= {f"optimizer.{name}.{key}": optimizer.state[parameter][key] for key in STATE_NAMES}
    return base, delta


def _load_part(storage: Storage, part: Part, index: dict[str, Any], tensors: Tensors, *, no_dist: bool) -> None:
    absent = tensors.keys() - index.keys()
    if wrong := sorted((index.keys() - tensors.keys()) | {n for n in absent if not _is_moment(n)}):
        raise CheckpointError(
            f"{part.folder} and the model differ in tensors: {wrong[0]} and {len(wrong) - 1} more are on one "
            f"side only. Use the config that the checkpoint was made with."
        )
    with torch.no_grad():
        for name in absent:  # moments that were all zero are not stored
            tensors[name].zero_()
    try:
        with _quiet():
            dcp.load(
                {name: tensors[name] for name in sorted(index)},
                storage_reader=PartReader(storage, part, index),
                no_dist=no_dist,
            )
    except CheckpointException as error:
        raise _first_cause(error, f"cannot load {part.folder}") from error


def _without_zeros(delta: Tensors) -> Tensors:
    """`delta` less the moments that hold zeros only: right after a start or a reset that is most of them."""
    moments = [name for name in delta if _is_moment(name)]
    if not moments:
        return delta
    # By bits, so that -0.0 is kept as it is.
    nonzero = torch.stack([delta[name].view(torch.int32).any() for name in moments]).tolist()
    empty = {name for name, any_nonzero in zip(moments, nonzero, strict=True) if not any_nonzero}
    return {name: tensor for name, tensor in delta.items() if name not in empty}


def _is_moment(name: str) -> bool:
    return name.startswith("optimizer.") and name.rpartition(".")[2] in MOMENTS


def _new_attempt(storage: Storage) -> str:
    """A name never used before on this run: a number that grows, claimed in `attempts/`, and random digits."""
    number = max((int(path.removeprefix("attempts/")) for path in storage.list("attempts")), default=0)
    digits = uuid.uuid4().hex[:8]
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            storage.put_new(f"attempts/{number:04d}", digits.encode())
            return f"{number:04d}-{digits}"


def _first_cause(error: CheckpointException, what: str) -> Exception:
    """torch gathers every rank's failure; the first by rank says enough, and keeps its class if it is ours."""
    rank, (cause, _) = min(error.failures.items())
    message = f"{what}: rank {rank}: {cause}"
    if not isinstance(cause, ReloraError):  # out of memory, say: no reason to call the checkpoint damaged
        return RuntimeError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}")
    ours = type(cause)(message)
    ours.restart_helps = cause.restart_helps
    return ours


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _versions() -> dict[str, str]:
    return {
        "relora_ray": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
