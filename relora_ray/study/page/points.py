"""Charts of a sweep's points: parallel coordinates, two keys at a time, what a lower loss costs, and what matters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from relora_ray.study.page.chart import Chart, Figure, Trace, layout, plain, rounded
from relora_ray.sweep.results import Point, importance, pareto
from relora_ray.sweep.space import Value, short_value, text

COSTS = {
    "num_trainable": ("trained parameters", False),
    "state_bytes": ("training state, bytes", False),
    "train_s": ("seconds of updates", False),
    "tokens_per_s": ("tokens per second", True),
    "peak_memory_bytes": ("peak memory, bytes", False),
}
"""By name of a measurement: what it is called, and whether more is better."""
MAX_VALUES = 12
"""Of a key: with more it is drawn as a range."""
MAX_PAIRS = 30


def sweep_charts(points: Sequence[Point]) -> list[Chart]:
    """Those that there is something for: of points that came to the end."""
    done = [point for point in points if point.state == "done" and math.isfinite(point.loss())]
    if len(done) < 2:
        return []
    names = list(dict.fromkeys(name for point in done for name in point.settings))
    varied = [name for name in names if len({_value(point, name) for point in done}) > 1]
    charts = [parallel(done, varied)] if varied else []
    pairs = [(_leaf(a) + " and " + _leaf(b), two_keys(done, a, b)) for a, b in combinations(varied, 2)][:MAX_PAIRS]
    if pairs:
        note = "Held-out loss, mean over seeds and over all other keys. Dark is better."
        charts.append(Chart("Two keys at a time", note, pairs, height=380))
    fronts = [(name[0], front(done, key, name[0], name[1])) for key, name in COSTS.items() if _known(done, key)]
    if fronts:
        note = "Points on the line are beaten by none in loss without being worse in the other."
        charts.append(Chart("What a lower loss costs", note, fronts))
    if (chart := what_matters(done)) is not None:
        charts.append(chart)
    return charts


def _value(point: Point, name: str) -> Value:
    return point.settings.get(name, "")


def _leaf(name: str) -> str:
    return plain(name.rpartition(".")[2])


def _ordered(points: Sequence[Point], name: str) -> list[Value]:
    return sorted({_value(point, name) for point in points}, key=lambda v: (isinstance(v, str), v))


def _known(points: Sequence[Point], key: str) -> bool:
    """Whether all have measured it, and not the same."""
    measured = [run.get(key) for point in points for run in point.runs.values()]
    is_told = all(point.runs for point in points) and all(isinstance(value, int | float) for value in measured)
    return is_told and len({point.mean(key) for point in points}) > 1


def parallel(points: Sequence[Point], names: Sequence[str]) -> Chart:
    """Values of a list are evenly spaced, as they are usually a geometric row; ranges are drawn as they are, or by
    their logarithm where they span a factor of 100."""
    dimensions: list[dict[str, Any]] = []
    for name in names:
        values = _ordered(points, name)
        if len(values) <= MAX_VALUES or any(isinstance(value, str) for value in values):
            dimensions.append(
                {
                    "label": _leaf(name),
                    "values": [values.index(_value(point, name)) for point in points],
                    "tickvals": list(range(len(values))),
                    "ticktext": [plain(short_value(value)) for value in values],
                    "range": [-0.1, len(values) - 0.9],
                }
            )
        else:
            dimensions.append(_range(_leaf(name), [float(_value(point, name)) for point in points]))
    losses = [point.loss() for point in points]
    dimensions.append({"label": "loss", "values": list(map(rounded, losses))})
    trace: Trace = {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": {
            "color": list(map(rounded, losses)), "colorscale": "Viridis", "showscale": True, "cmin": min(losses),
            "cmax": max(losses), "colorbar": {"thickness": 12, "title": {"text": "loss"}},
        },
        "labelside": "bottom",
    }  # fmt: skip
    note = f"{len(points)} points that came to the end. Drag along an axis to choose; drag a name to move its axis."
    said = {"margin": {"l": 60, "r": 30, "t": 30, "b": 40}}
    return Chart("Parallel coordinates", note, [("", {"data": [trace], "layout": said})], height=380)


def _range(label: str, values: list[float]) -> dict[str, Any]:
    if min(values) > 0 and max(values) / min(values) >= 100:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        ticks = list(range(low, high + 1))
        logs = [rounded(math.log10(value)) for value in values]
        return {"label": label, "values": logs, "tickvals": ticks, "ticktext": [f"1e{tick}" for tick in ticks]}
    return {"label": label, "values": list(map(rounded, values))}


def two_keys(points: Sequence[Point], across: str, down: str) -> Figure:
    columns, rows = _ordered(points, across), _ordered(points, down)
    said = layout(_leaf(down))
    said["xaxis"] = {"title": {"text": _leaf(across)}, "automargin": True}
    if max(len(columns), len(rows)) > MAX_VALUES:
        return {"data": [_scattered(points, across, down)], "layout": said}
    said["xaxis"]["type"] = said["yaxis"]["type"] = "category"
    z = [[_mean(points, {across: column, down: row}) for column in columns] for row in rows]
    trace: Trace = {
        "type": "heatmap",
        "x": [plain(short_value(value)) for value in columns],
        "y": [plain(short_value(value)) for value in rows],
        "z": z,
        "texttemplate": "%{z:.4f}",
        "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
        "xgap": 1,
        "ygap": 1,
    }
    return {"data": [trace], "layout": said}


def _scattered(points: Sequence[Point], across: str, down: str) -> Trace:
    return {
        "type": "scatter", "mode": "markers",
        "x": [_value(point, across) for point in points], "y": [_value(point, down) for point in points],
        "text": [plain(f"{text(point.settings)}: {point.loss():.4f}") for point in points],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": [rounded(point.loss()) for point in points], "colorscale": "Viridis", "showscale": True,
            "size": 10, "colorbar": {"thickness": 12},
        },
    }  # fmt: skip


def _mean(points: Sequence[Point], chosen: dict[str, Value]) -> float | None:
    found = [point.loss() for point in points if all(_value(point, n) == value for n, value in chosen.items())]
    return rounded(statistics.fmean(found)) if found else None


def front(points: Sequence[Point], key: str, title: str, larger: bool) -> Figure:
    best = sorted(pareto(points, key, larger=larger), key=lambda point: point.mean(key))

    def trace(name: str, shown: Sequence[Point], **style: Any) -> Trace:
        return {
            "type": "scatter", "name": name, "x": [rounded(p.mean(key)) for p in shown],
            "y": [rounded(p.loss()) for p in shown], "hovertemplate": "%{text}<extra></extra>",
            "text": [plain(f"{text(p.settings)}: loss {p.loss():.4f}, {p.mean(key):,.4g}") for p in shown], **style,
        }  # fmt: skip

    said = layout("held-out loss", showlegend=True)
    said["xaxis"] = {"title": {"text": title}, "tickformat": ".3s", "automargin": True}
    return {
        "data": [
            trace("points", points, mode="markers", marker={"color": "#7d8794", "size": 7}),
            trace("Pareto front", best, mode="lines+markers", line={"color": "#3b82d0"}, marker={"size": 9}),
        ],
        "layout": said,
    }


def what_matters(points: Sequence[Point]) -> Chart | None:
    found = importance(points)[:20]
    if not found:
        return None
    known = [not math.isnan(item.low) for item in found]
    trace: Trace = {
        "type": "bar",
        "orientation": "h",
        "y": [plain(item.name) for item in found],
        "x": [rounded(item.share) for item in found],
        "marker": {"color": "#3b82d0"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, i.high - i.share) if k else 0.0 for i, k in zip(found, known, strict=True)],
            "arrayminus": [max(0.0, i.share - i.low) if k else 0.0 for i, k in zip(found, known, strict=True)],
        },
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    said = layout("")
    said["xaxis"] = {"title": {"text": "share of the variance"}, "tickformat": ".0%", "automargin": True}
    said["yaxis"] |= {"autorange": "reversed", "type": "category"}
    note = (
        "How much of the variance of the losses one key alone explains, or two beyond what each does (omega squared). "
        "Seeds are blocks; whiskers: 90 % of resamples of the seeds"
        + ("." if any(known) else ", which needs more than one seed.")
    )
    return Chart("What matters", note, [("", {"data": [trace], "layout": said})], height=160 + 30 * len(found))
