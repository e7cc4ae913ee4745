"""Charts along the way of runs: held-out loss, training loss, and the learning rate with what happened on it."""

from __future__ import annotations

from collections.abc import Sequence

from relora_ray.runs.metrics import perplexity
from relora_ray.study.page.chart import Chart, Figure, Trace, layout, line, plain, thinned, xs
from relora_ray.study.page.facts import Facts, Mark, Point
from relora_ray.study.run_log import number

MARKS = {
    "end of the warm start": ("#2a9d6f", "diamond"),
    "merge and reset": ("#9a62c7", "circle"),
    "merge": ("#3b82d0", "circle-open"),
    "rollback": ("#d03b3b", "triangle-left"),
    "restart": ("#d08a1f", "x-open"),
}
"""Colour and symbol by what happened; other boundaries of other methods have the last's."""
OTHER = ("#7d8794", "square")
MAX_SETS = 10
"""Sets of held-out text beside the run's own."""
MAX_MARKS = 1000
"""Of one kind, in a chart."""


def held_out(runs: Sequence[Facts]) -> Chart:
    own = [run.evals for run in runs]
    variants = [("loss", _losses(runs, own)), ("perplexity", _losses(runs, own, as_perplexity=True))]
    for name in sorted({name for run in runs for name in run.named_evals})[:MAX_SETS]:
        variants.append((f"loss on {name}", _losses(runs, [run.named_evals.get(name, ()) for run in runs])))
    note = "On the same rows of held-out text each time. Perplexity is exp of the loss."
    return Chart("Held-out loss", note, variants)


def _losses(
    runs: Sequence[Facts], evals: Sequence[Sequence[tuple[Point, float]]], *, as_perplexity: bool = False
) -> Figure:
    """`evals`: of each run."""
    traces = []
    for index, (run, found) in enumerate(zip(runs, evals, strict=True)):
        y = [perplexity(loss) if as_perplexity else loss for _, loss in found]
        kept = thinned(y, 500)
        x = xs(run, (found[i][0] for i in kept))
        traces.append(line(index, plain(run.label), x, [y[i] for i in kept], mode="lines+markers", marker={"size": 6}))
    said = layout("perplexity" if as_perplexity else "loss, nats per token", showlegend=False)
    said["yaxis"] |= {"type": "log"} if as_perplexity else {}
    return {"data": traces, "layout": said}


def training(runs: Sequence[Facts], at_most: int) -> Chart:
    """`at_most`: points of each run."""
    traces: list[Trace] = []
    for index, run in enumerate(runs):
        losses = [number(record, "loss") for record in run.train]
        kept = thinned(losses, at_most)
        x = xs(run, (run.places[i] for i in kept))
        traces.append(line(index, plain(run.label), x, [losses[i] for i in kept], line={"width": 1}))
        if len(runs) == 1:
            finite = [loss for loss in losses if loss is not None]
            if finite:
                traces += _verticals(index, run, min(finite), max(finite))
    said = layout("loss, nats per token", showlegend=len(runs) == 1)
    note = "Of every update that counts, on its own rows." + _thinned(runs, at_most)
    return Chart("Training loss", note, [("loss", {"data": traces, "layout": said})])


def learning_rate(index: int, run: Facts, at_most: int) -> Chart:
    rates = [number(record, "learning_rate") for record in run.train]
    kept = thinned(rates, at_most)
    x = xs(run, (run.places[i] for i in kept))
    traces = [line(index, "learning rate", x, [rates[i] for i in kept])]
    finite = [rate for rate in rates if rate is not None]
    if finite:
        traces += _verticals(index, run, 0.0, max(finite))
    by_step = {record["step"]: rate for record, rate in zip(run.train, rates, strict=True)}
    for kind, marks in _by_kind(run).items():
        colour, symbol = MARKS.get(kind, OTHER)
        x = xs(run, (mark.point for mark in marks))
        y = [by_step.get(mark.point.step, 0.0) for mark in marks]
        traces.append(
            line(
                index,
                plain(kind),
                x,
                y,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7 if kind == "restart" else 11},
                text=[plain(mark.text) for mark in marks],
                hovertemplate="%{text}<extra></extra>",
                showlegend=False,
            )
        )
    said = layout("learning rate", showlegend=True)
    said["yaxis"] |= {"exponentformat": "power"}
    note = "Lines are what happened on the way; their marks say more." + _thinned([run], at_most)
    return Chart("Learning rate and boundaries", note, [("", {"data": traces, "layout": said})], run=index)


def _by_kind(run: Facts) -> dict[str, list[Mark]]:
    found: dict[str, list[Mark]] = {}
    for mark in run.marks:
        found.setdefault(mark.kind, []).append(mark)
    return {kind: marks[:: -(-len(marks) // MAX_MARKS)] for kind, marks in found.items()}


def _verticals(index: int, run: Facts, low: float, high: float) -> list[Trace]:
    """Of each kind of mark one trace, which has its entry in the legend."""
    traces = []
    for kind, marks in _by_kind(run).items():
        x = xs(run, (point for mark in marks for point in (mark.point, mark.point, None)))
        y = [value for _ in marks for value in (low, high, None)]
        style = {"color": MARKS.get(kind, OTHER)[0], "width": 1, "dash": "dot"}
        traces.append(line(index, plain(kind), x, y, line=style, hoverinfo="skip", opacity=0.8))
    return traces


def _thinned(runs: Sequence[Facts], at_most: int) -> str:
    longest = max((len(run.train) for run in runs), default=0)
    if longest <= at_most:
        return ""
    return f" {longest:,} updates are drawn as {at_most:,} points: of every stretch its smallest and its largest value."
