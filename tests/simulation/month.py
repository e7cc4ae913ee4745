"""python -m tests.simulation.month [--seed 1] > benchmarks/results/spot-month.md

A month of a run on 64 spot machines, in half a minute: a process or a machine fails every ten minutes, machines that
were lost come back, and on one machine every attempt fails within a minute. What share of the time goes into steps that
count, and what does it bring to leave the bad machine out?

Simulated: the ranks (one greenlet does what they all do), when machines fail, and how long a restart takes, which is
measured (benchmarks/results/elasticity.md). Real: `Sizing`, `Failures`, `Orders`, `Tally`, and commits, lines,
retention and reading back on a bucket whose storage errs at times.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import logging
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from relora_ray.checkpoint import Commits, Share
from relora_ray.checkpoint.history import History
from relora_ray.checkpoint.lineage import Lineage
from relora_ray.checkpoint.manifest import Counters, Manifest, Part, StoredObject, read_record
from relora_ray.checkpoint.ownership import claim
from relora_ray.checkpoint.parts import read_checked
from relora_ray.config import CheckpointConfig
from relora_ray.errors import ReloraError
from relora_ray.runs.rollback import where_to_go_on
from relora_ray.runs.tally import Tally
from relora_ray.runtime.failures import Failures
from relora_ray.runtime.orders import Orders
from relora_ray.runtime.sizing import STEADY_S, Seen, Sizing, without_bad
from relora_ray.study.ablations import version
from tests.simulation.run import Broken
from tests.simulation.world import Process, World, bucket_storage

DAY_S = 24 * 3600.0
NUM_MACHINES, MIN_MACHINES = 64, 32
STEP_S = 20.0
"""Of a step on all machines; on fewer it takes longer in proportion."""
FAIL_EVERY_S = 600.0
KINDS = {"killed": 0.4, "lost": 0.3, "notice": 0.3}
"""What happens to a machine: its process ends, it is gone at once, or it is gone after a notice."""
NOTICE_S = 120.0
BACK_S = (120.0, 900.0)
"""A machine that is lost is replaced after a time between these."""
BAD = "bad"
BAD_S = (5.0, 60.0)
"""On this machine an attempt fails after a time between these."""
RESTART_S = {"start": 11.7, "killed": 1.0, "lost": 11.7, "drained": 9.6, "added": 29.4}
"""From the fault to the next step, medians of benchmarks/results/elasticity.md."""
UPLOAD_S = 5.0
"""From the end of a step until all ranks have stored their share of a save."""
BOUNDARY_STEPS = 1_000
OLD_LIMIT = 100
"""Failures in a run's whole life, after which earlier versions gave up."""
FAULTS = 0.05
"""The share of the world's faults that take place: 1 of 2,000 requests fails, 1 of 500 writes goes astray."""


class Over(Exception):
    """The month is, or the run."""


@dataclass
class Result:
    days: float
    useful_s: float = 0.0
    """Of steps that count at the end."""
    steps: int = 0
    counted_s: float = 0.0
    """The same as the run's own tally has it."""
    again_steps: int = 0
    again_s: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)
    """By what the attempt began after."""
    resizes_lost: int = 0
    """Steps that were lost at a resize."""
    bad_s: float = 0.0
    bad_attempts: int = 0
    page_bytes: int = 0
    commits: int = 0
    objects: int = 0
    """In the bucket, at the end."""
    failures: int = 0
    old_rule_s: float = 0.0
    """When the run would have failed for the 100th time."""
    gave_up: str = ""
    ended_s: float = 0.0
    requests: int = 0
    faults: int = 0

    @property
    def goodput(self) -> float:
        return self.useful_s / (self.days * DAY_S)


class SomeFaults(World):
    """Faults of storage at a low rate."""

    def strikes(self) -> bool:
        return self.random.random() < FAULTS and super().strikes()


class Month:
    """The machines, and the one run on them: its ranks, its policy and its coordinator."""

    def __init__(
        self, seed: int, *, days: float = 30.0, bad: bool = True, leave_out: bool = True, save_every: int = 20,
        limit: int = 20,
    ) -> None:  # fmt: skip
        """`bad`: one of the machines is. `leave_out`: the run does without it. `limit`: cluster.max_failures."""
        self._seed, self._world = seed, SomeFaults(seed, max_requests=10**8)
        self._storage = bucket_storage(self._world, "runs/month")
        self._failures = Failures(limit)
        self._leave_out, self._save_every = leave_out, save_every
        self._cfg = CheckpointConfig(save_every_steps=save_every, keep_last=2)
        self.tally, self.result = Tally(), Result(days)
        self._spent: list[float] = []
        """Seconds of each step that counts."""
        # What happens to the machines. It does not depend on what the run does, so that runs can be compared.
        self._fate, self._bad_fate = random.Random(seed), random.Random(seed + 1)
        self._up = {BAD if bad and not n else f"m{n}" for n in range(NUM_MACHINES)}
        self._leaving: set[str] = set()
        self._num_machines = NUM_MACHINES
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        # The attempt under way.
        self._attempt, self._latest, self._group = "", "", [""]
        self._orders = Orders(0)
        self._lost: list[tuple[str, str]] = []
        """Machines that were lost to it, and how."""
        self._sizing = Sizing(MIN_MACHINES)
        self._saving = self._deciding = False
        self._newest = ""
        """The checkpoint that was acknowledged last."""

    def run(self) -> Result:
        random.seed(self._seed)  # pauses between tries
        began = self._world.time
        self._at(began + self.result.days * DAY_S, self._end)
        self._at(began + self._fate.expovariate(1 / FAIL_EVERY_S), self._fail_somewhere)
        main = Process(self._world, "run", self._live)
        self._world.start(main)
        self._world.run()
        result = self.result
        result.useful_s, result.steps, result.counted_s = sum(self._spent), len(self._spent), self.tally.useful_s
        result.requests, result.faults = self._world.num_requests, self._world.num_faults
        result.objects = len(self._world.bucket)
        self._measure()
        self._world.faults = False
        observer = Process(self._world, "observer", self._check)
        self._world.start(observer)
        self._world.run()
        return result

    # Machines.

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), happen))

    def _end(self) -> None:
        raise Over("the month is over")

    def _fail_somewhere(self) -> None:
        now = self._world.time
        self._at(now + self._fate.expovariate(1 / FAIL_EVERY_S), self._fail_somewhere)
        machine = self._fate.choice(sorted(self._up - self._leaving - {BAD}))
        kind = self._fate.choices([*KINDS], [*KINDS.values()])[0]
        if kind == "killed":
            self._hit(machine, "killed")
        elif kind == "lost":
            self._lose(machine)
        else:
            self._leaving.add(machine)
            self._at(now + NOTICE_S, lambda: self._lose(machine))

    def _lose(self, machine: str) -> None:
        self._up.remove(machine)
        self._leaving.discard(machine)
        self._hit(machine, "lost")
        self._at(self._world.time + self._fate.uniform(*BACK_S), self._come_back)

    def _come_back(self) -> None:
        self._up.add(f"m{self._num_machines}")
        self._num_machines += 1
        self._at(self._world.time + STEADY_S, lambda: None)  # it is looked at again

    def _hit(self, machine: str, how: str) -> None:
        if self._attempt and machine in self._group:
            self._lost.append((machine, how))

    def _pass(self, seconds: float) -> bool:
        """Let time pass. False as soon as a machine of the group is hit."""
        until = self._world.time + seconds
        while not self._lost:
            when = min(until, self._events[0][0])
            self._world.sleep(max(0.0, when - self._world.time))
            if self._world.time < self._events[0][0]:
                return True
            heapq.heappop(self._events)[2]()
            self._decide_on_size()
        return False

    # What elastic.BoundaryPolicy does with Ray.

    def _usable(self) -> list[str]:
        usable = dict.fromkeys(self._up - self._leaving)
        bad = self._failures.bad_nodes(self._world.time) if self._leave_out else []
        return sorted(without_bad(bad, usable, lambda machines: len(machines) >= MIN_MACHINES))

    def _decide_on_size(self) -> None:
        if not self._attempt or self._orders.order.what == "held":
            return
        usable, group, leaving = self._usable(), set(self._group), set(self._leaving)
        seen = Seen(len(usable), group, leaving, self._up - leaving - set(usable))
        is_asked = self._orders.order.what == "save"
        decision = self._sizing.decide(self._world.time, seen, lambda: is_asked, lambda: True)
        if decision.do == "ask":
            ranks = [rank for rank, machine in enumerate(self._group) if machine in leaving]
            self._orders = self._orders.ask(wait=decision.wait, leaving=ranks)
            self._sizing.accepted(decision, seen)
        elif decision.do == "go on":
            self._orders = self._orders.withdraw()
        elif decision.do == "replace":
            raise Broken(f"{self._attempt} is replaced though nobody has failed to store")

    # The coordinator and the ranks.

    def _live(self) -> None:
        self._term = claim(self._storage, "00000001")
        self._commits = Commits(self._storage, self._cfg, lambda attempt: attempt == self._latest)
        began, cause = self._world.time, "start"
        try:
            for number in itertools.count(1):
                cause = self._run_attempt(self._term.attempt(number), cause)
        except Over as over:
            self.result.gave_up = str(over) if self._failures.too_many() else ""
            self.result.ended_s = self._world.time - began
        if BAD in self._group and self._attempt:
            self.result.bad_s += self._world.time - self._began
        self._attempt = ""

    def _run_attempt(self, name: str, cause: str) -> str:
        """One attempt, until a machine is lost to it or its group is replaced. Returns which."""
        while self._deciding:  # it will look for the newest checkpoint
            self._world.sleep(0.1)
        self._attempt = self._latest = name
        self._group, self._lost = self._usable(), []
        self._sizing.started(len(self._group))
        self._orders, self._began = Orders(len(self._group)), self._world.time
        self.result.restarts[cause] = self.result.restarts.get(cause, 0) + 1
        self._tell("begin", world_size=len(self._group), cause=cause)
        if BAD in self._group:
            self.result.bad_attempts += 1
            self._at(
                self._began + self._bad_fate.uniform(*BAD_S),
                lambda: self._hit(BAD, "killed") if self._attempt == name else None,
            )
        self._from_step: int | None = None
        stepped, before = False, len(self._spent)
        if self._pass(RESTART_S[cause]) and (lineage := self._resume(name, cause)) is not None:
            down_s = self._world.time - (self.tally.step_time or self._began)
            while self._train_step():
                if not stepped:
                    stepped = True
                    self._tell_of_restart(cause, "", before, down_s)
                step = len(self._spent)
                if self._orders.order.what == "save":
                    if self._save_as_asked(lineage, step):
                        return self._replace(name)
                elif step % self._save_every == 0 and not self._saving:
                    self._save_beside(lineage, step)
        return self._fail(cause, stepped, before)

    def _resume(self, name: str, cause: str) -> Lineage | None:
        lineage = Lineage(name)
        try:
            paths, _, unreadable = where_to_go_on(self._storage)
            if unreadable or (self._newest and self._newest not in paths):
                raise Broken(f"{name} goes on from {paths[-1:]}, though {self._newest} was acknowledged")
            step = 0
            if paths:
                manifest = read_record(self._storage, paths[-1])
                lineage.resume(manifest, tuple(paths))
                (stored,) = manifest.delta.objects
                step = json.loads(read_checked(self._storage, manifest.delta, stored))["step"]
        except ReloraError as error:
            self._world.say(f"{name} cannot be restored: {error}")
            self._lost.append(("", "killed"))
            return None
        if step > len(self._spent):
            raise Broken(f"{name} goes on from step {step}, and {len(self._spent)} were made")
        lost = len(self._spent) - step
        if cause in ("drained", "added"):
            self.result.resizes_lost += lost
        self.result.again_steps += lost
        self.result.again_s += sum(self._spent[step:])
        del self._spent[step:]
        self._from_step = step
        self._tell("attempt", step=step)
        orphans = Commits(self._storage, self._cfg)
        self._beside("orphans", lambda: orphans.remove_orphans(name, lineage.line))
        if not paths:
            self._save_beside(lineage, 0)
        return lineage

    def _train_step(self) -> bool:
        self._decide_on_size()
        seconds = STEP_S * NUM_MACHINES / len(self._group)
        if not self._pass(seconds):
            return False
        self._spent.append(seconds)
        self._tell("train", step=len(self._spent), step_s=seconds, loss=3.0, tokens_per_s=1e6)
        return True

    def _replace(self, name: str) -> str:
        """All ranks wait: another group goes on from what they have stored."""
        cause = "drained" if len(self._usable()) < len(self._group) else "added"
        self._end_attempt(name, cause)
        return cause

    def _fail(self, cause: str, stepped: bool, before: int) -> str:
        machine, how = self._lost[0]
        name, result = self._attempt, self.result
        self._end_attempt(name, how)
        if not stepped:
            self._tell_of_restart(cause, how, before, self._world.time - self._began)
        result.failures += 1
        if result.failures == OLD_LIMIT:
            result.old_rule_s = self._world.time - 1e9
        self._failures.failed(self._world.time, stepped=stepped, node=machine, others=len(self._group) > 1)
        if too_many := self._failures.too_many():
            raise Over(too_many)
        self._lost = []
        self._pass(self._failures.pause_s())
        return how

    def _end_attempt(self, name: str, cause: str) -> None:
        self._orders = self._orders.stop()
        if BAD in self._group:
            self.result.bad_s += self._world.time - self._began
        self._tell("lost", cause=cause)
        self._attempt = ""

    # Saves.

    def _save_beside(self, lineage: Lineage, step: int) -> None:
        """Behind training."""

        def save() -> None:
            self._world.sleep(UPLOAD_S)
            manifest = self._store(lineage, step) if self._attempt == lineage.attempt and not self._lost else None
            self._saving = False
            if manifest is not None:
                self._prune(manifest)

        self._saving = True
        self._beside("save", save)

    def _save_as_asked(self, lineage: Lineage, step: int) -> bool:
        """All ranks store their state because they were asked to. Whether the group is to be replaced: else they train
        on, or some were lost."""
        self._orders = self._orders.begin(step)
        wish = self._orders.bound
        while self._saving:
            if not self._pass(0.5):
                return False
        stored_at = self._world.time + UPLOAD_S
        if not self._pass(UPLOAD_S) and {machine for machine, _ in self._lost} <= {
            self._group[rank] for rank in self._orders.leaving
        }:  # the others store what theirs would be
            self._world.sleep(max(0.0, stored_at - self._world.time))
        elif self._lost:
            return False
        manifest = self._store(lineage, step)
        for rank in range(len(self._group)):
            self._orders = self._orders.come(rank, step, manifest is not None)
        if manifest is not None:
            self._beside("prune", lambda: self._prune(manifest))
        if not self._pass(0.0):
            return False
        if self._orders.order.what != "held":
            if not self._orders.is_over(wish):
                raise Broken(f"all came with step {step}, and wait: {self._orders}")
            return False
        if len(self._usable()) == self._sizing.asked:
            return True
        self._orders, self._sizing.asked = self._orders.withdraw(), None
        return False

    def _store(self, lineage: Lineage, step: int) -> Manifest | None:
        boundary = step // BOUNDARY_STEPS * BOUNDARY_STEPS
        manifest = Manifest(
            step=step, tokens=step, boundary=boundary, base=lineage.base_at(boundary),
            delta=Part(folder=lineage.folder("delta", step), objects=(), digest=0), counters=Counters(), identity="i",
            data_fingerprint="f", attempt=lineage.attempt, world_size=len(self._group), versions={},
            unix_time=self._world.time, line=lineage.line,
        )  # fmt: skip
        self._deciding = True
        try:
            for kind in ["delta"] if manifest.base else ["base", "delta"]:
                data, folder = json.dumps({"step": step}).encode(), lineage.folder(kind, step)
                self._storage.put(f"{folder}/part", data)
                stored = StoredObject(path="part", size_bytes=len(data), sha256=sha256(data).hexdigest())
                manifest = manifest.model_copy(update={kind: Part(folder=folder, objects=(stored,), digest=0)})
            outcome = self._commits.commit([Share(rank=0, manifest=manifest, writers=(0,))])
        except ReloraError as error:
            self._world.say(f"step {step} is not stored: {error}")
            return None
        finally:
            self._deciding = False
        if outcome.fatal:
            raise Broken(f"step {step} of {lineage.attempt}: {outcome.error}")
        if outcome.manifest is not None:
            self._newest = outcome.manifest.path
            lineage.committed(outcome.manifest)
            self._failures.committed(self._group)
            self.tally.committed(step, self._newest, self._world.time)
            self.result.commits += 1
            if self.result.commits % 100 == 0:
                self._measure()
        return outcome.manifest

    def _prune(self, manifest: Manifest) -> None:
        if not self._commits._lock.locked():  # a thread would wait for the one before; greenlets are one thread
            self._commits.prune(manifest)

    def _beside(self, name: str, work: Callable[[], None]) -> None:
        self._world.start(Process(self._world, name, work))

    # What is told of it.

    def _tell(self, kind: str, **about: object) -> None:
        self.tally.add({"kind": kind, "attempt": self._attempt, **about}, self._world.time)

    def _tell_of_restart(self, cause: str, ended_by: str, before: int, down_s: float) -> None:
        from_step = self._from_step
        self.tally.add(
            {
                "kind": "restart", "attempt": self._latest, "cause": cause, "trained": not ended_by,
                "change": "resize" if cause in ("drained", "added") else "failure", "ended_by": ended_by,
                "world_size": len(self._group), "from_step": from_step, "down_s": down_s,
                "steps_lost": before - from_step if from_step is not None else 0, "unix_time": self._world.time,
            },
            self._world.time,
        )  # fmt: skip

    def _measure(self) -> None:
        size = len(json.dumps(self.tally.page(), allow_nan=False).encode())
        self.result.page_bytes = max(self.result.page_bytes, size)

    def _check(self) -> None:
        """The last checkpoint that was acknowledged is there, whole."""
        if not self._newest:
            return
        history = History(self._storage)
        if self._newest not in history.line:
            raise Broken(f"{self._newest} was acknowledged last and is not on the line {history.line}")
        for part in history.read(self._newest).parts:
            for stored in part.objects:
                read_checked(self._storage, part, stored)


CASES: dict[str, dict[str, float]] = {
    "as it is": {},
    "bad machine not left out": {"leave_out": False},
    "the same, and it never gives up: one day": {"leave_out": False, "limit": -1, "days": 1},
    "no bad machine": {"bad": False},
    "saves every 10 steps": {"save_every": 10},
}


def simulate_case(case: tuple[str, int]) -> tuple[Result, float]:
    """The result, and the seconds of a processor that the simulation took."""
    name, seed = case
    logging.disable(logging.CRITICAL)
    began = time.process_time()
    return Month(seed, **CASES[name]).run(), time.process_time() - began


def report(results: dict[str, tuple[Result, float]], seed: int) -> str:
    rows = []
    for name, (result, took_s) in results.items():
        month_s, others = result.days * DAY_S, result.restarts
        rows.append(
            f"| {name} | {result.goodput:.1%} | {result.steps:,} ({result.steps * STEP_S / month_s:.0%}) "
            f"| {result.failures:,} | {others.get('drained', 0) + others.get('added', 0):,} | {result.again_steps:,} "
            f"({result.again_s / month_s:.1%}) | {result.resizes_lost} "
            f"| {(month_s - result.useful_s - result.again_s) / month_s:.1%} "
            f"| {result.bad_s / month_s:.2%}, {result.bad_attempts} | {result.page_bytes:,} "
            f"| {f'day {result.ended_s / DAY_S:.2f}' if result.gave_up else 'never'} "
            f"| {f'day {result.old_rule_s / DAY_S:.2f}' if result.old_rule_s else 'never'} | {took_s:.0f} |"
        )
    first, table = results["as it is"][0], "\n".join(rows)
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in KINDS.items())
    restarts = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in RESTART_S.items() if kind != "start")
    columns = [
        "case", "goodput", "steps (of those without any fault)", "failures", "resizes",
        "steps done again (of the time)",
        "of these at resizes", "neither", "on the bad machine (of the time, attempts)", "tally's page at most, bytes",
        "gave up", f"by the old rule: {OLD_LIMIT} failures in a life", "simulated in, s of a processor",
    ]  # fmt: skip
    return f"""# A month on spot machines, simulated

{first.days:.0f} days on {NUM_MACHINES} machines. One of them fails every {FAIL_EVERY_S / 60:.0f} minutes on average \
({kinds}, of {NOTICE_S:.0f} s), and one that was lost is replaced after {BACK_S[0] / 60:.0f} to {BACK_S[1] / 60:.0f} \
minutes. On one more, every attempt fails {BAD_S[0]:.0f} to {BAD_S[1]:.0f} s after it began. A step takes \
{STEP_S:.0f} s on all machines. A save every 20 steps takes {UPLOAD_S:.0f} s and some requests, behind training. Each \
case has the same failures.

Real code: failures and their pauses, decisions on a size, orders for saves and resizes, commits, lines, retention, \
and the tally. Simulated: the ranks, the machines, and storage that errs ({first.requests:,} requests, \
{first.faults:,} faults). A restart takes what elasticity.md measured with a small model ({restarts}): a large one \
needs the time to read its state besides.

Version: {version()}.
Command: `python -m tests.simulation.month --seed {seed}`

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{table}

Goodput: seconds of steps that count at the end, of all seconds. Neither: restarts, pauses, saves that were asked for, \
and steps that were broken off. At the end there are {first.objects} objects in the bucket, after {first.commits:,} \
commits.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.month")
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    with multiprocessing.Pool(2) as pool:
        found = pool.map(simulate_case, [(name, seed) for name in CASES], chunksize=1)
    print(report(dict(zip(CASES, found, strict=True)), seed), end="")


if __name__ == "__main__":
    main()
