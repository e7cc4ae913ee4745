"""Saving and resuming a training state: the tensors of a model and its optimizer, and a position.

`save` is called by every rank at the same step. It copies this rank's share to host memory, and a thread stores it
while training goes on; the manifest is committed when all ranks' shares are there (commit.py). `restore` brings a
checkpoint back, in place. Start, crash and restart are one path: the state after 0 updates is saved too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from relora_ray import __version__
from relora_ray.checkpoint.commit import LAST_WORDS_S, Commits, Committer, Outcome, Share
from relora_ray.checkpoint.group import GroupCommitter
from relora_ray.checkpoint.layout import PartPlan, plan_part
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, Manifest, Part, Rollback, Setup
from relora_ray.checkpoint.ownership import refuse_if_superseded
from relora_ray.checkpoint.parts import PartReader, read_whole_index, write_share
from relora_ray.config import CheckpointConfig
from relora_ray.errors import CheckpointError, DamagedError, NotSavedError, RankFailedError, ReloraError, StorageError
from relora_ray.modeling.optim import MOMENTS, options, refuse_unknown_options, state_tensors
from relora_ray.modeling.parallel import World, as_integers, bit_sums, digest, digest_of_sums
from relora_ray.storage import Storage
from relora_ray.verdict import in_words, verdict

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Position:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    """Finished updates."""
    boundary: int = 0
    """Finished updates at the last boundary."""
    counters: Counters = field(default_factory=Counters)
    rollbacks: tuple[Rollback, ...] = ()
    """On the way here."""


@dataclass(frozen=True)
class Saved:
    """What became of one save that was due."""

    step: int
    manifest: Manifest | None = None
    """None if nothing was stored: see `why_not`."""
    base_is_new: bool = False
    blocked_s: float = 0.0
    """Seconds that training waited."""
    save_s: float = 0.0
    """Seconds until the commit."""
    why_not: str = ""


@dataclass
class _UnderWay:
    """The save that a thread is working on."""

    future: Future[tuple[Outcome, float]]
    """The outcome, and when it was known."""
    position: Position
    base_is_new: bool
    began: float
    blocked_s: float = 0.0
    reported: bool = False


class Checkpointer:
    """One attempt's checkpoints of one run. Made by every rank, at the same time, and closed at its end."""

    def __init__(
        self,
        storage: Storage,
        cfg: CheckpointConfig,
        world: World,
        *,
        attempt: str,
        identity: str,
        data_fingerprint: str,
        tokens_per_step: int,
        setup: Setup | None = None,
        committer: Committer | None = None,
        timeout_s: float = 600,
    ) -> None:
        """`attempt`: its name, the same on every rank, such as ownership.py gives. `setup`: what the run is."""
        self._storage, self._cfg, self._world = storage, cfg, world
        self.attempt, self._setup = attempt, setup
        self._identity, self._data_fingerprint, self._tokens_per_step = identity, data_fingerprint, tokens_per_step
        commits = Commits(storage, cfg)
        self._committer = committer or GroupCommitter(world, commits, timeout_s=timeout_s)
        self._lineage = Lineage(attempt)
        self._under_way: _UnderWay | None = None
        self._failure = ""
        """Why the last save that ended was not stored."""
        self._options: tuple[torch.optim.Optimizer, list[dict[str, str]]] | None = None
        """Of the optimizer, as it was at its first save."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="relora-ray-save")
        self._commits = commits
        self._host = HostCopies()

    def restore(
        self,
        manifest: Manifest,
        line: tuple[str, ...],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: set[str],
    ) -> Position:
        """Copy a checkpoint into `model` and `optimizer` in place (every rank). `line`: paths of it and of those before
        it, for those after it to name. DamagedError if it is not whole, CheckpointError if it does not fit; the tensors
        are then in an undefined state."""
        if manifest.identity != self._identity:
            raise CheckpointError(
                f"{self._storage.url}/{manifest.path} was made by a run of another config or other data (identity "
                f"{manifest.identity}, here {self._identity}): two runs have been started under one name. Use another."
            )
        base, delta = split_state(model, optimizer, frozen)
        if bool(base) != (manifest.base is not None):
            raise CheckpointError(f"{manifest.path} and the model disagree on whether there are frozen weights.")
        for part, tensors in ((manifest.base, base), (manifest.delta, delta)):
            if part is None:
                continue
            index = self._world.on_first(lambda part=part: read_whole_index(self._storage, part))  # type: ignore[misc]
            self._world.on_all(
                lambda part=part, index=index, tensors=tensors: _load_part(self._storage, part, index, tensors)  # type: ignore[misc]
            )
            part_digest = digest(list(tensors.values()))
            self._world.assert_same(part_digest, f"after loading {part.folder}")
            if part_digest != part.digest:
                raise DamagedError(
                    f"{part.folder} of {manifest.path} restored to another digest than it was saved with."
                )
        self._lineage.resume(manifest, line)
        return Position(manifest.step, manifest.boundary, manifest.counters, manifest.rollbacks)

    def take_over(
        self,
        manifest: Manifest,
        run: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: set[str],
        fresh: Collection[str],
    ) -> Position:
        """Begin this run with another's checkpoint at a boundary (one process): copy all of it into `model` and
        `optimizer` but the parameters named in `fresh` and their moments, which are left as they are.

        The base is not copied when this is saved: the manifest names the one of `run`, which lies beside this run.
        DamagedError if it is not whole, CheckpointError if it does not fit.
        """
        source = self._storage.sibling(run)

        def left(name: str) -> bool:
            kind, _, rest = name.partition(".")
            return (rest.rpartition(".")[0] if kind == "optimizer" else rest) in fresh

        for part, tensors in zip((manifest.base, manifest.delta), split_state(model, optimizer, frozen), strict=True):
            if part is not None:
                index = _without(read_whole_index(source, part), left)
                _load_part(source, part, index, {n: tensor for n, tensor in tensors.items() if not left(n)})
        self._lineage.fork(manifest, run)
        return Position(manifest.step, manifest.boundary, manifest.counters, manifest.rollbacks)

    def save(
        self,
        position: Position,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: set[str],
        *,
        needed: bool = False,
        leaving: Sequence[int] = (),
        commit_after: Future[Any] | None = None,
    ) -> list[Saved]:
        """Begin to store the state at `position` (every rank, same step); returns what became of earlier saves.

        The base is written only if a boundary changed it since the last checkpoint. While an earlier save is under
        way, one that is `needed`, brings a new base or would leave too many steps unsaved waits for it; any other is
        left out. Ranks that are `leaving` store nothing: the others hold the same state. `commit_after`: the manifest
        is not committed before this is done, whatever comes of it. Failures of storage are part of the result: the run
        can still resume from the checkpoint before. NotSavedError when there have been too many.
        """
        began = time.perf_counter()
        if self._under_way is not None:
            needed |= bool(frozen) and self._under_way.position.boundary != position.boundary
            needed |= self._unsaved(position.step) > self._max_unsaved
            busy = self._world.sum(float(not self._under_way.future.done()))[0] > 0  # ranks may not differ in this
            if busy and not needed:
                return [Saved(position.step, why_not=f"that of step {self._under_way.position.step} is under way")]
        self._refuse_changed_options(optimizer)
        results = self.settle()
        last_chance = bool(self._failure) and self._unsaved(position.step) > self._max_unsaved
        base, delta = split_state(model, optimizer, frozen)
        writers = [rank for rank in range(self._world.size) if rank not in leaving] or list(range(self._world.size))
        manifest, plans = self._draft(position, base, delta, len(writers))
        base_is_new = "base" in plans
        if self._world.rank not in writers:
            plans = {}
        share = Share(rank=self._world.rank, manifest=manifest, writers=tuple(writers))
        number = writers.index(self._world.rank) if plans else -1
        tensors = base | delta
        mine = {kind: self._host.take(kind, plan.slices(number, tensors)) for kind, plan in plans.items()}
        self._host.synchronize()
        future = self._thread.submit(self._store, share, plans, number, mine, commit_after)
        self._under_way = _UnderWay(future, position, base_is_new, began)
        waits = last_chance or not self._cfg.save_async
        if waits:
            wait([future])
        self._under_way.blocked_s = time.perf_counter() - began
        if waits:
            results += self.settle()
            self._end_if_unsaved(position.step)
        return results

    def poll(self) -> list[Saved]:
        """What became of the save under way, as soon as this rank knows. Cheap: call it after every step."""
        if self._under_way is None or not self._under_way.future.done():
            return []
        return self._report(self._under_way)

    def close(self, *, failed: bool = False) -> list[Saved]:
        """Wait for the save under way; the checkpointer is then of no more use (every rank).

        NotSavedError if it was not stored. After a failure elsewhere (`failed`) nothing is raised: what can be stored
        in `LAST_WORDS_S` seconds is.
        """
        if not failed:
            results = self.settle()
            self._thread.shutdown()
            if self._failure:
                raise NotSavedError(f"the last checkpoint was not stored: {self._with_advice(self._failure)}")
            return results
        if self._under_way is not None:
            with contextlib.suppress(Exception):
                self._under_way.future.result(timeout=LAST_WORDS_S)
        self._thread.shutdown(wait=False)
        return []

    def roll_back(self, rollback: Rollback) -> None:
        """Store that the run goes back (one rank). CheckpointError if this attempt was given up, StorageError if it
        cannot be stored."""
        outcome = self._committer.roll_back(rollback)
        if outcome.error:
            raise (CheckpointError if outcome.fatal else StorageError)(outcome.error)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on this attempt's way that are there, ascending (one rank)."""
        return self._lineage.steps(self._storage)

    def remove_orphans(self) -> None:
        """Begin to remove what earlier attempts left behind, before the first save (every rank, once it is clear what
        is gone on from)."""
        if self._world.is_first:
            self._thread.submit(self._commits.remove_orphans, self.attempt, self._lineage.line)

    def fence(self) -> None:
        """SupersededError if another driver owns the run by now (one rank)."""
        refuse_if_superseded(self._storage, self.attempt)

    def _refuse_changed_options(self, optimizer: torch.optim.Optimizer) -> None:
        """TypeError if an optimizer keeps something in its groups that changes: it would be lost without a word."""
        now = options(optimizer)
        if self._options is None or self._options[0] is not optimizer:
            refuse_unknown_options(optimizer)
            self._options = optimizer, now
        for before, group in zip(self._options[1], now, strict=True):
            if changed := [name for name in group if group[name] != before.get(name)]:
                raise TypeError(
                    f"the optimizer's group has {changed[0]}={group[changed[0]]}, and had {before.get(changed[0])}: a "
                    f"checkpoint holds tensors of optimizer.state only. Keep there what changes."
                )

    def _draft(
        self, position: Position, base: Tensors, delta: Tensors, num_writers: int
    ) -> tuple[Manifest, dict[str, PartPlan]]:
        """The manifest less the objects to be stored, and the plans of the delta and, if it is new, of the base."""
        base_part = self._lineage.base_at(position.boundary) if base else None
        base_is_new = bool(base) and base_part is None

        def part(kind: str, sums: list[int]) -> Part:
            value = digest_of_sums(sums)
            self._world.assert_same(value, f"before the checkpoint at step {position.step}")
            return Part(folder=self._lineage.folder(kind, position.step), objects=(), digest=value)

        delta_sums = bit_sums(list(delta.values()))
        delta_part = part("delta", delta_sums)
        zeros = _zeros(delta, delta_sums)
        plans = {"delta": plan_part({n: t for n, t in delta.items() if n not in zeros}, num_writers, zeros)}
        if base_is_new:
            base_part = part("base", bit_sums(list(base.values())))
            plans["base"] = plan_part(base, num_writers)
        manifest = Manifest(
            step=position.step,
            tokens=position.step * self._tokens_per_step,
            boundary=position.boundary,
            base=base_part,
            delta=delta_part,
            counters=position.counters,
            identity=self._identity,
            data_fingerprint=self._data_fingerprint,
            attempt=self.attempt,
            world_size=self._world.size,
            versions=_versions(),
            unix_time=time.time(),
            line=self._lineage.line,
            rollbacks=position.rollbacks,
            setup=self._setup,
        )
        return manifest, plans

    def _store(
        self,
        share: Share,
        plans: dict[str, PartPlan],
        number: int,
        mine: dict[str, Tensors],
        commit_after: Future[Any] | None,
    ) -> tuple[Outcome, float]:
        """In the thread: put this rank's objects, those of writer `number`, then hand the share in. Returns the outcome
        and when it was known."""
        error, manifest = "", share.manifest
        try:
            for kind, plan in plans.items():
                part: Part = getattr(manifest, kind)
                objects = write_share(self._storage, part.folder, plan, number, mine[kind])
                manifest = manifest.model_copy(update={kind: part.model_copy(update={"objects": tuple(objects)})})
        except ReloraError as caught:
            error = str(caught)
        except Exception as caught:  # the other ranks wait for this share, whatever happened
            logger.exception("rank %d could not store its share", self._world.rank)
            error = f"{type(caught).__name__}: {caught}"
        if commit_after is not None:
            wait([commit_after])
        outcome = self._committer.commit(share.model_copy(update={"manifest": manifest, "error": error}))
        return outcome, time.perf_counter()

    def settle(self) -> list[Saved]:
        """Wait for the save under way (every rank): all then know the same of it."""
        if self._under_way is None:
            return []
        ended, self._under_way = self._under_way, None
        outcome, _ = ended.future.result()
        results = self._report(ended)
        self._failure = outcome.error
        if outcome.manifest is not None:
            self._lineage.committed(outcome.manifest)
        return results

    def _end_if_unsaved(self, step: int) -> None:
        if self._failure and self._unsaved(step) > self._max_unsaved:
            raise NotSavedError(
                f"{self._unsaved(step)} updates, up to step {step}, are not stored, and checkpoint.max_unsaved_steps="
                f"{self._max_unsaved} allows no more: {self._with_advice(self._failure)}"
            )

    def _report(self, ended: _UnderWay) -> list[Saved]:
        """What became of a save, once. CheckpointError if somebody else writes the run."""
        outcome, known_at = ended.future.result()
        if outcome.fatal:
            raise CheckpointError(outcome.error)
        if ended.reported:
            return []
        ended.reported = True
        step = ended.position.step
        if outcome.manifest is None and self._world.is_first:
            logger.warning("the checkpoint at step %d was not stored: %s", step, self._with_advice(outcome.error))
        return [
            Saved(step, outcome.manifest, ended.base_is_new, ended.blocked_s, known_at - ended.began, outcome.error)
        ]

    @property
    def _max_unsaved(self) -> int:
        return self._cfg.max_unsaved_steps or 4 * self._cfg.save_every_steps

    def _unsaved(self, step: int) -> int:
        newest = self._lineage.newest
        return step - (newest.step if newest is not None else 0)

    def _with_advice(self, error: str) -> str:
        newest = self._lineage.newest
        there = f"step {newest.step}" if newest is not None else "its start"
        return f"{error.rstrip('.')}. The run could resume from {there}."


class HostCopies:
    """Copies of tensors in host memory, pinned if they come from a GPU, in buffers that the next copy uses again.

    A rank holds one copy of its share of the delta, and from the first boundary on one of its share of the base.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensors] = {}

    def take(self, kind: str, tensors: Tensors) -> Tensors:
        """Copies of `tensors`, complete after `synchronize`; those of the last call for this kind are overwritten."""
        old = self._buffers.get(kind, {})
        new = {name: _buffer_for(tensor, old.get(name)) for name, tensor in tensors.items()}
        self._buffers[kind] = new
        for name, tensor in tensors.items():
            new[name].copy_(tensor, non_blocking=True)
        return new

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _buffer_for(tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
        return old
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def restore_model(storage: Storage, manifest: Manifest, model: nn.Module, frozen: set[str]) -> None:
    """Copy a checkpoint's weights, without optimizer state, into `model` in place. One process."""
    for part, tensors in zip((manifest.base, manifest.delta), split_state(model, None, frozen), strict=True):
        if part is not None:
            index = _without(read_whole_index(storage, part), lambda name: name.startswith("optimizer."))
            _load_part(storage, part, index, tensors)


def split_state(model: nn.Module, optimizer: torch.optim.Optimizer | None, frozen: set[str]) -> tuple[Tensors, Tensors]:
    """All live tensors of a training state as (base, delta), under stable names, sharing their memory.

    `model.<name>` for parameters and persistent buffers, `optimizer.<parameter>.<key>` for what the optimizer keeps.
    """
    own = {id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))}
    tensors = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if own[id(t)] == name}
    base = {f"model.{name}": t for name, t in tensors.items() if name in frozen}
    delta = {f"model.{name}": t for name, t in tensors.items() if name not in frozen}
    if optimizer is not None:
        delta |= {f"optimizer.{name}": t for name, t in state_tensors(model, optimizer).items()}
    return base, delta


def _without(index: dict[str, Any], left: Callable[[str], bool]) -> dict[str, Any]:
    return {kind: {name: entry for name, entry in of.items() if not left(name)} for kind, of in index.items()}


def _load_part(storage: Storage, part: Part, index: dict[str, Any], tensors: Tensors) -> None:
    """In this process alone: torch would have ranks exchange pickled plans, and all of them read the same."""
    stored, absent = index["tensors"], tensors.keys() - index["tensors"].keys()
    zeros = index["zeros"].keys() if "zeros" in index else {name for name in absent if _is_moment(name)}
    if wrong := sorted((stored.keys() - tensors.keys()) | (absent ^ zeros)):
        raise CheckpointError(
            f"{part.folder} and the model differ in tensors: {wrong[0]} and {len(wrong) - 1} more are on one "
            f"side only. Use the config that the checkpoint was made with. If an earlier version began the run, name "
            f"in method.leave_out the stacks of experts and the layers that it trained in full."
        )
    with torch.no_grad():
        for name in absent:
            tensors[name].zero_()
    try:
        with _quiet():
            dcp.load(
                {name: tensors[name] for name in sorted(stored)},
                storage_reader=PartReader(storage, part, stored),
                no_dist=True,
            )
    except CheckpointException as error:
        raise _first_cause(error, f"cannot load {part.folder}") from error


def _zeros(delta: Tensors, sums: list[int]) -> Tensors:
    """What the optimizer keeps that holds zeros only: right after a start or a reset that is most of it. `sums`: of the
    tensors' bits, so that -0.0 counts as something, and only those that may be empty need another look."""
    maybe = [n for n, total in zip(delta, sums, strict=True) if n.startswith("optimizer.") and total == 0]
    if not maybe:
        return {}
    nonzero = torch.stack([as_integers(delta[name]).any() for name in maybe]).tolist()
    return {name: delta[name] for name, any_nonzero in zip(maybe, nonzero, strict=True) if not any_nonzero}


def _is_moment(name: str) -> bool:
    """What versions before format 5 left out where it was zero."""
    return name.startswith("optimizer.") and name.rpartition(".")[2] in MOMENTS


def _first_cause(error: CheckpointException, what: str) -> Exception:
    """What torch wraps keeps its class if it is ours."""
    _, (cause, _) = min(error.failures.items())
    message = f"{what}: {cause}"
    if not isinstance(cause, ReloraError):  # out of memory, say: no reason to call the checkpoint damaged
        failed = RankFailedError(f"{what}: {in_words(cause)}")
        failed.verdict = verdict(cause)
        return failed
    ours = type(cause)(message)
    ours.restart_helps = cause.restart_helps
    return ours


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "relora_ray": __version__,
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
    }
