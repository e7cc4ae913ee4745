"""Ray Train's controller, run in the driver's own process.

Ray starts an actor for it, on the driver's machine and ending with the driver: a process more, which takes three
seconds to import what the driver has imported. Nothing is lost without it, as a driver that dies ends the run's
attempts in either case, and the same command continues the run.

With each worker group Ray starts another actor, by which workers agree on what they report. Ours report nothing: theirs
is one that imports nothing.

Private to Ray 2.60 and used here: TrainController with its worker_group_cls and _worker_group, WorkerGroup with its
_init_train_context_on_workers, and the name by which that module finds SynchronizationActor.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

UNNEEDED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Each would start an actor: for Ray's data sets, of which there are none, with every worker group; and one that frees
the machines of a run whose controller is gone, which Ray does when the process is gone that has asked for them."""


class Group(WorkerGroup):
    """Its workers know no controller: they could only ask it for checkpoints that they reported."""

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class Controller(TrainController):
    worker_group_cls = Group


def run_controller(**given: Any) -> Any:
    """A ray.train.Result. `given`: what Ray Train gives its controller. Main thread or another; blocks until the end.

    At Ctrl-C the worker group is ended, and KeyboardInterrupt is raised."""
    given["callbacks"] = [c for c in given["callbacks"] if type(c).__name__ not in UNNEEDED]
    worker_group.SynchronizationActor = _no_reports()
    controller = Controller(**given)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(controller.run())  # not asyncio.run, which would put Ctrl-C off until a call returns
    except BaseException:
        if controller._worker_group is not None:
            controller._worker_group.abort()
        given["scaling_policy"].before_controller_abort()  # or Ray keeps the machines for this run, for three minutes
        raise
    finally:
        loop.close()
    return controller.get_result()


def _no_reports() -> Any:
    """In place of Ray's SynchronizationActor."""

    class NoReports:  # here, so that it is sent as it is, and nothing is imported for it
        def set_required_ranks(self, ranks: Any) -> None: ...
        def reset(self) -> None: ...

        def __init__(self, **_: Any) -> None: ...

    return ray.remote(num_cpus=0)(NoReports)
