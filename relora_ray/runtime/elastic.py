"""When a worker group changes its size: the only module that knows Ray Train's private classes.

Stock Ray Train looks at its machines every minute, through a list that is 20 s old, and replaces a worker group without
a word: what was trained since the last checkpoint is done again. Here the list is fresh and without machines that are
being drained. For a resize that nobody forces the ranks are asked to store their state after the next step and wait;
the group is replaced while they do, so no step is lost. After a loss the survivors are left to store what they began.

Where Ray's classes are not as expected, `trainer_class` returns Ray's own trainer, with a warning: tests/runtime say
clearly when a new version of Ray changes them.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relora_ray.runtime.agent import warm_up

logger = logging.getLogger(__name__)

try:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    missing = ""
except ImportError as error:  # pragma: no cover: another version of Ray
    missing = str(error)

CHECK_S = 1.0
"""How often machines are looked at."""
STEADY_S = 3.0
"""A larger size must have been possible for so long: machines that come together are taken in together."""
DOUBT_S = 60.0
"""Ray's list of machines may be wrong for so long after a loss: they are knocked at."""
KNOCK_S = 2.0
"""A machine that does not answer for so long is gone."""
WARM_S = 60.0
"""A new machine that has not imported everything by then is taken in as it is."""
ASK_AGAIN_S = 10.0
"""Between a wish that came to nothing and the next."""
CALL_S = 10.0
"""The coordinator answers within this."""
LAST_WORDS_S = 70.0

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # of an agent that does not answer
    # Drained machines are this module's affair: Ray's own watcher would wait until all workers have ended.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's page "Train", a sweep's runs too
}
"""Environment of Ray Train's controller; what is set already stays."""


def trainer_class(coordinator: Any) -> Any:
    """TorchTrainer, with this module's policy if Ray's classes allow it."""
    reason = missing or _what_is_unknown()
    if reason:
        logger.warning(
            "Ray %s is not the version that this was made for (%s): its own elastic policy is used, which loses steps "
            "at a resize.",
            ray.__version__,
            reason,
        )
        return TorchTrainer

    class ElasticTrainer(TorchTrainer):
        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            kwargs["scaling_policy"] = BoundaryPolicy(self.scaling_config, coordinator)
            return super()._initialize_and_run_controller(**kwargs)

    return ElasticTrainer


def _what_is_unknown() -> str:
    """What this module needs of Ray's private classes and does not find."""
    needed = {
        ElasticScalingPolicy: (
            "make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group",
            "_get_reserved_resources", "_count_possible_workers", "_get_resize_decision",
            "_maybe_send_resource_request", "on_controller_start_worker_group",
            "before_controller_execute_failure_decision",
        ),
        TorchTrainer: ("_initialize_and_run_controller",),
    }  # fmt: skip
    absent = [
        f"{owner.__name__}.{name}" for owner, names in needed.items() for name in names if not hasattr(owner, name)
    ]
    return f"there is no {', '.join(absent)}" if absent else ""


if not missing:

    class BoundaryPolicy(ElasticScalingPolicy):
        """Resizes when all ranks have stored their state and wait; starts again at once with what is there."""

        def __init__(self, scaling_config: Any, coordinator: Any) -> None:
            super().__init__(scaling_config)
            self._coordinator = coordinator
            self._checked_at, self._doubt_until = 0.0, 0.0
            self._gone: set[str] = set()
            """Machines that Ray takes for alive and that do not answer."""
            self._possible, self._possible_since = 0, 0.0
            self._group_start: float | None = None
            self._asked: int | None = None
            """The size that the ranks were asked to store their state for."""
            self._ask_again_at = 0.0
            self._leaving: set[str] = set()
            """Machines that are being drained."""
            self._told_leaving: set[str] = set()
            self._warming: dict[str, tuple[Any, float]] = {}
            """By machine: the task that has everything imported there, and since when."""

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            try:
                ray.get(self._coordinator.last_words.remote(), timeout=LAST_WORDS_S)
            except ray.exceptions.RayError as error:
                logger.warning("survivors may have been storing a checkpoint: %s", error)
            self._doubt_until = time.monotonic() + DOUBT_S

        def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
            """Keep Ray from placing workers on machines that it does not yet know to be gone."""
            return {"ray.io/node-id": f"!in({','.join(sorted(self._gone))})"} if self._gone else None

        def make_decision_for_non_running_worker_group(self) -> Any:
            decision = super().make_decision_for_non_running_worker_group()
            if isinstance(decision, NoopDecision):
                time.sleep(0.2)  # the controller asks again at once
            return decision

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            now, size = time.monotonic(), worker_group_state.num_workers
            if self._group_start != worker_group_state.start_time:
                self._group_start, self._asked = worker_group_state.start_time, None
            if self._asked is not None and self._is_paused():
                return self._resize(size, self._asked)
            if now - self._checked_at < CHECK_S:
                return NoopDecision()
            self._checked_at = now
            self._maybe_send_resource_request()
            resources = self._get_reserved_resources()
            if resources is None:
                return NoopDecision()
            leaving = self._leaving
            if self._asked is not None and not self._call("is_asked"):  # the attempt ended, or nothing could be stored
                self._asked, self._ask_again_at = None, now + ASK_AGAIN_S
                self._told_leaving.clear()
            possible = self._count_possible_workers(resources)
            if possible != self._possible:
                self._possible, self._possible_since = possible, now
            wanted = size if possible < self.scaling_config.min_workers else possible
            if wanted > size and not (self._are_warm(resources) and now - self._possible_since >= STEADY_S):
                wanted = size
            if now < self._ask_again_at:
                return NoopDecision()
            if wanted != size and wanted != self._asked:
                verb = "machines are being drained" if leaving and wanted < size else "machines came or went"
                if self._ask(leaving, f"{verb}: {size} -> {wanted} workers", wait=True):
                    self._asked = wanted
            elif wanted == size and self._asked is not None:
                self._call("go_on")
                self._asked = None
            elif wanted == size and leaving - self._told_leaving:
                # There is nobody to go on without them: at least the state is stored.
                self._ask(leaving, "machines are being drained", wait=False)
            return NoopDecision()

        def _are_warm(self, nodes: Iterable[str]) -> bool:
            """Whether new machines have imported everything, as they are told to here while training goes on."""
            for node in set(nodes) - self._warming.keys():
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(warm_up).options(scheduling_strategy=where)
                self._warming[node] = (task.remote(), time.monotonic())
            tasks = [task for node, (task, since) in self._warming.items() if time.monotonic() - since < WARM_S]
            return len(ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]) == len(tasks) if tasks else True

        def _ask(self, leaving: set[str], cause: str, *, wait: bool) -> bool:
            accepted = bool(self._call("ask_to_save", sorted(leaving), cause, wait))
            if accepted:
                self._told_leaving |= leaving
            return accepted

        def _resize(self, size: int, wanted: int) -> Any:
            self._asked = None
            resources = self._get_reserved_resources()  # never on a stale plan
            if resources is None or self._count_possible_workers(resources) != wanted:
                self._call("go_on")
                return NoopDecision()
            self._call("resizing")
            logger.info("resizing from %d to %d workers", size, wanted)
            return self._get_resize_decision(wanted)

        def _is_paused(self) -> bool:
            return bool(self._call("is_paused"))

        def _call(self, name: str, *args: Any) -> Any:
            try:
                return ray.get(getattr(self._coordinator, name).remote(*args), timeout=CALL_S)
            except ray.exceptions.RayError as error:
                logger.warning("the coordinator does not answer: %s", error)
                return None

        def _get_reserved_resources(self) -> Any:
            """What each machine has for us now, without those that are being drained."""
            try:
                found = ray.get(
                    self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, True),
                    timeout=CALL_S,
                )
                self._leaving = _draining()
                self._gone = _unreachable(found) if time.monotonic() < self._doubt_until else set()
            except Exception as error:  # whatever it is: the run goes on at its size
                logger.warning("the machines cannot be looked at: %s", error)
                return None
            return {node: resources for node, resources in found.items() if node not in self._leaving | self._gone}


def _unreachable(nodes: Iterable[str]) -> set[str]:
    """Ids of those whose Ray daemon does not take a connection."""
    addresses = {n["NodeID"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes()}

    def answers(node: str) -> bool:
        try:
            socket.create_connection(addresses[node], timeout=KNOCK_S).close()
        except (OSError, KeyError):
            return False
        return True

    nodes = list(nodes)
    with ThreadPoolExecutor(32) as pool:
        return {node for node, there in zip(nodes, pool.map(answers, nodes), strict=True) if not there}


def _draining() -> set[str]:
    """Ids of machines that are about to be taken away."""
    return set(ray._private.state.state.get_draining_nodes() or {})
