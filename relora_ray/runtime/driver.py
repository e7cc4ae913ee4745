"""The driver: checks, a Ray, the coordinator, Ray Train, and what a person sees meanwhile.

What can be refused without a Ray has been, by preflight.py. Torch is not imported here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relora_ray import config as rc
from relora_ray.checkpoint import list_manifests
from relora_ray.checkpoint.owner import owning
from relora_ray.config.file import to_yaml
from relora_ray.errors import RunBusyError, RunFailedError
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import begin, check_run, is_finished
from relora_ray.runs.sinks import listening
from relora_ray.runtime import elastic
from relora_ray.runtime.address import cluster_address, refuse_if_dead
from relora_ray.runtime.agent import Rendezvous, run_agent
from relora_ray.runtime.coordinator import CoordinatorActor
from relora_ray.runtime.gauges import gauges
from relora_ray.runtime.messages import Event, log_event, waiting_event
from relora_ray.runtime.own_ray import OwnRay, in_short
from relora_ray.runtime.stopping import store, storing_at_a_signal, what_is_stored

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]

POLL_S = 0.25
DRAIN_S = 30.0
"""A coordinator that does not say what there is to show within this is asked again."""
START_S = 300.0
"""The coordinator has started within this."""


def run(
    cfg: rc.RunConfig,
    *,
    on_event: OnEvent,
    wait: bool = False,
    own_ray: OwnRay | None = None,
    server: str = "",
    on_coordinator: Callable[[Any], None] = lambda coordinator: None,
) -> None:
    """Train `cfg` to its end on the running Ray, or on a local one started for it. Raises ReloraError, among them
    RunBusyError before anything is written, unless it is to `wait` for the other driver's end, and StoppedError after
    a signal, when the state is stored; KeyboardInterrupt after SIGINT if there is nothing to store.

    `cfg`: as `preflight` returned it. `own_ray`: the local one, if it has been begun to start. `server`: the address of
    one that forks processes on this machine, for a local Ray's workers; see server.py. `on_coordinator`: called with
    the run's, when it is there."""
    refuse_dead_cluster()  # before anything is claimed
    on_event(waiting_event("the run's folder, and Ray"))
    with owning(run_storage(cfg), wait=wait, check=lambda: check_run(cfg)) as hold, connected(cfg, own_ray) as is_own:
        cfg = begin(cfg, hold.term)
        if is_finished(cfg, run_storage(cfg)):  # by the driver that was waited for
            return
        on_event(waiting_event("the coordinator"))
        _say_what_is_missing(cfg, on_event)
        _say_if_drivers_cannot_be_told_apart(cfg, on_event)
        # On the driver's own node: without this, Ray may put it on a spot machine.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = CoordinatorActor.options(scheduling_strategy=here).remote(to_yaml(cfg), hold.term)
        try:
            ray.get(coordinator.fatal.remote(), timeout=START_S)
        except ray.exceptions.RayError as error:
            raise RunFailedError(f"the coordinator cannot start on the driver's node: {error}") from error
        on_coordinator(coordinator)
        on_event(waiting_event(f"workers, 0 of {cfg.cluster.workers} there"))
        hold.when_lost(lambda reason: coordinator.supersede.remote(reason))

        def say(text: str) -> None:
            on_event(log_event("driver", text))

        try:
            with (
                listening(cfg, on_event, say=say, openers=[gauges(cfg)]) as tell,
                _watching(coordinator, tell),
                storing_at_a_signal(
                    lambda: store(coordinator), lambda stored: what_is_stored(run_storage(cfg), stored), on_event
                ),
            ):
                tell({"kind": "term", "number": hold.term.number})
                _fit(cfg, coordinator, server, is_own=is_own)
        except RunFailedError:
            if hold.lost:
                raise RunBusyError(hold.lost) from None
            raise


def _fit(cfg: rc.RunConfig, coordinator: Any, server: str, *, is_own: bool) -> None:
    cluster = cfg.cluster
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    for name, value in elastic.SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="relora-ray-") as scratch:
        trainer = elastic.trainer_class(coordinator, run_storage(cfg).url, own_ray=is_own)(
            run_agent,
            train_loop_config={"config": to_yaml(cfg), "coordinator": coordinator, "server": server},
            scaling_config=ScalingConfig(
                num_workers=(cfg.min_workers, cluster.workers),
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            backend_config=Rendezvous(),
            # Ray's own record of the run is not used (our manifests are the truth): it goes to the driver's machine,
            # where Ray's controller is, under a name of its own every time.
            run_config=RunConfig(
                name=f"{cfg.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),  # the coordinator counts, from commit to commit
                logging_config=LoggingConfig(log_level="CRITICAL"),  # on the console; all of it is in Ray's log files
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise RunFailedError(ray.get(coordinator.fatal.remote()) or f"Ray Train gave up: {error}") from error
        except SystemExit as error:  # how Ray Train answers Ctrl-C, after it has stopped the workers
            raise KeyboardInterrupt from error
    if fatal := ray.get(coordinator.fatal.remote()):
        raise RunFailedError(fatal)
    if max(list_manifests(run_storage(cfg)), default=-1) < cfg.last_step:
        raise RunFailedError(
            f"the workers ended before step {cfg.last_step} was stored. Run the same command again to continue."
        )


def _say_what_is_missing(cfg: rc.RunConfig, on_event: OnEvent) -> None:
    """Ray waits in silence for resources that are not there (an autoscaler may bring them): say so."""
    there = ray.cluster_resources()
    needed = {
        "CPU": cfg.min_workers * cfg.cluster.cpus_per_worker,
        "GPU": cfg.min_workers * cfg.cluster.gpus_per_worker,
    }
    for kind, amount in needed.items():
        if amount > there.get(kind, 0):
            message = (
                f"{cfg.min_workers} workers need {amount:g} {kind}s and the cluster has {there.get(kind, 0):g}: "
                f"waiting for more nodes. Without an autoscaler, lower cluster.workers or cluster.min_workers."
            )
            on_event(log_event("driver", message))
    if not cfg.method.exports:
        on_event(log_event("driver", f"method.kind={cfg.method.kind} has no dense weights: no model is exported"))


def _say_if_drivers_cannot_be_told_apart(cfg: rc.RunConfig, on_event: OnEvent) -> None:
    storage = run_storage(cfg)
    if not storage.honours_put_new():
        message = (
            f"{storage.url} replaces what it was told to create: if two drivers claim this run at the same moment, "
            f"both may train it. Start one at a time."
        )
        on_event(log_event("driver", message))


def refuse_dead_cluster() -> None:
    """ConfigError if RAY_ADDRESS names a cluster that does not answer."""
    if not ray.is_initialized() and (address := cluster_address()):
        refuse_if_dead(address)


@contextmanager
def connected(cfg: rc.RunConfig, own_ray: OwnRay | None = None) -> Iterator[bool]:
    """The cluster of RAY_ADDRESS (Ray jobs have it set), or else a local Ray with a slot for every worker: `own_ray`,
    if that has been begun to start.

    Yields whether it is the latter, which ends with the block.

    A Ray that happens to run on this machine is not joined unasked: it may be another run's own, and end with it.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with on_ray(lambda: own_ray or OwnRay.to_train(cfg.cluster)) as is_own:
        if is_own:
            _refuse_if_gpus_are_missing(cfg)
        yield is_own


@contextmanager
def on_ray(start: Callable[[], OwnRay]) -> Iterator[bool]:
    """As `connected`. `start`: begins a Ray of this process' own, where RAY_ADDRESS names none."""
    if ray.is_initialized():
        yield False
        return
    address = cluster_address()
    if address:
        refuse_if_dead(address)
        with _joined(address):
            yield False
        return
    with start() as here, _joined(here.address):
        yield True


def _refuse_if_gpus_are_missing(cfg: rc.RunConfig) -> None:
    """Others may come to a cluster, and none to a Ray of the driver's own."""
    wanted, there = cfg.cluster.workers * cfg.cluster.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if wanted > there:
        raise RunFailedError(
            f"cluster.workers={cfg.cluster.workers} with cluster.gpus_per_worker={cfg.cluster.gpus_per_worker} "
            f"need {wanted} GPUs; this machine has {there:g}, and RAY_ADDRESS names no cluster. "
            f"Set RAY_ADDRESS, lower cluster.workers, or train on the CPU with cluster.gpus_per_worker=0."
        )


@contextmanager
def _joined(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # another version of Ray or Python, a token that is missing, ...
        raise RunFailedError(f"Ray at {address} cannot be joined: {in_short(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _watching(coordinator: Any, on_event: OnEvent) -> Iterator[None]:
    """Hand the coordinator's events to `on_event`, in a thread, until the block ends."""
    done = threading.Event()

    def poll() -> int:
        """Returns how many events there were."""
        if not ray.is_initialized():  # a call would start one
            return 0
        try:
            events = ray.get(coordinator.drain.remote(), timeout=DRAIN_S)
        except ray.exceptions.RayError as error:
            logger.warning("no progress can be shown for the moment: %s", error)
            done.wait(10 * POLL_S)
            return 0
        for event in events:
            on_event(event)
        return len(events)

    def watch() -> None:
        while not done.wait(POLL_S):
            poll()

    thread = threading.Thread(target=watch, name="relora-ray-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        while poll():  # a call gives so many at most
            pass
