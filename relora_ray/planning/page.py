"""A plan as a page of text, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from relora_ray.planning import forecast
from relora_ray.planning.forecast import NOTICES_S, Outcome
from relora_ray.planning.plan import Column, RunPlan
from relora_ray.planning.suggest import Suggestion

ROLES = {
    "weights": "weights",
    "adapters": "adapters",
    "derived": "derived (effective weights)",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits and buffers",
    "buckets": "DDP's buckets, once",
}
MOST_COUNTS = 8
"""Numbers of machines that are shown."""


def page(plan: RunPlan, suggested: Sequence[Suggestion]) -> Iterator[str]:
    yield from _head(plan)
    yield from _tables(plan)
    if plan.cluster is not None:
        yield from _failures(plan)
        yield from _scaling(plan)
    yield from _notes(plan)
    if suggested:
        yield ""
        yield "suggested"
        for each in suggested:
            yield f"  {each.setting or '-':38} # {each.reason}"


def _head(plan: RunPlan) -> Iterator[str]:
    cfg, cluster = plan.cfg, plan.cluster
    epochs = "" if plan.epochs is None else f", {plan.epochs:.2f} times the data"
    yield (
        f"plan {cfg.name}: {cfg.method.kind}, {cfg.steps:,} updates of {cfg.tokens_per_step:,} tokens, "
        f"{_count(cfg.steps * cfg.tokens_per_step)} tokens{epochs}"
    )
    micro = f"micro-batches of {plan.rows} x {cfg.data.seq_len}"
    if cluster is None:
        yield (
            f"{plan.workers} workers, {cfg.train.precision}, {micro}. No machine is named: --machines "
            f"g6.xlarge:{plan.workers} adds time, and whether it fits"
        )
        return
    machine, gpu = cluster.machine, cluster.machine.gpu
    burst = f", up to {machine.burst_gbps:g} for a while" if machine.burst_gbps else ""
    reached, peak = cluster.flops_per_s / 1e12, gpu.tflops(cfg.train.precision)
    yield (
        f"{cluster.count} x {machine.name}: {machine.num_gpus} {gpu.name} of {gpu.memory_gb:g} GB each, "
        f"{reached:.3g} of {peak:g} TFLOP/s in {cfg.train.precision}, {machine.network_gbps:g} Gbit/s{burst}"
    )
    yield f"{plan.workers} workers, {micro}, {forecast.rows_per_worker(cfg, plan.workers)} rows of an update each"


def _tables(plan: RunPlan) -> Iterator[str]:
    columns = plan.all_columns
    names = [_title(plan, column) for column in columns]
    yield ""
    yield _row("parameters, M", names)
    for kind, text in (
        ("embeddings", "embeddings and head"), ("linear", "matrices"), ("adapters", "adapters"),
        ("other", "norms, biases"),
    ):  # fmt: skip
        if any(c.phase.parameters[kind] for c in columns):
            yield _row(
                f"  {text}",
                [f"{c.phase.parameters[kind] / 1e6:,.2f}" if c.phase.parameters[kind] else "-" for c in columns],
            )
    yield _row(
        "  trained",
        [f"{c.phase.trained / 1e6:,.1f} ({c.phase.trained / c.phase.num_parameters:.0%})" for c in columns],
    )
    yield _row("memory of one GPU, GB", names)
    for role, text in ROLES.items():
        if any(c.memory[role] > 5e6 for c in columns):
            yield _row(f"  {text}", [_gb(c.memory[role]) for c in columns])
    yield _row("  all", [_gb(c.memory_bytes) for c in columns])
    if plan.cluster is not None:
        usable = forecast.usable_bytes(plan.cluster.machine.gpu.memory_bytes)
        yield _row(
            f"  of {usable / 1e9:.1f} that can be used",
            ["fits" if c.memory_bytes <= usable else "DOES NOT FIT" for c in columns],
        )
        yield _row("  most rows of a micro-batch", [str(c.largest_rows or "none") for c in columns])
    yield _row("an update", names)
    yield _row("  PFLOPs, attention included", [f"{c.flops / 1e15:,.3f}" for c in columns])
    if any(c.frozen_gradient_flops for c in columns):
        with_them = [
            f"{(c.flops + c.frozen_gradient_flops) / 1e15:,.3f}" if c.frozen_gradient_flops else "" for c in columns
        ]
        yield _row("  with frozen weights' gradients", with_them)
    yield _row("  gradients reduced, MB", [f"{c.phase.gradient_bytes / 1e6:,.0f}" for c in columns])
    if plan.cluster is not None:
        updates = [c.update for c in columns if c.update is not None]
        yield _row("  computing, s", [_seconds(u.compute_s) for u in updates])
        yield _row(
            "  reducing, s (of these waited)", [f"{_seconds(u.reduce_s)} ({_seconds(u.waits_s)})" for u in updates]
        )
        yield _row("  all, s", [_seconds(u.seconds) for u in updates])
    yield _row("a checkpoint, GB", names)
    yield _row(
        "  base, stored once a boundary", [_gb(c.phase.base_bytes) if c.phase.base_bytes else "-" for c in columns]
    )
    yield _row("  delta", [_gb(c.phase.delta_bytes) for c in columns])
    if any(c.phase.delta_after_reset_bytes != c.phase.delta_bytes for c in columns):
        yield _row("  delta right after a boundary", [_gb(c.phase.delta_after_reset_bytes) for c in columns])
    host = [(c.phase.base_bytes + c.phase.delta_bytes) / plan.workers for c in columns]
    yield _row("  host memory of each worker", [_gb(number) for number in host])
    if plan.cluster is not None:
        costs = [c.costs for c in columns if c.costs is not None]
        yield _row(
            "  delta stored in, s (training waits)",
            [f"{_seconds(c.stored_s)} ({_seconds(c.blocked_s)})" for c in costs],
        )
        for notice in NOTICES_S:
            yield _row(f"  within a notice of {notice:.0f} s", [_within(plan, c, notice) for c in columns])


def _title(plan: RunPlan, column: Column) -> str:
    is_full = plan.full is not None and column.phase.state == plan.full.phase.state
    return "full = warm start" if is_full and column is not plan.full else column.phase.name


def _within(plan: RunPlan, column: Column, notice: float) -> str:
    assert plan.cluster is not None
    assert column.update is not None
    needed = forecast.notice_s(column.phase, plan.cluster, column.update.seconds)
    return f"{'yes' if needed <= notice else 'NO'}, {_seconds(needed)} s"


def _failures(plan: RunPlan) -> Iterator[str]:
    cluster, costs, step = plan.cluster, plan.last.costs, plan.last.update
    assert cluster is not None
    assert costs is not None
    assert step is not None
    if not cluster.failures_per_day:
        return
    by_young, by_daly, best = plan.intervals()
    every = plan.cfg.checkpoint.save_every_steps
    as_it_is, sensible = plan.outcome(cluster, every_steps=every), plan.outcome(cluster)
    group = 24 / cluster.failures_per_day / cluster.count
    yield (
        f"failures: {cluster.failures_per_day:g} a machine and day, one of the {cluster.count} every {group:.3g} h; a "
        f"restart takes {costs.restart_s:.0f} s"
    )
    yield (
        f"  between saves: Young {_seconds(by_young)} s, Daly {_seconds(by_daly)} s, no less than a save takes: "
        f"{_seconds(best)} s; up to {sensible.save_every_steps} updates cost half a percent more"
    )
    yield f"  as configured, every {every} updates ({_seconds(every * step.seconds)} s): goodput {as_it_is.goodput:.1%}"


def _scaling(plan: RunPlan) -> Iterator[str]:
    outcomes = plan.outcomes()
    fulls = plan.outcomes(full=True) if plan.full is not None else []
    rates = [rate for rate in plan.rates if rate != plan.cluster.failures_per_day] if plan.cluster else []
    others = [plan.outcomes(rate=rate) for rate in rates]
    heads = ["update, s", "save every", "goodput", *(f"at {rate:g}" for rate in rates), "tokens/s", "days"]
    heads += ["$"] * _priced(plan) + (["full, days"] + ["full, $"] * _priced(plan) if fulls else [])
    yield ""
    yield _wide("machines", heads)
    for n in _shown(outcomes, plan.cluster.count if plan.cluster else 1):
        found = outcomes[n]
        cells = [_seconds(found.update_s), str(found.save_every_steps), f"{found.goodput:.1%}"]
        cells += [f"{other[n].goodput:.1%}" for other in others]
        cells += [_count(found.tokens_per_s), _days(found.days)]
        cells += [_dollars(found)] * _priced(plan)
        if fulls:
            cells += [_days(fulls[n].days)] + [_dollars(fulls[n])] * _priced(plan)
        yield _wide(f"{found.machines:,}", cells)


def _shown(outcomes: Sequence[Outcome], asked: int) -> list[int]:
    """Places of those to show: the one that was asked for, and others evenly."""
    every = -(-len(outcomes) // MOST_COUNTS)
    return [n for n, found in enumerate(outcomes) if n % every == 0 or found.machines == asked]


def _notes(plan: RunPlan) -> Iterator[str]:
    cluster, last = plan.cluster, plan.last
    yield ""
    if last.taken.why_not:
        yield f"  FLOPs and activations are by formula: without values the model cannot be run ({last.taken.why_not})"
    compiled = plan.cfg.train.compile is not False
    more = " torch.compile, which is on, keeps less of them." if compiled else ""
    yield f"  Activations are those of eager execution.{more} Memory leaves out 1 GB for CUDA and 5 %."
    if cluster is not None:
        if misfits := [c.phase.name for c in plan.all_columns if c.largest_rows == 0]:
            yield f"  {' and '.join(misfits)}: no micro-batch fits. Times are those of such GPUs that had the memory."
        yield (
            f"  Assumed: {cluster.storage_bytes_per_s / 1e6:g} MB/s of storage a machine; a lost machine is replaced, "
            f"and not paid for, meanwhile. Not counted: evaluations, merges."
        )


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:38}" + "".join(f"{cell:>19}" for cell in cells)


def _wide(name: str, cells: Iterable[str]) -> str:
    return f"{name:>9}" + "".join(f"{cell:>12}" for cell in cells)


def _priced(plan: RunPlan) -> int:
    return int(plan.cluster is not None and plan.cluster.price is not None)


def _gb(count: float) -> str:
    return "-" if count < 1e4 else f"{count / 1e9:,.2f}" if count >= 1e8 else f"{count / 1e9:.3g}"


def _seconds(value: float) -> str:
    if value == math.inf:
        return "never"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.0005 else "0"


def _days(value: float) -> str:
    return "never" if value == math.inf else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _dollars(found: Outcome) -> str:
    return "-" if found.dollars is None or found.dollars == math.inf else f"{found.dollars:,.0f}"


def _count(value: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def as_json(plan: RunPlan, suggested: Sequence[Suggestion]) -> dict[str, Any]:
    """For tools: bytes, seconds and FLOPs as numbers; null for what would be infinite."""

    def column(found: Column) -> dict[str, Any]:
        phase = found.phase
        return {
            "name": phase.name,
            "steps": phase.steps,
            "parameters": phase.parameters,
            "trained": phase.trained,
            "memory_bytes": found.memory,
            "largest_micro_batch_rows": found.largest_rows,
            "update_flops": found.flops,
            "frozen_gradient_flops": found.frozen_gradient_flops,
            "flops_by_formula": bool(found.taken.why_not),
            "gradient_bytes": phase.gradient_bytes,
            "base_bytes": phase.base_bytes,
            "delta_bytes": phase.delta_bytes,
            "delta_after_reset_bytes": phase.delta_after_reset_bytes,
            "update_s": None if found.update is None else asdict(found.update),
            "save": None if found.costs is None else asdict(found.costs),
        }

    told: dict[str, Any] = {
        "run": plan.cfg.name,
        "method": plan.cfg.method.kind,
        "steps": plan.cfg.steps,
        "tokens": plan.cfg.steps * plan.cfg.tokens_per_step,
        "epochs": plan.epochs,
        "workers": plan.workers,
        "micro_batch_rows": plan.rows,
        "cluster": None if plan.cluster is None else asdict(plan.cluster),
        "phases": [column(found) for found in plan.columns],
        "full_rank": None if plan.full is None else column(plan.full),
        "suggestions": [asdict(each) for each in suggested],
    }
    if plan.cluster is not None:
        told["save_every_s"] = dict(zip(("young", "daly", "best"), plan.intervals(), strict=True))
        told["outcomes"] = [asdict(found) for found in plan.outcomes()]
        told["full_rank_outcomes"] = [asdict(found) for found in plan.outcomes(full=True)] if plan.full else []
    return dict(_finite(told))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
