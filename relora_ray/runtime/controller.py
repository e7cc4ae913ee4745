"""Ray Train's controller, run in the driver's own process.

Ray starts an actor for it, on the driver's machine and ending with the driver: a process more, which takes three
seconds to import what the driver has imported. Nothing is lost without it, as a driver that dies ends the run's
attempts in either case, and the same command continues the run.

With each worker group Ray starts another actor, by which workers agree on what they report. Ours report nothing, and
have none.

Private to Ray 2.60 and used here: TrainController with its worker_group_cls and _worker_group, WorkerGroup with its
_init_train_context_on_workers and _get_worker_runtime_env, and the names by which its modules find SynchronizationActor
and what ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

UNNEEDED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Each would start an actor: for Ray's data sets, of which there are none, with every worker group; and one that frees
the machines of a run whose controller is gone, which Ray does when the process is gone that has asked for them."""


class Group(WorkerGroup):
    """Its workers know no controller, which they could only ask for checkpoints that they reported, and no actor by
    which to agree on those."""

    unneeded: Collection[str] = ()
    """Variables of the environment that workers do without. Those that are told any are new processes, which Ray starts
    when they are asked for; the others it keeps ready."""

    @classmethod
    def _get_worker_runtime_env(cls, custom_runtime_env: Any) -> dict[str, Any]:
        found = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        variables = {n: value for n, value in found.pop("env_vars").items() if n not in cls.unneeded}
        return found | ({"env_vars": variables} if variables else {})

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=None,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class NoActor:
    """In place of Ray's SynchronizationActor: what starts it starts nothing."""

    @classmethod
    def options(cls, **_: Any) -> type[NoActor]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> NoActor:
        return cls()


def _shut_down(actor: Any, rays_own: Callable[[Any], None] = state._shutdown_sync_actor) -> None:
    if not isinstance(actor, NoActor):
        rays_own(actor)


class Controller(TrainController):
    worker_group_cls = Group


def run_controller(*, own_settings: Collection[str] = (), **given: Any) -> Any:
    """A ray.train.Result. `own_settings`: variables of the environment for the controller alone. `given`: what Ray
    Train gives it. Main thread or another; blocks until the end.

    At Ctrl-C the worker group is ended, and KeyboardInterrupt is raised."""
    given["callbacks"] = [c for c in given["callbacks"] if type(c).__name__ not in UNNEEDED]
    Group.unneeded = own_settings
    worker_group.SynchronizationActor = NoActor
    state._shutdown_sync_actor = _shut_down
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
