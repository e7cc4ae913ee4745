"""What charts are made of: plotly's figures as plain data, text that may be anybody's, and as many points as one sees.

A figure is `{"data": [trace, ...], "layout": {...}}`, as plotly.js takes it. Where a trace's `meta.x` has several x
values by name ("steps", "seconds", ...) the page shows the one that is chosen.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from relora_ray.cli import printable
from relora_ray.masking import masked
from relora_ray.study.page.facts import Facts, Point

Figure = dict[str, Any]
Trace = dict[str, Any]

COLOURS = ("#3b82d0", "#e07b39", "#2a9d6f", "#9a62c7", "#cf4d6f", "#8a8f2a", "#1fa3b5", "#b0703c", "#6b7fd7", "#7d8794")
"""Readable on white and on near-black."""
DASHES = ("solid", "dash", "dot", "dashdot")
X_NAMES = {"steps": "updates", "tokens": "tokens", "seconds": "seconds in steps that count", "dollars": "dollars"}
MAX_TEXT = 300


@dataclass(frozen=True)
class Chart:
    """One place on the page, with one or more figures to choose from."""

    title: str
    note: str
    variants: Sequence[tuple[str, Figure]]
    run: int | None = None
    """Which run it is of, if it is shown only when that one is chosen."""
    height: int = 310


def plain(text: object) -> str:
    """As it may stand in a figure: no secret, nothing that plotly takes for markup or for a template."""
    shown = printable(masked(str(text)))
    shown = shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}..."
    return html.escape(shown, quote=False).replace("%{", "% {")


def rounded(value: float | None) -> float | None:
    """Seven digits: more than one can see."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def thinned(values: Sequence[float | None], at_most: int) -> list[int]:
    """Numbers of the values to draw: all, or of every stretch its smallest, its largest, and the first and last of all,
    so that no spike is lost."""
    if len(values) <= at_most:
        return list(range(len(values)))
    stretches = max(1, (at_most - 2) // 2)
    chosen = {0, len(values) - 1}
    for number in range(stretches):
        stretch = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        finite = [(value, i) for i in stretch if (value := values[i]) is not None]
        if finite:
            chosen |= {min(finite)[1], max(finite)[1]}
    return sorted(chosen)


def xs(run: Facts, points: Iterable[Point | None]) -> dict[str, list[float | None]]:
    """Of a trace along a run's way; a None among the points is a gap."""
    points = list(points)

    def each(value: Callable[[Point], float | None]) -> list[float | None]:
        return [None if point is None else value(point) for point in points]

    found = {
        "steps": each(lambda p: p.step),
        "tokens": each(lambda p: p.tokens),
        "seconds": each(lambda p: rounded(p.seconds)),
    }
    if run.dollars is not None:
        found["dollars"] = each(lambda p: rounded(p.dollars))
    return found


def line(run: int, name: str, x: dict[str, list[float | None]], y: Sequence[float | None], **style: Any) -> Trace:
    """A trace of run number `run`; x can be chosen."""
    colour = {"color": COLOURS[run % len(COLOURS)], "dash": DASHES[run // len(COLOURS) % len(DASHES)], "width": 1.5}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x["steps"],
        "y": [rounded(value) for value in y],
        "meta": {"x": x, "run": run},
        "line": colour | style.pop("line", {}),
        **style,
    }


def layout(y_title: str, **more: Any) -> dict[str, Any]:
    return {
        "margin": {"l": 60, "r": 16, "t": 30, "b": 44},
        "xaxis": {"title": {"text": X_NAMES["steps"]}, "automargin": True},
        "yaxis": y_axis(y_title),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "hovermode": "closest",
        **more,
    }


def y_axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 12}, "automargin": True}
