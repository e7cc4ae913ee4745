"""The coordinator without Ray: its methods as agents call them, many at once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint import Manifest, Outcome, Rollback, Share, list_manifests
from relora_ray.checkpoint.manifest import StoredObject
from relora_ray.checkpoint.ownership import Term, claim
from relora_ray.config.file import to_yaml
from relora_ray.errors import StorageError
from relora_ray.runs.metrics import read_pages
from relora_ray.runs.places import run_storage
from relora_ray.runtime import coordinator as module
from relora_ray.runtime import failures
from relora_ray.runtime.coordinator import GIVEN_UP, Coordinator
from relora_ray.runtime.messages import Arrival, Member, Start
from relora_ray.runtime.orders import Order
from tests.tiny import tiny_config

Test = Callable[[Coordinator], Coroutine[Any, Any, None]]
TERM = Term(1, "1f2e3d4c")


def member(rank: int, size: int = 2, group: str = "a", node: str = "") -> Member:
    return Member(group, rank, size, node or f"node-{rank}", f"10.0.0.{rank}", 9000 + rank)


def share(start: Start, step: int = 4, writers: tuple[int, ...] = (0, 1)) -> Share:
    def part(kind: str) -> dict[str, Any]:
        stored = StoredObject(path=f"r{start.rank:05d}-p000.safetensors", size_bytes=1, sha256="0" * 64)
        return {"folder": f"{kind}/step-{step:08d}-{start.attempt}", "objects": (stored,), "digest": 5}

    manifest = {
        "step": step, "tokens": 8, "boundary": 3, "base": part("base"), "delta": part("delta"), "counters": {},
        "identity": "i", "data_fingerprint": "f", "attempt": start.attempt, "world_size": 2, "versions": {},
        "unix_time": 1,
    }  # fmt: skip
    return Share(rank=start.rank, manifest=Manifest.model_validate(manifest), writers=writers)


async def commit(coordinator: Coordinator, *args: Any, **kwargs: Any) -> Outcome:
    """As a process that trains has it done."""
    return Outcome.model_validate_json(await coordinator.commit(share(*args, **kwargs).model_dump_json()))


def messages(coordinator: Coordinator) -> list[str]:
    """What was said on the console since the last look."""
    return [event["message"] for event in coordinator.drain() if event["kind"] == "log"]


async def begin(coordinator: Coordinator, size: int = 2, group: str = "a") -> list[Start]:
    starts = await asyncio.gather(*(coordinator.join(member(rank, size, group)) for rank in range(size)))
    assert all(starts)
    return starts


@pytest.fixture
def play(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Coordinator]:
    """Run a test's coroutine with a coordinator; returns that. There are no pauses before attempts."""
    monkeypatch.setattr(failures, "MOST_PAUSE_S", 0.0)

    def run(test: Test, *overrides: str) -> Coordinator:
        async def main() -> Coordinator:
            cfg = tiny_config(data, tmp_path, "cluster.collective_timeout_s=1", *overrides)
            claim(run_storage(cfg), TERM.driver)
            coordinator = Coordinator(to_yaml(cfg), TERM)
            await test(coordinator)
            while coordinator._tasks:
                await asyncio.gather(*coordinator._tasks)
            return coordinator

        return asyncio.run(main())

    return run


def test_attempt_begins_when_all_agents_are_there(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        first = asyncio.create_task(coordinator.join(member(0)))
        await asyncio.sleep(0.05)
        assert not first.done()
        second = await coordinator.join(member(1))
        one = await first
        assert one is not None
        assert second is not None
        assert (one.rank, second.rank, one.attempt) == (0, 1, second.attempt)
        assert {(s.host, s.port, s.size) for s in (one, second)} == {("10.0.0.0", 9000, 2)}, "they meet at rank 0"
        assert one.attempt == "0001.0001-1f2e3d4c"
        assert one.cause.change == "start"
        assert one.secret == second.secret
        assert len(one.secret) == 32
        assert one.secret not in repr(one)

    play(test)


def test_ranks_with_other_code_never_train_together(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        first, other = (dataclasses.replace(member(rank), code=code) for rank, code in enumerate(("aaaa", "bbbb")))
        assert await asyncio.gather(coordinator.join(first), coordinator.join(other)) == [None, None]
        assert coordinator.fatal().startswith(
            "rank 1 on 10.0.0.1 has other files of relora_ray (bbbb) than rank 0 on 10.0.0.0 (aaaa). Install one"
        )

    play(test)


def test_lost_rank_ends_the_attempt_for_all_and_the_next_knows_why(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        watching = asyncio.create_task(coordinator.watch(starts[0].attempt, Order()))
        await coordinator.lost(starts[1].attempt, 1, "its process was ended by SIGKILL", "died")
        assert (await watching).what == "stop"
        assert (await coordinator.watch(starts[0].attempt, Order())).what == "stop", "also to who asks late"
        again = await begin(coordinator)
        assert again[0].secret != starts[0].secret
        assert again[0].attempt > starts[0].attempt
        assert again[0].cause.change == "failure"
        assert again[0].cause.text == "rank 1: its process was ended by SIGKILL"

    play(test)


def test_rank_that_failed_first_is_the_cause_also_if_others_were_heard_before(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        attempt = (await begin(coordinator))[0].attempt
        told = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
        follows = asyncio.create_task(coordinator.lost(attempt, 0, told, "follows"))
        await asyncio.sleep(0.05)
        assert not follows.done()
        await coordinator.lost(attempt, 1, "its process was ended by SIGSEGV", "died")
        await follows
        starts = await begin(coordinator)
        assert starts[0].cause.text == "rank 1: its process was ended by SIGSEGV"
        await coordinator.lost(starts[0].attempt, 0, told, "follows")
        assert (await begin(coordinator))[0].cause.text == f"rank 0: {told}", "of its machine nothing is heard"

    play(test)


def test_error_that_all_ranks_see_ends_the_attempt_when_all_have_said_so(play: Callable[..., Any]) -> None:
    """Or one of them is ended before it has stored its metrics."""

    async def test(coordinator: Coordinator) -> None:
        attempt = (await begin(coordinator))[0].attempt
        first = asyncio.create_task(coordinator.lost(attempt, 1, "RanksDisagreeError: x", "unknown"))
        await asyncio.sleep(0.1)
        assert not first.done()
        began = time.monotonic()
        await coordinator.lost(attempt, 0, "RanksDisagreeError: x", "unknown")
        await first
        assert time.monotonic() - began < 0.5

    play(test)


def test_failures_are_counted_and_limited(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for _ in range(3):
            starts = await begin(coordinator)
            await coordinator.lost(starts[0].attempt, 0, "x", "died")
            await coordinator.lost(starts[0].attempt, 1, "hears of it later", "follows")
        assert "3 attempt(s) in a row failed before a checkpoint was committed" in coordinator.fatal()
        assert "cluster.max_failures=2 allows no more; the last: rank 0: x" in coordinator.fatal()
        assert await coordinator.join(member(0)) is None

    play(test, "cluster.max_failures=2")


OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate {} MiB"


def test_same_error_again_and_again_ends_the_run(play: Callable[..., Any]) -> None:
    """Nobody knows whether it is the machines' doing, until it was met on another, or there is no other."""

    async def test(coordinator: Coordinator) -> None:
        for number, rank in enumerate((0, 0, 0, 0, 1)):
            assert coordinator.fatal() == "", "it may be machine node-0"
            starts = await begin(coordinator)
            await coordinator.lost(starts[0].attempt, rank, OOM.format(number), "unknown")
        assert coordinator.fatal() == (
            "the same error ended 5 attempts in a row before they had made a step, on 2 machines: another would meet "
            f"it again; the last: rank 1: {OOM.format(4)}"
        )
        assert await coordinator.join(member(0)) is None

    async def test_alone(coordinator: Coordinator) -> None:
        for number in range(3):
            assert coordinator.fatal() == ""
            starts = await begin(coordinator, size=1)
            await train(coordinator, starts, 0, list(range(1, 4)))
            await coordinator.lost(starts[0].attempt, 0, OOM.format(number), "unknown")
        assert "ended 3 attempts in a row after step 3, on the only machine" in coordinator.fatal()

    play(test)
    play(test_alone)


@pytest.mark.parametrize(
    ("said", "kind", "steps"),
    [
        (["refused"] * 6, "passing", [1] * 6),
        (["its process was ended by SIGKILL"] * 6, "died", [1] * 6),
        (["RuntimeError: a", "RuntimeError: b"] * 3, "unknown", [1] * 6),
        (["RuntimeError: a"] * 6, "unknown", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_what_may_pass_is_tried_again(play: Callable[..., Any], said: list[str], kind: Any, steps: list[int]) -> None:
    """What only a machine or the network can cause, other errors, and the same at another step."""

    async def test(coordinator: Coordinator) -> None:
        for reason, step in zip(said, steps, strict=True):
            starts = await begin(coordinator, size=1)
            await train(coordinator, starts, 0, list(range(1, step + 1)))
            await coordinator.lost(starts[0].attempt, 0, reason, kind)
        assert coordinator.fatal() == ""

    play(test)


def test_error_of_a_machine_that_is_new_to_the_run_does_not_end_it(play: Callable[..., Any]) -> None:
    """One without a module, say: the others have trained. It is left out like any on which attempts fail."""
    reason = "ModuleNotFoundError: No module named 'x'"

    async def test(coordinator: Coordinator) -> None:
        await train(coordinator, await begin(coordinator), 0, [1, 2])
        for group in "bcd":
            starts = await begin(coordinator, 3, group)
            await coordinator.lost(starts[0].attempt, 2, reason, "lasting")
        assert coordinator.fatal() == ""
        assert coordinator.bad_nodes() == ["node-2"]
        starts = await begin(coordinator, 3, "e")
        await coordinator.lost(starts[0].attempt, 1, reason, "lasting")
        assert coordinator.fatal() == reason, "on a machine that has trained"

    play(test)


def test_agent_that_fails_is_counted_also_before_it_has_joined(play: Callable[..., Any]) -> None:
    """Or Ray would start the worker group again for ever."""

    async def test(coordinator: Coordinator) -> None:
        for number in range(3):
            assert coordinator.fatal() == ""
            coordinator.agent_failed("a", 0, "node-0", f"OSError: no address {number}", "unknown")
        assert "the same error ended 3 attempts in a row" in coordinator.fatal()
        assert "the last: rank 0: its agent: OSError: no address 2" in coordinator.fatal()

    async def test_lasting(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.agent_failed("a", 0, "node-0", "ConfigError: another version", "lasting")
        assert coordinator.fatal() == "ConfigError: another version"
        assert (await coordinator.watch(starts[0].attempt, Order())).what == "stop"

    play(test)
    play(test_lasting)


def test_failures_of_a_run_that_gets_on_are_not_counted_together(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for step in range(1, 5):
            starts = await begin(coordinator)
            await asyncio.gather(*(commit(coordinator, start, step) for start in starts))
            await coordinator.lost(starts[0].attempt, 0, "x", "died")
        assert coordinator.fatal() == ""

    play(test, "cluster.max_failures=1")


def test_worker_groups_that_ray_replaces_are_counted_too(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for group in "ab":
            await begin(coordinator, group=group)
        assert coordinator.fatal() == ""
        assert await coordinator.join(member(0, group="c")) is None
        assert "the last: Ray replaced the worker group" in coordinator.fatal()

    play(test, "cluster.max_failures=1")


def test_rollback_is_no_failure(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for _ in range(3):
            starts = await begin(coordinator)
            await coordinator.lost(starts[0].attempt, 0, "RolledBackError: back to step 15", "rollback")
        assert coordinator.fatal() == ""
        starts = await begin(coordinator)
        await coordinator.lost(starts[0].attempt, 0, "x", "died")
        assert "cluster.max_failures=0" in coordinator.fatal()

    play(test, "cluster.max_failures=0")


def test_attempts_without_a_step_are_recorded_said_and_paused_after(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(coordinator: Coordinator) -> None:
        await train(coordinator, await begin(coordinator), 0, [1, 2, 3])
        await coordinator.lost(coordinator._latest, 1, "gone", "died")
        messages(coordinator)
        monkeypatch.setattr(failures, "MOST_PAUSE_S", 60.0)
        starts = await begin(coordinator)
        coordinator.tell(starts[0].attempt, {"kind": "attempt", "attempt": starts[0].attempt, "step": 2})
        await coordinator.lost(starts[0].attempt, 0, "no such file", "died")
        assert messages(coordinator) == [
            "rank 0: no such file",
            "1 attempt(s) without a step, the next begins in 1 s: rank 0: no such file",
        ]
        began = time.monotonic()
        starts = await begin(coordinator)
        assert 0.9 < time.monotonic() - began < 10
        await coordinator.lost(starts[0].attempt, 0, "no such file", "died")
        assert "2 attempt(s) without a step, the next begins in 2 s" in messages(coordinator)[1]
        coordinator._not_before = 0.0
        await train(coordinator, await begin(coordinator), 1, [2])

    pages = read_pages(play(test)._storage, "restarts")
    assert [(page["trained"], page["steps_lost"], page["cause"], page["ended_by"]) for page in pages] == [
        (True, 0, "the run was started", ""),
        (False, 1, "rank 1: gone", "rank 0: no such file"),
        (False, 0, "rank 0: no such file", "rank 0: no such file"),
        (True, 1, "rank 0: no such file", ""),
    ]


def test_machine_on_which_failures_begin_is_named(play: Callable[..., Any]) -> None:
    """That of the rank that holds odd values, whichever rank is quicker to say so."""

    async def test(coordinator: Coordinator) -> None:
        for _ in range(3):
            starts = await begin(coordinator, 3)
            said = await asyncio.gather(*map(coordinator.arrive, arrivals(starts, "before", [5, 5, 6])))
            await coordinator.lost(starts[0].attempt, 0, f"RanksDisagreeError: {said[0]}", "died")
        assert coordinator.bad_nodes() == ["node-2"]
        assert len([said for said in messages(coordinator) if "began on machine node-2" in said]) == 1

    play(test)


def test_wish_without_a_wait_leaves_nobody_paused(play: Callable[..., Any]) -> None:
    """Or the next resize would not wait for the stored state."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save([], "a notice", False)
        assert await save(coordinator, starts, 5) == [1, 1]
        assert not coordinator.is_asked()
        coordinator.ask_to_save([], "a resize", True)
        assert not coordinator.is_paused()

    play(test)


def test_told_to_stop_while_a_machine_leaves(play: Callable[..., Any]) -> None:
    """Who is leaving is not forgotten, and whether the state was stored is known."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        number = starts[0].attempt
        coordinator.ask_to_save(["node-1"], "a notice", True)
        coordinator.ask_to_save(None, "the driver was told to stop", False)
        assert await coordinator.begin_save(number, 8) == [1]
        waiting = asyncio.create_task(coordinator.pause(number, 0, 8, True))
        await asyncio.sleep(0.05)
        assert not coordinator.is_stored()
        other = asyncio.create_task(coordinator.pause(number, 1, 8, True))
        await asyncio.sleep(0.05)
        assert coordinator.is_stored()
        coordinator.go_on()
        assert await waiting == await other == 1
        coordinator.ask_to_save(None, "again", False)
        assert await save(coordinator, starts, 9, stored=False) == [2, 2]
        assert not coordinator.is_stored(), "storage failed"

    play(test)


def test_told_to_stop_while_all_wait_for_a_resize(play: Callable[..., Any]) -> None:
    """What there is to store is stored, and nobody trains: there is nothing to wait for."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save([], "a resize", True)
        waiting = asyncio.create_task(save(coordinator, starts, 8))
        await asyncio.sleep(0.05)
        assert coordinator.is_paused()
        assert coordinator.ask_to_save(None, "the driver was told to stop", False)
        assert coordinator.is_stored()
        coordinator.go_on()
        await waiting

    play(test)


def test_left_over_agents_change_nothing(play: Callable[..., Any]) -> None:
    """Agents of a worker group that was replaced may still be running, or wait for the others."""

    async def test(coordinator: Coordinator) -> None:
        old = await begin(coordinator, group="a")
        waiting = asyncio.create_task(coordinator.join(member(0, group="b")))
        await asyncio.sleep(0)
        new = await begin(coordinator, 1, group="c")
        assert await waiting is None
        assert await coordinator.join(member(1, group="a")) is None
        await coordinator.lost(old[0].attempt, 0, "a late error", "lasting")
        coordinator.tell(old[0].attempt, {"kind": "train", "step": 99})
        assert coordinator.fatal() == ""
        assert {event["kind"] for event in coordinator.drain()} == {"log", "waiting", "begin", "lost"}
        await coordinator.lost(new[0].attempt, 0, "an error", "lasting")
        assert coordinator.fatal() == "an error"

    play(test)


def test_run_ends_when_all_ranks_are_done(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        first = asyncio.create_task(coordinator.done(starts[0].attempt, 0))
        await asyncio.sleep(0.05)
        assert not first.done()
        assert await coordinator.done(starts[1].attempt, 1)
        assert await first
        assert await coordinator.join(member(0)) is None

    play(test)


def test_rank_lost_at_the_end_is_not_the_end(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        first = asyncio.create_task(coordinator.done(starts[0].attempt, 0))
        await asyncio.sleep(0)
        await coordinator.lost(starts[1].attempt, 1, "x", "died")
        assert not await first
        await begin(coordinator)

    play(test)


def test_lasting_error_that_is_told_late_ends_the_run_for_those_that_wait(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        await coordinator.lost(starts[1].attempt, 1, "Connection closed by peer", "follows")
        waiting = asyncio.create_task(coordinator.join(member(1)))
        await asyncio.sleep(0.05)
        await coordinator.lost(starts[0].attempt, 0, "NonFiniteError: the first", "lasting")
        assert await waiting is None
        assert await coordinator.join(member(0)) is None
        assert coordinator.fatal() == "NonFiniteError: the first"

    play(test)


def test_driver_that_was_superseded_ends_the_attempt_for_good(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.supersede("term 2 belongs to driver 5a5a5a5a")
        assert (await coordinator.watch(starts[0].attempt, Order())).what == "stop"
        assert coordinator.fatal() == "term 2 belongs to driver 5a5a5a5a"
        assert await coordinator.join(member(0)) is None
        assert (await commit(coordinator, starts[0])).error == GIVEN_UP

    play(test)


def replacement(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """What Ray starts in place of a coordinator that died."""
    monkeypatch.setattr(module, "_was_reconstructed", lambda: True)
    return Coordinator(to_yaml(tiny_config(data, tmp_path)), TERM)


def test_actor_in_place_of_one_that_died_ends_what_it_does_not_know(
    play: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was under way, and is asked of it again, comes to an end; the next attempt has a later term."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        await asyncio.gather(*(commit(coordinator, start) for start in starts))
        attempt = starts[0].attempt
        after = replacement(data, tmp_path, monkeypatch)
        assert (await after.watch(attempt, Order())).what == "stop"
        assert await after.pause(attempt, 1, 8, True) == 0
        assert await after.begin_save(attempt, 8) == []
        assert not await after.done(attempt, 1)
        assert await after.arrive(arrivals(starts, "before", [5, 5])[0]) == GIVEN_UP
        again = await commit(after, starts[0], 8)
        assert (again.manifest, again.error, again.fatal) == (None, GIVEN_UP, False)
        await after.lost(attempt, 0, f"CheckpointError: {GIVEN_UP}", "lasting")
        assert after.fatal() == ""
        assert not after.ask_to_save([], "x", True)
        members = [dataclasses.replace(member(rank), step=7) for rank in (0, 1)]
        begun = await asyncio.gather(*map(after.join, members))
        assert [start and start.attempt for start in begun] == ["0002.0001-1f2e3d4c"] * 2
        assert begun[0] is not None
        assert (begun[0].cause.change, begun[0].cause.text.partition(",")[0]) == ("failure", "the coordinator died")
        await train(after, [start for start in begun if start], 4, [5])
        await asyncio.gather(*after._tasks)
        late = await commit(coordinator, starts[0], 5, writers=(0,))
        assert late.fatal, "an actor that was taken for dead commits nothing more"
        assert "term 2" in late.error

    storage = play(test)._storage
    assert list_manifests(storage) == [4]
    assert read_pages(storage, "restarts")[-1]["steps_lost"] == 3


def test_actor_in_place_of_one_that_died_does_not_go_on_if_another_driver_has_the_run(
    play: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(coordinator: Coordinator) -> None:
        claim(coordinator._storage, "5a5a5a5a")
        after = replacement(data, tmp_path, monkeypatch)
        assert await asyncio.gather(*(after.join(member(rank)) for rank in (0, 1))) == [None, None]
        assert "belongs to driver 5a5a5a5a since term 2" in after.fatal()

    play(test)


def test_actor_in_place_of_one_that_died_waits_for_storage(
    play: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def succeed(*_: Any) -> Term:
        if not tried:
            tried.append(1)
            raise StorageError("s3 does not answer")
        return Term(2, TERM.driver)

    async def test(coordinator: Coordinator) -> None:
        after = replacement(data, tmp_path, monkeypatch)
        assert (await begin(after))[0].attempt == "0002.0001-1f2e3d4c"
        assert "no attempt can begin: s3 does not answer" in messages(after)

    tried: list[int] = []
    monkeypatch.setattr(module, "succeed", succeed)
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    play(test)


def test_agent_that_does_not_come_is_named(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(coordinator: Coordinator) -> None:
        waiting = [asyncio.create_task(coordinator.join(member(rank, 3))) for rank in (0, 2)]
        said: list[str] = []
        while not said:
            await asyncio.sleep(0.01)
            said = messages(coordinator)
        assert said[0].startswith("the next attempt waits for ranks [1]")
        await coordinator.join(member(1, 3))
        assert all(await asyncio.gather(*waiting))

    monkeypatch.setattr(module, "GATHER_S", 0.05)
    play(test)


def test_wish_that_cannot_be_fulfilled_is_known(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        assert not coordinator.ask_to_save([], "x", True), "nothing is trained"
        starts = await begin(coordinator)
        assert coordinator.ask_to_save([], "x", True)
        assert coordinator.is_asked()
        await save(coordinator, starts, 8, stored=False)
        assert not coordinator.is_asked(), "it could not be stored"
        assert coordinator.ask_to_save([], "x", True)
        await coordinator.lost(starts[0].attempt, 0, "gone", "died")
        assert not coordinator.is_asked()

    play(test)


async def save(coordinator: Coordinator, starts: list[Start], step: int, *, stored: bool = True) -> list[int]:
    """All ranks store what they were asked to, and wait."""
    await coordinator.begin_save(starts[0].attempt, step)
    return await asyncio.gather(*(coordinator.pause(s.attempt, s.rank, step, stored) for s in starts))


async def train(coordinator: Coordinator, starts: list[Start], from_step: int, steps: list[int]) -> None:
    attempt = starts[0].attempt
    coordinator.tell(attempt, {"kind": "attempt", "attempt": attempt, "step": from_step})
    for step in steps:
        coordinator.tell(attempt, {"kind": "train", "step": step})


def arrivals(starts: list[Start], when: str, digests: list[int]) -> list[Arrival]:
    return [Arrival(s.attempt, s.rank, s.size, 6, when, d) for s, d in zip(starts, digests, strict=True)]


def test_1024_ranks_agree_at_a_boundary_and_the_ledger_has_it(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator, 1024)
        for when, digest in (("before", 5), ("after", 7)):
            said = await asyncio.gather(*map(coordinator.arrive, arrivals(starts, when, [digest] * 1024)))
            assert set(said) == {""}

    storage = play(test)._storage
    page = json.loads(storage.get("ledger/step-00000006-0001.0001-1f2e3d4c.json"))
    assert (page["digest_before"], page["digest_after"], page["world_size"]) == (5, 7, 1024)
    assert page["boundary_s"] > 0


def test_odd_rank_is_named_and_nobody_goes_on(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator, 3)
        said = await asyncio.gather(*map(coordinator.arrive, arrivals(starts, "before", [5, 5 ^ 1 << 40, 5])))
        assert len(set(said)) == 1
        assert "before the boundary at step 6: rank(s) [1] hold other values than the other 2 of 3 ranks" in said[0]

    assert play(test)._storage.list("ledger") == []


def test_rank_that_does_not_come_is_named(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator, 3)
        said = await asyncio.gather(*map(coordinator.arrive, arrivals(starts, "before", [5, 5, 5])[:2]))
        assert set(said) == {"ranks [2] did not come to the boundary at step 6 in 1 s."}

    play(test)


def test_resize_waits_for_the_stored_state(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        attempt = starts[0].attempt
        coordinator.ask_to_save([], "machines came or went: 2 -> 3 workers", True)
        assert await coordinator.watch(attempt, Order()) == Order("save", 1)
        assert not coordinator.is_paused()
        await coordinator.begin_save(attempt, 8)
        waiting = [asyncio.create_task(coordinator.pause(attempt, 0, 8, True))]
        await asyncio.sleep(0.05)
        assert not coordinator.is_paused()
        waiting.append(asyncio.create_task(coordinator.pause(attempt, 1, 8, True)))
        assert await coordinator.watch(attempt, Order("save", 1)) == Order("held", 1)
        assert coordinator.is_paused()
        assert not any(task.done() for task in waiting)
        assert coordinator.resizing()
        bigger = await begin(coordinator, 3, group="b")
        assert (bigger[0].cause.change, bigger[0].cause.text[:8]) == ("resize", "machines")
        assert (await coordinator.watch(attempt, Order("held", 1))).what == "stop"
        assert coordinator._failures.in_a_row == 0
        await asyncio.gather(*waiting)

    play(test)


def test_resize_that_is_called_off_lets_the_ranks_go_on(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save([], "x", True)
        waiting = asyncio.create_task(save(coordinator, starts, 8))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        coordinator.go_on()
        assert await waiting == [1, 1]
        assert await coordinator.watch(starts[0].attempt, Order("held", 1)) == Order("run", 1)
        assert not coordinator.is_paused()

    play(test)


def test_resize_that_does_not_come_is_not_waited_for(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after it was announced; what ends the attempt later is then no resize."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save([], "x", True)
        waiting = asyncio.create_task(save(coordinator, starts, 8))
        await asyncio.sleep(0.05)
        assert coordinator.resizing()
        assert await asyncio.wait_for(waiting, 5) == [1, 1]
        assert not coordinator.is_asked()
        assert "there was no resize" in messages(coordinator)[-1]
        await coordinator.lost(starts[0].attempt, 0, "gone", "died")
        assert (await begin(coordinator))[0].cause.text == "rank 0: gone"

    monkeypatch.setattr(module, "HOLD_S", 0.2)
    play(test)


@pytest.mark.parametrize(("stored", "wait"), [(False, True), (True, False)])
def test_ranks_go_on_where_there_is_nothing_to_wait_for(play: Callable[..., Any], stored: bool, wait: bool) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save(["node-1"], "x", wait)
        assert await save(coordinator, starts, 8, stored=stored) == [1, 1]
        assert not coordinator.is_paused()

    play(test)


def test_checkpoint_needs_only_the_ranks_that_stay(play: Callable[..., Any]) -> None:
    """What a leaving rank would store the others store: its share is not waited for, and the loss of it does not
    end the attempt before theirs are committed."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        attempt = starts[0].attempt
        coordinator.ask_to_save(["node-1"], "x", True)
        await coordinator.begin_save(attempt, 4)
        lost = asyncio.create_task(coordinator.lost(attempt, 1, "its machine is gone", "died"))
        last_words = asyncio.create_task(coordinator.last_words())
        await asyncio.sleep(0.05)
        assert not lost.done(), "rank 0 is storing"
        outcome = await commit(coordinator, starts[0], writers=(0,))
        assert outcome.manifest is not None, outcome.error
        assert not last_words.done()
        await coordinator.pause(attempt, 0, 4, True)
        await lost
        await last_words

    assert list_manifests(play(test)._storage) == [4]


def test_share_that_is_missing_is_named(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        outcome = await commit(coordinator, starts[0])
        assert outcome.error == "no share from ranks [1] in 1 s"
        assert await commit(coordinator, starts[1]) == outcome, "the same to who comes late"

    play(test)


def test_next_attempt_waits_for_a_commit_but_not_for_what_is_removed(play: Callable[..., Any]) -> None:
    """A prune may take minutes."""

    async def test(coordinator: Coordinator) -> None:
        committing, removing, entered = threading.Event(), threading.Event(), threading.Event()
        commits: Any = coordinator._commits
        commit_now, prune = commits.commit, commits.prune

        def slow_commit(shares: Any) -> Any:
            entered.set()
            assert committing.wait(10)
            return commit_now(shares)

        def slow_prune(manifest: Manifest) -> None:
            assert removing.wait(10)
            prune(manifest)

        commits.commit, commits.prune = slow_commit, slow_prune
        starts = await begin(coordinator)
        saving = [asyncio.create_task(commit(coordinator, start)) for start in starts]
        await asyncio.to_thread(entered.wait)
        following = asyncio.create_task(begin(coordinator, group="b"))
        await asyncio.sleep(0.05)
        assert not following.done()
        committing.set()
        assert (await asyncio.wait_for(following, 5))[0].attempt.startswith("0001.0002-")
        assert [(await saved).manifest is not None for saved in saving] == [True, True]
        assert any(not task.done() for task in coordinator._tasks), "the prune is under way"
        removing.set()

    assert list_manifests(play(test)._storage) == [4]


def test_roll_back_is_stored_unless_the_attempt_was_given_up(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for group in "ab":
            starts = await begin(coordinator, group=group)
        for number, expected in ((2, ""), (1, GIVEN_UP)):
            attempt = TERM.attempt(number)
            back = Rollback(
                number=1, to_step=3, skip_from=5, skip_until=7, why="it diverged", unix_time=1, attempt=attempt
            )
            said = Outcome.model_validate_json(await coordinator.roll_back(back.model_dump_json()))
            assert (said.error, said.fatal) == (expected, False)
        assert starts[0].attempt == TERM.attempt(2)

    assert play(test)._storage.list("rollbacks") == ["rollbacks/0001.0002-1f2e3d4c.json"]


def test_restart_is_recorded_with_its_price(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for from_step, steps in ((0, [1, 2, 3]), (2, [3, 4])):
            starts = await begin(coordinator)
            await train(coordinator, starts, from_step, steps)
            await coordinator.lost(starts[0].attempt, 1, "gone", "died")

    pages = read_pages(play(test)._storage, "restarts")
    assert [(p["change"], p["steps_lost"], p["world_size"]) for p in pages] == [("start", 0, 2), ("failure", 1, 2)]
    assert pages[1]["cause"] == "rank 1: gone"
    assert pages[1]["down_s"] >= 0


def test_events_are_fetched_some_at_a_time(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(coordinator: Coordinator) -> None:
        for number in range(7):
            coordinator.warn(str(number))
        assert [messages(coordinator) for _ in range(3)] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]

    monkeypatch.setattr(module, "DRAINED", 3)
    play(test)
