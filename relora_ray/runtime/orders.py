"""What the ranks of an attempt are told: one state machine, without a clock, threads or Ray.

    run     --ask-->                              save      a wish to have the state stored, with the next number
    save    --all ranks came, stored-->           held      or run, if nobody wanted them to wait
    save    --a rank came and had not stored-->   run
    held    --called off, or it took too long-->  run
    any     --the attempt is over-->              stop      for good

A rank hears of a wish when it does; that one has heard is enough for all to save at the end of a step, since they
agree on it in the reduction of the loss. So it is the step that says which wish a save is for: rank 0 names it before
the others store (`begin`), and every rank that comes with this step comes for that wish, whatever was said meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Order:
    """What a rank is told."""

    what: Literal["run", "save", "held", "stop"] = "run"
    wish: int = 0
    """The number of the newest wish. It is to be obeyed where `what` is save, and over where it is run."""


@dataclass(frozen=True)
class Orders:
    """One state, and those that follow from it."""

    size: int
    order: Order = Order()
    waits: bool = False
    """They are to wait when the state is stored: it is for a resize."""
    also: bool = False
    """Somebody else wants the state stored, resize or not."""
    leaving: frozenset[int] = frozenset()
    """Ranks on machines that will soon be gone: the others store what theirs would be."""
    step: int = -1
    """At which a save was begun last, and..."""
    bound: int = 0
    """...the wish that it is for."""
    storing: bool = False
    """That save has begun, and nobody has come out of it."""
    came: frozenset[int] = frozenset()
    """Ranks that have stored that state and wait."""
    stored: bool = False
    """The newest wish was fulfilled."""

    def ask(self, *, wait: bool, leaving: Iterable[int] | None = None) -> Orders:
        """Somebody wants the state stored after the next step. One wish with that which is under way, if one is:
        nobody trains on before that is stored. `leaving`: None if it is not known anew."""
        told = self if leaving is None else replace(self, leaving=frozenset(leaving))
        if self.order.what in ("held", "stop"):
            return told
        if self.order.what == "save":
            return replace(told, waits=self.waits or wait, also=self.also or not wait)
        order = Order("save", self.order.wish + 1)
        return replace(told, order=order, waits=wait, also=not wait, came=frozenset(), stored=False)

    def withdraw(self) -> Orders:
        """No resize after all; what somebody else asked for is stored nevertheless."""
        if self.order.what == "held" or (self.order.what == "save" and not self.also):
            return self._run()
        return replace(self, waits=False)

    def begin(self, step: int) -> Orders:
        """Rank 0 is about to save because of a wish, as all ranks are."""
        return replace(self, step=step, bound=self.order.wish, storing=True)

    def come(self, rank: int, step: int, stored: bool) -> Orders:
        """A rank is out of the save at `step`, which succeeded or did not. It waits until `is_over`."""
        here = replace(self, storing=self.storing and step != self.step)
        if self.order.what != "save" or (step, self.bound) != (self.step, self.order.wish):
            return here
        if not stored:
            return here._run()
        here = replace(here, came=self.came | {rank})
        if len(here.came) < self.size:
            return here
        here = replace(here, stored=True)
        return replace(here, order=Order("held", self.order.wish)) if self.waits else here._run()

    def is_over(self, wish: int) -> bool:
        """Whether who came for that wish trains on."""
        return self.order.what in ("run", "stop") or self.order.wish > wish

    def stop(self) -> Orders:
        return replace(self, order=Order("stop", self.order.wish))

    def _run(self) -> Orders:
        return replace(self, order=Order("run", self.order.wish), waits=False, also=False)
