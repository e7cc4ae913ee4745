"""How fast a run was, as FLOP/s of one of its workers: what another of the same kind of machine can be planned by."""

from __future__ import annotations

from statistics import median

from relora_ray.errors import CheckpointError
from relora_ray.planning.count import phases
from relora_ray.planning.forecast import update_flops
from relora_ray.runs import metrics
from relora_ray.runs.setting import read_config
from relora_ray.storage import Storage

LATEST = 200
"""So many of its updates count."""


def reached_flops_per_s(storage: Storage) -> float:
    """Of one worker, by the run's median seconds an update since its last restart, waiting for others included.
    CheckpointError if it has made none."""
    cfg = read_config(storage)
    attempts = [records for _, records in metrics.read_attempts(storage)]
    for records in reversed(attempts):
        begun = next((r for r in records if r["kind"] == "attempt"), {})
        trained = [r for r in records if r["kind"] == "train" and r.get("step_s") and r.get("loss") is not None]
        if not trained or not isinstance(begun.get("world_size"), int) or begun["world_size"] < 1:
            continue
        at = trained[-1]["step"] - 1
        phase = next(p for p in reversed(phases(cfg)) if p.begins <= at)
        same = [r["step_s"] for r in trained if r["step"] - 1 >= phase.begins][-LATEST:]
        flops = update_flops(cfg, phase.measure(cfg.train.micro_batch_rows), begun["world_size"])
        return flops / median(same)
    raise CheckpointError(f"{storage.url} has no metrics of any step yet: its speed is not known. Give --utilisation.")
