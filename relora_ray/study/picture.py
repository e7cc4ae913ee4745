"""A picture of one run: loss and learning rate by update, with what happened on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relora_ray.errors import CheckpointError
from relora_ray.study.plots import pyplot
from relora_ray.study.run_log import RunLog, number

BOUNDARIES = {"switch": ("C2", "end of the warm start"), "merge": ("C7", "merge")}


def draw_run(log: RunLog, out: Path) -> None:
    """Write a PNG or SVG. Steps of attempts that were given up do not count. CheckpointError without any step."""
    plt, cfg, trained = pyplot(), log.cfg, log.latest("train")
    if not trained:
        raise CheckpointError(f"{log.url} has no metrics of any step yet: there is nothing to draw.")
    figure, (losses, rates) = plt.subplots(2, 1, figsize=(9, 5.5), sharex=True, height_ratios=[3, 1])
    steps = [record["step"] for record in trained]
    losses.plot(
        steps, [number(record, "loss") for record in trained], color="C0", alpha=0.5, linewidth=0.8, label="training"
    )
    evals = [record for record in log.latest("eval") if number(record, "loss") is not None]
    held_out = [e["loss"] for e in evals]
    losses.plot([e["step"] for e in evals], held_out, color="C1", marker="o", linestyle=":", label="held-out text")
    for e in evals:
        losses.annotate(f"{e['loss']:.2f}", (e["step"], e["loss"]), (0, 7), textcoords="offset points", fontsize=7)
    rates.plot(steps, [number(record, "learning_rate") for record in trained], color="C3", linewidth=1)
    for axis in (losses, rates):
        _mark(axis, log)
        axis.grid(alpha=0.3)
    losses.set_ylabel("loss, nats per token")
    losses.set_title(f"{cfg.name}: {cfg.method.kind}, {trained[-1]['step']:,} of {cfg.steps:,} updates")
    losses.legend(fontsize=8)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("updates")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _mark(axis: Any, log: RunLog) -> None:
    """Boundaries and restarts as lines, each kind once in the legend."""
    told = set()
    places = [
        (r["step"], *BOUNDARIES.get(r["boundary_kind"], ("C7", r["boundary_kind"]))) for r in log.latest("boundary")
    ]
    places += [(attempt["step"], "C5", "restart") for attempt in log.kinds["attempt"][1:]]
    for step, colour, label in places:
        style = ":" if label == "restart" else "--"
        axis.axvline(step, color=colour, linestyle=style, linewidth=1, label=None if label in told else label)
        told.add(label)
