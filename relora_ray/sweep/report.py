"""What a sweep says, for people: README.md with its pictures, table.csv, and best.yaml to train with."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import yaml

from relora_ray.runs.metrics import perplexity, size_text
from relora_ray.storage import Storage
from relora_ray.study.plots import pyplot
from relora_ray.sweep.compare import comparison
from relora_ray.sweep.dimension import Value, names_of
from relora_ray.sweep.results import Point, best, importance, pareto, ranking, to_csv
from relora_ray.sweep.space import WARM, Sweep, short_value, text

FRONTS = {"state_bytes": ("training state, bytes", False), "tokens_per_s": ("tokens per second", True)}


def write_up(sweep: Sweep, points: Sequence[Point], out: Storage) -> None:
    """All of it into `out`."""
    out.put("table.csv", to_csv(points).encode())
    pictures = draw(sweep, points)
    for name, image in pictures.items():
        out.put(name, image)
    if (found := best(points)) is not None:
        out.put("best.yaml", best_config(sweep, found).encode())
    out.put("README.md", ("\n".join(page(sweep, points, list(pictures))) + "\n").encode())


def best_config(sweep: Sweep, point: Point) -> str:
    """The run's config of a point, as YAML: a run of its own, with the sweep's first seed."""
    raw = sweep.settled(point.settings)
    raw |= {"name": f"{sweep.name}-best", "seed": sweep.spec.seeds[0]}
    said = f"# Point {point.number} of the sweep {sweep.name}: held-out loss {point.loss():.4f}, mean of seeds "
    said += ", ".join(map(str, sweep.spec.seeds)) + ".\n"
    if point.parent is not None:
        said += (
            f"# It was forked from point {point.parent} after {point.forked_at} updates, which had other settings.\n"
        )
    return said + yaml.safe_dump(raw, sort_keys=False)


def page(sweep: Sweep, points: Sequence[Point], pictures: Sequence[str]) -> Iterator[str]:
    spec, found = sweep.spec, best(points)
    yield f"# Sweep {sweep.name}\n"
    states = ", ".join(
        f"{n} {state}" for state in dict.fromkeys(p.state for p in points) if (n := _count(points, state))
    )
    yield (
        f"{len(points)} points ({states}) of {spec.search} search, each with seeds {', '.join(map(str, spec.seeds))}, "
        f"{sweep.rungs[-1]:,} updates a run.\n"
    )
    if found is not None:
        value = perplexity(found.loss())
        yield f"Best: {text(found.settings)}, held-out loss {found.loss():.4f}, perplexity {value:.2f}.\n"
    else:
        yield "No point came to the end: there is no best one.\n"
    yield from comparison(sweep, points)
    yield from compute(sweep, points)
    names = names_of(spec.space)
    yield (
        "| point | " + " | ".join(names) + " | loss | by seed | perplexity | tokens/s | state | peak memory | updates |"
    )
    yield "|---" * (len(names) + 8) + "|"
    for point in ranking(points):
        yield _row(point, names)
    said = "State: weights, gradients and moments after the warm start, by shape. Loss in nats per token, held-out"
    yield f"\n{said}{'; ± is the standard deviation over seeds' if len(spec.seeds) > 1 else ''}.\n"
    if spec.halving or spec.population:
        yield "What follows is of points that came to the end, which were the better ones on the way.\n"
    if sum(point.state == "done" for point in points) > 2:
        yield "## What matters\n"
        yield "| key | share of the variance | 90 % of resamples of the seeds |"
        yield "|---|---|---|"
        for item in importance(points):
            between = "" if math.isnan(item.low) else f"{item.low:.0%} to {item.high:.0%}"
            yield f"| {item.name} | {item.share:.0%} | {between} |"
        yield (
            "\nHow much of the variance of the losses the values of one key alone explain, or those of two beyond what "
            "each does alone (omega squared). What a seed adds to all points is left out"
            + ("" if len(spec.seeds) > 1 else ". With one seed, noise and what other keys do cannot be told apart")
            + ".\n"
        )
    for name in FRONTS:
        front = pareto(points, name, larger=FRONTS[name][1])
        if len(front) > 1:
            yield (
                f"Pareto front of loss and {FRONTS[name][0]}: "
                + "; ".join(f"{text(p.settings)} ({p.loss():.4f}, {p.mean(name):.4g})" for p in front)
                + "\n"
            )
    for name in pictures:
        yield f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n"
    for point in points:
        if point.why:
            yield f"Point {point.number} ({text(point.settings)}) {point.state}: {point.why.partition(chr(10))[0]}\n"


def compute(sweep: Sweep, points: Sequence[Point]) -> Iterator[str]:
    """What was trained, and what sharing warm starts saved."""
    runs = [run for point in points for run in point.runs.values()]
    own = sum(run["steps"] for run in runs)
    forked = [run for run in runs if run["forked_from"].startswith(WARM)]
    warm = sum({run["forked_from"]: run["forked_at"] for run in forked}.values())
    alone, shared = own + sum(run["forked_at"] for run in forked), {run["forked_from"] for run in forked}
    yield f"{own + warm:,} updates were trained" + (
        f", {warm:,} of them in {len(shared)} warm start(s) that {len(forked)} runs share; without sharing it would "
        f"have been {alone:,}: {1 - (own + warm) / alone:.1%} saved.\n"
        if forked
        else ".\n"
    )


def _count(points: Sequence[Point], state: str) -> int:
    return sum(point.state == state for point in points)


def _row(point: Point, names: Sequence[str]) -> str:
    settings = " | ".join(short_value(point.settings.get(name, "")) for name in names)
    by = point.losses.get(point.last_rung, {})
    if not by:
        return f"| {point.number} | {settings} | {point.state} | | | | | | |"
    spread = f" ± {statistics.stdev(by.values()):.4f}" if len(by) > 1 else ""
    loss = f"{point.loss():.4f}{spread}" if point.state != "diverged" else "diverged"
    seeds = ", ".join(f"{loss:.4f}" for loss in by.values())
    ended = "" if point.state == "done" else f" {point.state}"
    return (
        f"| {point.number} | {settings} | {loss} | {seeds} | {perplexity(statistics.fmean(by.values())):.2f} | "
        f"{point.mean('tokens_per_s'):,.0f} | {size_text(point.mean('state_bytes'))} | "
        f"{size_text(point.mean('peak_memory_bytes'))} | {point.last_rung:,}{ended} |"
    )


def draw(sweep: Sweep, points: Sequence[Point]) -> dict[str, bytes]:
    """PNG images by file name: those that the points are enough for."""
    done = [point for point in points if point.state == "done"]
    if len(done) < 2:
        return {}
    names = [name for name in names_of(sweep.spec.space) if all(name in point.settings for point in done)]
    pictures = {"parallel.png": _parallel(names, done)}
    listed = [name for name in names if len({point.settings[name] for point in done}) > 1]
    listed = [name for name in listed if len({point.settings[name] for point in done}) <= 12]
    if len(listed) > 1:
        pictures["heat-maps.png"] = _heat_maps(listed, done)
    for name, (label, larger) in FRONTS.items():
        if len({point.mean(name) for point in done}) > 1:
            pictures[f"pareto-{name.replace('_', '-')}.png"] = _front(name, label, larger, done)
    return pictures


def _heat_maps(names: list[str], points: list[Point]) -> bytes:
    """Loss by every pair of keys, mean over the others; of three keys, by two for each value of the third."""
    plt = pyplot()
    panels: list[tuple[str, str, str, list[Point]]] = []
    if len(names) == 3:
        across, down, third = names
        for value in _values(third, points):
            chosen = [p for p in points if p.settings[third] == value]
            panels.append((across, down, f"{_leaf(third)} {short_value(value)}", chosen))
    else:
        panels = [(a, b, "", points) for a, b in combinations(names, 2)]
    low, high = (f(p.loss() for p in points) for f in (min, max))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1, 3.6), squeeze=False, layout="constrained"
    )
    for axis, (across, down, title, chosen) in zip(axes[0], panels, strict=True):
        columns, rows = _values(across, points), _values(down, points)
        cells: dict[tuple[Value, Value], list[float]] = defaultdict(list)
        for point in chosen:
            cells[point.settings[down], point.settings[across]].append(point.loss())
        grid = [[statistics.fmean(cells[r, c]) if cells.get((r, c)) else math.nan for c in columns] for r in rows]
        image = axis.imshow(grid, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
        for y, line in enumerate(grid):
            for x, loss in enumerate(line):
                if not math.isnan(loss):
                    dark = loss > (low + high) / 2
                    axis.text(
                        x, y, f"{loss:.3f}", ha="center", va="center", color="white" if dark else "black", fontsize=8
                    )
        axis.set_xticks(range(len(columns)), [short_value(v) for v in columns])
        axis.set_yticks(range(len(rows)), [short_value(v) for v in rows])
        axis.set_xlabel(_leaf(across))
        axis.set_ylabel(_leaf(down))
        axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="held-out loss")
    return _png(plt, figure)


def _parallel(names: list[str], points: list[Point]) -> bytes:
    """One line per point over an axis per key, coloured by loss."""
    plt = pyplot()
    columns = [*names, "loss"]
    figure, axis = plt.subplots(figsize=(1.8 * len(columns) + 2, 4), layout="constrained")
    low, high = (f(p.loss() for p in points) for f in (min, max))
    colours = plt.get_cmap("viridis_r")
    ticks = {name: _values(name, points) for name in names}
    ordered = sorted(points, key=lambda p: -p.loss())  # the best on top
    for place, point in enumerate(ordered):
        aside = 0.03 * (
            place / max(1, len(ordered) - 1) - 0.5
        )  # or lines through the same values would hide each other
        heights = [_height(ticks[name], point.settings[name]) + aside for name in names]
        share = (point.loss() - low) / (high - low or 1)
        axis.plot(range(len(columns)), [*heights, share], color=colours(share), linewidth=1.5)
    for x, name in enumerate(columns):
        axis.axvline(x, color="0.7", linewidth=0.8)
        marks = ticks.get(name, [low, high])
        shown = marks if len(marks) <= 8 else [marks[0], marks[-1]]
        for mark in shown:
            y = _height(marks, mark)
            axis.text(x + 0.04, y, short_value(mark), fontsize=9, va="center", bbox={"color": "white", "pad": 0.8})
    axis.set_xticks(range(len(columns)), [_leaf(name) for name in columns])
    axis.set_yticks([])
    return _png(plt, figure)


def _height(values: list[Value], value: Value) -> float:
    """Evenly spaced, in order: values of a sweep are usually a geometric row."""
    return values.index(value) / max(1, len(values) - 1)


def _front(name: str, label: str, larger: bool, points: list[Point]) -> bytes:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.scatter([p.mean(name) for p in points], [perplexity(p.loss()) for p in points], color="0.6", s=18)
    front = sorted(pareto(points, name, larger=larger), key=lambda p: p.mean(name))
    across, up = [p.mean(name) for p in front], [perplexity(p.loss()) for p in front]
    axis.plot(across, up, "o-", color="tab:blue", label="Pareto front")
    axis.set_xlabel(label)
    axis.set_ylabel("perplexity")
    axis.legend()
    return _png(plt, figure)


def _values(name: str, points: Sequence[Point]) -> list[Value]:
    values = {point.settings[name] for point in points}
    return sorted(values, key=lambda v: (isinstance(v, str), v))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _png(plt: Any, figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    plt.close(figure)
    return out.getvalue()
