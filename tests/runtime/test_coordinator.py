"""The coordinator without Ray: its methods as agents call them, many at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint import list_manifests
from relora_ray.config_file import to_yaml
from relora_ray.metrics import read_pages
from relora_ray.runs import run_storage
from relora_ray.runtime.coordinator import Coordinator
from relora_ray.runtime.messages import Arrival, Member, Orders, Start
from tests.checkpoint.test_saving import share_of
from tests.tiny import tiny_config

Test = Callable[[Coordinator], Coroutine[Any, Any, None]]


def member(rank: int, size: int = 2, group: str = "a", node: str = "") -> Member:
    return Member(group, rank, size, node or f"node-{rank}", f"10.0.0.{rank}", 9000 + rank)


async def begin(coordinator: Coordinator, size: int = 2, group: str = "a") -> list[Start]:
    starts = await asyncio.gather(*(coordinator.join(member(rank, size, group)) for rank in range(size)))
    assert all(starts)
    return starts  # type: ignore[return-value]


@pytest.fixture
def play(data: Path, tmp_path: Path) -> Callable[..., Coordinator]:
    """Run a test's coroutine with a coordinator; returns that."""

    def run(test: Test, *overrides: str) -> Coordinator:
        async def main() -> Coordinator:
            cfg = tiny_config(data, tmp_path, "cluster.collective_timeout_s=1", *overrides)
            coordinator = Coordinator(to_yaml(cfg))
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
        assert one.cause.change == "start"

    play(test)


def test_lost_rank_ends_the_attempt_for_all_and_the_next_knows_why(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        watching = asyncio.create_task(coordinator.watch(starts[0], member(0), Orders()))
        await coordinator.lost(starts[1].attempt, 1, "its process was ended by SIGKILL")
        assert (await watching).stop
        assert (await coordinator.watch(starts[0], member(0), Orders())).stop, "also to who asks late"
        again = await begin(coordinator)
        assert again[0].attempt > starts[0].attempt
        assert again[0].cause.change == "failure"
        assert again[0].cause.text == "rank 1: its process was ended by SIGKILL"

    play(test)


def test_failures_are_counted_and_limited(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for _ in range(3):
            starts = await begin(coordinator)
            await coordinator.lost(starts[0].attempt, 0, "x")
            await coordinator.lost(starts[0].attempt, 1, "hears of it later")
        assert "3 attempt(s) failed, and cluster.max_failures=2" in coordinator.fatal()
        assert await coordinator.join(member(0)) is None

    play(test, "cluster.max_failures=2")


def test_rollback_is_no_failure(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        for _ in range(3):
            starts = await begin(coordinator)
            await coordinator.lost(starts[0].attempt, 0, "RolledBackError: back to step 15")
        assert coordinator.fatal() == ""
        starts = await begin(coordinator)
        await coordinator.lost(starts[0].attempt, 0, "x")
        assert "cluster.max_failures=0" in coordinator.fatal()

    play(test, "cluster.max_failures=0")


def test_wish_without_a_wait_leaves_nobody_paused(play: Callable[..., Any]) -> None:
    """Or the next resize would not wait for the stored state."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        coordinator.ask_to_save([], "a notice", False)
        for start in starts:
            await coordinator.pause(start.attempt, start.rank, 5, True)
        assert not coordinator.is_asked()
        coordinator.ask_to_save([], "a resize", True)
        assert not coordinator.is_paused()

    play(test)


def test_told_to_stop_while_a_machine_leaves(play: Callable[..., Any]) -> None:
    """Who is leaving is not forgotten, and whether the state was stored is known."""

    async def test(coordinator: Coordinator) -> None:
        number = (await begin(coordinator))[0].attempt
        coordinator.ask_to_save(["node-1"], "a notice", True)
        coordinator.ask_to_save(None, "the driver was told to stop", False)
        assert await coordinator.leaving(number) == [1]
        await coordinator.pause(number, 0, 8, True)
        assert not coordinator.is_stored()
        await coordinator.pause(number, 1, 8, True)
        assert coordinator.is_stored()
        coordinator.ask_to_save(None, "again", False)
        await coordinator.pause(number, 0, 9, False)
        await coordinator.pause(number, 1, 9, False)
        assert not coordinator.is_stored(), "storage failed"

    play(test)


def test_told_to_stop_while_all_wait_for_a_resize(play: Callable[..., Any]) -> None:
    """What there is to store is stored, and nobody trains: there is nothing to wait for."""

    async def test(coordinator: Coordinator) -> None:
        number = (await begin(coordinator))[0].attempt
        coordinator.ask_to_save([], "a resize", True)
        for rank in (0, 1):
            await coordinator.pause(number, rank, 8, True)
        assert coordinator.is_paused()
        assert coordinator.ask_to_save(None, "the driver was told to stop", False)
        assert coordinator.is_stored()

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
        await coordinator.fail(old[0].attempt, "a late error")
        await coordinator.lost(old[0].attempt, 0, "x")
        coordinator.tell(old[0].attempt, {"kind": "train", "step": 99})
        assert coordinator.fatal() == ""
        assert coordinator.drain() == []
        await coordinator.fail(new[0].attempt, "an error")
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
        await coordinator.lost(starts[1].attempt, 1, "x")
        assert not await first
        await begin(coordinator)

    play(test)


def test_actor_in_place_of_one_that_died_is_told_what_is_under_way(
    play: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """The attempt goes on, and its end is everybody's."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        after = Coordinator(to_yaml(tiny_config(data, tmp_path)))
        pausing = asyncio.create_task(after.pause(starts[1].attempt, 1, 8, True))  # made again before it was told
        await asyncio.sleep(0.05)
        watching = [asyncio.create_task(after.watch(s, member(s.rank), Orders())) for s in starts]
        assert not (await pausing).stop
        assert not any(task.done() for task in watching)
        after.ask_to_save(["node-1"], "x", True)
        assert await after.leaving(starts[0].attempt) == [1]
        assert not (await watching[0]).stop
        await after.lost(starts[0].attempt, 0, "gone")
        assert (await after.watch(starts[1], member(1), Orders())).stop
        assert (await begin(after))[0].cause.text == "rank 0: gone"

    play(test)


def test_agent_whose_start_was_lost_with_the_actor_gets_the_same(
    play: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Whether it asks the new one before that is told of the attempt, or after."""

    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator, 3)
        after = Coordinator(to_yaml(tiny_config(data, tmp_path)))
        asking = asyncio.create_task(after.join(member(1, 3)))
        await asyncio.sleep(0.05)
        watching = asyncio.create_task(after.watch(starts[0], member(0, 3), Orders()))
        assert await asking == starts[1]
        assert await after.join(member(2, 3)) == starts[2]
        assert not watching.done()
        new_port = Member("a", 2, 3, "node-2", "10.0.0.2", 1234)
        again = asyncio.create_task(after.join(new_port))
        assert (await watching).stop, "its process is over"
        again.cancel()

    play(test)


def test_wish_that_cannot_be_fulfilled_is_known(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        assert not coordinator.ask_to_save([], "x", True), "nothing is trained"
        number = (await begin(coordinator))[0].attempt
        assert coordinator.ask_to_save([], "x", True)
        assert coordinator.is_asked()
        await coordinator.pause(number, 0, 8, False)
        assert not coordinator.is_asked(), "it could not be stored"
        assert coordinator.ask_to_save([], "x", True)
        await coordinator.lost(number, 0, "gone")
        assert not coordinator.is_asked()

    play(test)


def test_commit_whose_answer_was_lost_with_the_actor_is_known(
    play: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    async def test(coordinator: Coordinator) -> None:
        coordinator._storage.put("attempts/0001", b"aa")
        outcome, _ = await asyncio.gather(*(coordinator.commit(share_of(rank)) for rank in (0, 1)))
        assert outcome.manifest is not None
        after = Coordinator(to_yaml(tiny_config(data, tmp_path)))
        assert await after.commit(share_of(1)) == outcome

    play(test)


def arrivals(starts: list[Start], when: str, digests: list[int]) -> list[Arrival]:
    return [Arrival(s.attempt, s.rank, s.size, 6, when, d) for s, d in zip(starts, digests, strict=True)]


def test_1024_ranks_agree_at_a_boundary_and_the_ledger_has_it(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator, 1024)
        for when, digest in (("before", 5), ("after", 7)):
            said = await asyncio.gather(*map(coordinator.arrive, arrivals(starts, when, [digest] * 1024)))
            assert set(said) == {""}

    storage = play(test)._storage
    page = json.loads(storage.get("ledger/step-00000006.json"))
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
        number = starts[0].attempt
        coordinator.ask_to_save([], "machines came or went: 2 -> 3 workers", True)
        orders = await coordinator.watch(starts[0], member(0), Orders())
        assert orders.save > 0
        assert not coordinator.is_paused()
        await coordinator.pause(number, 0, 8, True)
        assert not coordinator.is_paused()
        await coordinator.pause(number, 1, 8, True)
        assert coordinator.is_paused()
        coordinator.resizing()
        bigger = await begin(coordinator, 3, group="b")
        assert bigger[0].cause.change == "resize"
        assert (await coordinator.watch(starts[0], member(0), orders)).stop

    play(test)


def test_resize_that_is_called_off_lets_the_ranks_go_on(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        starts = await begin(coordinator)
        number = starts[0].attempt
        coordinator.ask_to_save([], "x", True)
        for rank in (0, 1):
            orders = await coordinator.pause(number, rank, 8, True)
            assert orders.go_on < orders.save
        coordinator.go_on()
        orders = await coordinator.watch(starts[0], member(0), orders)
        assert orders.go_on == orders.save
        assert not coordinator.is_paused()

    play(test)


@pytest.mark.parametrize(("stored", "wait"), [(False, True), (True, False)])
def test_ranks_go_on_where_there_is_nothing_to_wait_for(play: Callable[..., Any], stored: bool, wait: bool) -> None:
    async def test(coordinator: Coordinator) -> None:
        number = (await begin(coordinator))[0].attempt
        coordinator.ask_to_save(["node-1"], "x", wait)
        assert await coordinator.leaving(number) == [1]
        for rank in (0, 1):
            orders = await coordinator.pause(number, rank, 8, stored)
        assert orders.go_on == orders.save
        assert not coordinator.is_paused()

    play(test)


def test_checkpoint_needs_only_the_ranks_that_stay(play: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    """What a leaving rank would store the others store: its share is not waited for, and the loss of it does not
    end the attempt before theirs are committed."""

    async def test(coordinator: Coordinator) -> None:
        number = (await begin(coordinator))[0].attempt
        coordinator.ask_to_save(["node-1"], "x", True)
        await coordinator.leaving(number)
        lost = asyncio.create_task(coordinator.lost(number, 1, "its machine is gone"))
        await asyncio.sleep(0.05)
        assert not lost.done(), "rank 0 is storing"
        share = share_of(0).model_copy(update={"writers": (0,)})
        coordinator._storage.put("attempts/0001", b"aa")
        outcome = await coordinator.commit(share)
        assert outcome.manifest is not None, outcome.error
        await coordinator.pause(number, 0, 4, True)
        await lost

    assert list_manifests(play(test)._storage) == [4]


def test_share_that_is_missing_is_named(play: Callable[..., Any]) -> None:
    async def test(coordinator: Coordinator) -> None:
        outcome = await coordinator.commit(share_of(0))
        assert outcome.error == "no share from ranks [1] in 1 s"
        assert await coordinator.commit(share_of(1)) == outcome, "the same to who comes late"

    play(test)


def test_restart_is_recorded_with_its_price(play: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    async def test(coordinator: Coordinator) -> None:
        for name, from_step, steps in (("0001-aa", 0, [1, 2, 3]), ("0002-bb", 2, [3, 4])):
            starts = await begin(coordinator)
            coordinator.tell(starts[0].attempt, {"kind": "attempt", "attempt": name, "step": from_step})
            for step in steps:
                coordinator.tell(starts[0].attempt, {"kind": "train", "step": step})
            await coordinator.lost(starts[0].attempt, 1, "gone")

    storage = run_storage(tiny_config(data, tmp_path))
    play(test)
    pages = read_pages(storage, "restarts")
    assert [(p["change"], p["steps_lost"], p["world_size"]) for p in pages] == [("start", 0, 2), ("failure", 1, 2)]
    assert pages[1]["cause"] == "rank 1: gone"
    assert pages[1]["down_s"] >= 0
