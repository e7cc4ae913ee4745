"""What runs did, from their storage alone.

relora-ray report RUN [RUN ...] [--html FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relora_ray import cli
from relora_ray.cli import command, printable
from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError, ReloraError
from relora_ray.runs import evaluations, metrics
from relora_ray.runs.metrics import Record, size_text
from relora_ray.runs.rollback import skipped
from relora_ray.runs.setting import MODEL, is_run
from relora_ray.storage import Storage, add_options_argument, parse_options
from relora_ray.study.page.contents import SETTINGS, Contents, Table, contents
from relora_ray.study.page.facts import run_facts
from relora_ray.study.page.html import find_plotly, render
from relora_ray.study.picture import draw_run
from relora_ray.study.run_log import RunLog, read_log
from relora_ray.sweep.results import Point, read_points

SHOWN = 8
"""Runs of steps that are listed."""
SWEEP = "sweep.yaml"
PAGE = "report.html"
MAX_LINES, MAX_CELL = 100, 100
"""Of a table that is printed."""
_READS = 4
"""Runs that are read at a time, each with requests of its own."""


def summary(storage: Storage) -> str:
    """A page of text: losses and perplexities, merges, checkpoint bytes by kind, where the model is."""
    return "\n".join(_lines(read_log(storage)))


def _lines(log: RunLog) -> Iterator[str]:
    cfg, evals = log.cfg, log.latest("eval")
    yield f"run {cfg.name} ({cfg.method.kind}), {log.url}"
    if log.origin is not None:
        yield f"  forked    from {log.origin.parent} after step {log.origin.step:,}"
    if evals:
        yield "  held-out text           loss    perplexity"
    best = _best(evals)
    for record in evals:
        numbers = f"{_number(record['loss'], 7, 4)}  {_number(record['perplexity'], 12, 2)}"
        mark = "   best" if record is best and len(evals) > 1 else ""
        yield f"    after step {record['step']:>7,}  {numbers}{_note(cfg, record['step'])}{mark}"
    yield from _named_sets(log)
    trained = log.latest("train")
    if trained:
        yield f"  trained   {trained[-1]['step']:,} of {cfg.steps:,} steps, {trained[-1]['tokens']:,} tokens"
    yield from _not_made(log, trained)
    merges = [b["step"] for b in log.latest("boundary") if b["boundary_kind"] == "merge"]
    where = " after steps " + ", ".join(f"{step:,}" for step in merges) if 0 < len(merges) < 20 else ""
    if cfg.merges or merges:
        yield f"  merges    {len(merges)}{where}"
    yield from _state(metrics.structures(log.kinds))
    checkpoints = log.latest("checkpoint")
    if checkpoints:
        base = [c["base_bytes"] for c in checkpoints if c["base_is_new"]]
        delta = [c["delta_bytes"] for c in checkpoints]
        yield (
            f"  saved     {len(checkpoints)} checkpoints: base {size_text(sum(base))} in {len(base)}, "
            f"delta {size_text(sum(delta))} in {len(delta)} (last: base {size_text(checkpoints[-1]['base_bytes'])}, "
            f"delta {size_text(delta[-1])})"
        )
    attempts = log.kinds["attempt"]
    yield f"  attempts  {len(attempts)}, world size {', '.join(str(a['world_size']) for a in attempts[-8:])}"
    for line in evaluations.lines(log.evaluations):
        yield f"  evaluated {line}"
    if log.has_model:
        yield f"  model     {log.url}/{MODEL} (plain Hugging Face folder)"


def _named_sets(log: RunLog) -> Iterator[str]:
    """The last evaluation on each set of data.validation, and the best one if that is another."""
    for name in metrics.sets_of(log.kinds):
        evals = log.latest(f"eval/{name}")
        if not evals:
            continue
        last = evals[-1]
        # A set that was added after the run began may have been exchanged: losses of another text do not compare.
        same = [r for r in evals if r.get("data_fingerprint") == last.get("data_fingerprint")]
        best = min((r for r in same if r["loss"] is not None), key=lambda r: float(r["loss"]), default=last)
        numbers = f"{_number(last['loss'], 7, 4)}  {_number(last['perplexity'], 12, 2)}"
        also = f"   best {best['loss']:.4f} after step {best['step']:,}" if best is not last else ""
        other = "   of another text before" if len(same) < len(evals) else ""
        yield f"    on {name[:20]:<20}{numbers}   after step {last['step']:,}{also}{other}"


def _state(structures: Sequence[Record]) -> Iterator[str]:
    """Bytes on each worker as they were last; nothing if the run's version did not record them."""
    found = structures[-1].get("state_bytes") if structures else None
    by_role = {role: size for role, size in found.items() if isinstance(size, int)} if isinstance(found, dict) else {}
    if by_role:
        parts = ", ".join(f"{role} {size_text(num_bytes)}" for role, num_bytes in by_role.items() if num_bytes)
        yield f"  state     {size_text(sum(by_role.values()))} on each worker: {parts}"


def _not_made(log: RunLog, trained: Sequence[Record]) -> Iterator[str]:
    """Updates among the steps that count that were not made, and why; counted from 0, as train.skip_steps is."""
    nothing = {r["step"] - 1 for r in trained if r["loss"] is None or r.get("grad_norm", 0.0) is None}
    left_out = nothing & skipped(log.rollbacks, log.cfg.steps).union(log.cfg.train.skip_steps)
    for name, steps, why in (
        ("skipped", nothing - left_out, "loss or gradient was not finite"),
        ("left out", left_out, "by train.skip_steps, or after going back"),
    ):
        if steps:
            yield f"  {name:9} {len(steps):,} of {len(trained):,} updates, {why}: {_spans(sorted(steps))}"


def _spans(steps: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` -> `3 to 5, 9`, no more than `SHOWN` of them."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    text = ", ".join(f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in spans[:SHOWN])
    return f"{text} and more" if len(spans) > SHOWN else text


def _number(value: float | None, width: int, digits: int) -> str:
    """One that is not finite is null in the log."""
    return f"{value:{width}.{digits}f}" if value is not None else f"{'n/a':>{width}}"


def _best(evals: Sequence[Record]) -> Record | None:
    """The lowest loss, the first of equal ones, of the evaluations on as much text as the last."""
    same = [e for e in metrics.of_one_text(evals) if e["loss"] is not None]
    return min(same, key=lambda e: (e["loss"], e["step"]), default=None)


def _note(cfg: RunConfig, step: int) -> str:
    notes = {0: "   before", cfg.warm_start_steps or -1: "   end of the warm start", cfg.steps: "   end"}
    return notes.get(step, "")


class Found:
    """What the arguments name: logs of runs, the points of a sweep if it is one, and what could not be read."""

    def __init__(self, places: Sequence[Storage]) -> None:
        self.problems: list[str] = []
        self.points: list[Point] | None = None
        self.logs: list[RunLog] = []
        for place in {place.url: place for place in places}.values():
            try:
                self.logs.append(read_log(place))
            except ConfigError as error:  # no run: it may hold some
                self._look_below(place, error, alone=len(places) == 1)

    def _look_below(self, place: Storage, error: ConfigError, *, alone: bool) -> None:
        """For runs that lie directly in a folder, which may be a sweep's."""
        is_sweep = place.exists(SWEEP)
        if is_sweep and alone:
            self.points = read_points(place)
        with ThreadPoolExecutor(_READS, thread_name_prefix="relora-ray-report") as pool:
            logs = list(pool.map(lambda name: self._log(place.child(name)), place.folders("")))
        self.logs += [log for log in logs if log is not None]
        if not is_sweep and not self.problems and not any(logs):
            raise error

    def _log(self, place: Storage) -> RunLog | None:
        """None if it is no run, or one that cannot be read."""
        try:
            return read_log(place) if is_run(place) else None
        except ReloraError as error:
            self.problems.append(f"{place.url} is left out: {error}")
            return None

    def page(
        self, places: Sequence[Storage], *, against: str | None = None, dollars_per_hour: float | None = None
    ) -> Contents:
        """All that is known, to be printed or drawn. `against`: the label of a run that others are compared with."""
        facts = [
            run_facts(log, label, dollars_per_hour=dollars_per_hour)
            for log, label in zip(self.logs, labels(self.logs), strict=True)
        ]
        return contents(self._title(places), facts, against=against, points=self.points, problems=self.problems)

    def _title(self, places: Sequence[Storage]) -> str:
        if len(self.logs) == 1 and self.points is None:
            return f"run {self.logs[0].cfg.name}"
        name = places[0].url.rpartition("/")[2] if len(places) == 1 else f"{len(self.logs)} runs"
        return f"sweep {name}" if self.points is not None else name


def html_page(place: Storage) -> str:
    """Of the run, the sweep or the runs there. ConfigError if there is none, or if plotly is not installed."""
    find_plotly()
    return render(Found([place]).page([place]))


def labels(logs: Sequence[RunLog]) -> list[str]:
    """What to call runs: by their names or, where these are not enough, by their folders too."""
    names = [log.cfg.name for log in logs]
    return [
        name if names.count(name) == 1 else log.url if len(log.url) <= 40 else f"...{log.url[-40:]}"
        for name, log in zip(names, logs, strict=True)
    ]


def _of_several(page: Contents) -> Iterator[str]:
    """Its tables in columns, and settings by row."""
    yield page.title
    for table in page.tables:
        yield f"\n{table.title}"
        yield from _settings(table) if table.title == SETTINGS else _columns(table)
    yield from ("", *page.warnings) if page.warnings else ()


def _columns(table: Table) -> Iterator[str]:
    rows = [[_short(cell) for cell in row] for row in (table.columns, *table.rows[:MAX_LINES])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(table.rows) > MAX_LINES:
        yield f"  and {len(table.rows) - MAX_LINES:,} more"


def _settings(table: Table) -> Iterator[str]:
    """One line for each of its columns: it has a row for each setting."""
    for number, label in enumerate(table.columns[1 : MAX_LINES + 1], 1):
        yield f"  {label}: " + " ".join(f"{row[0]}={row[number]}" for row in table.rows if row[number] != "")


def _short(cell: object) -> str:
    text = " ".join(str(cell).split())
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


def _file(name: str, option: str, endings: tuple[str, ...]) -> Path:
    if not name.endswith(endings):
        raise ConfigError(
            f"{option} {name!r} is no {' or '.join(endings)} file. Give one, or put {option} behind the runs."
        )
    return Path(name)


def _dollars(text: str) -> float:
    """For argparse: a price."""
    return cli.above_0(text, "number of dollars")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "report",
        "What runs did, from their storage alone: a page of text, and with --html one to look at, in one file.",
        "runs/quickstart",
        "runs/quickstart --html --picture quickstart.png",
        "runs/relora runs/lora --against relora --html compared.html --dollars-per-hour 2.5",
        "runs/my-sweep --html",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder or URL, or one that holds runs or a sweep"
    )
    parser.add_argument("--html", metavar="FILE", nargs="?", const=PAGE, help=f"also write a page; default: {PAGE}")
    parser.add_argument("--picture", metavar="FILE", help="also draw one run's losses: a .png or .svg file")
    parser.add_argument("--against", metavar="NAME", help="the run that others are compared with; default: the best")
    parser.add_argument("--dollars-per-hour", metavar="PRICE", type=_dollars, help="of one worker: adds dollars")
    add_options_argument(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    html = None if args.html is None else _file(args.html, "--html", (".html", ".htm"))
    picture = None if args.picture is None else _file(args.picture, "--picture", (".png", ".svg"))
    if html is not None:
        find_plotly()
    options = parse_options(args.storage_option)
    places = [cli.place("RUN", url, options, retry_s=cli.PATIENCE_S) for url in args.runs]
    found = Found(places)
    named = labels(found.logs)
    if args.against is not None and args.against not in named:
        raise ConfigError(f"--against {args.against!r} is none of these runs: {', '.join(named[:20])}. Name one.")
    if picture is not None and len(found.logs) != 1:
        raise ConfigError(f"--picture draws one run, and these are {len(found.logs)}. Give one, or --html for all.")
    one = len(found.logs) == 1 and found.points is None and not found.problems
    if one:
        print(printable("\n".join(_lines(found.logs[0]))))
    if not one or html is not None:
        page = found.page(places, against=args.against, dollars_per_hour=args.dollars_per_hour)
        if not one:
            print(printable("\n".join(_of_several(page))))
        if html is not None:
            data = render(page).encode()
            html.write_bytes(data)
            print(f"  page      {html} ({size_text(len(data))}, opens in a browser)")
    if picture is not None:
        draw_run(found.logs[0], picture)


if __name__ == "__main__":
    sys.exit(main())
