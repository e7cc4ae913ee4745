"""An actor that the driver owns and that all agents talk to: somebody outside the workers who knows and checks.

It brings the agents of a worker group together for an attempt and ends the attempt on all ranks when one is lost. At a
boundary it lets the ranks go on only when all have come with the same digest, and keeps the ledger. It commits
checkpoints: every rank hands in its share and waits. It counts failures, and remembers what no restart can mend.

If it dies, Ray starts another, which knows nothing of what this one began. That is not told to it: it takes the next
term, so that attempts of the one before it can write nothing more, tells whoever asks on their behalf to stop, and
begins anew from storage, which costs a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import ray

from relora_ray import clock
from relora_ray.checkpoint import Commits, Outcome, Share
from relora_ray.checkpoint.commit import LAST_WORDS_S
from relora_ray.checkpoint.manifest import Rollback
from relora_ray.checkpoint.ownership import Term, succeed
from relora_ray.config.file import parse_config
from relora_ray.errors import ReloraError, SupersededError
from relora_ray.replicas import disagreement
from relora_ray.runs.places import run_storage
from relora_ray.runs.tally import ProgressLog
from relora_ray.runtime.failures import Failures
from relora_ray.runtime.messages import Arrival, Cause, Event, Kind, Member, Start, log_event, waiting_event
from relora_ray.runtime.orders import Order, Orders

MAX_EVENTS = 100_000
"""What nobody fetches is forgotten, the oldest first."""
DRAINED = 10_000
"""So many events are fetched at once, at most."""
HOLD_S = 60.0
"""A resize that was announced and has not happened for so long is not waited for."""
FIRST_S = 1.0
"""After an error the other ranks may have their say for so long: one of them may have failed first, and those that see
the same error have metrics to store."""
AGAIN_S = 10.0
"""Between a try to take the next term that storage did not answer, and the next."""
GATHER_S = 60.0
"""When agents have waited for the others for so long, it is said for whom."""
GIVEN_UP = "this attempt was given up by the coordinator"

logger = logging.getLogger(__name__)


class Coordinator:
    def __init__(self, config: str, term: Term) -> None:
        """`config`: the run's YAML. `term`: what the driver has claimed."""
        cfg = parse_config(config)
        self._storage = run_storage(cfg)
        self._commits = Commits(self._storage, cfg.checkpoint, lambda attempt: attempt == self._latest)
        self._timeout_s = cfg.cluster.collective_timeout_s
        self._failures = Failures(cfg.cluster.max_failures)
        self._term, self._takes_over = term, _was_reconstructed()
        self._progress = None if self._takes_over else ProgressLog(self._storage, term)
        self._committing = asyncio.Lock()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._fatal, self._finished = "", False
        self._group, self._past_groups = "", {""}
        self._gathering = _Gathering()
        self._attempt: _Attempt | None = None
        """Under way."""
        self._latest, self._num_attempts = "", 0
        """The name of the last attempt that was begun, under way or not, and how many were in this term."""
        self._members: dict[int, Member] = {}
        """Of that attempt."""
        self._trained_on: set[str] = set()
        """Machines on which attempts of this actor made a step."""
        self._cause: Cause | None = Cause("start", "the run was started")
        """Why the next attempt will begin, as soon as that is known."""
        if self._takes_over:
            self._cause = Cause("failure", "the coordinator died, and another gave up what that one had begun")
        self._resize = ""
        self._not_before = 0.0
        """The next attempt's time, after a pause."""
        self._last_step, self._last_step_time = 0, clock.now()
        logging.getLogger("relora_ray").addHandler(_Log(self.warn))

    # Attempts.

    async def join(self, member: Member) -> Start | None:
        """Returns when all agents of the worker group are there, with what to start. None: there is nothing more to do,
        for anybody or for this group."""
        if self._fatal or self._finished or member.group in self._past_groups:
            return None
        if member.group != self._group:  # Ray has started another
            self._past_groups.add(self._group)
            self._group = member.group
            self._fail(Cause("failure", "Ray replaced the worker group"))
            self._gathering = self._gathering.give_up()
        else:
            self._fail(Cause("failure", f"rank {member.rank}: its agent lost touch with the coordinator"))
        if self._fatal:
            return None
        if not self._num_attempts:  # an actor before this one may have seen more
            self._last_step = max(self._last_step, member.step)
        gathering = self._gathering
        gathering.members[member.rank] = member
        self._events.append(waiting_event(f"workers, {len(gathering.members)} of {member.size} there"))
        if len(gathering.members) == 1:
            asyncio.get_running_loop().call_later(GATHER_S, self._say_who_is_missing, gathering, member.size)
        if len(gathering.members) == member.size and not gathering.full:
            gathering.full = True
            if odd := _of_other_code(gathering.members):
                self._give_up(odd)
                return None
            await self._begin(gathering)
        await gathering.decided.wait()
        return gathering.starts.get(member.rank)

    async def _begin(self, gathering: _Gathering) -> None:
        """Begin an attempt with these agents, unless they are of no use any more when the time has come."""
        await asyncio.sleep(self._not_before - clock.monotonic())
        await self._own()
        async with self._committing:  # it will look for the newest checkpoint
            if gathering is not self._gathering:
                return
            self._num_attempts += 1
            self._latest = self._term.attempt(self._num_attempts)
            assert self._cause is not None, "whatever ended the attempt before has set it"
            self._attempt = _Attempt(self._latest, gathering.members, self._cause)
            self._members = self._attempt.members
            self._cause, self._gathering = None, _Gathering()
            about = {"attempt": self._latest, "world_size": self._attempt.size, "cause": self._attempt.cause.text}
            self._show({"kind": "begin"} | about)
            gathering.begin(self._latest, self._attempt.cause, secrets.token_hex(16))
            self._events.append(waiting_event("processes that train"))

    async def _own(self) -> None:
        """Take the next term, if this actor is in the place of one that died."""
        while self._takes_over and not self._fatal:
            try:
                self._term = await asyncio.to_thread(succeed, self._storage, self._term)
                self._progress = await asyncio.to_thread(ProgressLog, self._storage, self._term)
                self._takes_over = False
            except SupersededError as error:
                self.supersede(str(error))
            except ReloraError as error:
                self.warn(f"no attempt can begin: {error}")
                await asyncio.sleep(AGAIN_S)

    def _say_who_is_missing(self, gathering: _Gathering, size: int) -> None:
        if gathering is self._gathering and not gathering.full:
            missing = sorted(set(range(size)) - gathering.members.keys())
            self.warn(f"the next attempt waits for ranks {missing}: their agents did not come in {GATHER_S:.0f} s")

    @ray.method(enable_task_events=False)  # under way when its worker ends, which Ray would show as a failed task
    async def watch(self, attempt: str, seen: Order) -> Order:
        """What the ranks of an attempt are told, as soon as it is not what was `seen`."""
        if (mine := self._find(attempt)) is None:
            return Order("stop")
        await mine.until(lambda: mine.orders.order != seen)
        return mine.orders.order

    async def lost(self, attempt: str, rank: int, reason: str, kind: Kind) -> None:
        """A rank has failed, or its process is gone: the attempt is over, for all. Returns when the next may be asked
        for."""
        if kind == "lasting" and attempt == self._latest:  # also if another rank was quicker to end
            if self._may_be_of_its_machine(self._members[rank].node):
                kind = "unknown"
            else:
                self._give_up(reason)
        if (mine := self._find(attempt)) is None:
            return
        mine.lost[rank] = (reason, kind)
        mine.changed()
        if kind != "died":
            await mine.until(lambda: mine.orders.order.what == "stop" or len(mine.lost) == mine.size, FIRST_S)
        await self._let_them_store(mine)
        self._end(mine)

    def agent_failed(self, group: str, rank: int, node: str, reason: str, kind: Kind) -> None:
        """An agent itself cannot go on; Ray will replace the worker group."""
        text = f"rank {rank}: its agent: {reason}"
        mine = self._attempt if group == self._group else None
        others = bool(_nodes(self._gathering.members | self._members) - {node})
        if kind == "lasting" and not (others and self._may_be_of_its_machine(node)):
            self._give_up(reason)
        if mine is not None:
            self._fail(Cause("failure", text), node, error="" if kind in ("passing", "follows") else reason)
        elif not self._fatal:  # before it had joined
            self.warn(text)
            self._count(False, node, others, text, reason if kind in ("lasting", "unknown") else "")

    def _may_be_of_its_machine(self, node: str) -> bool:
        """Whether an error that another attempt would meet again may be the machine's: it has other software, say, and
        the run has trained on the others."""
        return node not in self._trained_on and bool(_nodes(self._members) & self._trained_on)

    async def done(self, attempt: str, rank: int) -> bool:
        """A rank came to the end of the run; returns when all have (True) or one is lost (False)."""
        if (mine := self._find(attempt)) is None:
            return self._finished
        mine.done.add(rank)
        if len(mine.done) == mine.size:
            self._finished = True
            self._stop()
        await mine.until(lambda: mine.orders.order.what == "stop")
        return self._finished

    def supersede(self, reason: str) -> None:
        """The run belongs to another driver: nothing more is begun."""
        self._fatal = reason
        self._stop()
        self._give_up(reason)

    def fatal(self) -> str:
        """Why the run cannot go on, or ""."""
        return self._fatal

    def bad_nodes(self) -> list[str]:
        """Ray's ids of machines to do without for the moment."""
        return self._failures.bad_nodes(clock.monotonic())

    def nodes(self) -> list[str]:
        """Ray's ids of the machines of the worker group, as far as its agents have come."""
        return sorted(_nodes(self._gathering.members if self._attempt is None else self._attempt.members))

    def _find(self, attempt: str) -> _Attempt | None:
        """The attempt of that name, if it is under way."""
        return self._attempt if self._attempt is not None and self._attempt.name == attempt else None

    def _give_up(self, reason: str) -> None:
        """Begin no other attempt. The first reason counts."""
        self._fatal = self._fatal or reason
        self._gathering = self._gathering.give_up()

    def _stop(self) -> None:
        if self._attempt is not None:
            self._attempt.become(self._attempt.orders.stop())
            self._attempt = None

    def _end(self, attempt: _Attempt) -> None:
        """End an attempt of which ranks are lost, if nobody else has."""
        if attempt is not self._attempt:
            return
        first = attempt.first_lost()
        rank = next(iter(attempt.lost)) if first is None else first  # all of them say that another failed
        reason, kind = attempt.lost.get(rank) or next(iter(attempt.lost.values()))
        node = "" if first is None else attempt.members[rank].node
        text = reason if reason.startswith(f"rank {rank}: ") else f"rank {rank}: {reason}"
        nodes = {attempt.members[r].node for r, said in attempt.lost.items() if said == (reason, kind)}
        error = reason if kind == "unknown" else ""
        self._fail(Cause("failure", text), node, planned=kind == "rollback", error=error, nodes=nodes)

    def _fail(
        self, cause: Cause, node: str = "", *, planned: bool = False, error: str = "", nodes: Collection[str] = ()
    ) -> None:
        """End the attempt under way, if there is one, and see what follows. `planned`: one that went back is no failure
        (it is bounded by train.max_rollbacks). `error`: the same again and again, met on these `nodes`, is not the
        machines' doing."""
        if (ended := self._attempt) is None:
            if self._cause is None:
                self._cause = cause
            return
        self._stop()
        self._show({"kind": "lost", "attempt": ended.name, "cause": (self._cause or cause).text})
        if self._cause is not None:  # it ends for a resize
            return
        self._cause = cause
        self.warn(cause.text)
        if not ended.trained:
            self._record(ended, cause.text)
        if planned or self._fatal:
            return
        others, step = len(_nodes(ended.members)) > 1, self._last_step if ended.trained else None
        self._count(ended.trained, node, others, cause.text, error, nodes, step)

    def _count(
        self,
        stepped: bool,
        node: str,
        others: bool,
        cause: str,
        error: str,
        nodes: Collection[str] = (),
        step: int | None = None,
    ) -> None:
        """A failure: see whether there is to be another attempt, and when. Parameters as those of `Failures.failed`."""
        now = clock.monotonic()
        if bad := self._failures.failed(
            now, stepped=stepped, node=node, others=others, error=error, nodes=nodes, step=step
        ):
            self.warn(bad)
        if too_many := self._failures.too_many():
            self._give_up(f"{too_many}; the last: {cause}")
        elif pause_s := self._failures.pause_s():
            self._not_before = now + pause_s
            count = self._failures.without_step
            self.warn(f"{count} attempt(s) without a step, the next begins in {pause_s:.0f} s: {cause}")

    async def _let_them_store(self, attempt: _Attempt) -> None:
        """Those that are left may be storing a checkpoint that needs nothing of those that are lost."""

        def are_storing() -> bool:
            saving = any(save.may_complete_without(attempt.lost) for save in attempt.saves.values())
            return saving or (attempt.orders.storing and attempt.orders.leaving >= attempt.lost.keys())

        await attempt.until(lambda: not are_storing(), LAST_WORDS_S)

    # Wishes of the elastic policy, and of a driver that is told to stop.

    def ask_to_save(self, leaving: list[str] | None, cause: str, wait: bool) -> bool:
        """Have all ranks store their state after the next step and then `wait`, for a resize. `leaving`: machines that
        will soon be gone; None: those that were named before. False if nothing is being trained: ask again."""
        if (mine := self._attempt) is None:
            return False
        ranks = None if leaving is None else [m.rank for m in mine.members.values() if m.node in leaving]
        if wait:
            self._resize = cause
        mine.become(mine.orders.ask(wait=wait, leaving=ranks))
        self._hold(mine)
        return True

    def is_asked(self) -> bool:
        """Whether a wish is still to be fulfilled: not if the attempt ended or the state could not be stored."""
        return self._attempt is not None and self._attempt.orders.order.what in ("save", "held")

    def is_stored(self) -> bool:
        """Whether the last wish was fulfilled: all ranks have stored their state since."""
        return self._attempt is not None and self._attempt.orders.stored

    def is_paused(self) -> bool:
        """Whether the state is stored and all ranks wait: a resize loses nothing."""
        return self._attempt is not None and self._attempt.orders.order.what == "held"

    def resizing(self) -> bool:
        """The worker group is about to be replaced by one of another size. Whether they all still wait."""
        if self._attempt is not None:
            self._cause = Cause("resize", self._resize)
            self._hold(self._attempt)
        return self.is_paused()

    def go_on(self) -> None:
        """No resize after all."""
        if self._attempt is not None:
            self._cause = None
            self._attempt.become(self._attempt.orders.withdraw())

    async def begin_save(self, attempt: str, step: int) -> list[int]:
        """Rank 0 is about to store what it was asked to. Returns the ranks on machines that will soon be gone."""
        if (mine := self._find(attempt)) is None:
            return []
        mine.become(mine.orders.begin(step))
        return sorted(mine.orders.leaving)

    async def pause(self, attempt: str, rank: int, step: int, stored: bool) -> int:
        """A rank has stored what it was asked to, or has not been able to. Returns when it may train on, with the
        number of the wish that it has obeyed."""
        if (mine := self._find(attempt)) is None:
            return 0
        mine.become(mine.orders.come(rank, step, stored))
        wish = mine.orders.bound
        self._hold(mine)
        await mine.until(lambda: mine.orders.is_over(wish))
        return wish

    async def last_words(self) -> None:
        """Returns when a checkpoint that the survivors are storing is committed: Ray may then end them."""
        if self._attempt is not None:
            await self._let_them_store(self._attempt)

    def _hold(self, attempt: _Attempt) -> None:
        """From now on the ranks wait for a resize for so long, if they all wait."""
        if attempt.timer is not None:
            attempt.timer.cancel()
        if attempt.orders.order.what == "held":
            attempt.timer = asyncio.get_running_loop().call_later(HOLD_S, self._release, attempt)

    def _release(self, attempt: _Attempt) -> None:
        if attempt is self._attempt:
            self.warn(f"there was no resize in {HOLD_S:.0f} s: the workers train on")
            self.go_on()

    # Boundaries.

    async def arrive(self, arrival: Arrival) -> str:
        """Returns when all ranks are there: "" if they agree, or else what is wrong, the same to all."""
        if (mine := self._find(arrival.attempt)) is None:
            return GIVEN_UP
        key = (arrival.step, arrival.when)
        for over in [k for k in mine.boundaries if k[0] < arrival.step]:
            del mine.boundaries[over]
        boundary = mine.boundaries.setdefault(key, _Boundary())
        boundary.digests[arrival.rank] = arrival.digest
        if len(boundary.digests) == mine.size and not boundary.verdict.done():
            odd = disagreement([boundary.digests[rank] for rank in range(mine.size)])
            what = f"{arrival.when} the boundary at step {arrival.step}"
            boundary.verdict.set_result(f"{what}: {odd}" if odd else "")
            if odd:
                mine.suspect(boundary.odd())
            elif arrival.when == "after":
                self._enter_in_ledger(mine, arrival)
        try:
            return await asyncio.wait_for(asyncio.shield(boundary.verdict), self._timeout_s)
        except TimeoutError:
            missing = sorted(set(range(mine.size)) - boundary.digests.keys())
            error = f"ranks {missing} did not come to the boundary at step {arrival.step} in {self._timeout_s} s."
            if not boundary.verdict.done():
                mine.suspect(missing)
                boundary.verdict.set_result(error)
            return boundary.verdict.result()

    def _enter_in_ledger(self, attempt: _Attempt, after: Arrival) -> None:
        """Write the ledger's page on one boundary."""
        before = attempt.boundaries[after.step, "before"]
        page = {
            "step": after.step,
            "attempt": attempt.name,
            "world_size": attempt.size,
            "digest_before": before.digests[after.rank],
            "digest_after": after.digest,
            "boundary_s": clock.now() - before.began,
            "unix_time": clock.now(),
        }
        self._put_page(f"ledger/step-{after.step:08d}-{attempt.name}.json", page)

    # Checkpoints. Agents do not know what a Share is: it comes and goes as JSON.

    async def commit(self, share: str) -> str:
        """One rank's share of a save; returns when all writers' are there and the manifest is stored, or is not: the
        same to every rank."""
        return (await self._commit(Share.model_validate_json(share))).model_dump_json()

    async def roll_back(self, rollback: str) -> str:
        """Store that the run goes back."""
        wanted = Rollback.model_validate_json(rollback)
        outcome = await self._decide(wanted.attempt, lambda: self._commits.roll_back(wanted))
        return outcome.model_dump_json()

    async def _commit(self, share: Share) -> Outcome:
        if (mine := self._find(share.manifest.attempt)) is None:
            return Outcome(manifest=None, error=GIVEN_UP)
        step = share.manifest.step
        for over in [other for other in mine.saves if other < step]:  # an attempt has one save under way
            del mine.saves[over]
        save = mine.saves.setdefault(step, _Save(set(share.writers)))
        if save.outcome.done():  # it was given up, or needs nothing of this rank
            return save.outcome.result()
        save.shares[share.rank] = share
        if save.writers <= save.shares.keys() and not save.complete.is_set():
            save.complete.set()
            shares = [save.shares[rank] for rank in sorted(save.shares)]
            save.outcome.set_result(await self._decide(mine.name, lambda: self._commits.commit(shares)))
            mine.changed()
            if (manifest := save.outcome.result().manifest) is not None:
                self._failures.committed(_nodes(mine.members))
                if self._progress is not None:
                    self._progress.committed(manifest)
                self._in_background(asyncio.to_thread(self._commits.prune, manifest))
        try:  # only the gathering has a time limit: a commit that has begun is waited for
            await asyncio.wait_for(save.complete.wait(), self._timeout_s)
        except TimeoutError:
            missing = sorted(save.writers - save.shares.keys())
            if not save.outcome.done() and not save.complete.is_set():
                error = f"no share from ranks {missing} in {self._timeout_s} s"
                save.outcome.set_result(Outcome(manifest=None, error=error))
                mine.changed()
        return await asyncio.shield(save.outcome)

    async def _decide(self, attempt: str, action: Callable[[], Outcome]) -> Outcome:
        """Carry out `action`, in a thread, if the attempt is still under way; the next begins after that."""
        async with self._committing:
            if self._find(attempt) is None:
                return Outcome(manifest=None, error=GIVEN_UP)
            return await asyncio.to_thread(action)

    # Events.

    @ray.method(enable_task_events=False)  # as may this, for which nobody waits
    def tell(self, attempt: str, event: Event) -> None:
        if (mine := self._find(attempt)) is None:
            return
        self._show(event)
        if event["kind"] == "attempt":
            mine.from_step = event["step"]
        if event["kind"] == "train":
            if not mine.trained:
                mine.trained = True
                self._trained_on |= _nodes(mine.members)
                self._record(mine)
            self._last_step, self._last_step_time = event["step"], clock.now()

    def _record(self, attempt: _Attempt, ended_by: str = "") -> None:
        """An attempt trains, or ended before it did: record what that has cost since the record before."""
        begun_from = self._last_step if attempt.from_step is None else attempt.from_step
        page = {
            "kind": "restart",
            "attempt": attempt.name,
            "change": attempt.cause.change,
            "cause": attempt.cause.text,
            "trained": attempt.trained,
            "ended_by": ended_by,
            "world_size": attempt.size,
            "from_step": attempt.from_step,
            "steps_lost": max(0, self._last_step - begun_from),
            "down_s": clock.now() - self._last_step_time,
            "unix_time": clock.now(),
        }
        self._last_step, self._last_step_time = begun_from, clock.now()
        self._tally(page)
        if attempt.trained:
            self._events.append(page)
        self._put_page(f"restarts/{attempt.name}.json", page)

    def _show(self, event: Event) -> None:
        """To the driver, and to those who look at storage."""
        self._events.append(event)
        self._tally(event)

    def _tally(self, event: Event) -> None:
        if self._progress is not None:
            self._progress.add(event)

    def _put_page(self, path: str, page: dict[str, Any]) -> None:
        """In the background; a page that cannot be stored is a warning."""

        def put() -> None:
            try:
                self._storage.put(path, json.dumps(page, indent=1).encode())
            except ReloraError as error:
                self.warn(f"{path} was not written: {error}")

        self._in_background(asyncio.to_thread(put))

    def drain(self) -> list[Event]:
        """The oldest events that were not fetched yet. Only the driver asks."""
        return [self._events.popleft() for _ in range(min(DRAINED, len(self._events)))]

    def warn(self, message: str) -> None:
        """A line on the driver's console (from any thread)."""
        self._events.append(log_event("coordinator", message))

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Gathering:
    """Agents of one worker group that wait for the others."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.full = False
        self.decided = asyncio.Event()
        self.starts: dict[int, Start] = {}
        """None of them: there is nothing to do for the group."""

    def begin(self, attempt: str, cause: Cause, secret: str) -> None:
        first = self.members[0]
        for rank in self.members:
            self.starts[rank] = Start(attempt, rank, len(self.members), first.host, first.port, cause, secret)
        self.decided.set()

    def give_up(self) -> _Gathering:
        """The next."""
        self.decided.set()
        return _Gathering()


class _Attempt:
    def __init__(self, name: str, members: dict[int, Member], cause: Cause) -> None:
        self.name, self.members, self.size, self.cause = name, members, len(members), cause
        self.orders, self._changed = Orders(self.size), asyncio.Event()
        self.from_step: int | None = None
        self.trained = False
        self.lost: dict[int, tuple[str, Kind]] = {}
        """Why and how, by rank, in the order in which it was heard of."""
        self._suspect: int | None = None
        self.done: set[int] = set()
        self.saves: dict[int, _Save] = {}
        self.boundaries: dict[tuple[int, str], _Boundary] = {}
        self.timer: asyncio.TimerHandle | None = None

    def become(self, orders: Orders) -> None:
        self.orders = orders
        self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Returns when `condition` holds, or after that time. It is looked at when something has changed."""

        async def wait() -> None:
            while not condition():
                await self._changed.wait()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), timeout_s)

    def suspect(self, ranks: list[int]) -> None:
        """The attempt fails because of these, whoever says so first."""
        self._suspect = ranks[0] if len(ranks) == 1 else None

    def first_lost(self) -> int | None:
        """The rank with which it began, as far as that is known."""
        if self._suspect is not None:
            return self._suspect
        return next((rank for rank, (_, kind) in self.lost.items() if kind != "follows"), None)


class _Boundary:
    """Who has come to a boundary, and what becomes of them."""

    def __init__(self) -> None:
        self.began = clock.now()
        self.digests: dict[int, int] = {}
        self.verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def odd(self) -> list[int]:
        """The ranks whose digest most others do not have."""
        values = list(self.digests.values())
        return [rank for rank, value in self.digests.items() if 2 * values.count(value) < len(values)]


class _Save:
    """The shares of one save, and what became of it."""

    def __init__(self, writers: set[int]) -> None:
        self.writers = writers
        self.shares: dict[int, Share] = {}
        self.complete = asyncio.Event()
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def may_complete_without(self, lost: dict[int, Any]) -> bool:
        return not self.outcome.done() and not (self.writers - self.shares.keys()) & lost.keys()


class _Log(logging.Handler):
    """Hands warnings on: what this process logs is seen by nobody."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hand_on = hand_on

    def emit(self, record: logging.LogRecord) -> None:
        self._hand_on(record.getMessage())


def _of_other_code(members: dict[int, Member]) -> str:
    """What is wrong if not all ranks have the same files of this package: they would not compute the same."""
    first = members[0]
    odd = next((m for _, m in sorted(members.items()) if m.code != first.code), None)
    if odd is None:
        return ""
    return (
        f"rank {odd.rank} on {odd.host} has other files of relora_ray ({odd.code}) than rank 0 on {first.host} "
        f"({first.code}). Install one version on all machines, and start again when no file changes any more."
    )


def _nodes(members: dict[int, Member]) -> set[str]:
    return {member.node for member in members.values()}


def _was_reconstructed() -> bool:
    """Whether Ray started this actor in place of one that died."""
    if not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


CoordinatorActor = ray.remote(
    num_cpus=0, max_concurrency=10_000, max_restarts=-1, max_task_retries=-1
)(Coordinator)  # fmt: skip
"""All ranks may wait in a call at once. Restarted by Ray when it dies, and calls to it are made again."""
