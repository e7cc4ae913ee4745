"""A whole plan: what `relora-ray plan` prints, draws and gives out as JSON, beside full-rank training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from relora_ray.config import RunConfig
from relora_ray.planning import forecast
from relora_ray.planning.count import Phase, full_rank, phases
from relora_ray.planning.forecast import Cluster, Outcome, Update
from relora_ray.planning.goodput import Costs, best_interval, daly, mean_between_failures, young
from relora_ray.planning.trace import Pass


@dataclass(frozen=True)
class Column:
    """One structure of the run, or full-rank training, on the cluster that was asked for."""

    phase: Phase
    taken: Pass
    memory: dict[str, int]
    flops: float
    """Of an update, all workers."""
    frozen_gradient_flops: float
    largest_rows: int | None
    """Of a micro-batch that fits; 0: not even one row does. None without a machine."""
    update: Update | None
    costs: Costs | None

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class RunPlan:
    cfg: RunConfig
    workers: int
    rows: int
    """Of a micro-batch."""
    cluster: Cluster | None
    columns: list[Column]
    full: Column | None
    """None if the run is full-rank training."""
    epochs: float | None
    """None if the data are not there."""
    rates: list[float]
    """Failures of a machine a day."""

    @property
    def last(self) -> Column:
        """What most of the run is."""
        return self.columns[-1]

    @property
    def all_columns(self) -> list[Column]:
        """Each structure once: a warm start is full-rank training."""
        if self.full is None or any(column.phase.state == self.full.phase.state for column in self.columns):
            return self.columns
        return [*self.columns, self.full]

    def outcomes(self, *, full: bool = False, rate: float | None = None) -> list[Outcome]:
        """By number of machines, with the intervals between saves that are sensible."""
        assert self.cluster is not None
        cluster = self.cluster if rate is None else replace(self.cluster, failures_per_day=rate)
        return [self.outcome(forecast.at(cluster, count), full=full) for count in forecast.counts(self.cfg, cluster)]

    def outcome(self, cluster: Cluster, *, full: bool = False, every_steps: int | None = None) -> Outcome:
        columns = [self.full] if full and self.full is not None else self.columns
        return forecast.outcome(self.cfg, [(c.phase, c.taken) for c in columns], cluster, every_steps)

    def intervals(self) -> tuple[float, float, float]:
        """Seconds between saves by Young, by Daly, and the best that can be stored; inf without failures."""
        assert self.cluster is not None
        costs = self.last.costs
        assert costs is not None
        mean_s = mean_between_failures(self.cluster.failures_per_day, self.cluster.count)
        if mean_s == math.inf:
            return math.inf, math.inf, math.inf
        return young(costs.blocked_s, mean_s), daly(costs.blocked_s, mean_s), best_interval(costs, mean_s)


def make_plan(
    cfg: RunConfig, cluster: Cluster | None, *, rates: list[float] | None = None, epochs: float | None = None
) -> RunPlan:
    """`cluster`: None if no machine is named: without seconds then. Takes seconds of a processor, and no memory."""
    workers = cluster.workers if cluster is not None else cfg.cluster.workers
    rows = micro_rows(cfg, cluster)
    own = phases(cfg)
    columns = [_column(cfg, phase, rows, workers, cluster) for phase in own]
    full = None
    if cfg.method.kind != "full":
        plain = full_rank(cfg, own)
        full = _column(plain.cfg, plain, rows, workers, cluster)
    return RunPlan(cfg, workers, rows, cluster, columns, full, epochs, rates or [])


def micro_rows(cfg: RunConfig, cluster: Cluster | None) -> int:
    """Rows of a micro-batch on the machine's GPU."""
    by_device = cfg.train.micro_batch_rows_by_device.items()
    name = "" if cluster is None else cluster.machine.gpu.name
    return next((rows for device, rows in by_device if device in name), cfg.train.micro_batch_rows)


def _column(cfg: RunConfig, phase: Phase, rows: int, workers: int, cluster: Cluster | None) -> Column:
    taken = phase.measure(rows)
    largest = update = costs = None
    if cluster is not None:
        machine = cluster.machine
        largest = forecast.largest_rows(cfg, phase, machine, workers)
        update = forecast.update(cfg, phase, taken, cluster)
        costs = forecast.save_costs(phase, cluster)
    return Column(
        phase=phase,
        taken=taken,
        memory=forecast.memory(phase, taken, workers),
        flops=forecast.update_flops(cfg, taken, workers) * workers,
        frozen_gradient_flops=forecast.frozen_gradient_flops(cfg, phase),
        largest_rows=largest,
        update=update,
        costs=costs,
    )
