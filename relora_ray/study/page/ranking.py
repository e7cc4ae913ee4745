"""Runs in order, by what they came to on held-out text, and whether seeds tell them apart.

Runs that differ in nothing but their seed are one row, apart from those that are not finished. Two rows are compared by
the losses of runs with the same seed, at the last number of tokens at which all of these were evaluated.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from relora_ray.runs.metrics import perplexity
from relora_ray.study.page.facts import Facts
from relora_ray.study.paired import Difference, difference


@dataclass(frozen=True, repr=False)
class Row:
    """Runs of equal settings, by seed and then by name."""

    runs: Sequence[Facts]

    @property
    def label(self) -> str:
        first = self.runs[0].label
        return first if len(self.runs) == 1 else f"{first} and {len(self.runs) - 1} more"

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def losses(self) -> list[float]:
        """The last of each run that has one."""
        return [run.loss for run in self.runs if run.loss is not None]

    @property
    def loss(self) -> float | None:
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else perplexity(self.loss)

    @cached_property
    def by_tokens(self) -> dict[int, dict[int, float]]:
        """Held-out loss by seed and number of tokens; of runs with one seed the mean."""
        found: dict[int, dict[int, list[float]]] = {}
        for run in self.runs:
            for point, loss in run.evals:
                found.setdefault(run.log.cfg.seed, {}).setdefault(point.tokens, []).append(loss)
        return {s: {t: statistics.fmean(ls) for t, ls in by.items()} for s, by in found.items()}

    @property
    def held_out(self) -> tuple[Any, ...]:
        """What decides on which text a loss is taken."""
        return self.runs[0].held_out


@dataclass(frozen=True)
class Comparison:
    row: Row
    against: Row
    found: Difference | None
    tokens: int = 0

    @property
    def words(self) -> str:
        """A sentence for people."""
        if self.row is self.against:
            return "the others are compared with this"
        if self.row.held_out != self.against.held_out:
            return "other held-out text or rows: losses cannot be compared"
        if self.found is None:
            return "no seed and number of tokens in common: not compared"
        at = f"{self.found.mean:+.4f} after {self.tokens:,} tokens"
        if self.found.num_pairs == 1:
            return f"{at}, one pair of runs: no interval"
        said = f"{at}, 95 % interval {self.found.low:+.4f} to {self.found.high:+.4f} of {self.found.num_pairs} seeds"
        return f"{said}, which includes zero: these seeds do not tell them apart" if self.found.includes_zero else said


def rank(runs: Sequence[Facts]) -> list[Row]:
    """Finished ones first, each by loss; those without a loss last."""
    groups: dict[str, list[Facts]] = {}
    for run in runs:
        settings = {k: v for k, v in run.log.cfg.identity().items() if k != "seed"}
        origin = run.log.origin
        begins_with = {  # no part of a run's identity, as places move about
            "model.init_from": run.log.cfg.model.init_from,
            "fork": None if origin is None else [origin.parent, origin.step],
        }
        settings |= begins_with | {"held out": run.held_out, "finished": run.finished}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    rows = [Row(sorted(group, key=lambda run: (run.log.cfg.seed, run.label))) for group in groups.values()]
    return sorted(rows, key=lambda row: (not row.finished, math.inf if row.loss is None else row.loss, row.label))


def compare(row: Row, against: Row) -> Comparison:
    if row is against or row.held_out != against.held_out:
        return Comparison(row, against, None)
    seeds = sorted(row.by_tokens.keys() & against.by_tokens.keys())
    known = [set(one.by_tokens[seed]) for one in (row, against) for seed in seeds]
    tokens = max((t for t in set.intersection(*known) if t > 0), default=None) if known else None
    if tokens is None:
        return Comparison(row, against, None)
    mine, theirs = ({seed: one.by_tokens[seed][tokens] for seed in seeds} for one in (row, against))
    return Comparison(row, against, difference(mine, theirs), tokens)


def differing_settings(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Of each setting that is not the same in all rows, its values; seeds, and where things lie, are left out."""
    settings = [row.runs[0].log.cfg.settings() for row in rows]
    names = list(dict.fromkeys(name for each in settings for name in each))
    found = {name: [each.get(name) for each in settings] for name in names if not name.startswith(_PLACES)}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


_PLACES = ("name", "seed", "storage", "data.path", "data.storage_options", "data.validation.")
