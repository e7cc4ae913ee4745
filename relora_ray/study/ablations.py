"""A table of runs that differ in one thing each: tuned on one grid, repeated over seeds, written up as it goes.

python -m relora_ray.ablations TABLE.yaml --out FOLDER [key=value ...]

Every row is trained by the ordinary loop, in a process of one thread, at every point of the grid with the first seed.
As long as the point of lowest held-out loss has a neighbour that was not tried, beyond the grid's edge too, that is
tried (`extend`). The best point is then repeated with the other seeds, and judged on other held-out text than what
chose it (`report_rows`). Rows are compared seed by seed with the row that `against` names. FOLDER gets results.json
(every run), README.md (the tables) and curves.png after each run. A run that results.json has is not repeated, one that
was interrupted goes on from its checkpoint. The runs themselves lie under the table's `storage`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import Field, ValidationError, model_validator

from relora_ray import __version__, cli
from relora_ray.cli import at_least_1, command
from relora_ray.commands.shipped import find
from relora_ray.config import RunConfig, Section
from relora_ray.config.file import parse_config, parse_mapping, read_text
from relora_ray.errors import ConfigError, DamagedError, NonFiniteError
from relora_ray.study.paired import difference
from relora_ray.study.plots import pyplot

Point = dict[str, float]
Record = dict[str, Any]


class Row(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    label: str
    set: dict[str, Any] = Field({})
    """Keys of the run's config, or whole sections, that make this row."""
    grid: dict[str, tuple[float, ...]] | None = None
    """Instead of the table's."""
    against: str | None = None
    """Instead of the table's."""


class Table(Section):
    title: str
    text: str = ""
    """Put under the title."""
    base: dict[str, Any]
    """A run's config, less its name and seed."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """The first is the one that the grid is searched with."""
    grid: dict[str, tuple[float, ...]]
    """Values of config keys; every row is tried at all combinations."""
    warm_start_learning_rate: float | None = None
    """Learning rate of warm starts, the same for every row and grid point."""
    extend: int = Field(0, ge=0)
    """How many points a row may try besides its grid, to have both neighbours of the best one in every key. Beyond the
    grid's edge values go on by the ratio of the last two."""
    report_rows: int | None = Field(None, gt=0)
    """Validation rows that the best point is judged by, evenly spaced over those behind the `train.eval_rows` that
    choose it. None: by the same."""
    against: str | None = None
    """The row that the others are compared with, seed by seed."""
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Table:
        lists: list[tuple[str, list[Any]]] = [
            ("two rows have the name", [row.name for row in self.rows]),
            ("seeds has twice", list(self.seeds)),
            *((f"grid has twice for {key}", list(grid[key])) for grid in self.grids for key in grid),
        ]
        if empty := [key for grid in self.grids for key, values in grid.items() if not values]:
            raise ValueError(f"grid has no value for {empty[0]}")
        names = [row.name for row in self.rows]
        if unknown := [a for a in (self.against, *(row.against for row in self.rows)) if a and a not in names]:
            raise ValueError(f"against={unknown[0]} is no row. There are {', '.join(names)}")
        for what, values in lists:
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{what} {twice[0]}: every run counts once")
        return self

    @property
    def grids(self) -> list[dict[str, tuple[float, ...]]]:
        """The table's own and its rows'."""
        return [self.grid, *(row.grid for row in self.rows if row.grid is not None)]

    @property
    def decided(self) -> set[str]:
        """Keys that the table sets itself, which an override would make equal in runs that must differ."""
        return {"name", "seed", *(key for grid in self.grids for key in grid)}

    def points(self, row: Row) -> list[Point]:
        grid = self.grid if row.grid is None else row.grid
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def config(self, row: Row, point: Point, seed: int, overrides: list[str]) -> RunConfig:
        short = "-".join(f"{key.rpartition('.')[2]}{value:g}" for key, value in point.items()).replace("+", "")
        settings = row.set | point | {"seed": seed, "name": f"{row.name}-{short}-seed{seed}"}
        lines = [f"{key}={_flow(value)}" for key, value in settings.items()]
        source = f"row {row.name!r}"
        cfg = parse_config(_flow({"name": "x", **self.base}), [*lines, *overrides], source=source)
        if self.warm_start_learning_rate is not None and cfg.warm_start_steps:
            ratio = self.warm_start_learning_rate / cfg.optimizer.learning_rate
            lines.append(f"method.warm_start_lr_ratio={ratio!r}")
            cfg = parse_config(_flow({"name": "x", **self.base}), [*lines, *overrides], source=source)
        # A row that was changed in the table is another run, as is one whose architecture was.
        return _named(cfg.name, _with_architecture(cfg, _architecture(cfg.model.huggingface)))


def _named(name: str, cfg: RunConfig) -> RunConfig:
    return cfg.model_copy(update={"name": f"{name}-{identity(cfg)[:6]}"})


def _with_architecture(cfg: RunConfig, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"fingerprint": fingerprint})})


@cache
def _architecture(place: str) -> str:
    """The fingerprint of what `model.huggingface` names; empty if it names nothing."""
    if not place:
        return ""
    from relora_ray.modeling.architecture import read_architecture

    return read_architecture(place).fingerprint


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def load_table(path: str) -> Table:
    raw = parse_mapping(read_text(path), source=path)
    try:
        return Table.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            "\n".join([f"{path} is not a table of runs, such as those of configs/ablations/:", *lines])
        ) from None  # the cause shows values


class Results:
    """What every run came to, by the settings that decide it: a change of the table asks for new runs only."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.json"
        self.records: dict[str, Record] = {}
        if self._path.exists():
            try:
                self.records = {r["identity"]: r for r in json.loads(self._path.read_text())["runs"]}
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{self._path} does not hold results. Restore it, or delete it.") from error

    def get(self, cfg: RunConfig, report_rows: int | None = None) -> Record | None:
        """None, too, if the run was not judged by so many rows. Runs of versions that went by the place of
        `model.huggingface` are known by that."""
        found = self.records.get(identity(cfg)) or self.records.get(identity(_with_architecture(cfg, "")))
        judged = report_rows is None or not has_loss(found) or found.get("report_rows") == report_rows
        return found if judged else None

    def add(self, record: Record) -> None:
        self.records[record["identity"]] = record
        ordered = sorted(self.records.values(), key=lambda r: r["name"])
        text = '{"runs": [\n' + ",\n".join(json.dumps(r) for r in ordered) + "\n]}\n"
        beside = self._path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(self._path)


# What a result does not depend on; all else, how it is evaluated and rounded included, makes another run.
_ELSEWHERE = (
    "name", "storage", "data.path", "data.storage_options", "data.validation", "checkpoint.", "cluster.",
    "train.log_every_steps",
    "train.divergence_", "train.max_rollbacks", "train.stop_after_steps",  # see run_one
    "train.effective_weights", "train.loss_chunk_tokens", "train.recompute",
)  # fmt: skip


def identity(cfg: RunConfig) -> str:
    """Digest of the settings that decide a run's record, its data's fingerprint among them."""
    settings = cfg.settings()
    settings["train.compile"] = bool(settings["train.compile"])  # without a word: off, as these are runs on CPUs
    decisive = {k: v for k, v in settings.items() if not k.startswith(_ELSEWHERE)}
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def run_one(cfg: RunConfig, report_rows: int | None = None) -> Record:
    """Train one run to its end, in this process; its record. A run that diverges has no loss."""
    from relora_ray.loop import loss_on, run_attempt
    from relora_ray.modeling.parallel import World
    from relora_ray.runs import metrics
    from relora_ray.runs.batches import open_batches
    from relora_ray.runs.places import run_storage
    from relora_ray.runs.setting import check_run

    diverged, reported = "", dict[str, Any]()
    # A row that diverges is a result: nothing may save it.
    cfg = check_run(cfg.model_copy(update={"train": cfg.train.model_copy(update={"max_rollbacks": 0})}))
    try:
        state = run_attempt(cfg, World())
        if report_rows is not None:
            behind = open_batches(cfg, World()).validation.rows_behind(cfg.train.eval_rows, report_rows)
            loss, _ = loss_on(cfg, World(), state.model, behind)
            reported = {"report_rows": report_rows, "reported": loss}
    except NonFiniteError as error:
        diverged = str(error)
    storage = run_storage(cfg)
    records = metrics.read_kinds(storage)
    evals = {r["step"]: r["loss"] for r in metrics.latest(records["eval"])}
    steps, structures = metrics.latest(records["train"]), metrics.structures(records)
    return {
        "name": cfg.name,
        "identity": identity(cfg),
        "data_fingerprint": cfg.data.fingerprint,
        "seed": cfg.seed,
        "loss": None if diverged else evals[cfg.steps],
        "diverged": diverged,
        **reported,
        "evals": evals,
        "tokens": steps[-1]["tokens"],
        "num_trainable": structures[-1]["num_trainable"],
        "num_parameters": structures[0]["num_parameters"],
        "train_s": round(sum(s["step_s"] for s in steps)),
        "machine": machine(),
        "version": version(),
    }


def run_table(table: Table, out: Path, overrides: list[str], *, jobs: int) -> None:
    """All runs that are still missing, `jobs` at a time."""
    from relora_ray.runs.setting import open_data

    pyplot()
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in table.decided:
            raise ConfigError(f"{key} is decided by the table, run by run, and cannot be overridden. Change the table.")
    first = table.seeds[0]
    one = table.config(table.rows[0], table.points(table.rows[0])[0], first, overrides)
    overrides = [*overrides, f"data.fingerprint={open_data(one).fingerprint}"]
    for row in table.rows:  # a mistake in the last row is found before the first is trained
        for point in table.points(row):
            table.config(row, point, first, overrides)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out)
    os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        running: dict[Future[Record], str] = {}
        searching = list(table.rows)

        def submit(cfg: RunConfig, report_rows: int | None) -> None:
            if identity(cfg) not in running.values():  # two rows may share a run
                running[pool.submit(run_one, _as_it_began(cfg), report_rows)] = identity(cfg)

        while True:
            for row in list(searching):
                found = collect(table, row, results, overrides)
                wanted: list[tuple[RunConfig, int | None]] = [
                    (table.config(row, point, first, overrides), None) for point in found.untried
                ]
                if not wanted and found.best is not None:
                    chosen = [table.config(row, found.best, seed, overrides) for seed in table.seeds]
                    wanted = [(c, table.report_rows) for c in chosen if results.get(c, table.report_rows) is None]
                if not wanted:
                    searching.remove(row)
                for cfg, report_rows in wanted:
                    submit(cfg, report_rows)
            write_up(table, results, out, overrides)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                record = future.result()
                results.add(record)
                loss = "diverged" if record["loss"] is None else f"loss {record['loss']:.4f}"
                print(f"{record['name']}: {loss}, {record['train_s']} s", flush=True)


def _as_it_began(cfg: RunConfig) -> RunConfig:
    """The run that a version which went by the place of `model.huggingface` has begun, if one has; else `cfg`."""
    if not cfg.model.fingerprint:
        return cfg
    from relora_ray.runs.places import run_storage
    from relora_ray.runs.setting import is_run

    before = _named(cfg.name.rpartition("-")[0], _with_architecture(cfg, ""))
    return before if is_run(run_storage(before)) else cfg


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class RowResults:
    """What is known of a row so far."""

    row: Row
    grid: list[tuple[Point, Record | None]]
    """With the first seed; what was tried beyond the grid is at the end."""
    seeds: list[Record]
    """At the best point: as many as have been run."""
    beyond: int
    """How many of the points were not in the grid."""
    open_keys: list[str]
    """Keys in which the best point has a neighbour that was not tried."""

    @property
    def untried(self) -> list[Point]:
        """What is still to be run with the first seed."""
        return [point for point, record in self.grid if record is None]

    @property
    def best(self) -> Point | None:
        """The grid point of lowest loss, or None if all diverged or none was run."""
        return _best(self.grid)

    def losses(self, table: Table) -> dict[int, float]:
        """What the best point is judged by, by seed."""
        name = "loss" if table.report_rows is None else "reported"
        return {record["seed"]: record[name] for record in self.seeds if has_loss(record)}


def _best(grid: Sequence[tuple[Point, Record | None]]) -> Point | None:
    losses = [(record["loss"], number) for number, (_, record) in enumerate(grid) if has_loss(record)]
    return grid[min(losses)[1]][0] if losses else None


def has_loss(record: Record | None) -> TypeGuard[Record]:
    return record is not None and record["loss"] is not None


def collect(table: Table, row: Row, results: Results, overrides: list[str]) -> RowResults:
    """What the results say of a row, and what they ask for: the same whenever it is asked."""
    first = table.seeds[0]

    def look_up(points: Sequence[Point]) -> list[tuple[Point, Record | None]]:
        return [(point, results.get(table.config(row, point, first, overrides))) for point in points]

    def is_run(point: Point) -> bool:
        try:
            table.config(row, point, first, overrides)
        except ConfigError:
            return False
        return True

    grid, beyond, around = look_up(table.points(row)), 0, list[tuple[str, Point]]()
    while all(record is not None for _, record in grid) and (best := _best(grid)) is not None:
        tried = [point for point, _ in grid]
        around = [(key, p) for key, p in _neighbours(best, tried) if p not in tried and is_run(p)]
        if not around or beyond + len(around) > table.extend:
            break
        beyond += len(around)
        grid += look_up([point for _, point in around])
        around = []
    seeds: list[Record | None] = []
    if (best := _best(grid)) is not None and all(record is not None for _, record in grid):
        configs = [table.config(row, best, seed, overrides) for seed in table.seeds]
        seeds = [results.get(cfg, table.report_rows) for cfg in configs]
    open_keys = list(dict.fromkeys(key for key, _ in around))
    return RowResults(row, grid, [record for record in seeds if record is not None], beyond, open_keys)


def _neighbours(best: Point, tried: Sequence[Point]) -> Iterator[tuple[str, Point]]:
    """The points one step from `best` in each key that has several values: to the next value that was tried, or, where
    there is none, on by the ratio of the last two."""
    for key, value in best.items():
        values = sorted({point[key] for point in tried})
        if len(values) < 2 or values[0] <= 0:
            continue
        at = values.index(value)
        lower = values[at - 1] if at else float(f"{value * value / values[1]:.6g}")
        higher = values[at + 1] if at + 1 < len(values) else float(f"{value * value / values[-2]:.6g}")
        yield from ((key, best | {key: neighbour}) for neighbour in (lower, higher))


def write_up(table: Table, results: Results, out: Path, overrides: list[str]) -> None:
    rows = [collect(table, row, results, overrides) for row in table.rows]
    (out / "README.md").write_text("\n".join(_page(table, rows)) + "\n")
    _plot(table.title, [row for row in rows if row.losses(table)], out / "curves.png")


def _page(table: Table, rows: list[RowResults]) -> Iterator[str]:
    yield f"# {table.title}\n"
    if table.text:
        yield table.text.strip() + "\n"
    compared = any(against for against in (table.against, *(row.against for row in table.rows)))
    against = "| against, seed by seed " if compared else ""
    yield f"| | trained parameters | grid point | held-out loss | perplexity {against}| by seed |"
    yield f"|---|---|---|---|---{'|---' if compared else ''}|---|"
    by_name = {found.row.name: found for found in rows}
    for found in rows:
        yield _row(table, found, by_name, compared)
    yield f"\nLoss in nats per token, mean and standard deviation over seeds {', '.join(map(str, table.seeds))}."
    if table.report_rows is None:
        yield "The first of them also chose the grid point, which favours rows with larger grids a little."
    else:
        cfg = table.config(table.rows[0], table.points(table.rows[0])[0], table.seeds[0], [])
        yield (
            f"The point was chosen with the first of them on {cfg.train.eval_rows * cfg.data.seq_len:,} held-out "
            f"tokens, and judged on {table.report_rows * cfg.data.seq_len:,} others, spread over the rest of that text."
        )
    if compared:
        yield (
            "Against: the mean difference to the named row of runs with the same seed, and its 95 % interval (t). "
            "Each interval is of one comparison by itself: of twenty between equals one is expected to exclude zero."
        )
    yield f"\n## The grid, seed {table.seeds[0]}\n"
    yield "| | held-out loss at each point |"
    yield "|---|---|"
    for found in rows:
        points = (f"{_point(point)}: {_loss(record)}" for point, record in found.grid)
        yield f"| {found.row.label} | {'; '.join(points)}{_said_of_edges(found)} |"
    yield "\n![held-out loss over the run](curves.png)\n"
    runs = {r["identity"]: r for f in rows for r in (*(r for _, r in f.grid if r is not None), *f.seeds)}
    for what, of in (("Machine", "machine"), ("Version", "version"), ("Data", "data_fingerprint")):
        yield f"{what}: {'; '.join(sorted({str(r[of]) for r in runs.values()})) or '-'}  "
    hours = sum(r["train_s"] for r in runs.values()) / 3600
    tokens = ", ".join(f"{n:,}" for n in sorted({r["tokens"] for r in runs.values() if has_loss(r)}))
    yield f"{len(runs)} runs of {tokens or 'no'} tokens, {hours:.1f} hours of one thread\n"
    yield "## Settings\n"
    rows_ = {f.row.name: f.row.set for f in rows if f.row.set}
    settings = table.base | {"warm starts": {"optimizer.learning_rate": table.warm_start_learning_rate}, "rows": rows_}
    yield f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)}```"


def _said_of_edges(found: RowResults) -> str:
    """A note where a better point may lie next to the best one."""
    beyond = f"; {found.beyond} of them beyond the grid" if found.beyond else ""
    return beyond + (f"; best at the edge of {', '.join(found.open_keys)}" if found.open_keys else "")


def _row(table: Table, found: RowResults, rows: dict[str, RowResults], compared: bool) -> str:
    empty = "| " if compared else ""
    if found.best is None:
        state = "diverged" if found.grid and not found.untried else "not run yet"
        return f"| {found.row.label} | | | {state} | {empty}| |"
    run = sum(record is not None for _, record in found.grid)
    if not found.seeds:
        part = f"{_point(found.best)} (so far: {run} of {len(found.grid)} points run)"
        return f"| {found.row.label} | | {part} | not run yet | {empty}| |"
    by_seed, one = found.losses(table), found.seeds[0]
    losses = list(by_seed.values())
    mean = statistics.fmean(losses)
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    if len(losses) < len(found.seeds):
        spread += f" ({len(found.seeds) - len(losses)} of {len(found.seeds)} diverged)"
    other = found.row.against or table.against
    difference = ""
    if compared:
        difference = f"| {_difference(by_seed, rows[other], table) if other and other != found.row.name else ''} "
    each = ", ".join(f"{by_seed[r['seed']]:.4f}" if has_loss(r) else "diverged" for r in found.seeds)
    return (
        f"| {found.row.label} | {one['num_trainable']:,} | {_point(found.best)} "
        f"| {mean:.4f}{spread} | {math.exp(mean):.3f} {difference}| {each} |"
    )


def _difference(by_seed: dict[int, float], other: RowResults, table: Table) -> str:
    found = difference(by_seed, other.losses(table))
    if found is None or found.num_pairs < 2:
        return f"{other.row.label}: -"
    zero = ", includes zero" if found.includes_zero else ""
    return f"{other.row.label}: {found.mean:+.4f} ± {found.half:.4f}{zero}"


def _loss(record: Record | None) -> str:
    if record is None:
        return "-"
    return f"{record['loss']:.4f}" if has_loss(record) else "diverged"


def _point(point: Point) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in point.items())


def _plot(title: str, rows: list[RowResults], path: Path) -> None:
    """Mean held-out loss of every row over the run, with the range over seeds."""
    if not rows:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.5))
    ends = []
    for number, found in enumerate(rows):
        curves = [{int(s): loss for s, loss in r["evals"].items() if int(s) > 0} for r in found.seeds if has_loss(r)]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour, dashes = f"C{number % 10}", ["-", "--", ":"][number // 10 % 3]
        means = [statistics.fmean(v) for v in values]
        axes.plot(steps, means, marker=".", label=found.row.label, color=colour, linestyle=dashes)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        ends += values[-1]
    axes.set_ylim(min(ends) - 0.03, max(ends) + 0.3)
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def machine() -> str:
    """Processor and number of cores, and torch's version."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def version() -> str:
    """The package's version, with the commit where it runs from a checkout."""
    try:
        return f"{__version__} at {commit_of(Path(__file__).parent)}"
    except (OSError, subprocess.CalledProcessError):
        return __version__


def commit_of(checkout: Path) -> str:
    """OSError or CalledProcessError where there is no git, or no checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        "ablations",
        (__doc__ or "").splitlines()[0],
        "configs/ablations/resets.yaml data.path=data/books --out resets --jobs 2",
    )
    parser.add_argument("table", help="a YAML of configs/ablations/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, such as data.path=FOLDER")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json, README.md and curves.png")
    parser.add_argument("--jobs", type=at_least_1, default=1, help="runs at a time, one thread each")
    args = parser.parse_intermixed_args(argv)
    run_table(load_table(find(args.table)), args.out, args.overrides, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
