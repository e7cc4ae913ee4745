"""What `watch` shows, as words and, for a terminal, as rich's tables. The page in a browser says the same words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relora_ray.cli import printable
from relora_ray.runs.metrics import perplexity, size_text
from relora_ray.runs.standing import age_text
from relora_ray.study.live import View

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#%"
WIDE = 110
"""Columns from which there are two fields beside each other."""
LABEL = 10


def fields(view: View) -> Iterator[tuple[str, str]]:
    """Labels and texts, without the loss's picture. Text of storage is in them as it is: see `printable`."""
    yield "driver", view.driver
    if view.waits_for:
        yield "waits for", view.waits_for + ("" if view.waits_s is None else f", since {age_text(view.waits_s)}")
    if view.cause:
        yield "no step", view.cause
    yield "step", f"{view.step:,} of {view.steps:,}{_left(view)}"
    yield "loss", "none yet" if view.loss is None else f"{view.loss:.4f}"
    if view.eval_loss is not None:
        yield "held out", f"{view.eval_loss:.4f}, perplexity {perplexity(view.eval_loss):.2f}, after {view.eval_step:,}"
    if view.learning_rate is not None:
        yield "lr", f"{view.learning_rate:.3g}"
    if view.tokens_per_s is not None:
        yield "speed", f"{view.tokens_per_s:,.0f} tokens/s{_flops(view)}"
    if view.boundaries:
        yield "boundary", _boundaries(view)
    if view.attempt:
        since = "" if view.attempt_s is None else f", since {age_text(view.attempt_s)}"
        yield "workers", f"{view.world_size} on {view.device or 'unknown'}, attempt {view.attempt}{since}"
    if view.state_bytes:
        parts = ", ".join(f"{role} {size_text(count)}" for role, count in view.state_bytes.items())
        yield "state", f"{size_text(sum(view.state_bytes.values()))} on each worker: {parts}"
    yield "saved", _saved(view)
    if view.resizes or view.failures:
        yield "changes", f"{view.resizes} resizes, {view.failures} failures"
    if view.skipped:
        yield "skipped", f"{view.skipped:,} updates"


def spark(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """A line of at most `width` bars: means of equal shares of `values`, the least and the greatest being the lowest
    and the highest bar."""
    bars, width = ASCII_BARS if ascii_only else BARS, min(width, len(values))
    if width < 1:
        return ""
    cuts = [number * len(values) // width for number in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    return "".join(bars[int((mean - low) / span * (len(bars) - 1) + 0.5) if span else 0] for mean in means)


def frame(view: View, width: int, *, ascii_only: bool = False, problem: str = "") -> RenderableType:
    """One run. `problem`: why this is not of now."""
    title = Text(printable(f"{view.name} ({view.kind})"), style="bold")
    title.append(printable(f"  {view.url}"), style="dim")
    rows = [_cells(label, text) for label, text in fields(view)]
    place = next(number for number, (label, _) in enumerate(fields(view)) if label == "loss")
    half = width // 2 if width >= WIDE else width
    if line := spark(view.losses, half - LABEL - 4, ascii_only=ascii_only):
        rows.insert(place + 1, (Text(""), Text(line, style="cyan", no_wrap=True)))
    shown: list[RenderableType] = [title, _bar(view, width, ascii_only)]
    if width < WIDE:
        shown.append(_grid(rows))
    else:
        both = Table.grid(padding=(0, 2), expand=True)
        both.add_column(ratio=1)
        both.add_column(ratio=1)
        middle = (len(rows) + 1) // 2
        both.add_row(_grid(rows[:middle]), _grid(rows[middle:]))
        shown.append(both)
    if problem:
        shown.append(Text(printable(problem), style="red"))
    return Group(*shown)


def table(rows: Sequence[tuple[str, View | str]], width: int, *, ascii_only: bool = False) -> RenderableType:
    """Several runs, by name: of each how it is, or what is wrong. The narrower, the fewer columns."""
    columns = _columns(width)
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    for label in columns:
        shown.add_column(label, justify="left" if label in ("run", "now", "curve") else "right", no_wrap=label != "now")
    if rows and "run" in columns:
        shown.columns[0].max_width = max(8, width // 3)
        shown.columns[0].overflow = "ellipsis"
    for name, found in rows:
        cells = {"run": name} | ({"now": found} if isinstance(found, str) else _cells_of(found, ascii_only))
        shown.add_row(*(Text(printable(cells.get(label, ""))) for label in columns))
    return shown


def _columns(width: int) -> list[str]:
    """What fits, and is needed most."""
    wanted = [("run", 0), ("step", 0), ("loss", 0), ("now", 0), ("held out", 60), ("tokens/s", 72), ("saved", 84),
              ("left", 96), ("workers", 108), ("curve", 120)]  # fmt: skip
    order = ["run", "now", "step", "loss", "curve", "held out", "tokens/s", "left", "saved", "workers"]
    fitting = {label for label, least in wanted if width >= least}
    return [label for label in order if label in fitting]


def _cells_of(view: View, ascii_only: bool) -> dict[str, str]:
    return {
        "now": state_word(view),
        "step": f"{view.step:,}/{view.steps:,}",
        "loss": "" if view.loss is None else f"{view.loss:.4f}",
        "held out": "" if view.eval_loss is None else f"{view.eval_loss:.4f}",
        "tokens/s": f"{view.tokens_per_s:,.0f}" if view.tokens_per_s is not None and view.alive else "",
        "left": age_text(view.left_s) if view.left_s is not None and view.alive and not view.finished else "",
        "saved": "" if view.saved_s is None else f"{age_text(view.saved_s)} ago",
        "workers": str(view.world_size) if view.alive else "",
        "curve": spark(view.losses, 16, ascii_only=ascii_only),
    }


def state_word(view: View) -> str:
    if view.finished and not view.alive:
        return "finished"
    if not view.alive:
        return "no driver"
    return f"waits: {view.waits_for}" if view.waits_for else "trains"


def _cells(label: str, text: str) -> tuple[Text, Text]:
    style = {"waits for": "yellow", "no step": "red"}.get(label, "")
    return Text(label, style="dim"), Text(printable(text), style=style)


def _grid(rows: Sequence[tuple[Text, Text]]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=LABEL - 1)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    return grid


def _bar(view: View, width: int, ascii_only: bool) -> Text:
    share = min(1.0, view.step / view.steps)
    length = max(4, min(width, WIDE) - 8)
    done = int(length * share)
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    return Text(
        f"{full * done}{empty * (length - done)} {share:6.1%}", style="green" if view.finished else "", no_wrap=True
    )


def _left(view: View) -> str:
    if view.left_s is None or view.finished or not view.alive:
        return ""
    return f", {age_text(view.left_s)} left"


def _flops(view: View) -> str:
    if view.flops_per_s is None:
        return ""
    text = f", {_flops_text(view.flops_per_s)} a worker"
    if view.peak_flops:
        text += f", {view.flops_per_s / view.peak_flops:.1%} of {_flops_text(view.peak_flops)}"
    return text


def _flops_text(per_s: float) -> str:
    return f"{per_s / 1e12:.4g} TFLOP/s" if per_s >= 1e11 else f"{per_s / 1e9:.3g} GFLOP/s"


def _boundaries(view: View) -> str:
    text = f"{view.passed} of {view.boundaries}"
    if view.next_boundary is None:
        return text
    text += f", the next after step {view.next_boundary:,}"
    return text if view.next_boundary_s is None or not view.alive else f"{text}, in {age_text(view.next_boundary_s)}"


def _saved(view: View) -> str:
    if view.saved_step is None or view.saved_s is None:
        return "nothing yet"
    return f"step {view.saved_step:,}, {age_text(view.saved_s)} ago; {view.unsaved} steps after it are not"
