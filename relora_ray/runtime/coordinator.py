"""An actor that the driver owns and that all agents talk to: somebody outside the workers who knows and checks.

It brings the agents of a worker group together for an attempt and ends the attempt on all ranks when one is lost. At a
boundary it lets the ranks go on only when all have come with the same digest, and keeps the ledger. It commits
checkpoints: every rank hands in its share and waits. It remembers the first error that no restart can mend.

What it knows it is told: calls that were under way when it died are made again to the one that Ray starts in its place,
and what was committed is in storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import pickle
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

from relora_ray.checkpoint import Commits, Manifest, Outcome, Share
from relora_ray.checkpoint.checkpointer import LAST_WORDS_S
from relora_ray.checkpoint.manifest import attempt_number
from relora_ray.config_file import parse_config
from relora_ray.errors import ReloraError, RolledBackError
from relora_ray.parallel import disagreement
from relora_ray.runs import is_finished, run_storage
from relora_ray.runtime.messages import Arrival, Cause, Event, Member, Orders, Start, log_event

MAX_EVENTS = 100_000
"""What nobody fetches is forgotten, the oldest first."""
TELL_S = 30.0
"""An actor that replaces one that died is told within this what is under way."""

logger = logging.getLogger(__name__)


class Coordinator:
    def __init__(self, config: str) -> None:
        """`config`: the run's YAML."""
        cfg = parse_config(config)
        self._storage = run_storage(cfg)
        self._commits = Commits(self._storage, cfg.checkpoint)
        self._timeout_s, self._max_failures = cfg.cluster.collective_timeout_s, cfg.cluster.max_failures
        self._committing = asyncio.Lock()
        self._saves: dict[tuple[int, int, str], _Save] = {}
        self._boundaries: dict[tuple[int, int, str], _Boundary] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._fatal, self._finished = "", False
        self._group, self._past_groups = "", {""}
        self._gathering = _Gathering()
        self._attempt: _Attempt | None = None
        self._cfg, self._ended = cfg, 0
        self._adopted: Start | None = None
        self._began, self._told = False, asyncio.Event()
        """Whether this actor has begun an attempt, or was told of one that an actor before it began."""
        # Unique over the lives of this actor: agents of an attempt that it has forgotten must not be taken for others.
        self._number = time.time_ns() // 10**6
        self._cause: Cause | None = Cause("start", "the run was started")
        self._next_cause: Cause | None = None
        self._failures = 0
        self._last_step, self._last_step_time = 0, time.time()
        logging.getLogger("relora_ray").addHandler(_Log(self._on_log))

    # Attempts.

    async def join(self, member: Member) -> Start | None:
        """Returns when all agents of the worker group are there, with what to start. None: there is nothing more to do,
        for anybody or for this group."""
        if self._fatal or self._finished or member.group in self._past_groups:
            return None
        if (running := self._attempt) is not None and member.group == self._group:
            if self._adopted is not None and running.members.get(member.rank, member) == member:
                running.members[member.rank] = member  # the answer to it was lost with the actor before this one
                return dataclasses.replace(self._adopted, rank=member.rank)
            self._end_attempt()  # it asks for another: its process is over
        if member.group != self._group:  # Ray has started another
            self._past_groups.add(self._group)
            self._past_groups.discard("")
            self._group = member.group
            self._end_attempt()
            self._gathering.give_up()
            self._gathering = _Gathering()
        gathering = self._gathering
        gathering.members[member.rank] = member
        if len(gathering.members) == member.size:
            self._gathering = _Gathering()
            await self._settle()
            if member.group != self._group:  # replaced meanwhile
                gathering.give_up()
                return None
            self._end_attempt()
            self._number += 1
            cause = self._cause or Cause("failure", "Ray replaced the worker group")
            self._attempt = _Attempt(self._number, list(gathering.members.values()), member.size, cause)
            self._cause, self._began, self._adopted = None, True, None
            gathering.begin(self._attempt)
        await gathering.complete.wait()
        return gathering.starts.get(member.rank)

    async def watch(self, start: Start, member: Member, seen: Orders) -> Orders:
        """The orders of an attempt, as soon as they are not those that were `seen`."""
        if not self._began:  # this actor replaces one that died: it learns here what is under way
            self._began, self._group = True, member.group
            self._attempt = _Attempt(start.attempt, [], start.size, start.cause)
            self._attempt.trains = True
            self._cause, self._adopted = None, start
            self._told.set()
            for rank in self._gathering.members:
                self._gathering.starts[rank] = dataclasses.replace(start, rank=rank)
            self._attempt.members |= self._gathering.members
            self._gathering.give_up()
            self._gathering = _Gathering()
        mine = self._attempt
        if mine is None or mine.number != start.attempt:
            return Orders(stop=True)
        mine.members[start.rank] = member
        await mine.until(lambda: mine.orders != seen)
        return mine.orders

    async def lost(self, attempt: int, rank: int, reason: str) -> None:
        """A rank's process is gone: the attempt is over, for all. Returns when the next may be asked for."""
        mine = await self._find(attempt)
        if mine is None:
            return
        mine.lost.add(rank)
        if self._cause is None:
            self._cause = Cause("failure", f"rank {rank}: {reason}")
            # One that went back is bounded by train.max_rollbacks. Its process says so by the error's name.
            self._failures += not reason.startswith(f"{RolledBackError.__name__}: ")
            self._warn(self._cause.text)
            if self._max_failures >= 0 and self._failures > self._max_failures and not self._fatal:
                self._fatal = (
                    f"{self._failures} attempt(s) failed, and cluster.max_failures={self._max_failures} allows no "
                    f"more; the last: {self._cause.text}"
                )
        await self._wait_for_save(mine)
        self._ended = mine.number
        self._end_attempt(mine)

    async def done(self, attempt: int, rank: int) -> bool:
        """A rank came to the end of the run; returns when all have (True) or one is lost (False)."""
        mine = await self._find(attempt)
        if mine is None:  # an actor that has died may have let the others go
            return self._finished or await asyncio.to_thread(self._is_finished)
        mine.done.add(rank)
        if len(mine.done) == mine.size:
            self._finished = True
            self._end_attempt(mine)
        await mine.until(lambda: mine.orders.stop)
        return self._finished

    async def fail(self, attempt: int, message: str) -> None:
        """A worker's error that a restart cannot mend; the first counts, also if another rank was quicker to end."""
        if await self._find(attempt) is not None or attempt == self._ended:
            self._fatal = self._fatal or message

    def _is_finished(self) -> bool:
        return is_finished(self._cfg, self._storage)

    def fatal(self) -> str:
        return self._fatal

    async def _find(self, number: int) -> _Attempt | None:
        """The attempt of that number, if it is under way."""
        if not self._began:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._told.wait(), TELL_S)
        return self._attempt if self._attempt is not None and self._attempt.number == number else None

    def _end_attempt(self, attempt: _Attempt | None = None) -> None:
        if self._attempt is not None and attempt in (None, self._attempt):
            self._attempt.order(stop=True)
            self._attempt = None

    async def _wait_for_save(self, attempt: _Attempt) -> None:
        """Those that are left may be storing a checkpoint that needs nothing of those that are lost."""
        waiting: list[asyncio.Future[Any]] = [
            save.outcome for save in self._saves.values() if save.may_complete_without(attempt.lost)
        ]
        if attempt.storing is not None and attempt.lost <= set(attempt.leaving):
            waiting.append(attempt.storing)
        if waiting:
            await asyncio.wait(waiting, timeout=LAST_WORDS_S)

    async def _settle(self) -> None:
        """Wait until no commit is under way: an attempt looks for the newest checkpoint after this."""
        async with self._committing:
            pass

    # Wishes of the elastic policy.

    def ask_to_save(self, leaving: list[str] | None, cause: str, wait: bool) -> bool:
        """Have all ranks store their state after the next step and then `wait`, for a resize. `leaving`: machines that
        will soon be gone; None: those that were named before. False if nothing is being trained: ask again."""
        mine = self._attempt
        if mine is None:
            return False
        if leaving is not None:
            mine.leaving = [m.rank for m in mine.members.values() if m.node in leaving]
        if not wait and self.is_paused():  # for a resize: what there is to store is stored
            return True
        mine.stored = False
        mine.waits = wait
        if mine.orders.go_on >= mine.orders.save:  # nobody waits any more since the last wish
            mine.paused = {}
        self._next_cause = Cause("resize", cause)
        mine.order(save=max(time.time_ns(), mine.orders.save + 1))
        return True

    def is_asked(self) -> bool:
        """Whether a wish is still to be fulfilled: not if the attempt ended or the state could not be stored."""
        return self._attempt is not None and self._attempt.orders.save > self._attempt.orders.go_on

    def is_stored(self) -> bool:
        """Whether the last wish was fulfilled: all ranks have stored their state since."""
        return self._attempt is not None and self._attempt.stored

    async def pause(self, attempt: int, rank: int, step: int, stored: bool) -> Orders:
        """A rank has stored what it was asked to store, or has not been able to."""
        mine = await self._find(attempt)
        if mine is None:
            return Orders(stop=True)
        mine.paused[rank] = stored
        if mine.storing is not None and not mine.storing.done():
            mine.storing.set_result(None)
        mine.stored = len(mine.paused) == mine.size and all(mine.paused.values())
        if not stored or (not mine.waits and len(mine.paused) == mine.size):
            mine.order(go_on=mine.orders.save)
        return mine.orders

    async def resumed(self, attempt: int, rank: int) -> None:
        """A rank has waited long enough and trains."""
        if (mine := await self._find(attempt)) is not None:
            mine.paused.pop(rank, None)

    def is_paused(self) -> bool:
        """Whether the state is stored and all ranks wait: a resize loses nothing."""
        mine = self._attempt
        return mine is not None and mine.waits and len(mine.paused) == mine.size and all(mine.paused.values())

    def resizing(self) -> None:
        """The worker group is about to be replaced by one of another size."""
        self._cause = self._next_cause

    def go_on(self) -> None:
        """No resize after all."""
        if self._attempt is not None:
            self._attempt.paused = {}
            self._attempt.order(go_on=self._attempt.orders.save)

    async def leaving(self, attempt: int) -> list[int]:
        """Ranks on machines that will soon be gone. Asked when they begin to store what they were asked to."""
        mine = await self._find(attempt)
        if mine is None:
            return []
        mine.storing = asyncio.get_running_loop().create_future()
        return list(mine.leaving)

    async def last_words(self) -> None:
        """Returns when a checkpoint that the survivors are storing is committed: Ray may then end them."""
        if self._attempt is not None:
            await self._wait_for_save(self._attempt)

    # Boundaries.

    async def arrive(self, arrival: Arrival) -> str:
        """Returns when all ranks are there: "" if they agree, or else what is wrong, the same to all."""
        key = (arrival.attempt, arrival.step, arrival.when)
        for over in [k for k in self._boundaries if k[:2] < key[:2]]:
            del self._boundaries[over]
        boundary = self._boundaries.setdefault(key, _Boundary())
        if not boundary.digests:
            boundary.began = time.time()
        boundary.digests[arrival.rank] = arrival.digest
        if len(boundary.digests) == arrival.size and not boundary.verdict.done():
            odd = disagreement([boundary.digests[rank] for rank in range(arrival.size)])
            what = f"{arrival.when} the boundary at step {arrival.step}"
            boundary.verdict.set_result(f"{what}: {odd}" if odd else "")
            if arrival.when == "after" and not odd:
                self._enter_in_ledger(arrival)
        try:
            return await asyncio.wait_for(asyncio.shield(boundary.verdict), self._timeout_s)
        except asyncio.TimeoutError:
            missing = sorted(set(range(arrival.size)) - boundary.digests.keys())
            error = f"ranks {missing} did not come to the boundary at step {arrival.step} in {self._timeout_s} s."
            if not boundary.verdict.done():
                boundary.verdict.set_result(error)
            return boundary.verdict.result()

    def _enter_in_ledger(self, after: Arrival) -> None:
        """Write the ledger's page on one boundary. What came before it is not known if this actor died meanwhile."""
        before = self._boundaries.get((after.attempt, after.step, "before"))
        page = {
            "step": after.step,
            "attempt": self._attempt.name if self._attempt is not None else "",
            "world_size": after.size,
            "digest_before": before.digests[after.rank] if before is not None else None,
            "digest_after": after.digest,
            "boundary_s": time.time() - before.began if before is not None else None,
            "unix_time": time.time(),
        }
        self._put_page(f"ledger/step-{after.step:08d}.json", page)

    # Checkpoints.

    async def commit_bytes(self, share: bytes) -> bytes:
        """`commit`, for agents, which do not know what a Share is. (From our own process, not from storage.)"""
        return pickle.dumps(await self.commit(pickle.loads(share)))

    async def commit(self, share: Share) -> Outcome:
        """One rank's share of a save; returns when all writers' are there and the manifest is stored, or is not: the
        same to every rank."""
        manifest = share.manifest
        key = (attempt_number(manifest.attempt), manifest.step, manifest.attempt)
        for over in [other for other in self._saves if other < key]:  # an attempt has one save under way
            del self._saves[over]
        found = None
        if key not in self._saves and (self._told.is_set() or not self._began):
            # The actor before this one may have committed it and not told everybody.
            found = await asyncio.to_thread(self._commits.committed, manifest)
        if found is not None:
            return Outcome(manifest=found)
        save = self._saves.setdefault(key, _Save(set(share.writers)))
        if save.outcome.done():  # it was given up, or needs nothing of this rank
            return save.outcome.result()
        save.shares[share.rank] = share
        if save.writers <= save.shares.keys() and not save.complete.is_set():
            save.complete.set()
            async with self._committing:
                shares = [save.shares[rank] for rank in sorted(save.shares)]
                save.outcome.set_result(await asyncio.to_thread(self._commits.commit, shares))
            self._in_background(self._prune(save.outcome.result().manifest))
        try:  # only the gathering has a time limit: a commit that has begun is waited for
            await asyncio.wait_for(save.complete.wait(), self._timeout_s)
        except asyncio.TimeoutError:
            missing = sorted(save.writers - save.shares.keys())
            if not save.outcome.done() and not save.complete.is_set():
                error = f"no share from ranks {missing} in {self._timeout_s} s"
                save.outcome.set_result(Outcome(manifest=None, error=error))
        return await asyncio.shield(save.outcome)

    async def _prune(self, committed: Manifest | None) -> None:
        if committed is not None:
            async with self._committing:
                await asyncio.to_thread(self._commits.prune, committed)

    # Events.

    def tell(self, attempt: int, event: Event) -> None:
        if self._attempt is None or self._attempt.number != attempt:
            return
        self._events.append(event)
        if event["kind"] == "attempt":
            self._attempt.name, self._attempt.from_step = event["attempt"], event["step"]
        if event["kind"] == "train":
            if not self._attempt.trains:
                self._attempt.trains = True
                self._on_first_step(self._attempt)
            self._last_step, self._last_step_time = event["step"], time.time()

    def _on_first_step(self, attempt: _Attempt) -> None:
        """An attempt trains: record what the change cost."""
        page = {
            "kind": "restart",
            "attempt": attempt.name,
            "change": attempt.cause.change,
            "cause": attempt.cause.text,
            "world_size": attempt.size,
            "from_step": attempt.from_step,
            "steps_lost": max(0, self._last_step - attempt.from_step),
            "down_s": time.time() - self._last_step_time,
            "unix_time": time.time(),
        }
        self._events.append(page)
        self._put_page(f"restarts/{attempt.name}.json", page)

    def _put_page(self, path: str, page: dict[str, Any]) -> None:
        """In the background; a page that cannot be stored is a warning."""

        def put() -> None:
            try:
                self._storage.put(path, json.dumps(page, indent=1).encode())
            except ReloraError as error:
                self._warn(f"{path} was not written: {error}")

        self._in_background(asyncio.to_thread(put))

    def drain(self) -> list[Event]:
        """The events since the last call. Only the driver asks."""
        events = list(self._events)
        self._events.clear()
        return events

    def _warn(self, message: str) -> None:
        self._events.append(log_event("coordinator", message))

    def _on_log(self, record: logging.LogRecord) -> None:
        self._warn(record.getMessage())

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Gathering:
    """Agents of one worker group that wait for the others."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.complete = asyncio.Event()
        self.starts: dict[int, Start] = {}
        """None of them: the group is over."""

    def begin(self, attempt: _Attempt) -> None:
        first = self.members[0]
        for rank in self.members:
            self.starts[rank] = Start(attempt.number, rank, attempt.size, first.host, first.port, attempt.cause)
        self.complete.set()

    def give_up(self) -> None:
        self.complete.set()


class _Attempt:
    def __init__(self, number: int, members: list[Member], size: int, cause: Cause) -> None:
        self.number, self.size, self.cause = number, size, cause
        self.members = {member.rank: member for member in members}
        self.name, self.from_step, self.trains = "", 0, False
        self.orders, self._changed = Orders(), asyncio.Event()
        self.lost: set[int] = set()
        self.done: set[int] = set()
        self.leaving: list[int] = []
        self.waits = False
        self.storing: asyncio.Future[None] | None = None
        """Done when what they were asked to store is stored, or is not."""
        self.paused: dict[int, bool] = {}
        """Ranks that wait since they were asked to save, and whether that was stored."""
        self.stored = False

    def order(self, **changes: Any) -> None:
        self.orders = dataclasses.replace(self.orders, **changes)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when its orders are such that `condition` holds."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()


class _Boundary:
    """Who has come to a boundary, and what becomes of them."""

    def __init__(self) -> None:
        self.began = 0.0
        self.digests: dict[int, int] = {}
        self.verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class _Save:
    """The shares of one save, and what became of it."""

    def __init__(self, writers: set[int]) -> None:
        self.writers = writers
        self.shares: dict[int, Share] = {}
        self.complete = asyncio.Event()
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def may_complete_without(self, lost: set[int]) -> bool:
        return not self.outcome.done() and not (self.writers - self.shares.keys()) & lost


class _Log(logging.Handler):
    """Hands warnings on: what this process logs is seen by nobody."""

    def __init__(self, hand_on: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._hand_on = hand_on

    def emit(self, record: logging.LogRecord) -> None:
        self._hand_on(record)


CoordinatorActor = ray.remote(
    num_cpus=0, max_concurrency=10_000, max_restarts=-1, max_task_retries=-1
)(Coordinator)  # fmt: skip
"""All ranks may wait in a call at once. Restarted by Ray when it dies, and calls to it are made again."""
