"""One run, or a run and its fork, under a seed: drivers that claim, attempts that train, save, diverge, fall back and
resume, while storage errs and processes stop and die. Then the question whether all promises were kept.

Simulated: what training computes (a state is a digest of the updates that made it), the ranks' shares (one rank), and
who starts drivers. Real: claiming, fencing, lines, commits, retention, rollbacks, pins, and reading a checkpoint back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from relora_ray.checkpoint import Commits, Rollback, Share
from relora_ray.checkpoint.history import History, pin, pin_base_only
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, Manifest, Part, StoredObject, key_of, read_record
from relora_ray.checkpoint.ownership import (
    BEAT_S,
    Life,
    Term,
    attempt_key,
    claim,
    refuse_if_superseded,
    refuse_if_taken_over,
    succeed,
)
from relora_ray.checkpoint.parts import read_checked
from relora_ray.config import CheckpointConfig
from relora_ray.errors import CheckpointError, DamagedError, DivergedError, ReloraError, RunBusyError, SupersededError
from relora_ray.rollback import roll_back, skipped, where_to_go_on
from tests.simulation.world import Process, World, bucket_storage

CYCLE = 4
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
    parent: str = ""
    forked_at: int = 0
    acknowledged: list[str] = field(default_factory=list)
    """Manifests, in the order in which somebody was told that they are stored."""
    attempts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By attempt, the line that it went on from."""
    rolled_back: set[str] = field(default_factory=set)
    """Attempts that were told that they go back."""
    content: dict[str, bytes] = field(default_factory=dict)
    finished: bool = False

    @property
    def place(self) -> str:
        return f"runs/{self.name}"

    def acknowledge(self, manifest: Manifest) -> None:
        """Somebody is told that a checkpoint is stored. If later attempts have begun, the first of them must know
        it: it was only the news that came late."""
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
        if not any(
            r.attempt in self.rolled_back
            and r.to_step < _step(newest)
            and not attempt_after(attempt_of(newest), r.attempt)
            for r in rollbacks
        ):
            raise Broken(f"{attempt} goes on from {line[-1:]}, though {newest} was acknowledged")


def attempt_of(path: str) -> str:
    return path.removeprefix("manifests/").removesuffix(".json").split("-", 2)[2]


def attempt_after(one: str, other: str) -> bool:
    return attempt_key(one) > attempt_key(other)


def _step(path: str) -> int:
    key = key_of(path)
    assert key is not None
    return key[1]


def state_after(before: str, step: int) -> str:
    return sha256(f"{before} {step}".encode()).hexdigest()[:16]


class Driver:
    """A driver's process, its coordinator and the ranks that it starts: they die together here."""

    def __init__(self, run: Run, number: int, *, stop_rate: float, calm: bool = False) -> None:
        self._run, self._world = run, run.world
        self._id = f"{number:08x}"
        self._random = random.Random(self._world.random.random())
        self.process = Process(self._world, f"{run.name}/{number}", self._live, stop_rate=stop_rate, calm=calm)
        self._storage = bucket_storage(self._world, run.place)
        self._lost = ""
        self._current = ""

    def die(self) -> None:
        if not self.process.over and self._world.strikes():
            self._world.say(f"{self.process.name} dies")
            self.process.kill()

    def _beside(self, name: str, work: Callable[[], object]) -> Process:
        """Another thread of this driver's process."""
        made = Process(
            self._world, f"{self.process.name}/{name}", work, stop_rate=self.process.stop_rate, calm=self.process.calm
        )
        self.process.children.append(made)
        self._world.start(made)
        return made

    def _live(self) -> None:
        try:
            self._drive()
        finally:
            self._lost = self._lost or "over"

    def _drive(self) -> None:
        life = Life(self._storage, self._id)
        while True:
            try:
                life.beat()
                term = claim(self._storage, self._id, wait=True)
                break
            except RunBusyError:
                return
            except ReloraError:  # storage failed: the driver ends, and is started again
                self._world.sleep(5.0)
        self._world.say(f"owns term {term.number}")
        self._beside("life", lambda: self._watch(life, term))
        commits = Commits(self._storage, self._run.cfg, lambda attempt: attempt == self._current)
        number = 0
        while not self._lost and not self._run.finished:
            if self._random.random() < 0.1:  # the coordinator died, and Ray has started another
                try:
                    term, number = succeed(self._storage, term), 0
                except SupersededError:
                    break
                except ReloraError:
                    continue
                commits = Commits(self._storage, self._run.cfg, lambda attempt: attempt == self._current)
            number += 1
            self._current = term.attempt(number)
            try:
                self._attempt(self._current, commits)
            except SupersededError as error:
                self._world.say(str(error))
                if not self._lost:
                    continue
            except DivergedError:
                self._run.finished = True
            except ReloraError as error:
                self._world.say(f"attempt {self._current} ends: {error}")
                if type(error) is CheckpointError:
                    raise
        life.end()

    def _watch(self, life: Life, term: Term) -> None:
        while not self._lost and not self._run.finished:
            self._world.sleep(BEAT_S)
            try:
                life.beat()
                refuse_if_taken_over(self._storage, term)
            except SupersededError as error:
                self._lost = str(error)
            except ReloraError:
                pass

    def _attempt(self, attempt: str, commits: Commits) -> None:
        """One attempt, from the newest checkpoint until it fails or the run ends."""
        run, lineage = self._run, Lineage(attempt)
        if run.parent and not self._storage.list_surely("manifests"):
            position, state = self._fork(attempt, lineage, commits)
        else:
            position, state = self._resume(lineage)
        orphans, line = Commits(self._storage, run.cfg), lineage.line
        self._beside("orphans", lambda: orphans.remove_orphans(attempt, line))  # rank 0's, not the coordinator's
        skip = skipped(position.rollbacks, run.steps)
        fails_at = self._random.choice([run.steps + 1, self._random.randrange(1, run.steps + 1)])
        diverges_at = self._random.choice([run.steps + 9] * 3 + [self._random.randrange(3, run.steps + 1)])
        saved = lineage.newest is not None
        if not saved:
            self._save(lineage, position, state, commits)
        while position.step < run.steps:
            if self._lost or run.finished:
                return
            self._world.sleep(STEP_S)
            if position.step not in skip:
                state = state_after(state, position.step)
            position.step += 1
            if position.step % CYCLE == 0:
                position.boundary = position.step
            if position.step == diverges_at and position.step not in skip:
                self._go_back(lineage, position, commits)
            if position.step == fails_at and self._random.random() < 0.7:
                raise ReloraError("a rank is lost")
            if position.step % 2 == 0 or position.step == run.steps:
                self._save(lineage, position, state, commits)
        if lineage.newest is not None and lineage.newest.step == run.steps:
            run.finished = True

    def _resume(self, lineage: Lineage) -> tuple[SimpleNamespace, str]:
        paths, rollbacks, unreadable = where_to_go_on(self._storage)
        for number in reversed(range(len(paths))):
            try:
                manifest = read_record(self._storage, paths[number])
                state = self._read(manifest)
            except DamagedError as error:
                self._world.say(f"{paths[number]} is passed over: {error}")
                self.pass_over(paths[number])
                continue
            line = tuple(paths[: number + 1])
            lineage.resume(manifest, line)
            self._run.begin(lineage.attempt, line, rollbacks)
            return SimpleNamespace(step=manifest.step, boundary=manifest.boundary, rollbacks=rollbacks), state
        if paths or unreadable:
            refuse_if_superseded(self._storage, lineage.attempt)
            raise CheckpointError("no checkpoint is whole")
        self._run.begin(lineage.attempt, (), rollbacks)
        return SimpleNamespace(step=0, boundary=0, rollbacks=rollbacks), "start"

    def pass_over(self, path: str) -> None:
        """Nothing: a reader never deletes. (A mutant does.)"""

    def _read(self, manifest: Manifest) -> str:
        """The state that a checkpoint holds: of the base, and what was done since."""
        parts = {part.folder.partition("/")[0]: self._part(part) for part in manifest.parts}
        state = json.loads(parts["delta"])
        if "base" in parts and json.loads(parts["base"])["boundary"] != manifest.boundary:
            raise Broken(f"{manifest.path} names a base of another boundary")
        return str(state["state"])

    def _part(self, part: Part) -> bytes:
        return b"".join(read_checked(self._storage, part, stored) for stored in part.objects)

    def _save(self, lineage: Lineage, position: SimpleNamespace, state: str, commits: Commits) -> None:
        base = lineage.base_at(position.boundary)
        parts = {"delta": {"state": state, "step": position.step}}
        if base is None:
            parts["base"] = {"boundary": position.boundary}
        manifest = Manifest(
            step=position.step, tokens=position.step, boundary=position.boundary, base=base,
            delta=Part(folder=lineage.folder("delta", position.step), objects=(), digest=0), counters=Counters(),
            identity="i", data_fingerprint="f", attempt=lineage.attempt, world_size=1, versions={},
            unix_time=self._world.time, line=lineage.line, rollbacks=position.rollbacks,
        )  # fmt: skip
        try:
            for kind, content in parts.items():
                data, folder = json.dumps(content).encode(), lineage.folder(kind, position.step)
                self._storage.put(f"{folder}/part", data)
                stored = StoredObject(path="part", size_bytes=len(data), sha256=sha256(data).hexdigest())
                manifest = manifest.model_copy(update={kind: Part(folder=folder, objects=(stored,), digest=0)})
        except ReloraError as error:
            self._world.say(f"the save after step {position.step} fails: {error}")
            return
        outcome = commits.commit([Share(rank=0, manifest=manifest, writers=(0,))])
        if outcome.manifest is None:
            self._world.say(f"step {position.step} is not committed: {outcome.error}")
            if outcome.fatal:
                raise SupersededError(outcome.error)
            return
        self._run.acknowledge(outcome.manifest)
        lineage.committed(outcome.manifest)
        if self._random.random() < 0.3:
            self._beside("prune", lambda: commits.prune(outcome.manifest)) if not commits._lock.locked() else None
        elif not commits._lock.locked():
            commits.prune(outcome.manifest)

    def _go_back(self, lineage: Lineage, position: SimpleNamespace, commits: Commits) -> None:
        """The losses of the last two updates were a sign of divergence."""
        cfg = SimpleNamespace(train=SimpleNamespace(max_rollbacks=3))
        counters = SimpleNamespace(rollbacks=len(position.rollbacks), first_sign=position.step - 2)
        method = SimpleNamespace(last_boundary=lambda step: step // CYCLE * CYCLE)
        before = lineage.steps(self._storage)
        args: tuple[Any, ...] = (cfg, method, before, counters, position.step, "it diverged")
        try:
            rollback = roll_back(*args, attempt=lineage.attempt)
        except DivergedError:
            rollback = None
        if rollback is None:
            return
        self._world.say(f"{lineage.attempt} goes {rollback}")
        self._run.rolled_back.add(lineage.attempt)
        outcome = commits.roll_back(rollback)
        if outcome.error:  # it may be stored all the same, and whoever owns the run next may have seen it
            raise (SupersededError if outcome.fatal else ReloraError)(outcome.error)
        raise ReloraError("rolled back")

    def _fork(self, attempt: str, lineage: Lineage, commits: Commits) -> tuple[SimpleNamespace, str]:
        run = self._run
        parent = self._storage.sibling(run.parent)
        steps = [step for step in History(parent).steps if step and step % CYCLE == 0]
        if not steps:
            self._world.sleep(3.0)
            self._lost = "there is nothing to fork yet" if self._random.random() < 0.1 else ""
            raise ReloraError("there is nothing to fork yet")
        number, _ = attempt_key(attempt)
        try:
            manifest = pin(parent, run.name, self._random.choice(steps), number)
        except CheckpointError as error:  # it was removed meanwhile
            raise ReloraError(str(error)) from None
        lineage.fork(manifest, run.parent)
        state = ""
        for part in manifest.parts:
            content = b"".join(read_checked(parent, part, stored) for stored in part.objects)
            state = json.loads(content).get("state", state)
        position = SimpleNamespace(step=manifest.step, boundary=manifest.boundary, rollbacks=manifest.rollbacks)
        run.begin(attempt, (), ())
        self._save(lineage, position, state, commits)
        if lineage.newest is None or lineage.newest.attempt != attempt:
            raise ReloraError("the fork could not be stored")
        run.forked_at = manifest.step
        pin_base_only(parent, run.name, manifest, number)
        return position, state


def simulate(seed: int, spared: Collection[int] = ()) -> World:
    """Raises Broken, or Stuck, where a promise is not kept, with the world as its attribute. Returns the world."""
    random.seed(seed)  # pauses between tries
    world = World(seed, spared=spared)
    rng = world.random
    cfg = CheckpointConfig(
        save_every_steps=2, keep_last=rng.choice([1, 1, 2, 3]), keep_every_steps=rng.choice([0, 0, 6])
    )
    runs = [Run(world, "a", rng.choice([9, 12, 16]), cfg)]
    if rng.random() < 0.3:
        runs.append(Run(world, "b", 22, cfg, parent="a"))
    made, number = [], 0
    for run in runs:
        for _ in range(rng.choice([1, 2, 2, 3])):
            number += 1
            driver = Driver(run, number, stop_rate=rng.choice([0.0, 0.003, 0.01, 0.03]))
            made.append((run, driver))
            world.start(driver.process, after_s=rng.choice([0.0, 0.0, 1.0, 20.0, 60.0]))
            if rng.random() < 0.5:
                world.at(world.time + rng.uniform(1.0, 120.0), driver.die)
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
        for _, driver in made:
            for process in (driver.process, *driver.process.children):
                if process.failure is not None:
                    raise process.failure
        for run in runs:
            _check(run)
    except BaseException as error:
        error.world = world  # type: ignore[attr-defined]
        raise
    return world


def _check(run: Run) -> None:
    if not run.finished:
        raise Broken(f"{run.name} has not come to its end")
    run.world.faults = False
    found: list[str] = []
    observer = Process(run.world, "observer", lambda: found.extend(_problems(run)), calm=True)
    run.world.start(observer)
    run.world.run()
    if observer.failure is not None:
        raise observer.failure
    if found:
        raise Broken("; ".join(found))


def _problems(run: Run) -> list[str]:
    storage = bucket_storage(run.world, run.place, retry_s=0.0)
    history = History(storage)
    problems = []
    newest = run.acknowledged[-1] if run.acknowledged else ""
    if newest and newest not in history.line:
        problems.append(f"{newest} was acknowledged last and is not on the line {history.line}")
    for path in history.line:
        manifest = history.read(path)
        for part in manifest.parts:
            for stored in part.objects:
                try:
                    data = read_checked(storage, part, stored)
                except ReloraError as error:
                    problems.append(f"{path} cannot be restored: {error}")
                    continue
                if part is manifest.delta and json.loads(data)["state"] != _expected(manifest):
                    problems.append(f"{path} is not what its updates make")
    steps = history.steps
    if steps != sorted(set(steps)):
        problems.append(f"the line is {steps}")
    return problems


def _expected(manifest: Manifest) -> str:
    """What a run comes to that makes every update once, less those that were passed over."""
    passed, state = skipped(manifest.rollbacks, 10**6), "start"
    for step in range(manifest.step):
        if step not in passed:
            state = state_after(state, step)
    return state
