"""When a worker group changes its size: the only module that knows Ray Train's private classes.

Stock Ray Train looks at its machines every minute, through a list that is 20 s old, and replaces a worker group without
a word: what was trained since the last checkpoint is done again. Here the list is fresh and without machines that are
being drained. For a resize that nobody forces the ranks are asked to store their state after the next step and wait;
the group is replaced while they do, so no step is lost. After a loss the survivors are left to store what they began.
A machine on which attempts fail again and again is treated like one that is gone.

All that is private to Ray 2.60 and used here; the settings at `SETTINGS` are its environment variables:

| private                                            | for                     | public instead                       |
|----------------------------------------------------|-------------------------|--------------------------------------|
| DataParallelTrainer: TorchTrainer without the import | no torch in the driver | ray.train.torch.TorchTrainer         |
| its _initialize_and_run_controller                 | to hand the policy over | none                                 |
| what controller.py names                           | fewer processes         | none                                 |
| ElasticScalingPolicy, its make_decision_..., twice | when to resize          | none                                 |
| NoopDecision, ResizeDecision                       | what they return        | none                                 |
| on_controller_start_worker_group                   | placing, and its size   | ScalingConfig.label_selector: fixed  |
| before_controller_execute_failure_decision         | last words              | UserCallback.after_exception: not    |
|                                                    |                         | where a group could not start        |
| after_controller_start, before_controller_abort,   | to ask the autoscaler   | ray.autoscaler.sdk: one wish for the |
| _send_resource_request, _maybe_...,                |                         | cluster, not one for each run        |
| _get_num_workers_for_resource_request              |                         |                                      |
| _autoscaling_coordinator, _requester_id            | which machines are ours | ray.nodes(): also what others have   |
| ray._private.state.state.get_draining_nodes        | which will be gone      | none: list_nodes() knows only alive  |
| (optional)                                         |                         | and dead, and needs a dashboard;     |
|                                                    |                         | get_preemption_info() is for workers |

`trainer_class` compares names and parameters, and the trainer does all of it once before it trains. Where something
does not work, Ray's own elastic policy is used, and the driver's console says so. Without the optional one nothing
counts as being drained.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relora_ray.runtime.server import warm_up
from relora_ray.runtime.sizing import Decision, Seen, Sizing, without_bad

logger = logging.getLogger(__name__)

try:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    from relora_ray.runtime.controller import Group, TrainController, WorkerGroup, run_controller, state, worker_group

    missing = ""
except ImportError as error:  # pragma: no cover: another version of Ray
    missing = str(error)

CHECK_S = 1.0
"""How often machines are looked at."""
DOUBT_S = 60.0
"""Ray's list of machines may be wrong for so long after a loss: they are knocked at."""
KNOCK_S = 2.0
"""A machine that does not answer for so long is gone."""
WARM_S = 60.0
"""A new machine that has not imported everything by then is taken in as it is."""
CALL_S = 10.0
"""The coordinator answers within this."""
ACTOR_S = 60.0
"""Ray's actor that reserves machines has started within this."""
LAST_WORDS_S = 70.0
SAY_AGAIN_S = 60.0
"""What lasts is said again after this."""

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # of an agent that does not answer
    # Drained machines are this module's affair: Ray's own watcher would wait until all workers have ended.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # an actor for a page that the dashboard in Ray's packages does not have
}
"""Environment of Ray Train's controller; what is set already stays."""

OVERRIDDEN = (
    "after_controller_start",
    "make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group",
    "on_controller_start_worker_group", "before_controller_execute_failure_decision",
    "_get_num_workers_for_resource_request",
)  # fmt: skip
USED = (
    "_maybe_send_resource_request", "_send_resource_request", "_autoscaling_coordinator", "before_controller_abort",
)  # fmt: skip

REPLACED = ("_init_train_context_on_workers", "_get_worker_runtime_env")
"""Of Ray's worker group, in controller.py."""

Resources = dict[str, float]


def trainer_class(coordinator: Any, run: str, *, own_ray: bool = False) -> Any:
    """A trainer, with this module's policy if Ray's classes allow it. `run`: a name that all drivers of the run have,
    and those of no other. `own_ray`: nobody else uses this Ray, which is one machine."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if reason := missing or _what_is_unknown():
        _say_that_stock_is_used(coordinator, reason)
        return DataParallelTrainer

    class ElasticTrainer(DataParallelTrainer):
        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            policy, reason = _tried_policy(self.scaling_config, coordinator, run, kwargs, own_ray=own_ray)
            if reason:
                _say_that_stock_is_used(coordinator, reason)
            else:
                kwargs["scaling_policy"] = policy
            return run_controller(own_settings=SETTINGS.keys(), **kwargs)

    return ElasticTrainer


def _say_that_stock_is_used(coordinator: Any, reason: str) -> None:
    message = (
        f"Ray {ray.__version__} is not the version that this was made for ({reason}): its own elastic policy is used, "
        f"which looks for machines once a minute, loses steps at a resize and hears of no notice. Install ray==2.60.*."
    )
    _show(coordinator, message)


def _show(coordinator: Any, message: str) -> None:
    """On the driver's console, from any process: what Ray Train's controller logs is seen by nobody."""
    try:
        coordinator.warn.remote(message)
    except AttributeError:  # it has no such method
        logger.warning("%s", message)


def _what_is_unknown() -> str:
    """What this module needs of Ray's private classes and does not find, or finds with other parameters."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    needed = {
        ElasticScalingPolicy: OVERRIDDEN + USED,
        DataParallelTrainer: ("_initialize_and_run_controller",),
        TrainController: ("worker_group_cls",),
        WorkerGroup: REPLACED,
        worker_group: ("SynchronizationActor",),
        state: ("_shutdown_sync_actor",),
    }
    absent = [
        f"{owner.__name__}.{name}" for owner, names in needed.items() for name in names if not hasattr(owner, name)
    ]
    if absent:
        return f"there is no {', '.join(absent)}"
    pairs = [(ElasticScalingPolicy, BoundaryPolicy, name) for name in OVERRIDDEN]
    pairs += [(WorkerGroup, Group, name) for name in REPLACED]
    changed = [
        f"{name}{theirs}"
        for them, us, name in pairs
        if list((theirs := inspect.signature(getattr(them, name))).parameters)
        != list(inspect.signature(getattr(us, name)).parameters)
    ]
    return f"there is now {', '.join(changed)}" if changed else ""


def _tried_policy(
    scaling_config: Any, coordinator: Any, run: str, controller: dict[str, Any], *, own_ray: bool
) -> tuple[Any, str]:
    """A policy that has done once all that is private to Ray, and what did not work. Before training, in the driver.

    `controller`: the arguments of Ray Train's controller."""
    try:
        if absent := {"scaling_policy", "train_run_context"} - controller.keys():
            return None, f"Ray Train's controller takes no {', '.join(sorted(absent))}"
        policy = (OwnRayPolicy if own_ray else BoundaryPolicy)(scaling_config, coordinator, run)
        policy.try_all(controller["train_run_context"])
    except ray.exceptions.RayTaskError as error:
        return None, _in_words(error)
    except ray.exceptions.RayError as error:  # somebody is slow or away: that is no other version
        _show(coordinator, f"the machines could not be looked at before the start: {_in_words(error)}.")
    except Exception as error:  # whatever it is: Ray's own policy may work
        return None, _in_words(error)
    return policy, ""


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"  # the last one of a traceback says what it was


if not missing:

    class BoundaryPolicy(ElasticScalingPolicy):
        """Resizes when all ranks have stored their state and wait; starts again at once with what is there."""

        def __init__(self, scaling_config: Any, coordinator: Any, run: str) -> None:
            super().__init__(scaling_config)
            self._coordinator, self._run = coordinator, run
            self._min, self._max = scaling_config.min_workers, scaling_config.max_workers
            self._each: Resources = {kind: n for kind, n in scaling_config.resources_per_worker.items() if n}
            """What one worker needs."""
            self._sizing = Sizing(self._min)
            self._checked_at, self._doubt_until = 0.0, 0.0
            self._gone: set[str] = set()
            """Machines that Ray takes for alive and that do not answer."""
            self._left_out: set[str] = set()
            """Machines on which attempts fail again and again, and without which there are enough."""
            self._in_their_place = 0
            """How many more workers Ray is asked for than there may be, as it counts machines that are bad or leave."""
            self._reserved: set[str] = set()
            """Machines that Ray has for us, fit to be used or not."""
            self._leaving: set[str] = set()
            """Machines that are being drained."""
            self._warming: dict[str, tuple[Any, float]] = {}
            """By machine: the task that has everything imported there, and since when."""
            self._said: dict[str, float] = {}
            self._is_reserver_up = False

        def try_all(self, run_context: Any) -> None:
            """Do once, in the driver, what the controller will have this do. Raises whatever does not work."""
            NoopDecision()
            self._start_with(self._max)
            self.after_controller_start(run_context)  # the request is the run's own: the controller makes it again
            self._see()

        def after_controller_start(self, train_run_context: Any) -> None:
            """The run's name is the request's. Ray keeps a request for three minutes after the driver that made it was
            killed: by a name that is new each time, the next driver of the run would wait for its own machines."""
            super().after_controller_start(SimpleNamespace(run_id=self._run))

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
            try:
                ray.get(self._coordinator.last_words.remote(), timeout=LAST_WORDS_S)
            except ray.exceptions.RayError as error:
                logger.warning("survivors may have been storing a checkpoint: %s", error)
            self._doubt_until = time.monotonic() + DOUBT_S

        def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
            """Keep Ray from placing workers on machines that it does not yet know to be gone, or that are left out."""
            self._sizing.started(num_workers)
            without = self._gone | self._left_out
            return {"ray.io/node-id": f"!in({','.join(sorted(without))})"} if without else None

        def _get_num_workers_for_resource_request(self) -> int:
            return int(self._max + self._in_their_place)

        def _send_resource_request(self) -> None:
            """When Ray's actor has started: Ray gives it 5 s to answer, and then prints a traceback."""
            if not self._is_reserver_up:
                with contextlib.suppress(ray.exceptions.RayError):  # Ray says so
                    ray.get(self._autoscaling_coordinator.__ray_ready__.remote(), timeout=ACTOR_S)
                self._is_reserver_up = True
            super()._send_resource_request()

        def make_decision_for_non_running_worker_group(self) -> Any:
            self._maybe_send_resource_request()
            resources = self._look()
            if resources is not None:
                room = self._room(resources)
                if room >= self._min:
                    self._said.pop("waiting", None)
                    return self._start_with(room)
                self._say_waiting(resources, room)
            time.sleep(0.2)  # the controller asks again at once
            return NoopDecision()

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            now, sizing = time.monotonic(), self._sizing
            if sizing.asked is not None and self._call("is_paused"):
                return self._replace(sizing.asked)
            if now - self._checked_at < CHECK_S:
                return NoopDecision()
            self._checked_at = now
            self._maybe_send_resource_request()
            resources = self._look()
            if resources is None:
                return NoopDecision()
            used = set(self._call("nodes") or []) if self._left_out | self._leaving else set()
            seen = Seen(self._room(resources), used, self._leaving, self._left_out)
            decision = sizing.decide(now, seen, lambda: self._call("is_asked"), lambda: self._are_warm(resources))
            if decision.do == "replace":
                return self._replace(decision.workers, at_once=True)
            if decision.do == "go on":
                self._call("go_on")
            elif decision.do == "ask" and self._ask(decision):
                sizing.accepted(decision, seen)
            return NoopDecision()

        def _are_warm(self, nodes: Iterable[str]) -> bool:
            """Whether new machines have imported everything, as they are told to here while training goes on."""
            for node in set(nodes) - self._warming.keys():
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(warm_up).options(scheduling_strategy=where)
                self._warming[node] = (task.remote(), time.monotonic())
            tasks = [task for node, (task, since) in self._warming.items() if time.monotonic() - since < WARM_S]
            return len(ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]) == len(tasks) if tasks else True

        def _ask(self, decision: Decision) -> bool:
            return bool(self._call("ask_to_save", sorted(self._leaving), decision.cause, decision.wait))

        def _replace(self, wanted: int, *, at_once: bool = False) -> Any:
            """`at_once`: though not all wait with their state stored."""
            self._sizing.asked = None
            resources = self._look()  # never on a stale plan
            if resources is None or self._room(resources) != wanted:
                self._call("go_on")
                return NoopDecision()
            if not self._call("resizing") and not at_once:  # they do not wait any more
                return NoopDecision()
            logger.info("resizing from %d to %d workers", self._sizing.size, wanted)
            return self._start_with(wanted)

        def _start_with(self, workers: int) -> Any:
            return ResizeDecision(num_workers=workers, resources_per_worker=self._each)

        def _call(self, name: str, *args: Any) -> Any:
            try:
                return ray.get(getattr(self._coordinator, name).remote(*args), timeout=CALL_S)
            except ray.exceptions.RayError as error:
                logger.warning("the coordinator does not answer: %s", error)
                return None

        def _say(self, what: str, message: str, *, again_s: float = math.inf) -> None:
            """On the driver's console; `what`, a name for it, not again before `again_s`."""
            now = time.monotonic()
            if what not in self._said or now - self._said[what] >= again_s:
                self._said[what] = now
                _show(self._coordinator, message)

        def _say_waiting(self, resources: dict[str, Resources], room: int) -> None:
            each = ", ".join(f"{amount:g} {kind}" for kind, amount in self._each.items())
            without = [
                f"{len(nodes)} {why}"
                for nodes, why in ((self._leaving, "being drained"), (self._gone, "gone"))
                if nodes
            ]
            self._say(
                "waiting",
                f"waiting for machines for {self._min} workers with {each} each (there are {len(resources)}, with room "
                f"for {room}{''.join(f', and {text}' for text in without)}). Without an autoscaler, add machines or "
                f"lower cluster.min_workers.",
                again_s=SAY_AGAIN_S,
            )

        def _room(self, machines: dict[str, Resources]) -> int:
            """Workers that fit there, and no more than there may be."""
            return int(min(sum(self._fit(there) for there in machines.values()), self._max))

        def _fit(self, there: Resources) -> int:
            return min((int(there.get(kind, 0) // amount) for kind, amount in self._each.items()), default=self._max)

        def _look(self) -> dict[str, Resources] | None:
            """`_see`, or None if that fails: the run goes on at its size."""
            try:
                return self._see()
            except Exception as error:  # whatever it is
                self._say(
                    "look",
                    f"the machines cannot be looked at ({_in_words(error)}): the run is neither started nor resized "
                    f"until they can be.",
                    again_s=SAY_AGAIN_S,
                )
                return None

        def _see(self) -> dict[str, Resources]:
            """What each machine has for us now, without those that are being drained, do not answer or are left out."""
            named = self._call("bad_nodes") if hasattr(self._coordinator, "bad_nodes") else None
            self._leaving = self._being_drained()
            bad = self._ask_for_others(named or [], self._leaving & self._reserved)
            found = self._look_at_reserved()
            self._reserved = set(found)
            self._gone = _unreachable(found) if time.monotonic() < self._doubt_until else set()
            usable = {node: there for node, there in found.items() if node not in self._leaving | self._gone}
            return self._leave_out(bad, usable)

        def _look_at_reserved(self) -> dict[str, Resources]:
            """What Ray has for us, by machine."""
            request = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, True)
            found: dict[str, Resources] = ray.get(request, timeout=CALL_S)
            return found

        def _being_drained(self) -> set[str]:
            try:
                return _draining()
            except Exception as error:  # a run can do without
                self._say(
                    "draining",
                    f"Ray does not say which machines are being drained ({_in_words(error)}): none counts as such. "
                    f"A notice changes nothing, and after the machine is lost the steps since the last checkpoint are "
                    f"done again.",
                )
                return set()

        def _ask_for_others(self, named: list[str], leaving: set[str]) -> dict[str, str]:
            """In place of machines that are `named` as bad, the worst first, and of those that are `leaving`: Ray
            reserves machines for us and starts others only as long as we ask for more than fits on these. Returns the
            bad ones with their addresses."""
            if not named and not leaving and not self._in_their_place:
                return {}
            alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            bad = [node for node in named if node in alive]
            in_their_place = sum(self._fit(alive[node]["Resources"]) for node in {*bad, *leaving} & alive.keys())
            if in_their_place != self._in_their_place:
                self._in_their_place = in_their_place
                self._send_resource_request()
            return {node: alive[node]["NodeManagerAddress"] for node in bad}

        def _leave_out(self, bad: dict[str, str], usable: dict[str, Resources]) -> dict[str, Resources]:
            """Those of the `usable` machines that are used: without the bad ones, as long as enough are left."""
            used = without_bad(bad, usable, lambda machines: self._room(machines) >= self._min)
            self._left_out = bad.keys() - used.keys() if self._room(used) >= self._min else set()
            for node, address in bad.items():
                if node in used:
                    self._say(
                        f"needed {node}",
                        f"attempts failed again and again on machine {address} ({node}), but without it there is "
                        f"no room for cluster.min_workers={self._min}: it is used until another comes.",
                    )
                elif node in self._left_out:
                    self._say(
                        f"left out {node}",
                        f"machine {address} ({node}) is left out: attempts failed there again and again. The run goes "
                        f"on with others.",
                    )
            return used

    class OwnRayPolicy(BoundaryPolicy):
        """All that there is is the run's: no actor is started that reserves machines and asks for more."""

        def after_controller_start(self, train_run_context: Any) -> None: ...
        def _maybe_send_resource_request(self) -> None: ...
        def _send_resource_request(self) -> None: ...

        def _look_at_reserved(self) -> dict[str, Resources]:
            return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


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
