"""A table of runs that differ in one thing each: tuned on one grid, repeated over seeds, written up as it goes.

python -m relora_ray.ablations TABLE.yaml --out FOLDER [key=value ...]

Every row is trained by the ordinary loop, in a process of one thread, at every point of the grid with the first seed;
the point of lowest held-out loss is then repeated with the other seeds. FOLDER gets results.json (every run), README.md
(the tables) and curves.png after each run. A run that results.json has is not repeated, one that was interrupted goes
on from its checkpoint. The runs themselves lie under the table's `storage`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from relora_ray import __version__
from relora_ray.config import RunConfig, Section
from relora_ray.config_file import parse_config
from relora_ray.errors import ConfigError, NonFiniteError, ReloraError

Point = dict[str, float]


class Row(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    label: str
    set: dict[str, Any] = Field({})
    """Keys of the run's config, or whole sections, that make this row."""
    grid: dict[str, tuple[float, ...]] | None = None
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
    rows: tuple[Row, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        return rows

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
        # A row that was changed in the table is another run.
        return cfg.model_copy(update={"name": f"{cfg.name}-{identity(cfg)[:6]}"})


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def load_table(path: str) -> Table:
    try:
        return Table.model_validate(yaml.safe_load(Path(path).read_text()))
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read: {error.strerror}. Give a table of configs/ablations/.") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} is not a table of runs: {error}") from error


class Results:
    """What every run came to, by the settings that decide it: a change of the table asks for new runs only."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.json"
        self.records: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.records = {r["identity"]: r for r in json.loads(self._path.read_text())["runs"]}

    def get(self, cfg: RunConfig) -> dict[str, Any] | None:
        return self.records.get(identity(cfg))

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["identity"]] = record
        ordered = sorted(self.records.values(), key=lambda r: r["name"])
        text = '{"runs": [\n' + ",\n".join(json.dumps(r) for r in ordered) + "\n]}\n"
        beside = self._path.with_suffix(".tmp")
        beside.write_text(text)
        beside.replace(self._path)


def identity(cfg: RunConfig) -> str:
    """Digest of the settings that decide a run's result, its data's fingerprint among them."""
    return sha256(json.dumps(cfg.identity(), sort_keys=True).encode()).hexdigest()[:16]


def run_one(cfg: RunConfig) -> dict[str, Any]:
    """Train one run to its end, in this process; its record. A run that diverges has no loss."""
    from relora_ray import metrics
    from relora_ray.loop import run_attempt
    from relora_ray.parallel import World
    from relora_ray.runs import claim, run_storage

    diverged = ""
    cfg = claim(cfg)
    try:
        run_attempt(cfg, World())
    except NonFiniteError as error:
        diverged = str(error)
    storage = run_storage(cfg)
    evals = {r["step"]: r["loss"] for r in metrics.read(storage, "eval")}
    steps = metrics.read(storage, "train")
    return {
        "name": cfg.name,
        "identity": identity(cfg),
        "data_fingerprint": cfg.data.fingerprint,
        "seed": cfg.seed,
        "loss": None if diverged else evals[cfg.steps],
        "diverged": diverged,
        "evals": evals,
        "tokens": steps[-1]["tokens"],
        "num_trainable": metrics.read_all(storage, "boundary")[-1]["num_trainable"]
        if cfg.warm_start_steps
        else metrics.read_all(storage, "attempt")[-1]["num_trainable"],
        "num_parameters": metrics.read_all(storage, "attempt")[0]["num_parameters"],
        "train_s": round(sum(s["step_s"] for s in steps)),
        "machine": machine(),
        "version": version(),
    }


def run_table(table: Table, out: Path, overrides: list[str], *, jobs: int) -> None:
    """All runs that are still missing, `jobs` at a time."""
    from relora_ray.runs import open_data

    first, *others = table.seeds
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
        running: dict[Future[dict[str, Any]], Row] = {}
        waiting = {row.name: row for row in table.rows}

        def submit(row: Row, cfg: RunConfig) -> None:
            if results.get(cfg) is None:
                running[pool.submit(run_one, cfg)] = row

        for row in table.rows:
            for point in table.points(row):
                submit(row, table.config(row, point, first, overrides))
        while True:
            for name in [n for n in waiting if not any(row.name == n for row in running.values())]:
                row = waiting.pop(name)
                if (best := best_point(table, row, results, overrides)) is not None:
                    for seed in others:
                        submit(row, table.config(row, best, seed, overrides))
            write_up(table, results, out, overrides)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                record = future.result()
                results.add(record)
                loss = "diverged" if record["loss"] is None else f"loss {record['loss']:.4f}"
                print(f"{record['name']}: {loss}, {record['train_s']} s", flush=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def best_point(table: Table, row: Row, results: Results, overrides: list[str]) -> Point | None:
    """The grid point of lowest loss with the first seed, or None if all diverged or none was run."""
    losses = {}
    for number, point in enumerate(table.points(row)):
        record = results.get(table.config(row, point, table.seeds[0], overrides))
        if record is not None and record["loss"] is not None:
            losses[number] = record["loss"]
    return table.points(row)[min(losses, key=lambda n: losses[n])] if losses else None


def write_up(table: Table, results: Results, out: Path, overrides: list[str]) -> None:
    (out / "README.md").write_text("\n".join(_page(table, results, overrides)) + "\n")
    if results.records:
        _plot(table, results, out / "curves.png", overrides)


def _page(table: Table, results: Results, overrides: list[str]) -> Iterator[str]:
    yield f"# {table.title}\n"
    if table.text:
        yield table.text.strip() + "\n"
    yield "| | trained | grid point | held-out loss | perplexity | over seeds |"
    yield "|---|---|---|---|---|---|"
    for row in table.rows:
        best = best_point(table, row, results, overrides)
        if best is None:
            done = any(results.get(table.config(row, p, table.seeds[0], overrides)) for p in table.points(row))
            yield f"| {row.label} | | | {'diverged' if done else 'not run yet'} | | |"
            continue
        records = _seeds(table, row, best, results, overrides)
        losses = [r["loss"] for r in records if r["loss"] is not None]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        each = ", ".join("diverged" if r["loss"] is None else f"{r['loss']:.4f}" for r in records)
        mean = statistics.fmean(losses)
        yield (
            f"| {row.label} | {records[0]['num_trainable'] / 1e6:.3f} M of {records[0]['num_parameters'] / 1e6:.3f} M "
            f"| {_point(best)} | {mean:.4f}{spread} | {math.exp(mean):.3f} | {each} |"
        )
    yield f"\n## The grid (seed {table.seeds[0]})\n"
    yield "| | grid point: held-out loss |"
    yield "|---|---|"
    for row in table.rows:
        found = []
        for point in table.points(row):
            record = results.get(table.config(row, point, table.seeds[0], overrides))
            loss = "-" if record is None else "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
            found.append(f"{_point(point)}: {loss}")
        yield f"| {row.label} | {'; '.join(found)} |"
    records_ = list(results.records.values())
    yield "\n![held-out loss](curves.png)\n"
    for what, of in (("Machine", "machine"), ("Version", "version"), ("Data", "data_fingerprint")):
        yield f"{what}: {'; '.join(sorted({str(r[of]) for r in records_})) or '-'}  "
    if records_:
        hours = sum(r["train_s"] for r in records_) / 3600
        yield f"{len(records_)} runs of {records_[0]['tokens']:,} tokens, {hours:.1f} hours of one thread.\n"
    yield "## Settings\n"
    yield f"```yaml\n{yaml.safe_dump(table.base, sort_keys=False, default_flow_style=None)}```"


def _seeds(table: Table, row: Row, point: Point, results: Results, overrides: list[str]) -> list[dict[str, Any]]:
    found = (results.get(table.config(row, point, seed, overrides)) for seed in table.seeds)
    return [record for record in found if record is not None]


def _point(point: Point) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in point.items())


def _plot(table: Table, results: Results, path: Path, overrides: list[str]) -> None:
    """Mean held-out loss of every row over the run, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    lowest, highest = math.inf, -math.inf
    colours = plt.get_cmap("tab10" if len(table.rows) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for number, row in enumerate(table.rows):
        best = best_point(table, row, results, overrides)
        if best is None:
            continue
        curves = [
            {int(step): loss for step, loss in r["evals"].items() if int(step) > 0}
            for r in _seeds(table, row, best, results, overrides)
            if r["loss"] is not None
        ]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour, style = colours[number % len(colours)], ["-", "--", ":"][number // len(colours) % 3]
        axes.plot(steps, [statistics.fmean(v) for v in values], style, color=colour, marker=".", label=row.label)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
        lowest, highest = min(lowest, *map(min, values)), max(highest, *map(max, values))
    if lowest < highest:
        axes.set_ylim(lowest - 0.02, min(highest, lowest + 0.5))
    axes.set_xlabel("updates")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(table.title)
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
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__} at {commit}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.ablations", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("table", help="a YAML of configs/ablations/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, such as data.path=FOLDER")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json, README.md and curves.png")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_intermixed_args()
    try:
        run_table(load_table(args.table), args.out, args.overrides, jobs=args.jobs)
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")


if __name__ == "__main__":
    main()
