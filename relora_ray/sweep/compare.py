"""Rows of a sweep held against each other: the best point of each, seed by seed.

A row's points differ in its own lists and in the rest of the space. Its best is the one of lowest held-out loss among
those that came to the end; rows are compared by these. A row with more points to choose from is favoured by that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from relora_ray.runs.metrics import perplexity, size_text
from relora_ray.study.paired import Difference, difference
from relora_ray.sweep.dimension import Row, is_rows
from relora_ray.sweep.results import Point, best
from relora_ray.sweep.space import Sweep, text


def comparison(sweep: Sweep, points: Sequence[Point]) -> Iterator[str]:
    """For each section that has rows a table of them, as lines of Markdown; nothing without rows."""
    for section, dimension in sweep.spec.space.items():
        if is_rows(dimension):
            yield from _table(section, dimension, points)


def paired(ours: Point, theirs: Point) -> Difference | None:
    """In held-out loss at the end, of the seeds that both have; None if there are none."""
    a, b = (point.losses.get(point.last_rung, {}) for point in (ours, theirs))
    return difference(a, b)


def _table(section: str, rows: Sequence[Row], points: Sequence[Point]) -> Iterator[str]:
    found = {row.name: [p for p in points if p.settings.get(section) == row.name] for row in rows}
    first = rows[0].name
    yield f"## {section.capitalize()}\n"
    yield (
        f"| {section} | points | best | held-out loss | perplexity | against {first}, seed by seed | "
        "trained parameters | state | tokens/s |"
    )
    yield "|---" * 9 + "|"
    reference = best(found[first])
    for row in rows:
        mine = found[row.name]
        chosen = best(mine)
        if chosen is None:
            states = ", ".join(dict.fromkeys(point.state for point in mine)) or "not begun"
            yield f"| {row.name} | {len(mine)} | {states} | | | | | | |"
            continue
        by = chosen.losses[chosen.last_rung]
        spread = f" ± {statistics.stdev(by.values()):.4f}" if len(by) > 1 else ""
        settings = text({k: v for k, v in chosen.settings.items() if k != section}) or "as it is"
        against = "" if row.name == first else _difference(chosen, reference)
        yield (
            f"| {row.name} | {len(mine)} | {settings} | {chosen.loss():.4f}{spread} | "
            f"{perplexity(chosen.loss()):.2f} | {against} | {chosen.mean('num_trainable') / 1e6:,.2f} M | "
            f"{size_text(chosen.mean('state_bytes'))} | {chosen.mean('tokens_per_s'):,.0f} |"
        )
    several = any(len(mine) > 1 for mine in found.values())
    seeds = min((len(point.losses[point.last_rung]) for name in found if (point := best(found[name]))), default=0)
    yield (
        f"\nDifferences are of runs with the same seed, which read the same rows in the same order; below 0 is "
        f"better than {first}."
        + (" ± is the 95 % interval (t), of one comparison by itself." if seeds > 1 else
           " One seed has no interval: give sweep.seeds several to tell a difference from chance.")
        + (" The best of a row is chosen by the same losses, which favours rows with more points." if several else "")
        + "\n"
    )  # fmt: skip


def _difference(ours: Point, theirs: Point | None) -> str:
    found = paired(ours, theirs) if theirs is not None else None
    if found is None:
        return "-"
    if found.num_pairs < 2:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} ± {found.half:.4f}{', includes zero' if found.includes_zero else ''}"
