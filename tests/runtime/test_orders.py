"""Everything that can happen to two ranks and a wish or two, in every order; and failures, counted.

The ranks are played here as trainer.py and loop.py have them: they hear of orders late, agree in a reduction on whether
to save, rank 0 announces the save, and its outcome is the same to all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from relora_ray.runtime.failures import BACK_S, STRIKE_S, Failures
from relora_ray.runtime.orders import Order, Orders

RANKS = (0, 1)
RUN, NOTHING = Order(), Orders(2)
STEPS, ASKS, WITHDRAWALS = 2, 2, 1
END = STEPS + 4
"""Where they come to if they are left alone."""


@dataclass(frozen=True)
class Rank:
    doing: str = "train"
    """train, reduce, announce, save, wait or ended"""
    told: Order = RUN
    obeyed: int = 0
    wishes: bool = False
    waits_for: int = 0
    waits_at: int = 0


@dataclass(frozen=True)
class Play:
    orders: Orders = NOTHING
    ranks: tuple[Rank, ...] = (Rank(),) * len(RANKS)
    step: int = 0
    last: int = STEPS
    outcome: bool | None = None
    saved_for: tuple[int, ...] = ()
    """Wishes that a save was begun for while they were to be obeyed."""
    asks: int = ASKS
    withdrawals: int = WITHDRAWALS

    def with_rank(self, rank: int, **changes: object) -> Play:
        ranks = list(self.ranks)
        ranks[rank] = replace(ranks[rank], **changes)
        return replace(self, ranks=tuple(ranks))

    def all(self, doing: str) -> bool:
        return all(rank.doing == doing for rank in self.ranks)

    def ranks_move(self) -> Iterator[tuple[str, Play]]:
        """What the ranks can do next."""
        for number, rank in enumerate(self.ranks):
            if rank.told != self.orders.order and rank.doing != "ended":
                doing = "ended" if self.orders.order.what == "stop" else rank.doing
                yield f"{number} hears", self.with_rank(number, told=self.orders.order, doing=doing)
            if rank.doing == "train" and self.step < self.last:
                wishes = rank.told.what == "save" and rank.told.wish > rank.obeyed
                yield f"{number} reduces", self.with_rank(number, doing="reduce", wishes=wishes)
            if rank.doing == "save" and self.outcome is not None:
                play = replace(self, orders=self.orders.come(number, self.step, self.outcome))
                waiting = {"waits_for": play.orders.bound, "waits_at": self.step}
                yield f"{number} comes", play.with_rank(number, doing="wait", **waiting)
            if rank.doing == "wait" and self.orders.is_over(rank.waits_for):
                obeyed = max(rank.obeyed, rank.waits_for)
                yield f"{number} goes on", self.with_rank(number, doing="train", obeyed=obeyed)
        if self.all("reduce"):
            doing = "announce" if any(rank.wishes for rank in self.ranks) else "train"
            ranks = tuple(replace(rank, doing=doing) for rank in self.ranks)
            yield "stepped", replace(self, ranks=ranks, step=self.step + 1)
        if self.all("announce"):
            ranks = tuple(replace(rank, doing="save") for rank in self.ranks)
            saved_for = self.saved_for + (self.orders.order.wish,) * (self.orders.order.what == "save")
            orders = self.orders.begin(self.step)
            yield "announced", replace(self, ranks=ranks, orders=orders, saved_for=saved_for, outcome=None)
        if self.all("save") and self.outcome is None:
            yield "stored", replace(self, outcome=True)

    def others_move(self) -> Iterator[tuple[str, Play]]:
        """What the policy, the driver and bad luck can do next."""
        if self.asks:
            for wait in (True, False):
                yield f"asked, wait={wait}", replace(self, orders=self.orders.ask(wait=wait), asks=self.asks - 1)
        if self.withdrawals:
            yield "withdrawn", replace(self, orders=self.orders.withdraw(), withdrawals=self.withdrawals - 1)
        if self.all("save") and self.outcome is None:
            yield "not stored", replace(self, outcome=False)
        yield "lost", replace(self, orders=self.orders.stop())

    def left_alone(self) -> Play:
        """What becomes of it if only the ranks move."""
        return _left_alone(replace(self, last=END, asks=0, withdrawals=0))


ENDS: dict[Play, Play] = {}


def _left_alone(play: Play) -> Play:
    passed = []
    while play not in ENDS:
        passed.append(play)
        if (move := next(play.ranks_move(), None)) is None:
            ENDS[play] = play
        else:
            play = move[1]
    ENDS.update(dict.fromkeys(passed, ENDS[play]))
    return ENDS[play]


@pytest.fixture(scope="module")
def plays() -> dict[Play, tuple[str, ...]]:
    """Every state that can be reached, with the shortest way there."""
    found: dict[Play, tuple[str, ...]] = {Play(): ()}
    new = [Play()]
    while new:
        old, new = new, []
        for play in old:
            stopped = play.orders.order.what == "stop"
            for name, following in (*play.ranks_move(), *(() if stopped else play.others_move())):
                if following not in found:
                    found[following] = (*found[play], name)
                    new.append(following)
    return found


def test_stop_wins_over_all(plays: dict[Play, tuple[str, ...]]) -> None:
    stopped = [play for play in plays if play.orders.order.what == "stop"]
    assert stopped
    for play in stopped:
        for name, following in (*play.ranks_move(), *play.others_move()):
            assert following.orders.order.what == "stop", (*plays[play], name)


def test_held_means_that_all_wait_with_one_stored_step(plays: dict[Play, tuple[str, ...]]) -> None:
    held = [play for play in plays if play.orders.order.what == "held"]
    assert held
    for play in held:
        assert all(rank.doing == "wait" for rank in play.ranks if rank.doing != "ended"), plays[play]
        assert {rank.waits_for for rank in play.ranks} == {play.orders.order.wish}, plays[play]
        assert {rank.waits_at for rank in play.ranks} == {play.step}, plays[play]
        assert play.orders.waits, plays[play]
        assert play.outcome, plays[play]
        assert play.orders.stored, plays[play]


def test_no_wish_is_obeyed_twice_and_none_is_lost(plays: dict[Play, tuple[str, ...]]) -> None:
    for play, way in plays.items():
        assert len(set(play.saved_for)) == len(play.saved_for), way
        if play.orders.order.what == "save" and play.outcome is not False:
            left = play.left_alone()
            assert left.orders.stored, way
            assert left.orders.order.wish == play.orders.order.wish, way


def test_withdrawal_of_a_resize_leaves_what_somebody_else_asked_for(plays: dict[Play, tuple[str, ...]]) -> None:
    both = [p for p in plays if p.orders.order.what == "save" and p.orders.also and p.orders.waits]
    assert both
    for play in both:
        withdrawn = replace(play, orders=play.orders.withdraw())
        assert withdrawn.orders.order.what == "save", plays[play]
        if play.outcome is not False:
            assert withdrawn.left_alone().orders.stored, plays[play]


def test_nobody_waits_for_ever(plays: dict[Play, tuple[str, ...]]) -> None:
    """Left alone, they train on or hold for a resize; when that is called off, they train on."""
    for play, way in plays.items():
        left = play.left_alone()
        if left.orders.order.what == "held":
            left = replace(left, orders=left.orders.withdraw()).left_alone()
        if left.orders.order.what == "stop":
            assert left.all("ended"), way
        else:
            assert left.all("train"), way
            assert left.step == END, way


def test_ranks_that_leave_are_known_until_others_are_named() -> None:
    orders = Orders(3).ask(wait=True, leaving=[1]).ask(wait=False)
    assert orders.leaving == {1}
    assert orders.begin(5).ask(wait=True, leaving=[2]).leaving == {2}


def test_storing_is_between_the_announcement_and_the_first_that_is_out_of_it() -> None:
    orders = Orders(2).ask(wait=True)
    assert not orders.storing
    assert orders.begin(5).storing
    assert not orders.begin(5).come(1, 5, True).storing


def test_failures_are_counted_since_the_last_checkpoint() -> None:
    failures = Failures(2)
    for _ in range(50):
        for _ in range(2):
            failures.failed(0, stepped=True)
        assert failures.too_many() == ""
        failures.committed(["a"])
    for _ in range(3):
        failures.failed(0, stepped=True)
    assert failures.too_many() == (
        "3 attempt(s) in a row failed before a checkpoint was committed, and cluster.max_failures=2 allows no more"
    )


def test_any_number_of_failures() -> None:
    failures = Failures(-1)
    for _ in range(1000):
        failures.failed(0, stepped=False)
    assert failures.too_many() == ""


def test_pause_doubles_while_no_step_is_made() -> None:
    failures = Failures(-1)
    failures.failed(0, stepped=True)
    assert failures.pause_s() == 0
    pauses = []
    for _ in range(9):
        failures.failed(0, stepped=False)
        pauses.append(failures.pause_s())
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    failures.failed(0, stepped=True)
    assert failures.pause_s() == 0


def fail(failures: Failures, now: float, *nodes: str) -> list[str]:
    return [failures.failed(now, stepped=True, node=node, others=True) for node in nodes]


def test_machine_on_which_failures_begin_is_left_out_and_taken_back() -> None:
    failures = Failures(-1)
    assert fail(failures, 0, "a", "a", "b", "a", "a") == [""] * 5, "not in a row"
    assert fail(failures, 0, "") == [""], "nobody knows where it began: not elsewhere"
    failures.committed(["a", "b"])
    said = fail(failures, 0, "a", "a")
    assert "machine a" in said[0]
    assert said[1] == "", "said once"
    assert failures.bad_nodes(1) == ["a"]
    failures.committed(["a", "b"])
    assert failures.bad_nodes(BACK_S) == ["a"], "not proven"
    failures.committed(["b"])
    assert failures.bad_nodes(BACK_S - 1) == ["a"]
    assert failures.bad_nodes(BACK_S) == []
    fail(failures, BACK_S, "a", "a", "a")
    failures.committed(["b"])
    assert failures.bad_nodes(3 * BACK_S - 1) == ["a"], "twice as long, the second time"
    assert failures.bad_nodes(3 * BACK_S) == []


def test_machine_is_not_blamed_for_what_nothing_can_be_compared_with() -> None:
    failures = Failures(-1)
    for _ in range(10):
        assert failures.failed(0, stepped=True, node="a", others=False) == ""
    assert failures.bad_nodes(0) == []


def test_failures_that_are_far_apart_are_not_the_machines() -> None:
    failures = Failures(-1)
    for number in range(10):
        assert fail(failures, number * (STRIKE_S + 1), "a") == [""]


def test_machine_that_nothing_can_be_done_without_comes_back() -> None:
    failures = Failures(-1)
    fail(failures, 0, "a", "a", "a")
    assert failures.bad_nodes(4 * BACK_S - 1) == ["a"]
    assert failures.bad_nodes(4 * BACK_S) == []
