"""What is on a page, in its order: a pure function of runs' facts and a sweep's points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from relora_ray.runs.evaluations import lines as evaluation_lines
from relora_ray.runs.metrics import perplexity, size_text
from relora_ray.study.page.chart import X_NAMES, Chart
from relora_ray.study.page.curves import held_out, learning_rate, training
from relora_ray.study.page.details import detail_charts
from relora_ray.study.page.facts import Facts
from relora_ray.study.page.points import sweep_charts
from relora_ray.study.page.ranking import Row, compare, differing_settings, rank
from relora_ray.sweep.results import Point, ranking
from relora_ray.sweep.space import short_value

MAX_DRAWN = 50
"""Runs that have curves, the best first."""
MAX_DETAILED = 12
"""Runs that have charts of their own."""
MAX_ROWS = 1000
MAX_COLUMNS = 60
SETTINGS = "Settings that differ"
MAX_POINTS = 2000
"""Of a run's curve, ..."""
ALL_POINTS = 16_000
"""... and of all runs' together."""
ALL_CELLS = 24_000
"""Of all runs' heat maps of layers by boundaries."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    run: int | None = None


@dataclass(frozen=True)
class Contents:
    title: str
    lead: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    details: Sequence[Table] = ()
    """Tables of single runs."""
    foot: Sequence[str] = ()
    run_names: Sequence[str] = ()
    """Of the runs that are drawn, by number."""
    detailed: Sequence[int] = ()
    x_names: Sequence[str] = field(default_factory=tuple)


def contents(
    title: str,
    runs: Sequence[Facts],
    *,
    against: str | None = None,
    points: Sequence[Point] | None = None,
    problems: Sequence[str] = (),
) -> Contents:
    """`against`: the run whose row the others are compared with, by its label; None: the best. `points`: of the sweep
    whose runs these are. `problems`: what could not be read."""
    rows = rank(runs)
    ordered = [run for row in rows for run in row.runs]
    drawn = ordered[:MAX_DRAWN]
    detailed = range(min(len(drawn), MAX_DETAILED))
    at_most = max(100, min(MAX_POINTS, ALL_POINTS // max(1, len(drawn))))
    own = max(100, min(MAX_POINTS, ALL_POINTS // max(1, len(detailed))))
    charts = sweep_charts(points) if points is not None else []
    if any(run.evals for run in drawn):
        charts.append(held_out(drawn))
    if any(run.train for run in drawn):
        charts.append(training(drawn, at_most))
    for number in detailed:
        if drawn[number].train:
            charts.append(learning_rate(number, drawn[number], own))
        charts += detail_charts(number, drawn[number], own, cells=ALL_CELLS // len(detailed))
    dollars = any(run.dollars is not None for run in drawn)
    return Contents(
        title=title,
        lead=list(_lead(runs)),
        tiles=_tiles(runs[0]) if len(runs) == 1 else (),
        warnings=[*problems, *_warnings(runs, drawn, len(detailed))],
        tables=list(_tables(rows, ordered, against, points)),
        charts=charts,
        details=[table for number in detailed for table in _details(number, drawn[number])],
        foot=_FOOT,
        run_names=[run.label for run in drawn],
        detailed=list(detailed),
        x_names=[name for name in X_NAMES if name != "dollars" or dollars],
    )


_FOOT = (
    "Only steps that count are counted: an attempt's records count up to the step from which a later attempt began. "
    "What was done after that is lost work: it is in no loss, no step and no token here, and grey on the clock.",
    "Seconds in steps that count are those of updates (each at the median of the recent ones), boundaries, evaluations "
    "and waits for saves. Goodput is their share of the time since the first attempt began. Dollars, where a price was "
    "given, are for every worker from an attempt's first record to its last, with the work that was lost. A fork's "
    "seconds and dollars go on from those of its parent, such as a warm start that several points of a sweep share.",
)


def _lead(runs: Sequence[Facts]) -> Iterator[str]:
    if len(runs) == 1:
        log = runs[0].log
        gone = "" if log.parent is not None else " (which is gone: its seconds and dollars are not counted)"
        forked = f", forked from {log.origin.parent} after step {log.origin.step:,}{gone}" if log.origin else ""
        yield f"{log.cfg.method.kind}, seed {log.cfg.seed}, {log.url}{forked}"
    else:
        kinds = sorted({run.log.cfg.method.kind for run in runs})
        yield f"{len(runs)} runs: {', '.join(kinds)}"


def _tiles(run: Facts) -> list[tuple[str, str]]:
    cfg = run.log.cfg
    tiles = [("updates", f"{run.steps:,} of {cfg.steps:,}"), ("tokens", f"{run.steps * cfg.tokens_per_step:,}")]
    if run.loss is not None:
        tiles += [("held-out loss", f"{run.loss:.4f}"), ("perplexity", f"{perplexity(run.loss):,.2f}")]
    if run.num_parameters is not None and run.num_trainable is not None:
        tiles.append(("parameters", f"{run.num_parameters / 1e6:,.2f} M"))
        tiles.append(("trained at the end", f"{run.num_trainable / 1e6:,.2f} M"))
    if run.states:
        tiles.append(("state on each worker", size_text(sum(run.states[-1][1].values()))))
    tiles.append(("seconds in steps", f"{run.seconds:,.0f}"))
    if run.goodput is not None:
        tiles.append(("goodput", f"{run.goodput:.1%}"))
    tiles.append(("attempts", f"{len(run.attempts):,}"))
    lost = sum(interruption.steps_lost for interruption in run.interruptions)
    tiles.append(("updates lost", f"{lost:,}"))
    if run.dollars is not None:
        tiles.append(("dollars", f"{run.dollars:,.2f}"))
    return tiles


def _warnings(runs: Sequence[Facts], drawn: Sequence[Facts], num_detailed: int) -> Iterator[str]:
    if not runs:
        yield "There is no run to show yet."
    if len({run.held_out for run in runs if run.evals}) > 1:
        yield "Not all runs were evaluated on the same held-out rows: losses of those that differ cannot be compared."
    for run in runs:
        if run.evals_apart:
            yield f"{run.label}: {run.evals_apart} evaluation(s) of another number of held-out rows are left out."
    if empty := [run.label for run in runs if not run.train]:
        yield f"No update yet: {_listed(empty)}."
    elif silent := [run.label for run in runs if not run.evals]:
        yield f"No held-out loss: {_listed(silent)}."
    if len(drawn) < len(runs):
        yield f"Curves of the best {len(drawn)} of {len(runs):,} runs are drawn; all are in the table."
    if num_detailed < len(drawn):
        yield f"The best {num_detailed} runs have charts of their own."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tables(
    rows: Sequence[Row], ordered: Sequence[Facts], against: str | None, points: Sequence[Point] | None
) -> Iterator[Table]:
    if points is not None:
        yield _points_table(points)
    if len(ordered) < 2:
        return
    yield ranking_table(rows, against)
    shown = rows[:MAX_COLUMNS]
    if differing := differing_settings(shown):
        yield Table(
            SETTINGS,
            ["", *(row.label for row in shown)],
            [[name, *map(_value, values)] for name, values in differing.items()],
            "" if len(shown) == len(rows) else f"Of the best {len(shown)} of {len(rows):,} rows.",
        )


def ranking_table(rows: Sequence[Row], against: str | None = None) -> Table:
    """Also what the command prints."""
    reference = next((row for row in rows if any(run.label == against for run in row.runs)), rows[0])
    lines = []
    for number, row in enumerate(rows[:MAX_ROWS], 1):
        done = "" if row.finished else f" of {max(run.log.cfg.steps for run in row.runs):,}"
        lines.append(
            [
                number,
                row.label,
                row.runs[0].log.cfg.method.kind,
                ", ".join(str(run.log.cfg.seed) for run in row.runs),
                f"{min(run.steps for run in row.runs):,}{done}",
                f"{min(run.steps * run.log.cfg.tokens_per_step for run in row.runs):,}",
                "n/a" if row.loss is None else f"{row.loss:.4f}",
                "n/a" if row.perplexity is None else f"{row.perplexity:,.2f}",
                _mean_text([run.seconds for run in row.runs], ",.0f"),
                _mean_text([run.num_trainable for run in row.runs], ",.0f"),
                _mean_text([run.goodput for run in row.runs], ".0%"),
                compare(row, reference).words,
            ]
        )
    columns = (
        "", "run", "method", "seed", "updates", "tokens", "held-out loss", "perplexity", "seconds", "trained",
        "goodput", "less the loss of " + reference.label,
    )  # fmt: skip
    note = (
        "Runs that differ in nothing but the seed are one row, with their means. Those that are finished come first, "
        "each by loss. Differences are of runs with the same seed, at the last number of tokens at which all were "
        "evaluated; each interval (Student's t) is of one comparison by itself: of twenty between equals one is "
        "expected to exclude zero."
    )
    return Table("Ranking", columns, lines, note)


def _mean_text(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else "n/a"


def _value(value: Any) -> str:
    return "" if value is None else short_value(value) if isinstance(value, float) else str(value)


def _points_table(points: Sequence[Point]) -> Table:
    names = list(dict.fromkeys(name for point in points for name in point.settings))
    lines = []
    for point in ranking(points)[:MAX_ROWS]:
        by_seed = point.losses.get(point.last_rung, {})
        lines.append(
            [
                point.number,
                *(_value(point.settings.get(name)) for name in names),
                f"{point.loss():.4f}" if by_seed and point.state != "diverged" else "n/a",
                ", ".join(f"{loss:.4f}" for loss in by_seed.values()),
                f"{point.last_rung:,}",
                point.state,
                point.why.partition("\n")[0],
            ]
        )
    columns = ["point", *names, "held-out loss", "by seed", "updates", "state", "why"]
    note = "Those that came furthest first, among them by loss, the mean over seeds."
    return Table("Points", columns, lines, note)


def _details(number: int, run: Facts) -> Iterator[Table]:
    if run.interruptions:
        lines = [
            [
                i.attempt, i.change, i.world_size, "" if i.from_step is None else f"{i.from_step:,}",
                f"{i.steps_lost:,}", f"{i.lost_s:,.1f}", f"{i.down_s:,.1f}", i.cause.strip().partition("\n")[0][:200],
            ]
            for i in run.interruptions[-MAX_ROWS:]
        ]  # fmt: skip
        columns = (
            "attempt", "why", "workers", "from step", "steps lost", "seconds of them", "seconds down", "cause",
        )  # fmt: skip
        yield Table(f"Interruptions of {run.label}", columns, lines, "The attempts that began after the first.", number)
    if run.log.evaluations:
        said = [[line] for line in evaluation_lines(run.log.evaluations)]
        yield Table(f"Evaluations of {run.label}", ["by relora-ray evaluate"], said[:MAX_ROWS], "", number)
    if run.evals:
        lines = [
            [
                f"{p.step:,}", f"{p.tokens:,}", f"{p.seconds:,.1f}", f"{loss:.4f}", f"{perplexity(loss):,.2f}",
                *([] if p.dollars is None else [f"{p.dollars:,.4f}"]),
            ]
            for p, loss in run.evals[-MAX_EVALS:]
        ]  # fmt: skip
        names = ["after step", "tokens", "seconds", "held-out loss", "perplexity", "dollars"][: len(lines[0])]
        yield Table(f"Held-out losses of {run.label}", names, lines, "", number)


MAX_EVALS = 200
