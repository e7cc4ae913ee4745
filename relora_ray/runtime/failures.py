"""How long to go on after failures, after what pause, and without which machines. No Ray and no clock: callers say when
something happened, in seconds of a clock that only goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from relora_ray.verdict import without_numbers

MOST_PAUSE_S = 60.0
STRIKES = 3
"""So many failures in a row that begin on one machine are the machine's, ..."""
STRIKE_S = 3600.0
"""...if no more time than this is between two of them."""
BACK_S = 600.0
"""A bad machine is left out for so long, and twice as long each time that it proves bad again. It may cost `STRIKES`
starts of some seconds and two resizes to find out: a few percent of this."""
MOST_BACK_S = 24 * 3600.0
SAME = 3
"""So many attempts in a row that the same error ends at the same step, on several machines or the only one, are not the
machines' doing."""
UNPROVEN = 4
"""Where no checkpoint was committed without it, it is left out for so many times as long: it may be needed."""


@dataclass
class _Bad:
    since: float
    for_s: float
    proven: bool = False
    """A checkpoint was committed without it: it was the machine."""


@dataclass
class _Same:
    """Attempts in a row that the same error ended."""

    error: str
    step: int | None
    """The last that they made; None: not one."""
    count: int
    nodes: set[str]
    """Where it was met."""
    alone: bool
    """No attempt had another machine."""


class Failures:
    def __init__(self, limit: int) -> None:
        """`limit`: cluster.max_failures."""
        self._limit = limit
        self.in_a_row = 0
        """Since the last checkpoint was committed."""
        self.without_step = 0
        """Of these, the last ones that did not make one step."""
        self._strikes, self._struck = ("", 0), 0.0
        self._bad: dict[str, _Bad] = {}
        self._times_bad: dict[str, int] = {}
        self._same: _Same | None = None

    def failed(
        self,
        now: float,
        *,
        stepped: bool,
        node: str = "",
        others: bool = False,
        error: str = "",
        nodes: Collection[str] = (),
        step: int | None = None,
    ) -> str:
        """An attempt failed. `node`: where it began, if that is known. `others`: whether it trained on other machines
        too: one cannot be told from a fault of the run that has it alone. `error`: what ended it, if its cause may be
        the run; met on `nodes`, after `step`. Returns what to say of the machine, or ""."""
        self.in_a_row += 1
        self.without_step = 0 if stepped else self.without_step + 1
        self._compare(without_numbers(error), step, {*nodes, node} - {""}, others)
        if not node:
            return ""
        before, count = self._strikes
        again = node == before and now - self._struck <= STRIKE_S
        self._strikes, self._struck = (node, count + 1 if again else 1), now
        if self._strikes[1] < STRIKES or not others:
            return ""
        self._strikes = ("", 0)
        times = self._times_bad[node] = self._times_bad.get(node, 0) + 1
        self._bad[node] = bad = _Bad(now, min(MOST_BACK_S, BACK_S * 2 ** (times - 1)))
        return (
            f"{STRIKES} failures in a row began on machine {node}: the run does without it for the next "
            f"{bad.for_s:.0f} s, if it can"
        )

    def _compare(self, error: str, step: int | None, nodes: set[str], others: bool) -> None:
        before = self._same
        if not error:
            self._same = None
        elif before is not None and (before.error, before.step) == (error, step):
            self._same = _Same(error, step, before.count + 1, before.nodes | nodes, before.alone and not others)
        else:
            self._same = _Same(error, step, 1, nodes, not others)

    def committed(self, nodes: Collection[str]) -> None:
        """A checkpoint was committed by an attempt on these machines."""
        self.in_a_row, self.without_step, self._same = 0, 0, None
        for node, bad in self._bad.items():
            bad.proven = bad.proven or node not in nodes

    def pause_s(self) -> float:
        """To wait before the next attempt: what ends before its first step may do so many times a minute."""
        return min(MOST_PAUSE_S, 2.0 ** min(self.without_step - 1, 10)) if self.without_step else 0.0

    def too_many(self) -> str:
        """Why the run gives up, or ""."""
        same = self._same
        if same is not None and same.count >= SAME and (same.alone or len(same.nodes) > 1):
            at = "before they had made a step" if same.step is None else f"after step {same.step:,}"
            where = "the only machine" if same.alone else f"{len(same.nodes)} machines"
            return f"the same error ended {same.count} attempts in a row {at}, on {where}: another would meet it again"
        if not 0 <= self._limit < self.in_a_row:
            return ""
        return (
            f"{self.in_a_row} attempt(s) in a row failed before a checkpoint was committed, and "
            f"cluster.max_failures={self._limit} allows no more"
        )

    def bad_nodes(self, now: float) -> list[str]:
        """Machines to do without."""
        return sorted(
            node for node, bad in self._bad.items() if now - bad.since < bad.for_s * (1 if bad.proven else UNPROVEN)
        )
