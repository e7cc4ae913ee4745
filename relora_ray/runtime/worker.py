"""What Ray Train runs in every worker process: one attempt of the run."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
import ray.train.torch
import torch

from relora_ray.checkpoint import Outcome, Share
from relora_ray.config_file import parse_config
from relora_ray.errors import ReloraError
from relora_ray.loop import run_attempt
from relora_ray.metrics import Record
from relora_ray.parallel import World


def train_worker(job: dict[str, Any]) -> None:
    """`job`: "config" (the run's YAML) and "coordinator" (its actor handle).

    An error that a restart cannot mend is told to the coordinator and raised: Ray then ends all ranks, which
    may be waiting for this one in a collective, and the attempt after that returns here at once.
    """
    coordinator = job["coordinator"]
    if ray.get(coordinator.fatal.remote()):
        return
    ray.get(coordinator.settle.remote())
    cfg = parse_config(job["config"])
    torch.set_num_threads(cfg.cluster.cpus_per_worker)
    world = World.current(ray.train.torch.get_device())
    _forward_warnings(coordinator, world.rank)
    coordinator.tell.remote({"kind": "worker", "rank": world.rank, "pid": os.getpid()})

    def on_record(record: Record) -> None:
        if world.is_first:
            coordinator.tell.remote(record)

    def commit(share: Share) -> Outcome:
        outcome: Outcome = ray.get(coordinator.commit.remote(share))
        return outcome

    try:
        run_attempt(cfg, world, on_record=on_record, committer=commit)
    except ReloraError as error:
        if not error.restart_helps:
            ray.get(coordinator.fail.remote(f"{type(error).__name__}: {error}"))
        raise


class _Forwarder(logging.Handler):
    def __init__(self, coordinator: Any, rank: int) -> None:
        super().__init__(logging.INFO)
        self._coordinator, self._rank = coordinator, rank

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or self._rank == 0:
            event = {
                "kind": "log",
                "level": record.levelname,
                "rank": self._rank,
                "message": record.getMessage(),
            }
            self._coordinator.tell.remote(event)


def _forward_warnings(coordinator: Any, rank: int) -> None:
    """Show this process's log on the driver's console: rank 0's, and any rank's warnings."""
    ours = logging.getLogger("relora_ray")
    ours.setLevel(logging.INFO)
    ours.handlers = [h for h in ours.handlers if not isinstance(h, _Forwarder)] + [_Forwarder(coordinator, rank)]
