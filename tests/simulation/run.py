"""One run, or a run and its fork, under a seed: drivers that claim, attempts of one or two ranks that train, save,
diverge, fall back and resume, while storage errs, machines are lost or cut off, and processes stop and die. Then the
question whether all promises were kept.

Simulated: what training computes (a state is a digest of the updates that made it), Ray (it starts worker groups and
a coordinator that died, and decides on sizes at random), and who starts drivers. Written out once more, since it is
tied to torch and processes: what agents, trainers and the loop do, in the order in which they do it. Real: claiming,
fencing, the coordinator with its orders, boundaries and commits, lines, retention, rollbacks, pins, reading back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from relora_ray.checkpoint import Commits, Outcome, Rollback, Share
from relora_ray.checkpoint.history import History, pin, pin_base_only
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, HeldOut, Manifest, Part, StoredObject, key_of, read_record
from relora_ray.checkpoint.ownership import (
    BEAT_S,
    Life,
    Term,
    attempt_key,
    claim,
    refuse_if_superseded,
    refuse_if_taken_over,
)
from relora_ray.checkpoint.parts import read_checked
from relora_ray.config import CheckpointConfig
from relora_ray.errors import (
    CheckpointError,
    DamagedError,
    DivergedError,
    NotSavedError,
    RanksDisagreeError,
    ReloraError,
    RolledBackError,
    RunBusyError,
    StorageError,
    SupersededError,
)
from relora_ray.runs.rollback import roll_back, skipped, where_to_go_on
from relora_ray.runtime.messages import Arrival, Member, Start
from relora_ray.runtime.orders import Order
from relora_ray.runtime.trainer import _kind
from relora_ray.storage import Storage
from tests.simulation.actor import Actor, coordinators
from tests.simulation.world import Process, Signal, World, bucket_storage

CYCLE = 4
EVAL_EVERY = 3
START = "0"
NONE_WHOLE = "no checkpoint is whole"
STEP_S = 1.0


class Broken(AssertionError):
    """A promise was not kept."""


@dataclass
class Run:
    """What is known of a run by an observer that storage cannot mislead."""

    world: World
    name: str
    steps: int
    cfg: CheckpointConfig
    parent: Run | None = None
    """It is a fork of this one."""
    forkless: bool = False
    """The parent is at its end, and has kept nothing that can be forked."""
    acknowledged: list[str] = field(default_factory=list)
    """Manifests, in the order in which somebody was told that they are stored."""
    meetings: dict[str, Meeting] = field(default_factory=dict)
    attempts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By attempt, the line that it went on from."""
    rolled_back: set[str] = field(default_factory=set)
    """Attempts that were told that they go back."""
    finished: bool = False

    @property
    def place(self) -> str:
        return f"runs/{self.name}"

    def acknowledge(self, manifest: Manifest) -> None:
        """Somebody is told that a checkpoint is stored. If later attempts have begun, the first of them must know
        it: it was only the news that came late."""
        if manifest.path in self.acknowledged:  # by another rank
            return
        self.world.say(f"{manifest.id} is acknowledged")
        later = sorted((a for a in self.attempts if attempt_after(a, manifest.attempt)), key=attempt_key)
        if later and manifest.path not in self.attempts[later[0]]:
            raise Broken(f"{manifest.path} is acknowledged, and {later[0]} has begun without it")
        if later:
            return
        if self.acknowledged and attempt_after(attempt_of(self.acknowledged[-1]), manifest.attempt):
            raise Broken(f"{manifest.path} is acknowledged after {self.acknowledged[-1]}: two train the run")
        self.acknowledged.append(manifest.path)

    def begin(self, attempt: str, line: tuple[str, ...], rollbacks: tuple[Rollback, ...]) -> None:
        self.world.say(f"attempt {attempt} goes on from {line[-1] if line else 'the start'}")
        self.attempts[attempt] = line
        newest = self.acknowledged[-1] if self.acknowledged else ""
        if not newest or newest in line or attempt_after(attempt_of(newest), attempt):
            return
        if line and _order(line[-1]) > _order(newest):  # what followed it is stored, and nobody was told yet
            return
        if not any(
            r.attempt in self.rolled_back
            and r.to_step <= _step(newest)  # where it was may be pruned by then
            and not attempt_after(attempt_of(newest), r.attempt)
            for r in rollbacks
        ):
            raise Broken(f"{attempt} goes on from {line[-1:]}, though {newest} was acknowledged")


def attempt_of(path: str) -> str:
    return path.removeprefix("manifests/").removesuffix(".json").split("-", 2)[2]


def attempt_after(one: str, other: str) -> bool:
    return attempt_key(one) > attempt_key(other)


def _order(path: str) -> tuple[tuple[int, int], int]:
    return attempt_key(attempt_of(path)), _step(path)


def _step(path: str) -> int:
    key = key_of(path)
    assert key is not None
    return key[1]


def state_after(before: str, step: int) -> str:
    return sha256(f"{before} {step}".encode()).hexdigest()[:16]


class Driver:
    """A driver's process, with its coordinator and the agents and trainers of its ranks: they die together here."""

    def __init__(self, run: Run, number: int, *, stop_rate: float, calm: bool = False) -> None:
        self.run, self._world = run, run.world
        self._id = f"{number:08x}"
        self.random = random.Random(self._world.random.random())
        self._calm = calm
        self.process = Process(self._world, f"{run.name}/{number}", self._live, stop_rate=stop_rate, calm=calm)
        self.storage = bucket_storage(self._world, run.place)
        self._lost = ""
        self._actor: Actor | None = None
        self._num_groups = 0

    def die(self) -> None:
        if not self.process.over and self._world.strikes():
            self._world.say(f"{self.process.name} dies")
            self.process.kill()

    def lose_coordinator(self) -> None:
        if self._actor is not None:
            self._actor.die()

    def _live(self) -> None:
        try:
            self._drive()
        finally:
            self._lost = self._lost or "over"

    def _drive(self) -> None:
        """As runtime/driver.py does."""
        run, life = self.run, Life(self.storage, self._id)
        while True:
            try:
                life.beat()
                if run.parent and not self.storage.list_surely("manifests"):
                    _fork(run, self.storage, self._id, self.random)
                term = claim(self.storage, self._id, wait=True)
                break
            except RunBusyError:
                return
            except ReloraError as error:  # the driver ends, and is started again
                self._world.say(str(error))
                self._world.sleep(10.0)
                if self.random.random() < 0.1 or run.finished:
                    return
        self._world.say(f"owns term {term.number}")
        self.process.beside("life", lambda: self._watch(life, term))
        self._actor = Actor(self.process, run.place, run.cfg, term)
        while not self._lost and not run.finished:
            self._train(self._actor)
            if fatal := self._actor.call("fatal"):
                self._world.say(f"gives up: {fatal}")
                if NONE_WHOLE in fatal:
                    raise Broken(fatal)
                break
        life.end()

    def _watch(self, life: Life, term: Term) -> None:
        """As checkpoint/owner.py does."""
        while not self._lost and not self.run.finished:
            self._world.sleep(BEAT_S)
            try:
                life.beat()
                refuse_if_taken_over(self.storage, term)
            except SupersededError as error:
                self._lost = str(error)
                if self._actor is not None:
                    self._actor.call("supersede", str(error))
            except ReloraError:
                pass

    def _train(self, actor: Actor) -> None:
        """One worker group, from its start until all its agents have ended, or some are lost, or its size changes: as
        Ray Train and the elastic policy have it."""
        self._num_groups += 1
        size, group = self.random.choice([1, 1, 2]), f"{self._id}-{self._num_groups}"
        self._world.say(f"{size} worker(s) start")
        agents = [Agent(self, actor, group, rank, size) for rank in range(size)]
        asked = -1.0
        while not all(agent.process.over for agent in agents):
            self._world.sleep(1.0)
            chance = 1.0 if self._calm else self.random.random()
            if chance < 0.008 and self._world.strikes():
                lost = self.random.choice(agents)
                if self.random.random() < 0.5:
                    self._world.say(f"the machine of rank {lost.rank} is lost")
                    lost.process.kill()
                else:
                    self._world.say(f"the machine of rank {lost.rank} is cut off")
                    lost.process.cut_off()
                if self.random.random() < 0.5:
                    actor.call("last_words")
                break
            if chance < 0.03 and asked < 0 and self._world.strikes():
                leaving = self.random.choice([[], [], [agents[-1].node]])
                wait = self.random.random() < 0.7
                if actor.call("ask_to_save", leaving, "machines came or went", wait) and wait:
                    asked = self._world.time
                continue
            if asked < 0:
                continue
            if actor.call("is_paused"):
                if actor.call("resizing"):
                    break
            elif not actor.call("is_asked"):
                asked = -1.0
            elif self._world.time > asked + self.random.choice([5.0, 90.0]):
                actor.call("go_on")
                asked = -1.0
        for agent in agents:
            if agent.process.is_cut_off:
                self._world.at(self._world.time + self.random.choice([20.0, 60.0, 200.0]), agent.process.kill)
            else:
                agent.process.kill()

    def pass_over(self, path: str) -> None:
        """Nothing: a reader never deletes. (A mutant does.)"""


class Agent:
    """As runtime/agent.py does: it has a trainer for each attempt, and ends it when the coordinator says so."""

    def __init__(self, driver: Driver, actor: Actor, group: str, rank: int, size: int) -> None:
        self._driver, self._actor, self._group = driver, actor, group
        self.rank, self._size, self.node = rank, size, f"m{rank}"
        self.process = driver.process.beside(f"{group}.{rank}", self._live)

    def _live(self) -> None:
        actor, step, is_new = self._actor, 0, True
        while True:
            member = Member(self._group, self.rank, self._size, self.node, "host", 1, step)
            start: Start | None = actor.call("join", member)
            if start is None:
                if is_new and not actor.call("fatal"):  # the run is done, and whoever was told so is lost
                    self._driver.run.finished = True
                return
            is_new = False
            over = Signal(self.process.world)
            trainer = Trainer(self._driver, actor, start, over)
            watching = self.process.beside("watch", lambda t=trainer, o=over: self._follow(t, o))
            over.wait()
            if trainer.order.what != "stop" and trainer.result == "done":
                if actor.call("done", start.attempt, self.rank):
                    self._driver.run.finished = True
                    return
            elif trainer.order.what != "stop":
                actor.call("lost", start.attempt, self.rank, trainer.result, trainer.kind)
            trainer.process.kill()
            trainer.meeting.break_off()
            watching.kill()
            step = trainer.step

    def _follow(self, trainer: Trainer, over: Signal) -> None:
        while trainer.order.what != "stop":
            trainer.order = self._actor.call("watch", trainer.start.attempt, trainer.order)
        over.give()


class Meeting:
    """Where the ranks of an attempt exchange values, in place of collectives."""

    def __init__(self, world: World, size: int) -> None:
        self._world, self._size, self._broken = world, size, False
        self._turns = [0] * size
        self._values: list[dict[int, Any]] = []
        self._full: list[Signal] = []

    def meet(self, rank: int, value: Any = None) -> list[Any]:
        """What all ranks say, by rank."""
        if Process.current().is_cut_off and self._size > 1:
            self.break_off()
        turn = self._turns[rank]
        self._turns[rank] += 1
        if turn == len(self._full):
            self._full.append(Signal(self._world))
            self._values.append({})
        self._values[turn][rank] = value
        if len(self._values[turn]) == self._size or self._broken:
            self._full[turn].give()
        self._full[turn].wait()
        if len(self._values[turn]) < self._size:
            raise RuntimeError("Connection closed by peer")
        return [self._values[turn][rank] for rank in range(self._size)]

    def break_off(self) -> None:
        self._broken = True
        for full in self._full:
            full.give()


class Trainer:
    """A rank's process in an attempt: what loop.py and checkpointer.py do, with a digest for a model."""

    def __init__(self, driver: Driver, actor: Actor, start: Start, over: Signal) -> None:
        self._run, self._actor, self.start = driver.run, actor, start
        self._driver, self._world, self._random = driver, driver.run.world, driver.random
        self._storage = bucket_storage(self._world, self._run.place)
        self._lineage = Lineage(start.attempt)
        self.meeting = self._run.meetings.setdefault(start.attempt, Meeting(self._world, start.size))
        self.order, self._obeyed, self.step = Order(), 0, 0
        self._saving: Save | None = None
        self._unsaved = ""
        self.result, self.kind, self._over = "", "", over
        self.process = Process.current().beside(f"{start.attempt}.{start.rank}", self._live)

    def _live(self) -> None:
        try:
            self._train()
            self.result = "done"
        except Killed:
            for child in self.process.children:
                child.kill()
            self.result, self.kind = "its process was ended by SIGKILL", "died"
        except (ReloraError, RuntimeError) as error:
            if not isinstance(error, ReloraError) and "Connection closed" not in str(error):
                raise
            self.result, self.kind = f"{type(error).__name__}: {error}", _kind(error, self.start.rank)
            self._world.say(self.result)
        self._over.give()
        self._world.sleep(0.01)  # others may hear of it first
        self.meeting.break_off()

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """What rank 0 finds, on all."""
        found: Any = None
        if self.start.rank == 0:
            try:
                found = action(), None
            except ReloraError as error:
                found = None, error
        value, error = self.meeting.meet(self.start.rank, found)[0]
        if error is not None:
            raise error
        return value

    def _train(self) -> None:
        run, start = self._run, self.start
        manifest, line, rollbacks, state = self._on_first(self._resume)
        position = SimpleNamespace(step=0, boundary=0, rollbacks=rollbacks, counters=Counters())
        if manifest is not None:
            self._lineage.resume(manifest, line)
            position.step, position.boundary = manifest.step, manifest.boundary
            position.counters = manifest.counters
        fate = self._on_first(self._draw)
        if start.rank == 0:
            orphans = Commits(self._storage, run.cfg)
            self.process.beside("orphans", lambda: orphans.remove_orphans(start.attempt, line))
        self._actor.tell("tell", start.attempt, {"kind": "attempt", "step": position.step})
        skip = skipped(rollbacks, run.steps)
        if manifest is None:
            _evaluate(position)
            self._save(position, state)
        while position.step < run.steps:
            self._world.sleep(STEP_S)
            wish = self.order.what == "save" and self.order.wish > self._obeyed
            wanted = any(self.meeting.meet(start.rank, wish))
            if position.step not in skip:
                state = state_after(state, position.step)
            position.step += 1
            self.step = position.step
            if start.rank == 0:
                self._actor.tell("tell", start.attempt, {"kind": "train", "step": position.step})
            self._poll()
            if fate.bad_memory and self.process.is_cut_off:
                self._world.sleep(20.0)
                self._go_back(position)
            if position.step == fate.diverges_at and position.step not in skip:
                self._go_back(position)
            if (start.rank, position.step) == fate.fails_at:
                raise Killed if fate.dies else StorageError("its disk is broken")
            if position.step % CYCLE == 0:
                for when in ("before", "after"):
                    odd = (start.rank, position.step, when) == fate.odd_at
                    value = int(state_after(state, -1) if odd else state, 16)
                    arrival = Arrival(start.attempt, start.rank, start.size, position.step, when, value)
                    if error := self._actor.call("arrive", arrival):
                        raise RanksDisagreeError(error)
                position.boundary = position.step
            is_best = position.step % EVAL_EVERY == 0 and _evaluate(position) and run.cfg.keep_best
            if wanted or is_best or position.step % 2 == 0 or position.step == run.steps:
                self._save(position, state, wanted=wanted, is_best=is_best)
        self._settle()
        if self._unsaved:
            raise NotSavedError(f"the last checkpoint was not stored: {self._unsaved}")
        self._on_first(lambda: refuse_if_superseded(self._storage, start.attempt))

    def _draw(self) -> SimpleNamespace:
        """What will happen to this attempt."""
        choose, steps = self._random, self._run.steps

        def some(rate: float) -> int:
            return choose.randrange(1, steps + 1) if choose.random() < rate and self._world.strikes() else 10**6

        return SimpleNamespace(
            fails_at=(choose.randrange(self.start.size), some(0.4)),
            dies=choose.random() < 0.5,
            bad_memory=choose.random() < 0.3,
            diverges_at=max(3, some(0.25)),
            odd_at=(choose.randrange(self.start.size), some(0.1), choose.choice(["before", "after"])),
        )

    def _resume(self) -> tuple[Manifest | None, tuple[str, ...], tuple[Rollback, ...], str]:
        paths, rollbacks, unreadable = where_to_go_on(self._storage)
        for number in reversed(range(len(paths))):
            try:
                manifest = read_record(self._storage, paths[number])
                state = _read(self._storage, manifest)
            except DamagedError as error:
                self._world.say(f"{paths[number]} is passed over: {error}")
                self._driver.pass_over(paths[number])
                continue
            line = tuple(paths[: number + 1])
            self._run.begin(self.start.attempt, line, rollbacks)
            return manifest, line, rollbacks, state
        if paths or unreadable:
            refuse_if_superseded(self._storage, self.start.attempt)
            raise CheckpointError(NONE_WHOLE)
        self._run.begin(self.start.attempt, (), rollbacks)
        return None, (), rollbacks, START

    # Checkpoints.

    def _save(self, position: SimpleNamespace, state: str, *, wanted: bool = False, is_best: bool = False) -> None:
        needed = wanted or is_best or position.step == self._run.steps
        busy = self._saving is not None and not needed
        if busy and not all(self.meeting.meet(self.start.rank, self._saving and self._saving.over.given)):
            return
        self._settle()
        leaving: list[int] = []
        if wanted:
            leaving = self._on_first(lambda: self._actor.call("begin_save", self.start.attempt, position.step))
        writers = [r for r in range(self.start.size) if r not in leaving] or list(range(self.start.size))
        self._saving = Save(self, draft(self._lineage, position, self.start.size), tuple(writers), state)
        if needed:
            self._settle()
        if wanted:
            obeyed = self._actor.call("pause", self.start.attempt, self.start.rank, position.step, not self._unsaved)
            self._obeyed = max(self._obeyed, obeyed)

    def _poll(self) -> None:
        """Ranks hear of a commit at different steps: what follows changes when all have."""
        if self._saving is not None and all(self.meeting.meet(self.start.rank, self._saving.over.given)):
            self._settle()

    def _settle(self) -> None:
        if self._saving is None:
            return
        self._saving.over.wait()
        outcome, self._saving = self._saving.outcome, None
        assert outcome is not None
        told = self.meeting.meet(self.start.rank, outcome.model_dump_json())
        if len(set(told)) > 1:
            raise Broken(f"ranks are told different things of one save: {told}")
        if outcome.fatal:
            raise CheckpointError(outcome.error)
        self._unsaved = outcome.error
        if outcome.manifest is not None:
            self._lineage.committed(outcome.manifest)

    def _go_back(self, position: SimpleNamespace) -> None:
        """The losses of the last two updates were a sign of divergence."""

        def decide() -> bool:
            cfg = SimpleNamespace(train=SimpleNamespace(max_rollbacks=3))
            counters = SimpleNamespace(rollbacks=len(position.rollbacks), first_sign=position.step - 2)
            method = SimpleNamespace(last_boundary=lambda step: step // CYCLE * CYCLE)
            before = self._lineage.steps(self._storage)
            args: tuple[Any, ...] = (cfg, method, before, counters, position.step, "it diverged")
            try:
                rollback = roll_back(*args, attempt=self.start.attempt)
            except DivergedError:
                rollback = None
            if rollback is None:
                return False
            self._world.say(f"{self.start.attempt} goes {rollback}")
            self._run.rolled_back.add(self.start.attempt)
            outcome = self.store(rollback)
            if outcome.error:  # it may be stored all the same, and whoever owns the run next may have seen it
                raise (CheckpointError if outcome.fatal else StorageError)(outcome.error)
            return True

        if self._on_first(decide):
            raise RolledBackError("the run goes back")

    def store(self, rollback: Rollback) -> Outcome:
        """Whoever owns the run does. (A mutant does it itself.)"""
        return Outcome.model_validate_json(self._actor.call("roll_back", rollback.model_dump_json()))


class Killed(Exception):
    """The process is."""


class Save:
    """A rank's part in one, in a thread beside training."""

    def __init__(self, trainer: Trainer, draft: Draft, writers: tuple[int, ...], state: str) -> None:
        self._trainer, self._draft, self._writers, self._state = trainer, draft, writers, state
        self.over, self.outcome = Signal(trainer.process.world), None
        trainer.process.beside("save", self._store)

    def _store(self) -> None:
        trainer, rank = self._trainer, self._trainer.start.rank
        manifest, error = stored(trainer._storage, self._draft, self._state, rank if rank in self._writers else None)
        share = Share(rank=rank, manifest=manifest, writers=self._writers, error=error)
        outcome = Outcome.model_validate_json(trainer._actor.call("commit", share.model_dump_json()))
        if outcome.manifest is not None:
            trainer._run.acknowledge(outcome.manifest)
        else:
            trainer._world.say(f"step {manifest.step} is not committed: {outcome.error}")
        self.outcome = outcome
        self.over.give()


Draft = tuple[Manifest, dict[str, str]]
"""A manifest less the objects that are yet to be stored, and the folders of those parts."""


def draft(lineage: Lineage, position: SimpleNamespace, size: int) -> Draft:
    base, folder = lineage.base_at(position.boundary), lineage.folder("delta", position.step)
    parts = {"delta": folder}
    if base is None:
        parts["base"] = lineage.folder("base", position.step)
        base = Part(folder=parts["base"], objects=(), digest=0)
    manifest = Manifest(
        step=position.step, tokens=position.step, boundary=position.boundary, base=base,
        delta=Part(folder=folder, objects=(), digest=0), counters=position.counters, identity="i", data_fingerprint="f",
        attempt=lineage.attempt, world_size=size, versions={}, unix_time=0.0, line=lineage.line,
        rollbacks=position.rollbacks,
    )  # fmt: skip
    return manifest, parts


def _evaluate(position: SimpleNamespace) -> bool:
    """Whether the held-out loss, drawn for the step and the way there, is the lowest so far."""
    drawn = sha256(f"{position.step} {len(position.rollbacks)}".encode()).digest()[0]
    found = HeldOut(step=position.step, loss=drawn, tokens=1)
    position.counters = position.counters.after_evaluation(found)
    return position.counters.best == found


def stored(storage: Storage, draft: Draft, state: str, rank: int | None) -> tuple[Manifest, str]:
    """The manifest with the objects of a rank, which are stored, and what went wrong."""
    manifest, parts = draft
    for kind, folder in parts.items() if rank is not None else ():
        content = {"state": state, "step": manifest.step, "boundary": manifest.boundary, "rank": rank}
        data, name = json.dumps(content).encode(), f"part-{rank}"
        try:
            storage.put(f"{folder}/{name}", data)
        except ReloraError as error:
            return manifest, str(error)
        there = StoredObject(path=name, size_bytes=len(data), sha256=sha256(data).hexdigest())
        manifest = manifest.model_copy(update={kind: Part(folder=folder, objects=(there,), digest=0)})
    return manifest, ""


def _read(storage: Storage, manifest: Manifest) -> str:
    """The state that a checkpoint holds. Broken if its parts are not of one step, or not those of its boundary."""
    for part in manifest.parts:
        for there in part.objects:
            content = json.loads(read_checked(storage, part, there))
            if part is manifest.base and content["boundary"] != manifest.boundary:
                raise Broken(f"{manifest.path} names a base of another boundary")
            if part is manifest.delta:
                state = str(content["state"])
                if state != _expected(manifest):
                    raise Broken(f"{manifest.path} is not what its updates make")
    return state


def _fork(run: Run, storage: Storage, driver: str, choose: random.Random) -> None:
    """The first checkpoint of a run, from its parent's: as fork.py does."""
    assert run.parent is not None
    parent = storage.sibling(run.parent.name)
    steps = [step for step in History(parent).steps if step and step % CYCLE == 0]
    if not steps:
        run.forkless = run.parent.finished
        raise StorageError("there is nothing to fork yet")
    term = claim(storage, driver)
    if storage.list_surely("manifests"):  # of another that was quicker
        return
    try:
        manifest = pin(parent, run.name, choose.choice(steps), term.number)
    except CheckpointError as error:  # it was removed meanwhile
        raise StorageError(str(error)) from None
    lineage = Lineage(term.attempt(1))
    lineage.fork(manifest, run.parent.name)
    state = _read(parent, manifest)
    position = SimpleNamespace(
        step=manifest.step, boundary=manifest.boundary, rollbacks=manifest.rollbacks, counters=Counters()
    )
    run.begin(lineage.attempt, (), ())
    share, error = stored(storage, draft(lineage, position, 1), state, 0)
    outcome = Commits(storage, run.cfg).commit([Share(rank=0, manifest=share, writers=(0,), error=error)])
    if outcome.manifest is None:
        raise StorageError(f"the fork could not be stored: {outcome.error}")
    run.acknowledge(outcome.manifest)
    pin_base_only(parent, run.name, manifest, term.number)


def simulate(seed: int, spared: Collection[int] = ()) -> World:
    """Raises Broken, or Stuck, where a promise is not kept, with the world as its attribute. Returns the world."""
    random.seed(seed)  # pauses between tries
    with coordinators():
        return _simulate(seed, spared)


def _simulate(seed: int, spared: Collection[int]) -> World:
    world = World(seed, spared=spared)
    rng = world.random
    cfg = CheckpointConfig(
        save_every_steps=2,
        keep_last=rng.choice([1, 1, 2, 3]),
        keep_every_steps=rng.choice([0, 0, 6]),
        keep_best=seed % 3 == 0,
    )
    runs = [Run(world, "a", rng.choice([7, 9, 12]), cfg)]
    if rng.random() < 0.3:
        runs.append(Run(world, "b", 16, cfg, parent=runs[0]))
    made, number = [], 0
    for run in runs:
        for _ in range(rng.choice([1, 2, 2, 3])):
            number += 1
            driver = Driver(run, number, stop_rate=rng.choice([0.0, 0.003, 0.01, 0.03]))
            made.append((run, driver))
            world.start(driver.process, after_s=rng.choice([0.0, 0.0, 1.0, 20.0, 60.0]))
            if rng.random() < 0.5:
                world.at(world.time + rng.uniform(1.0, 120.0), driver.die)
            while rng.random() < 0.3:
                world.at(world.time + rng.uniform(1.0, 120.0), driver.lose_coordinator)
    try:
        world.run()
        for round_number in range(3):  # whoever is left does not have to come to the end: somebody starts another
            for run in runs:
                if not run.finished:
                    number += 1
                    last = Driver(run, 1000 + number, stop_rate=0.0, calm=round_number > 0)
                    made.append((run, last))
                    world.start(last.process)
            world.run()
        for run in runs:
            _check(run)
    except BaseException as error:
        error.world = world  # type: ignore[attr-defined]
        raise
    finally:
        world.end()
    return world


def _check(run: Run) -> None:
    if run.forkless and not run.attempts:
        return
    if not run.finished:
        raise Broken(f"{run.name} has not come to its end")
    run.world.faults = False
    found: list[str] = []
    observer = Process(run.world, "observer", lambda: found.extend(_problems(run)), calm=True)
    run.world.start(observer)
    run.world.run()
    if found:
        raise Broken("; ".join(found))


def _problems(run: Run) -> list[str]:
    storage = bucket_storage(run.world, run.place, retry_s=0.0)
    history = History(storage)
    problems = []
    newest = run.acknowledged[-1] if run.acknowledged else ""
    if newest and newest not in history.line and not (history.line and _order(history.line[-1]) > _order(newest)):
        problems.append(f"{newest} was acknowledged last and is not on the line {history.line}")
    for path in history.line:
        try:
            _read(storage, history.read(path))
        except (ReloraError, Broken) as error:
            problems.append(f"{path} cannot be restored: {error}")
    if history.head is None or history.head.step != run.steps:
        problems.append(f"the run ended, and its newest checkpoint is {history.line[-1:]}")
    steps = history.steps
    if steps != sorted(set(steps)):
        problems.append(f"the line is {steps}")
    if run.cfg.keep_best and history.head is not None and (best := history.head.counters.best) is not None:
        held = {path for path in _way(run, history.head.path) if _step(path) == best.step}
        if not held <= set(history.line):
            problems.append(f"{held} held the best, and is not on the line {history.line}")
    return problems


def _way(run: Run, path: str) -> set[str]:
    """What was acknowledged on the way to a manifest, that included, whether it is still there or not."""
    way: set[str] = set()
    while True:
        attempt = attempt_of(path)
        way |= {p for p in run.acknowledged if attempt_of(p) == attempt and _step(p) <= _step(path)}
        if not (line := run.attempts.get(attempt)):
            return way
        path = line[-1]


def _expected(manifest: Manifest) -> str:
    """What a run comes to that makes every update once, less those that were passed over."""
    passed, state = skipped(manifest.rollbacks, 10**6), START
    for step in range(manifest.step):
        if step not in passed:
            state = state_after(state, step)
    return state
