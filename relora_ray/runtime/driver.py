"""The driver: checks, a Ray, the coordinator, Ray Train, and what a person sees meanwhile.

Everything that can be refused is refused before Ray starts: see `preflight`.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relora_ray import config as rc
from relora_ray.checkpoint import list_manifests
from relora_ray.config_file import to_yaml
from relora_ray.errors import ConfigError, RunBusyError, RunFailedError, StoppedError
from relora_ray.loop import open_batches
from relora_ray.methods import build_method
from relora_ray.parallel import World
from relora_ray.runs import (
    bare_model,
    begin,
    check_embedding,
    check_export,
    check_init_from,
    check_run,
    find_architecture,
    run_storage,
)
from relora_ray.runtime import elastic
from relora_ray.runtime.address import cluster_address, refuse_if_dead
from relora_ray.runtime.agent import Rendezvous, run_agent
from relora_ray.runtime.coordinator import CoordinatorActor
from relora_ray.runtime.messages import Event, log_event
from relora_ray.runtime.owner import owning
from relora_ray.storage import Storage
from relora_ray.trial import try_architecture

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]

POLL_S = 0.5
DRAIN_S = 30.0
"""A coordinator that does not say what there is to show within this is asked again."""
START_S = 300.0
"""The coordinator has started within this."""
STOP_S = 600.0
"""At most for the last save. Whoever says stop usually waits less, and then says SIGKILL."""


def preflight(cfg: rc.RunConfig) -> rc.RunConfig:
    """Check all that can be checked without Ray; returns the config as it will run. Writes nothing. Raises ReloraError.

    Local paths become absolute, because workers run in folders of their own.
    """
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and "://" not in cfg.storage and not os.path.isabs(cfg.storage):
        raise ConfigError(
            f"storage={cfg.storage!r} is relative, and a Ray job's working directory is a copy that goes away. Give an "
            f"absolute path that all machines share, or a URL."
        )
    if not ray.is_initialized():
        cluster_address()
    cfg = _with_absolute_paths(cfg)
    open_batches(cfg, World())
    cfg = check_run(cfg)
    check_export(cfg)
    if cfg.model.init_from and not list_manifests(run_storage(cfg)):  # else it is not read again
        check_init_from(cfg, bare_model(cfg, device="meta"))
    if cfg.model.llama is None:  # LLaMA is known; others are tried out small, and wrapped at their size
        try_architecture(cfg, find_architecture(cfg))
        shell = bare_model(cfg, device="meta")
        check_embedding(cfg, shell)
        build_method(cfg).adapt(shell, cfg.steps)
    return cfg


def run(cfg: rc.RunConfig, *, on_event: OnEvent, wait: bool = False) -> None:
    """Train `cfg` to its end on the running Ray, or on a local one started for it. Raises ReloraError, among them
    RunBusyError before anything is written, unless it is to `wait` for the other driver's end, and StoppedError after
    SIGTERM, KeyboardInterrupt after SIGINT."""
    refuse_dead_cluster()  # before anything is claimed
    with owning(run_storage(cfg), wait=wait, check=lambda: check_run(cfg)) as hold, connected(cfg):
        cfg = begin(cfg, hold.term)
        _say_what_is_missing(cfg, on_event)
        _say_if_drivers_cannot_be_told_apart(cfg, on_event)
        # On the driver's own node: without this, Ray may put it on a spot machine.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = CoordinatorActor.options(scheduling_strategy=here).remote(to_yaml(cfg), hold.term)
        try:
            ray.get(coordinator.fatal.remote(), timeout=START_S)
        except ray.exceptions.RayError as error:
            raise RunFailedError(f"the coordinator cannot start on the driver's node: {error}") from error
        hold.when_lost(lambda reason: coordinator.supersede.remote(reason))
        try:
            with _watching(coordinator, on_event), _saving_when_told_to_stop(coordinator, run_storage(cfg)):
                _fit(cfg, coordinator)
        except RunFailedError:
            if hold.lost:
                raise RunBusyError(hold.lost) from None
            raise


def _fit(cfg: rc.RunConfig, coordinator: Any) -> None:
    cluster = cfg.cluster
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    for name, value in elastic.SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="relora-ray-") as scratch:
        trainer = elastic.trainer_class(coordinator)(
            run_agent,
            train_loop_config={"config": to_yaml(cfg), "coordinator": coordinator},
            scaling_config=ScalingConfig(
                num_workers=(cfg.min_workers, cluster.workers),
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            torch_config=Rendezvous(),
            # Ray's own record of the run is not used (our manifests are the truth): it goes to the driver's machine,
            # where Ray's controller is, under a name of its own every time.
            run_config=RunConfig(
                name=f"{cfg.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),  # the coordinator counts, from commit to commit
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
def connected(cfg: rc.RunConfig) -> Iterator[None]:
    """The cluster of RAY_ADDRESS (Ray jobs have it set), or else a local Ray with a slot for every worker.

    A Ray that happens to run on this machine is not joined unasked: it may be another run's own, and end with it.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address := cluster_address():
        refuse_if_dead(address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # another version of Ray or Python, a token that is missing, ...
            raise RunFailedError(f"Ray at RAY_ADDRESS={address} cannot be joined: {_in_short(error)}") from error
    else:
        wanted = cfg.cluster.workers * cfg.cluster.gpus_per_worker
        if wanted > torch.cuda.device_count():
            raise RunFailedError(
                f"cluster.workers={cfg.cluster.workers} with cluster.gpus_per_worker={cfg.cluster.gpus_per_worker} "
                f"need {wanted} GPUs; this machine has {torch.cuda.device_count()}, and RAY_ADDRESS names no cluster. "
                f"Set RAY_ADDRESS, lower cluster.workers, or train on the CPU with cluster.gpus_per_worker=0."
            )
        needed = cfg.cluster.workers * cfg.cluster.cpus_per_worker
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")  # an actor that nobody asks without a dashboard
        try:
            ray.init(address="local", num_cpus=max(needed, os.cpu_count() or 1), include_dashboard=False, **quiet)
        except Exception as error:  # whatever it is, somebody must be told what to do
            ray.shutdown()
            raise ConfigError(f"no Ray can be started here: {_in_short(error)} {_advice(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _in_short(error: Exception) -> str:
    """Its class and first line, as a sentence."""
    said = (str(error).strip().splitlines() or ["it does not say why"])[0]
    return f"{type(error).__name__}: {said}{'' if said.endswith('.') else '.'}"


def _advice(error: Exception) -> str:
    """What to do about a Ray that does not start."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")
    folder = os.environ.get(variable, "/tmp")
    if "AF_UNIX" in str(error):
        return (
            f"Ray's sockets lie below {variable}={folder}, and the path of a socket may have 107 characters, of which "
            f"Ray needs about 70. Set RAY_TMPDIR to a short folder, such as /tmp."
        )
    path = str(getattr(error, "filename", None) or "")
    if path.startswith(os.path.expanduser("~/.ray")):
        return (
            f"Ray writes the token of the cluster that it starts into HOME={os.path.expanduser('~')}. Set HOME to a "
            f"folder that can be written."
        )
    if path:
        return f"Ray keeps its files below {variable}={folder}. Set RAY_TMPDIR to a folder that can be written."
    return f"What its processes say is below {folder}/ray/session_latest/logs."


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


@contextmanager
def _saving_when_told_to_stop(coordinator: Any, storage: Storage) -> Iterator[None]:
    """At SIGTERM have the state stored, then end the block as Ctrl-C does, with StoppedError. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, ended, stored = threading.Event(), threading.Event(), threading.Event()

    def save_and_stop() -> None:
        def call(name: str, *args: Any) -> bool:
            return bool(ray.get(getattr(coordinator, name).remote(*args), timeout=STOP_S))

        try:
            until = time.monotonic() + STOP_S
            waiting = call("ask_to_save", None, "the driver was told to stop", False)
            while waiting and not stored.is_set() and time.monotonic() < until:
                time.sleep(0.2)
                waiting = call("is_asked")
                if call("is_stored"):  # asked last: it may become so in between
                    stored.set()
        except ray.exceptions.RayError as error:
            logger.warning("the state could not be stored: %s", error)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    def on_term(*_: Any) -> None:
        if not told.is_set():
            told.set()
            threading.Thread(target=save_and_stop, daemon=True).start()

    before = signal.signal(signal.SIGTERM, on_term)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it in what its jobs start
    try:
        yield
    except KeyboardInterrupt:
        if not told.is_set():
            raise
        steps = list_manifests(storage)
        what = f"the state after step {steps[-1]} is stored" if steps else "nothing had been trained"
        if steps and not stored.is_set():  # it was starting, or storage failed
            what = f"the newest checkpoint is that after step {steps[-1]}; what was trained since could not be stored"
        raise StoppedError(f"told to stop by SIGTERM: {what}. Run the same command again to continue.") from None
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)


def _with_absolute_paths(cfg: rc.RunConfig) -> rc.RunConfig:
    def absolute(path: str) -> str:
        return path if "://" in path else os.path.abspath(path)

    model = cfg.model.model_copy(
        update={
            name: os.path.abspath(value)
            for name in ("huggingface", "init_from")
            if (value := os.path.expanduser(getattr(cfg.model, name)))
            and "://" not in value
            and (os.path.exists(value) or (name == "init_from" and os.path.exists(rc.split_step(value)[0])))
        }
    )
    return cfg.model_copy(
        update={
            "storage": absolute(cfg.storage),
            "model": model,
            "data": cfg.data.model_copy(update={"path": absolute(cfg.data.path)}),
        }
    )
