"""The training loop. No Ray here: a world of ranks, a config, and storage.

`run_attempt` is one life of a worker group: build, resume from the newest checkpoint, train to the end,
export. All ranks call it with equal arguments. `train` is the loop proper, meant to be read in order.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from relora_ray.checkpoint import Checkpointer, Committer, Manifest, Rollback, Saved, read_history
from relora_ray.checkpoint.manifest import Counters, HeldOut, read_record
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import RunConfig
from relora_ray.data.loader import BatchSource, MicroBatch
from relora_ray.errors import CheckpointError, DamagedError, DivergedError, NonFiniteError, RolledBackError
from relora_ray.keyed import key
from relora_ray.methods.base import Boundary, BoundaryReport, Method, Update, build_method
from relora_ray.methods.updates import updates_record
from relora_ray.modeling.optim import trainable
from relora_ray.modeling.parallel import World, digest
from relora_ray.modeling.schedule import lr_multiplier
from relora_ray.modeling.token_loss import TokenLoss
from relora_ray.runs.batches import Data, open_batches
from relora_ray.runs.card import model_card
from relora_ray.runs.divergence import begin_cycle, diverged, observe
from relora_ray.runs.metrics import MetricsLog, Record, StepTimer, perplexity
from relora_ray.runs.places import run_storage
from relora_ray.runs.rollback import roll_back, skipped, where_to_go_on
from relora_ray.runs.run import export_model
from relora_ray.runs.setting import MODEL, as_begun, begin, find_setting
from relora_ray.runs.state import TrainState, build_state, identity_digest, structure_record
from relora_ray.runs.trial import check_gradients
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

OnRecord = Callable[[Record], None]


class Supervisor(Protocol):
    """Who watches the ranks from outside and may want them to store their state. Called by every rank."""

    def agree(self, when: str, step: int, digest: int) -> None:
        """Returns when all ranks have come to the boundary after `step` updates with one digest. `when` is before or
        after. RanksDisagreeError if they have not."""

    def save_wanted(self) -> bool:
        """Whether the state is to be stored after this step. Asked at every step: must cost nothing."""

    def begin_save(self, step: int) -> list[int]:
        """The wanted checkpoint is about to be stored (rank 0 says so, before any rank does). Returns the ranks that
        will soon be gone: the others store what theirs would be."""

    def pause(self, step: int, stored: bool) -> None:
        """The wanted checkpoint is stored, or is not; returns when training may go on."""


def run_attempt(
    cfg: RunConfig,
    world: World,
    *,
    attempt: str | None = None,
    on_record: OnRecord | None = None,
    committer: Committer | None = None,
    supervisor: Supervisor | None = None,
    cause: str = "",
) -> TrainState:
    """Bring the run from its newest checkpoint to its end; returns the final state.

    RolledBackError if it diverged: call this again. `attempt`: its name, of a term that is held; None: rank 0 claims a
    term for it. `on_record` sees every metrics record on every rank. `committer`:
    who gathers the ranks' shares of a checkpoint and commits it; default: rank 0. `cause`: why this attempt begins, for
    the record. Safe to call again on a finished run: it then only writes the export that may be missing.
    """
    storage = run_storage(cfg)
    if attempt is None:
        attempt = world.on_first(lambda: _begin_alone(cfg))
    setting = world.on_all(lambda: find_setting(storage))
    cfg = as_begun(cfg, setting)
    method = build_method(cfg)
    data = open_batches(cfg, world)
    checkpointer = Checkpointer(
        storage,
        cfg.checkpoint,
        world,
        attempt=attempt,
        identity=identity_digest(cfg, data.fingerprint),
        data_fingerprint=data.fingerprint,
        tokens_per_step=cfg.tokens_per_step,
        setup=setting.record(),
        committer=committer,
        timeout_s=cfg.cluster.collective_timeout_s,
    )
    log = MetricsLog(storage, checkpointer.attempt) if world.is_first else None

    def emit(record: Record) -> None:
        record = {**record, "unix_time": round(time.time(), 3)}
        if log is not None:
            log.write(record, flush=record["kind"] != "train")
        if on_record is not None:
            on_record(record)

    closed = False
    try:
        state, saved = resume(cfg, method, checkpointer, world, storage)
        checkpointer.remove_orphans()
        emit(_attempt_record(cfg, state, checkpointer, world) | {"cause": cause})
        skip = skipped(state.position.rollbacks, cfg.steps).union(cfg.train.skip_steps)
        train(cfg, world, method, state, data, checkpointer, emit, log, supervisor, skip=skip, already_saved=saved)
        closed = True
        _emit_saved(emit, checkpointer.close())
        # An attempt that found the run at its end has stored nothing, so nothing has told it that the run is another
        # driver's by now, which may be going back.
        world.on_first(checkpointer.fence)
        if world.is_first and state.position.step == cfg.steps:
            _export_if_missing(cfg, method, state, storage)
        emit(
            {
                "kind": "end",
                "step": state.position.step,
                "skipped_steps": state.position.counters.skipped_steps,
                "peak_memory_bytes": world.peak_memory_bytes(),
            }
        )
    finally:
        if not closed:
            checkpointer.close(failed=True)
        if log is not None:
            log.close()
    return state


def train(
    cfg: RunConfig,
    world: World,
    method: Method,
    state: TrainState,
    data: Data,
    checkpointer: Checkpointer,
    emit: OnRecord,
    log: MetricsLog | None,
    supervisor: Supervisor | None = None,
    *,
    skip: frozenset[int],
    already_saved: bool,
) -> None:
    """Updates `state.position.step` .. `cfg.last_step - 1`, less those in `skip`, in place. Every rank."""

    def record_eval() -> None:
        record = evaluate(cfg, world, state, data.validation)
        if math.isfinite(record["loss"]):
            found = HeldOut(step=record["step"], loss=record["loss"], tokens=record["tokens"])
            state.position = replace(state.position, counters=state.position.counters.after_evaluation(found))
        emit(record)
        for name, rows in data.named.items():
            emit(evaluate(cfg, world, state, rows, name=name))

    def save(*, wanted: bool = False, is_best: bool = False) -> None:
        leaving = (
            world.broadcast(supervisor.begin_save(state.position.step) if world.is_first else None)
            if wanted and supervisor
            else []
        )
        frozen = method.frozen_names(state.model)
        results = checkpointer.save(
            state.position,
            state.model,
            state.optimizer,
            frozen,
            needed=wanted or is_best or state.position.step == cfg.last_step,
            leaving=leaving,
            # So that a run that goes on from this checkpoint has the metrics of all steps before.
            commit_after=log.flush() if log is not None else None,
        )
        if wanted and supervisor:
            results += checkpointer.settle()
        _emit_saved(emit, results)
        if wanted and supervisor:
            supervisor.pause(state.position.step, results[-1].manifest is not None)

    if not already_saved:  # the start is a checkpoint like any other
        record_eval()
        save()
    method.refresh(state.model)
    if state.position.step < cfg.last_step:
        wrapped = _wrap(cfg, world, state, data)
    timer = StepTimer()
    unchecked = world.size == 1
    """Whether gradients of the present structure have yet to be looked at: with several ranks `_wrap` has."""

    for step in range(state.position.step, cfg.last_step):
        began = time.perf_counter()
        done = step + 1
        learning_rate = cfg.optimizer.learning_rate * lr_multiplier(step, cfg)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)

        wanted, notes = False, dict[str, float]()
        if step in skip:
            loss, grad_norm = math.nan, math.nan
            counters = _count_skipped(state.position.counters)
        else:
            # Asked of all in the reduction of the loss: a rank that hears of it a step earlier must not be alone.
            wish = supervisor is not None and supervisor.save_wanted()
            # Loss and gradients are reduced: every rank sees the same numbers and takes the same branch.
            update, wanted = _make_update(cfg, world, method, state, wrapped, data.train.step(step), wish, unchecked)
            unchecked = False
            loss, grad_norm, notes = update.loss, update.grad_norm, update.notes
            counters = _count(cfg, state.position.counters, loss if update.applied else math.nan, done)
        state.position = replace(state.position, step=done, counters=counters)
        seconds = time.perf_counter() - began
        if step not in skip:  # nothing is done there: it says nothing of how long an update takes
            timer.add(seconds)

        took = {"step_s": seconds} if step in skip else {}
        emit(notes | _train_record(cfg, state, loss, grad_norm, learning_rate, timer) | took)
        _emit_saved(emit, checkpointer.poll())
        _end_if_diverged(cfg, world, method, checkpointer, counters, done)

        if method.is_boundary(done):
            report, record = _cross_boundary(cfg, world, method, state, data.train, done, supervisor)
            emit(record)
            if report.updates:
                emit({"kind": "updates", "step": done, "boundary_kind": report.kind, **updates_record(report.updates)})
            if report.new_parameters:
                del wrapped  # with its buckets, which hold a gradient of every weight
                gc.collect()
                wrapped = _wrap(cfg, world, state, data)
                unchecked = world.size == 1
        if _eval_due(cfg, done):
            record_eval()
        is_best = cfg.checkpoint.keep_best and _is_best(state.position.counters, done)
        if wanted or is_best or _save_due(cfg, method, done):
            save(wanted=wanted, is_best=is_best)


def loss_on(cfg: RunConfig, world: World, model: nn.Module, batches: Iterable[MicroBatch]) -> tuple[float, int]:
    """Loss per token, in nats, and the number of tokens, of all ranks' batches. Every rank."""
    model.eval()
    loss = TokenLoss(model, cfg.train)
    total, num_rows = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(_loss_sum(loss, batch))
            num_rows += float(batch.weights.sum())
    model.train()
    total, num_rows = world.sum(total, num_rows)
    tokens = num_rows * cfg.data.seq_len
    return total / tokens, int(tokens)


def evaluate(cfg: RunConfig, world: World, state: TrainState, validation: BatchSource, *, name: str = "") -> Record:
    """Loss per token on the first `eval_rows` validation rows: the same rows at any world size. Every rank. `name`: of
    the set of `data.validation` that they are of; the run's own held-out rows have none."""
    began = time.perf_counter()
    per_token, tokens = loss_on(cfg, world, state.model, validation.first_rows(cfg.train.eval_rows))
    return {
        "kind": "eval",
        "step": state.position.step,
        "loss": per_token,
        "perplexity": perplexity(per_token),
        "tokens": tokens,
        "eval_s": time.perf_counter() - began,
        **({"name": name, "data_fingerprint": cfg.data.validation_fingerprints.get(name, "")} if name else {}),
    }


def resume(
    cfg: RunConfig, method: Method, checkpointer: Checkpointer, world: World, storage: Storage
) -> tuple[TrainState, bool]:
    """The state of the newest checkpoint that is whole, or a new one; and whether it is saved already.

    A newer one that is damaged is passed over, with its reason, once an older one has been restored; CheckpointError if
    there is none. Nothing is removed: it stays until later commits have taken its place.
    """

    def look() -> tuple[list[str], list[str], list[tuple[str, str]]]:
        paths, rollbacks, unreadable = where_to_go_on(storage)
        return paths, [r.model_dump_json() for r in rollbacks], [(path, str(error)) for path, error in unreadable]

    paths, told, rejected = world.on_first(look)
    rollbacks = tuple(Rollback.model_validate_json(text) for text in told)
    for number in reversed(range(len(paths))):
        try:
            state = _restored(cfg, method, checkpointer, world, storage, paths[: number + 1])
        except DamagedError as error:
            rejected.append((paths[number], str(error)))
            continue
        for newer, reason in rejected:
            if world.is_first:
                step = state.position.step
                logger.warning("%s is passed over, and the run goes on from step %d: %s", newer, step, reason)
        _go_on_with(state, rollbacks)
        return state, True
    if rejected:
        world.on_first(checkpointer.fence)  # whoever owns the run by now may have removed what this one looked for
        raise CheckpointError(
            f"none of the {len(rejected)} checkpoints is whole; the newest: {rejected[0][1]} Nothing was changed. "
            f"Restore the files, or set another name to start again."
        )
    state = build_state(cfg, method, world, 0)
    world.assert_same(digest(list(state.model.state_dict().values())), "at the start")
    _go_on_with(state, rollbacks)
    return state, False


def _restored(
    cfg: RunConfig, method: Method, checkpointer: Checkpointer, world: World, storage: Storage, line: list[str]
) -> TrainState:
    """The state of the last checkpoint of a line. DamagedError if it is not whole."""
    manifest = Manifest.model_validate_json(world.on_first(lambda: read_record(storage, line[-1]).model_dump_json()))
    state = build_state(cfg, method, world, manifest.step)
    frozen = method.frozen_names(state.model)
    state.position = checkpointer.restore(manifest, tuple(line), state.model, state.optimizer, frozen)
    return state


def _go_on_with(state: TrainState, rollbacks: tuple[Rollback, ...]) -> None:
    counters = state.position.counters.model_copy(update={"rollbacks": len(rollbacks)})
    state.position = replace(state.position, counters=counters, rollbacks=rollbacks)


def _begin_alone(cfg: RunConfig) -> str:
    """Own the run without a driver; the name of an attempt."""
    storage = run_storage(cfg)
    term = claim(storage)
    begin(cfg, term)
    return term.attempt(1)


def _wrap(cfg: RunConfig, world: World, state: TrainState, data: Data) -> nn.Module:
    batch = data.train.step(state.position.step)[0]
    compiled = world.device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    if compiled:
        torch._dynamo.reset()  # graphs of parameters that are gone, and only so many may be made
    loss = TokenLoss(state.model, cfg.train, compiled=compiled)
    return world.wrap(
        loss, warm_up=lambda wrapped: _loss_sum(wrapped, batch), check=lambda: check_gradients(state.model)
    )


def _make_update(
    cfg: RunConfig,
    world: World,
    method: Method,
    state: TrainState,
    wrapped: nn.Module,
    rows: list[MicroBatch],
    wish: bool,
    unchecked: bool,
) -> tuple[Update, bool]:
    """One update as the method has it; and whether any rank has a `wish`. `unchecked`: look at the gradients first."""
    step, wanted = state.position.step, False

    def backward(extra: Callable[[], torch.Tensor] | None) -> float:
        nonlocal wanted
        loss, wanted = _accumulate_gradients(cfg, world, wrapped, rows, step, wish, extra)
        if unchecked:
            check_gradients(state.model)
        return loss

    update = Update(
        state.model,
        state.optimizer,
        step,
        seed=cfg.seed,
        world=world,
        grad_clip=cfg.optimizer.grad_clip,
        backward=backward,
    )
    method.update(update)
    if not update.is_over:
        raise RuntimeError(f"{type(method).__name__}.update returned without update.apply(): no weight has moved")
    return update, wanted


def _accumulate_gradients(
    cfg: RunConfig,
    world: World,
    wrapped: nn.Module,
    batches: list[MicroBatch],
    step: int,
    wish: bool,
    extra: Callable[[], torch.Tensor] | None = None,
) -> tuple[float, bool]:
    """Gradient of the mean loss over the global batch, and of `extra`, reduced over ranks; returns that mean, and
    whether any rank has a `wish`.

    Each micro-batch contributes its summed loss over the global number of tokens, so the gradient does not
    depend on how rows fall to micro-batches and ranks. DDP divides by the world size; the factor undoes it.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, batch in enumerate(_seeded(cfg, world, batches, step), 1):
        last = number == len(batches)
        with world.sync_gradients(wrapped, now=last):
            loss_sum = _loss_sum(wrapped, batch)
            loss = loss_sum * (world.size / cfg.tokens_per_step)
            (loss + extra() if extra is not None and last else loss).backward()
        total += loss_sum.detach()
    total_loss, wishes = world.sum(float(total), float(wish))
    return total_loss / cfg.tokens_per_step, wishes > 0


def _seeded(cfg: RunConfig, world: World, batches: list[MicroBatch], step: int) -> Iterator[MicroBatch]:
    """Each when it is its turn, with the random numbers for its dropout."""
    for number, batch in enumerate(batches):
        world.seed(key(cfg.seed, "dropout", step, world.rank, number))
        yield batch


def _loss_sum(loss: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over the tokens of the rows that count, in fp32. `loss`: a TokenLoss, wrapped or not."""
    total: torch.Tensor = loss(batch.inputs, batch.targets, batch.weights)
    return total


def _gradient_of(
    cfg: RunConfig,
    world: World,
    model: nn.Module,
    batches: list[MicroBatch],
    step: int,
    tensors: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """What `Boundary.gradient` gives, by the rows of update `step`."""
    were = [tensor.requires_grad for tensor in tensors]
    sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    loss = TokenLoss(model, cfg.train)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        for batch in _seeded(cfg, world, batches, step):
            mean = _loss_sum(loss, batch) / cfg.tokens_per_step
            found = torch.autograd.grad(mean, list(tensors), allow_unused=True)
            for tensor, total, gradient in zip(tensors, sums, found, strict=True):
                if gradient is None:
                    name = next((name for name, p in model.named_parameters() if p is tensor), "a tensor")
                    raise RuntimeError(
                        f"no gradient reaches {name}: it is not what its layer computes with, as W is not where "
                        f"adapters are added to it. Ask before they are put in, or of the layer's output."
                    )
                total += gradient
    finally:
        for tensor, was in zip(tensors, were, strict=True):
            tensor.requires_grad_(was)
    world.sum_(sums)
    return sums


def _count(cfg: RunConfig, counters: Counters, loss: float, done: int) -> Counters:
    """After an update with this loss; nan if it or the gradient was not finite, and the update not made."""
    counters = observe(cfg.train, counters, done - 1, loss)
    if math.isfinite(loss):
        return counters.model_copy(update={"skipped_in_a_row": 0})
    in_a_row = counters.skipped_in_a_row + 1
    logger.warning("step %d skipped: loss or gradient is not finite (%d in a row)", done - 1, in_a_row)
    return _count_skipped(counters).model_copy(update={"skipped_in_a_row": in_a_row})


def _end_if_diverged(
    cfg: RunConfig, world: World, method: Method, checkpointer: Checkpointer, counters: Counters, done: int
) -> None:
    """Raise on every rank if the run has diverged: RolledBackError if it goes back, else DivergedError."""
    in_a_row, allowed, back = counters.skipped_in_a_row, cfg.train.max_nonfinite_steps, cfg.train.max_rollbacks
    why = diverged(cfg.train, counters, done)
    if in_a_row > allowed:
        why = f"{in_a_row} steps in a row, up to step {done - 1}, had a loss or gradient that is not finite"
    if not why:
        return
    if back:
        checkpointer.settle()  # or its commit may prune the checkpoint that is chosen now

        def go_back() -> str:
            before = checkpointer.steps()
            rollback = roll_back(cfg, method, before, counters, done, why, attempt=checkpointer.attempt)
            if rollback is not None:
                checkpointer.roll_back(rollback)
            return "" if rollback is None else str(rollback)

        if rollback := world.on_first(go_back):
            raise RolledBackError(f"{why}: {rollback}")
    elif in_a_row <= allowed:
        return
    rules = [f"train.max_nonfinite_steps={allowed}"] * (in_a_row > allowed) + [f"train.max_rollbacks={back}"] * bool(
        back
    )
    raise (NonFiniteError if in_a_row > allowed else DivergedError)(
        f"{why}; {' with '.join(rules)} allows no more. Raise that to go on from the last checkpoint, or start under "
        f"another name from a step before (model.init_from=RUN@STEP) with a lower optimizer.learning_rate or a longer "
        f"warm-up."
    )


def _count_skipped(counters: Counters) -> Counters:
    return counters.model_copy(update={"skipped_steps": counters.skipped_steps + 1})


def _cross_boundary(
    cfg: RunConfig,
    world: World,
    method: Method,
    state: TrainState,
    rows: BatchSource,
    done: int,
    supervisor: Supervisor | None,
) -> tuple[BoundaryReport, Record]:
    """Do the boundary after `done` updates and see that every rank comes to it and out of it with the same weights."""
    began = time.perf_counter()

    def agree(when: str, value: int) -> None:
        if supervisor is None:
            world.assert_same(value, f"{when} the boundary at step {done}")
        else:
            supervisor.agree(when, done, value)

    agree("before", digest(trainable(state.model)))  # what is wrong must not reach the weights for good
    report = method.on_boundary(
        Boundary(
            state.model,
            state.optimizer,
            done,
            seed=cfg.seed,
            world=world,
            gradient=lambda tensors: _gradient_of(cfg, world, state.model, rows.step(done - 1), done - 1, tensors),
        )
    )
    state.optimizer = report.optimizer
    value = digest(list(state.model.state_dict().values()))
    agree("after", value)
    counters = begin_cycle(state.position.counters)
    if report.kind == "merge":
        counters = counters.model_copy(update={"merges": counters.merges + 1})
    state.position = replace(state.position, boundary=done, counters=counters)
    return report, {
        "kind": "boundary",
        "step": done,
        "boundary_kind": report.kind,
        "num_layers": report.num_layers,
        "state_pruned": report.state_pruned,
        "digest": value,
        "merges": counters.merges,
        **structure_record(state),
        "new_parameters": report.new_parameters,
        "boundary_s": time.perf_counter() - began,
    }


def _eval_due(cfg: RunConfig, done: int) -> bool:
    every = cfg.train.eval_every_steps
    return done in (cfg.warm_start_steps, cfg.last_step) or bool(every and done % every == 0)


def _is_best(counters: Counters, done: int) -> bool:
    return counters.best is not None and counters.best.step == done


def _save_due(cfg: RunConfig, method: Method, done: int) -> bool:
    return done == cfg.last_step or done % cfg.checkpoint.save_every_steps == 0 or method.is_boundary(done)


def _emit_saved(emit: OnRecord, results: list[Saved]) -> None:
    for saved in results:
        if saved.manifest is None:
            emit({"kind": "checkpoint_missed", "step": saved.step, "why": saved.why_not})
            continue
        base = saved.manifest.base
        emit(
            {
                "kind": "checkpoint",
                "step": saved.step,
                "delta_bytes": saved.manifest.delta.size_bytes,
                "base_bytes": base.size_bytes if base else 0,
                "base_is_new": saved.base_is_new,
                "blocked_s": saved.blocked_s,
                "save_s": saved.save_s,
            }
        )


def _export_if_missing(cfg: RunConfig, method: Method, state: TrainState, storage: Storage) -> None:
    """The last checkpoint is committed, so whoever exports it, however late, writes the same bytes."""
    out = storage.child(MODEL)
    if cfg.method.exports and not out.exists("config.json"):
        history = read_history(storage)
        setting, path = find_setting(storage, history), history.path_at(state.position.step)
        assert path is not None, "it is committed"
        card = model_card(cfg, history.read(path), setting.data_index(), dtype="float32")
        export_model(setting, cfg, state.model, method.dense_state_dict(state.model), out, card=card)


def _train_record(
    cfg: RunConfig,
    state: TrainState,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    timer: StepTimer,
) -> Record:
    done = state.position.step
    return {
        "kind": "train",
        "step": done,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": done * cfg.tokens_per_step,
        "tokens_per_s": cfg.tokens_per_step / timer.step_s if timer.step_s else 0.0,
        "step_s": timer.step_s,
        "left_s": (cfg.last_step - done) * timer.step_s,
        "cycle": state.position.counters.merges,
        "skipped_steps": state.position.counters.skipped_steps,
    }


def _attempt_record(cfg: RunConfig, state: TrainState, checkpointer: Checkpointer, world: World) -> Record:
    return {
        "kind": "attempt",
        "step": state.position.step,
        "attempt": checkpointer.attempt,
        "world_size": world.size,
        "device": str(world.device),
        "device_name": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "",
        **structure_record(state),
    }
