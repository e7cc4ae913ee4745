"""Fine-tuning on GLUE as Ray tasks: each task of GLUE with each seed is one, with a GPU if the cluster has any.

A task reads the model from its storage and stores its own result there, so that a lost machine or a killed driver costs
the tasks that were under way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import ray

from relora_ray.errors import ReloraError, RunFailedError
from relora_ray.evaluation.fine_tuning import Job, do
from relora_ray.runs.evaluations import Evaluation
from relora_ray.runtime.driver import on_ray
from relora_ray.runtime.own_ray import OwnRay

RETRIES = 5
"""Of a task whose machine or process is lost; what it raises itself is told at once."""


def do_on_ray(jobs: Sequence[Job]) -> Iterator[tuple[Job, Evaluation | None, str]]:
    """Each job with its record as it comes, and why it could not be stored; without a record, why there is none."""
    with on_ray(lambda: OwnRay(os.cpu_count() or 1)):
        gpus = ray.cluster_resources().get("GPU", 0) >= 1 and not all(job.device == "cpu" for job in jobs)
        remote = ray.remote(do).options(num_cpus=1, num_gpus=int(gpus), max_retries=RETRIES)
        waiting = {remote.remote(job): job for job in jobs}
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting))
                for reference in ready:
                    yield _outcome(waiting.pop(reference), reference)
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def _outcome(job: Job, reference: ray.ObjectRef) -> tuple[Job, Evaluation | None, str]:
    try:
        record, why = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ReloraError):
            return job, None, f"{type(error.cause).__name__}: {error.cause}"
        raise RunFailedError(f"{job.task} with seed {job.seed}: {error}") from error
    except ray.exceptions.RayError as error:
        return job, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return job, record, why
