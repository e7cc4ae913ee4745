"""A picture of a plan: memory by role, and goodput and cost against the number of machines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from relora_ray.planning import forecast
from relora_ray.planning.page import ROLES
from relora_ray.planning.plan import RunPlan
from relora_ray.study.plots import pyplot


def draw_plan(plan: RunPlan, out: Path) -> None:
    """Write a PNG or SVG. ConfigError without matplotlib."""
    plt = pyplot()
    panels = 1 if plan.cluster is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels + 1, 4.2), squeeze=False)
    _draw_memory(axes[0][0], plan)
    if plan.cluster is not None:
        _draw_goodput(axes[0][1], plan)
        _draw_cost(axes[0][2], plan)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{plan.cfg.name}: {plan.cfg.method.kind}", fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_memory(axis: Any, plan: RunPlan) -> None:
    names = [column.phase.name for column in plan.all_columns]
    below = [0.0] * len(names)
    for role, text in ROLES.items():
        heights = [column.memory[role] / 1e9 for column in plan.all_columns]
        if max(heights) > 0.005:
            axis.bar(names, heights, bottom=below, label=text, width=0.6)
            below = [b + h for b, h in zip(below, heights, strict=True)]
    if plan.cluster is not None:
        usable = forecast.usable_bytes(plan.cluster.machine.gpu.memory_bytes) / 1e9
        axis.axhline(
            usable, color="black", linestyle="--", linewidth=1, label=f"{plan.cluster.machine.gpu.name}, usable"
        )
    axis.set_ylabel(f"GB of one GPU, micro-batches of {plan.rows} rows")


def _draw_goodput(axis: Any, plan: RunPlan) -> None:
    assert plan.cluster is not None
    for rate in plan.rates or [plan.cluster.failures_per_day]:
        outcomes = plan.outcomes(rate=rate)
        axis.plot(
            [o.machines for o in outcomes],
            [100 * o.goodput for o in outcomes],
            marker=".",
            label=f"{rate:g} failures a machine and day",
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel(f"machines ({plan.cluster.machine.name})")
    axis.set_ylabel("goodput, %")


def _draw_cost(axis: Any, plan: RunPlan) -> None:
    assert plan.cluster is not None
    priced = plan.cluster.price is not None
    kinds = [(plan.cfg.method.kind, plan.outcomes())]
    kinds += [("full-rank", plan.outcomes(full=True))] if plan.full is not None else []
    for name, outcomes in kinds:
        finite = [o for o in outcomes if o.days < math.inf]
        axis.plot(
            [o.days for o in finite],
            [o.dollars if priced else o.machines * o.days * 24 for o in finite],
            marker=".",
            label=name,
        )
        for o in finite[:: max(1, len(finite) // 6)]:
            axis.annotate(f"{o.machines}", (o.days, o.dollars if priced else o.machines * o.days * 24), fontsize=6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("days (at each point: machines)")
    axis.set_ylabel("dollars" if priced else "machine hours")
