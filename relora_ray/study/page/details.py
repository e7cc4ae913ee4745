"""Charts of one run: what happened when, what it held, what it stored, and what its merges added to each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from relora_ray.study.page.chart import Chart, Figure, Trace, layout, plain, rounded, thinned, y_axis
from relora_ray.study.page.facts import Attempt, Facts
from relora_ray.study.run_log import number

ROLES = {
    "weights": "#3b82d0", "derived": "#1fa3b5", "gradients": "#e07b39", "optimizer": "#9a62c7",
}  # fmt: skip
OTHER = "#7d8794"
LOST, DOWN = "#8a8a8a", "#d03b3b"
MAX_ATTEMPTS = 400
"""Attempts whose lost work and pauses are shaded: more are not told apart."""
MAX_CHECKPOINTS = 1000
MAX_LINES = 300


def detail_charts(index: int, run: Facts, at_most: int, cells: int) -> list[Chart]:
    """Those that there is something for. `index`: which run it is; `at_most`: points of a line; `cells`: of a map."""
    charts = [
        on_the_clock(index, run, at_most), memory(index, run), checkpoints(index, run), layers(index, run, cells),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def on_the_clock(index: int, run: Facts, at_most: int) -> Chart | None:
    if not any(attempt.speeds for attempt in run.attempts):
        return None
    counted, lost, sizes = _on_time_line(run.attempts, at_most)
    shown = run.attempts[-MAX_ATTEMPTS:]
    again = run.interruptions[-MAX_ATTEMPTS:]
    traces: list[Trace] = [
        _trace("tokens/s", counted, {"color": "#3b82d0", "width": 1}),
        _trace("lost work", lost, {"color": LOST, "width": 1}),
        _trace("workers", sizes, {"color": "#2a9d6f", "width": 2, "shape": "hv"}, yaxis="y2"),
        {
            "type": "scatter",
            "mode": "markers",
            "name": "new attempt",
            "x": [_utc(i.at) for i in again],
            "y": [i.world_size for i in again],
            "yaxis": "y2",
            "marker": {
                "color": [DOWN if i.change == "failure" else "#d08a1f" for i in again],
                "symbol": "x",
                "size": 9,
            },
            "text": [
                plain(f"{i.change} at step {i.from_step}: {i.steps_lost} steps lost, {i.down_s:.1f} s down; {i.cause}")
                for i in again
            ],
            "hovertemplate": "%{text}<extra></extra>",
        },
    ]
    said = layout("tokens/s", showlegend=True)
    said["xaxis"] = {"type": "date", "title": {"text": "UTC"}, "anchor": "y2", "automargin": True}
    said["yaxis"] |= {"domain": [0.36, 1], "rangemode": "tozero"}
    said["yaxis2"] = y_axis("workers") | {"domain": [0, 0.26], "rangemode": "tozero", "nticks": 4}
    over = {before.name: i.at - i.down_s for before, i in zip(run.attempts, run.interruptions, strict=False)}
    said["shapes"] = [
        _band(a.lost_from, max(a.end, over.get(a.name, 0.0)), LOST) for a in shown if a.lost_from is not None
    ]
    said["shapes"] += [_band(i.at - i.down_s, i.at, DOWN) for i in again if i.down_s > 0]
    longest = sum(len(attempt.speeds) for attempt in run.attempts)
    note = "Throughput is of the median of recent updates. Grey: work that was lost. Red: no attempt trained."
    if longest > at_most:
        note += f" {longest:,} updates are drawn as {at_most:,} points."
    return Chart("On the clock", note, [("", {"data": traces, "layout": said})], run=index, height=400)


Series = list[tuple[float, float | None]]


def _on_time_line(attempts: Sequence[Attempt], at_most: int) -> tuple[Series, Series, Series]:
    """When, and tokens/s that count, tokens/s that do not, and workers; with gaps between attempts."""
    total = sum(len(attempt.speeds) for attempt in attempts) or 1
    counted: Series = []
    lost: Series = []
    sizes: Series = []
    for attempt in attempts:
        share = max(4, at_most * len(attempt.speeds) // total)
        kept = thinned([speed for _, speed in attempt.speeds], share)
        first_lost = math.inf if attempt.lost_from is None else attempt.lost_from
        for when, speed in (attempt.speeds[i] for i in kept):
            (lost if when > first_lost else counted).append((when, speed))
        for series in (counted, lost):
            if series and series[-1][1] is not None:
                series.append((attempt.end, None))
        sizes += [(attempt.begin, attempt.world_size), (attempt.end, attempt.world_size), (attempt.end, None)]
    return counted, lost, sizes


def _trace(name: str, series: Series, style: dict[str, Any], **more: Any) -> Trace:
    x, y = [_utc(when) for when, _ in series], [rounded(value) for _, value in series]
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, **more}


def _utc(clock: float) -> str:
    """As plotly reads times. One that no calendar has, as of a clock that was wrong, is the beginning of time."""
    try:
        return datetime.fromtimestamp(clock, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except (OverflowError, ValueError, OSError):
        return "1970-01-01 00:00:00.000"


def _band(begin: float, end: float, colour: str) -> dict[str, Any]:
    return {
        "type": "rect", "xref": "x", "yref": "paper", "x0": _utc(begin), "x1": _utc(end), "y0": 0, "y1": 1,
        "fillcolor": colour, "opacity": 0.2, "line": {"width": 0}, "layer": "below",
    }  # fmt: skip


def memory(index: int, run: Facts) -> Chart | None:
    if not run.states:
        return None
    states = run.states if len(run.states) <= 20 else [*run.states[:10], *run.states[-10:]]
    roles = list(dict.fromkeys(role for _, state in states for role in state))
    whens = [when for when, _ in states]
    traces: list[Trace] = [
        {
            "type": "bar", "orientation": "h", "name": plain(role), "y": whens,
            "x": [state.get(role, 0) for _, state in states], "marker": {"color": ROLES.get(role, OTHER)},
            "hovertemplate": "%{x:.4s}B<extra>%{fullData.name}</extra>",
        }
        for role in roles
        if any(state.get(role) for _, state in states)
    ]  # fmt: skip
    said = layout("", barmode="stack", showlegend=True)
    said["xaxis"] = {"title": {"text": "bytes on each worker"}, "tickformat": ".3s", "automargin": True}
    said["yaxis"] |= {"autorange": "reversed", "type": "category"}
    note = "Of weights, gradients and optimizer state, counted by the tensors' shapes, as they change at boundaries."
    if run.peak_bytes is not None:
        note += (
            f" The most that a process held of the device's (or the machine's) memory: {run.peak_bytes / 1e6:,.0f} MB."
        )
    height = 190 + 34 * len(states)
    return Chart("Memory", note, [("", {"data": traces, "layout": said})], run=index, height=height)


def checkpoints(index: int, run: Facts) -> Chart | None:
    saved = run.checkpoints
    if not saved:
        return None
    total = [float(r["delta_bytes"] + r["base_bytes"] * r["base_is_new"]) for r in saved]
    shown = [saved[i] for i in thinned(total, MAX_CHECKPOINTS)]
    steps = [record["step"] for record in shown]

    def marks(name: str, y: Sequence[float | None], colour: str, symbol: str) -> Trace:
        return {
            "type": "scatter", "mode": "markers", "name": name, "x": steps, "y": list(map(rounded, y)),
            "marker": {"color": colour, "symbol": symbol, "size": 8},
        }  # fmt: skip

    size = layout("bytes written", showlegend=True)
    size["yaxis"] |= {"tickformat": ".3s", "rangemode": "tozero"}
    written = [marks("delta", [r["delta_bytes"] for r in shown], "#3b82d0", "circle")]
    if any(r["base_is_new"] for r in saved):
        of_base = [r["base_bytes"] if r["base_is_new"] else None for r in shown]
        written.append(marks("base", of_base, "#9a62c7", "diamond"))
    time = layout("seconds", showlegend=True)
    time["yaxis"] |= {"rangemode": "tozero"}
    took = [
        marks("until stored", [number(r, "save_s") for r in shown], "#2a9d6f", "circle"),
        marks("training waited", [number(r, "blocked_s") for r in shown], DOWN, "x"),
    ]
    bases = [r["base_bytes"] for r in saved if r["base_is_new"]]
    waited = sum(number(r, "blocked_s") or 0.0 for r in saved)
    note = (
        f"{len(saved):,} checkpoints: {sum(r['delta_bytes'] for r in saved) / 1e6:,.1f} MB of delta, "
        f"{sum(bases) / 1e6:,.1f} MB in {len(bases)} bases; training waited {waited:,.1f} s for them."
    )
    if len(shown) < len(saved):
        note += f" {len(shown):,} are drawn."
    variants = [("bytes", {"data": written, "layout": size}), ("seconds", {"data": took, "layout": time})]
    return Chart("Checkpoints", note, variants, run=index)


def layers(index: int, run: Facts, cells: int) -> Chart | None:
    """Of each merge, or other boundary that says it, what it added to every layer."""
    if not run.updates:
        return None
    paths = list(dict.fromkeys(str(path) for record in run.updates for path in record["layers"]))
    columns = max(1, cells // max(1, len(paths)))
    records = [run.updates[i * len(run.updates) // columns] for i in range(columns)]
    records = records if len(run.updates) > columns else list(run.updates)
    variants = [
        ("Frobenius norm", _heat_map(paths, records, lambda record: record["norms"])),
        ("effective rank", _heat_map(paths, records, lambda record: record["effective_ranks"])),
        ("largest singular value", _heat_map(paths, records, _largest)),
        (f"singular values after step {records[-1]['step']:,}", _spectra(paths, records[-1])),
    ]
    note = (
        "Of the update B A that a boundary added to each layer, from the adapters. Effective rank: exp of the entropy "
        "of the singular values' shares (Roy and Vetterli 2007)."
    )
    if len(records) < len(run.updates):
        note += f" {len(records):,} of {len(run.updates):,} boundaries are drawn."
    if left_out := max(int(number(record, "layers_left_out") or 0) for record in run.updates):
        note += f" {left_out:,} more layers were not recorded."
    return Chart("What merges added", note, variants, run=index, height=min(1400, max(320, 130 + 15 * len(paths))))


def _largest(record: dict[str, Any]) -> list[Any]:
    values = record.get("singular_values")
    return [v[0] if isinstance(v, list) and v else None for v in values] if isinstance(values, list) else []


def _heat_map(paths: Sequence[str], records: Sequence[dict[str, Any]], values: Any) -> Figure:
    columns = [dict(zip(map(str, record["layers"]), values(record), strict=False)) for record in records]
    z = [[rounded(number(column, path)) for column in columns] for path in paths]
    trace: Trace = {
        "type": "heatmap",
        "x": [f"{record['step']:,}" for record in records],
        "y": _short_names(paths),
        "z": z,
        "colorscale": "Viridis",
        "hovertemplate": "%{y}<br>after step %{x}: %{z}<extra></extra>",
        "colorbar": {"thickness": 12},
        "xgap": 1,
    }
    said = layout("", hovermode="closest")
    said["xaxis"] = {"title": {"text": "after update"}, "type": "category", "automargin": True}
    said["yaxis"] = {"autorange": "reversed", "type": "category", "automargin": True, "tickfont": {"size": 10}}
    return {"data": [trace], "layout": said}


def _spectra(paths: Sequence[str], record: dict[str, Any]) -> Figure:
    """A line for every layer, coloured by its kind: q_proj, down_proj, ..."""
    names = dict(zip(paths, _short_names(paths), strict=True))
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    values = record.get("singular_values")
    pairs = list(zip(map(str, record["layers"]), values if isinstance(values, list) else [], strict=False))
    traces: list[Trace] = []
    told: set[str] = set()
    for path, found in pairs[:MAX_LINES]:
        kind = path.rpartition(".")[2]
        row = dict(enumerate(found)) if isinstance(found, list) else {}
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": plain(kind), "legendgroup": plain(kind),
                "showlegend": kind not in told, "x": [i + 1 for i in row], "opacity": 0.75,
                "y": [rounded(number({"s": s}, "s")) for s in row.values()], "marker": {"size": 4},
                "line": {"color": _KINDS[kinds.index(kind) % len(_KINDS)], "width": 1},
                "hovertemplate": f"{plain(names.get(path, path))}: %{{y}}<extra></extra>",
            }
        )  # fmt: skip
        told.add(kind)
    said = layout("singular value", showlegend=True)
    said["xaxis"] = {"title": {"text": "index"}, "dtick": 1, "automargin": True}
    said["yaxis"] |= {"type": "log", "exponentformat": "power"}
    return {"data": traces, "layout": said}


_KINDS = ("#3b82d0", "#e07b39", "#2a9d6f", "#9a62c7", "#cf4d6f", "#8a8f2a", "#1fa3b5", "#7d8794")


def _short_names(paths: Sequence[str]) -> list[str]:
    """Without what all begin with: `model.layers.`."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [plain(".".join(part[shared:])) for part in parts]
