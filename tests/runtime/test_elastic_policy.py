"""The elastic policy alone. Ray's classes are real: its policy, its decisions, its scaling config, and what reserves
machines. Faked are the actor calls, which are made at once, the machines, the clock and our coordinator."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    autoscaling_coordinator_client,
    create_scaling_policy,
)  # fmt: skip
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from relora_ray.runtime import controller, elastic


class Handle:
    """An actor, as its handle looks: calls are made at once, and `ray.get` hands their results on."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Coordinator:
    """What the policy asks of the coordinator, and what it was told."""

    def __init__(self) -> None:
        self.warned: list[str] = []
        self.bad: list[str] = []
        self.used: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        self.asked = self.paused = False

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def bad_nodes(self) -> list[str]:
        return self.bad

    def nodes(self) -> list[str]:
        return self.used

    def ask_to_save(self, leaving: list[str], cause: str, wait: bool) -> bool:
        self.calls.append(("ask_to_save", leaving, cause, wait))
        self.asked = True
        return True

    def is_asked(self) -> bool:
        return self.asked

    def is_paused(self) -> bool:
        return self.paused

    def go_on(self) -> None:
        self.calls.append(("go_on",))

    def resizing(self) -> bool:
        self.calls.append(("resizing",))
        return self.paused


class Cluster:
    """Machines of one CPU, a clock, and the policy of a run of so many workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.now = monkeypatch, 1000.0
        self.machines: list[str] = []
        self.draining: dict[str, int] = {}
        self.requests: list[int] = []
        """How many workers' machines the autoscaler was asked for, each time."""
        self.coordinator = Coordinator()
        self.reserver = _AutoscalingCoordinatorActor(
            send_resources_request=lambda bundles, **_: self.requests.append(len(bundles)),
            get_cluster_nodes=self.nodes,
        )
        self.reserver.__ray_ready__ = lambda: self.requests.append(0)
        monkeypatch.setattr(ray, "get", lambda result, timeout=None: result)
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(ray._private.state.GlobalState, "get_draining_nodes", lambda _: self.draining)
        monkeypatch.setattr(
            autoscaling_coordinator_client, "get_or_create_autoscaling_coordinator", lambda: Handle(self.reserver)
        )
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.advance)
        monkeypatch.setattr(elastic, "time", clock)
        monkeypatch.setattr(elastic.BoundaryPolicy, "_are_warm", lambda *_: True)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}, "NodeManagerAddress": f"ip-of-{name}"}
            for name in self.machines
        ]

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def scaling(self, least: int, most: int) -> ScalingConfig:
        return ScalingConfig(num_workers=(least, most), resources_per_worker={"CPU": 1.0})

    def policy(self, least: int, most: int, run: str = "s3://runs/run") -> Any:
        policy = elastic.BoundaryPolicy(self.scaling(least, most), Handle(self.coordinator), run)
        policy.after_controller_start(SimpleNamespace(run_id=uuid.uuid4().hex))
        return policy

    def start(self, policy: Any) -> tuple[int, Any]:
        """Workers that a group is started with, and its label selector."""
        decision = policy.make_decision_for_non_running_worker_group()
        assert isinstance(decision, ResizeDecision), self.coordinator.warned
        assert decision.resources_per_worker == {"CPU": 1.0}
        return decision.num_workers, self.place(policy, decision.num_workers)

    def place(self, policy: Any, workers: int) -> Any:
        where = policy.on_controller_start_worker_group(scaling_config=policy.scaling_config, num_workers=workers)
        without = where["ray.io/node-id"] if where else ""
        there = [name for name in self.machines if name not in self.draining and name not in without.strip("!in()")]
        self.coordinator.used = there[:workers]
        return where

    def replace(self, policy: Any, size: int) -> Any:
        """All wait with their state stored: another group of the same size is started, once. Its label selector."""
        self.coordinator.paused = True
        (decision,) = self.look(policy, size, 1)
        assert decision.num_workers == size
        where = self.place(policy, size)
        self.coordinator.paused = self.coordinator.asked = False
        assert self.look(policy, size, 100) == [], "once is enough"
        return where

    def look(self, policy: Any, size: int, seconds: float = 10.0) -> list[Any]:
        """The resizes decided in so many seconds while a group of this size runs."""
        decisions = []
        for _ in range(int(seconds)):
            self.advance(1.0)
            group = SimpleNamespace(num_workers=size, start_time=0.0)
            decisions.append(policy.make_decision_for_running_worker_group(group, None))
        return [d for d in decisions if not isinstance(d, NoopDecision)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


# What Ray no longer does.


def test_run_does_without_knowing_what_is_drained_and_says_so_once(cluster: Cluster) -> None:
    cluster.monkeypatch.delattr(ray._private.state.GlobalState, "get_draining_nodes")
    cluster.machines = ["a", "b"]
    policy = cluster.policy(1, 2)
    assert cluster.start(policy) == (2, None)
    cluster.look(policy, 2, 100)
    (said,) = cluster.coordinator.warned
    assert "does not say which machines are being drained" in said
    assert "no attribute 'get_draining_nodes'" in said
    assert "none counts as such" in said


def test_drained_machine_is_not_counted(cluster: Cluster) -> None:
    cluster.machines, cluster.draining = ["a", "b"], {"a": 0}
    assert cluster.start(cluster.policy(1, 2)) == (1, None)


def test_machines_that_cannot_be_looked_at_are_said_each_minute(cluster: Cluster) -> None:
    cluster.machines = ["a", "b"]
    policy = cluster.policy(1, 2)

    def fail(*_: Any) -> Any:
        raise TypeError("get_reserved_resources takes 1 argument")

    cluster.reserver.get_reserved_resources = fail
    for _ in range(10):
        assert policy.make_decision_for_non_running_worker_group() == NoopDecision()
    (said,) = cluster.coordinator.warned
    assert "machines cannot be looked at (TypeError: get_reserved_resources takes 1 argument)" in said
    cluster.look(policy, 2, 100)
    assert len(cluster.coordinator.warned) == 2


# Before training.


def begin(cluster: Cluster) -> Any:
    """The scaling policy that Ray Train's controller is given."""
    return handed_over(cluster)["scaling_policy"]


def handed_over(cluster: Cluster, *, own_ray: bool = False, **more: Any) -> dict[str, Any]:
    """What Ray Train's controller is given."""
    given: dict[str, Any] = {}
    cluster.monkeypatch.setattr(elastic, "run_controller", given.update)
    ours = elastic.trainer_class(Handle(cluster.coordinator), "s3://runs/run", own_ray=own_ray)
    trainer = ours.__new__(ours)
    trainer.datasets = {}
    trainer.scaling_config = cluster.scaling(1, 2)
    trainer._initialize_and_run_controller(
        scaling_policy=create_scaling_policy(trainer.scaling_config), train_run_context=SimpleNamespace(run_id="run"),
        **more,
    )  # fmt: skip
    return given


def test_own_ray_has_no_actor_that_reserves_machines(cluster: Cluster) -> None:
    cluster.machines = ["a"]
    nodes = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}}, {"NodeID": "b", "Alive": False}]
    cluster.monkeypatch.setattr(elastic.ray, "nodes", lambda: nodes)
    policy = handed_over(cluster, own_ray=True)["scaling_policy"]
    assert type(policy) is elastic.OwnRayPolicy
    assert cluster.start(policy)[0] == 2
    assert cluster.requests == []
    assert cluster.coordinator.warned == []


def test_next_driver_of_a_run_has_the_machines_of_one_that_was_killed(cluster: Cluster) -> None:
    """Ray keeps them for the run, whose request it has, for three minutes."""
    cluster.machines = ["a", "b"]
    assert cluster.start(cluster.policy(1, 2))[0] == 2
    assert cluster.start(cluster.policy(1, 2))[0] == 2
    cluster.policy(1, 2, "s3://runs/other").make_decision_for_non_running_worker_group()
    assert "waiting for machines for 1 workers with 1 CPU each (there are 0" in cluster.coordinator.warned[-1]


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_run_that_is_stopped_leaves_its_machines_to_others(cluster: Cluster, ends: type[BaseException]) -> None:
    cluster.machines = ["a", "b"]
    policy = cluster.policy(1, 2)

    class Controller:
        def __init__(self, **_: Any) -> None:
            self._worker_group = None

        async def run(self) -> None:
            assert cluster.start(policy)[0] == 2
            raise ends

    cluster.monkeypatch.setattr(controller, "Controller", Controller)
    with pytest.raises(ends):
        controller.run_controller(scaling_policy=policy, callbacks=[])
    assert cluster.start(cluster.policy(1, 2, "s3://runs/other"))[0] == 2


def test_policy_that_works_is_used_without_a_word(cluster: Cluster) -> None:
    cluster.machines = ["a"]
    assert type(begin(cluster)) is elastic.BoundaryPolicy
    assert cluster.coordinator.warned == []
    assert cluster.requests[:2] == [0, 2], "Ray's actor has started before it is asked, for which Ray has 5 s only"


def test_what_a_run_can_do_without_is_said_before_training_and_not_again(cluster: Cluster) -> None:
    cluster.machines = ["a"]
    cluster.monkeypatch.delattr(ray._private.state.GlobalState, "get_draining_nodes")
    policy = begin(cluster)
    assert type(policy) is elastic.BoundaryPolicy
    assert len(cluster.coordinator.warned) == 1
    policy.after_controller_start(SimpleNamespace(run_id="run"))
    assert cluster.start(policy) == (1, None)
    assert len(cluster.coordinator.warned) == 1


def test_rays_own_policy_is_used_where_what_is_called_is_gone(cluster: Cluster) -> None:
    """It is an actor's method: no class that is derived from shows that it is gone."""
    cluster.monkeypatch.delattr(_AutoscalingCoordinatorActor, "get_reserved_resources")
    assert type(begin(cluster)) is ElasticScalingPolicy
    (said,) = cluster.coordinator.warned
    assert "no attribute 'get_reserved_resources'" in said
    assert "its own elastic policy is used, which looks for machines once a minute, loses steps at a resize" in said


def test_rays_own_policy_is_used_where_a_call_has_other_parameters(cluster: Cluster) -> None:
    cluster.monkeypatch.setattr(_AutoscalingCoordinatorActor, "get_reserved_resources", lambda self, requester: {})
    assert type(begin(cluster)) is ElasticScalingPolicy
    assert "takes 2 positional arguments but 3 were given" in cluster.coordinator.warned[0]


def test_rays_own_policy_is_used_where_decisions_look_different(cluster: Cluster) -> None:
    cluster.monkeypatch.setattr(elastic, "ResizeDecision", lambda workers: workers, raising=False)
    assert type(begin(cluster)) is ElasticScalingPolicy
    assert "unexpected keyword argument 'num_workers'" in cluster.coordinator.warned[0]


def test_slow_actor_is_not_taken_for_another_version(cluster: Cluster) -> None:
    def be_slow(*_: Any) -> None:
        raise ray.exceptions.GetTimeoutError("Get timed out")

    cluster.reserver.get_reserved_resources = be_slow
    assert type(begin(cluster)) is elastic.BoundaryPolicy
    assert "could not be looked at before the start: GetTimeoutError: Get timed out" in cluster.coordinator.warned[0]


def test_hook_with_other_parameters_is_noticed(cluster: Cluster) -> None:
    def hook(self: Any, *, num_workers: int) -> None: ...

    cluster.monkeypatch.setattr(ElasticScalingPolicy, "on_controller_start_worker_group", hook)
    assert elastic.trainer_class(Handle(cluster.coordinator), "s3://runs/run") is DataParallelTrainer
    (said,) = cluster.coordinator.warned
    assert "there is now on_controller_start_worker_group(self: 'Any', *, num_workers: 'int')" in said


# Machines on which attempts fail again and again.


def test_bad_machine_is_left_out_for_a_spare_one_and_that_is_said_once(cluster: Cluster) -> None:
    """Ray reserves machines for two workers, the bad one among them: it must be asked for more."""
    cluster.machines, cluster.coordinator.bad = ["a", "b", "c"], ["a"]
    policy = cluster.policy(1, 2)
    assert cluster.start(policy) == (2, {"ray.io/node-id": "!in(a)"})
    assert (cluster.requests[1], cluster.requests[-1]) == (2, 3), (
        "another machine is started where there is no spare one"
    )
    assert cluster.look(policy, 2, 100) == []
    assert [call for call in cluster.coordinator.calls if call[0] == "ask_to_save"] == []
    (said,) = cluster.coordinator.warned
    assert said.startswith("machine ip-of-a (a) is left out: attempts failed there again and again")


def test_least_bad_machines_are_used_where_there_are_too_few_others(cluster: Cluster) -> None:
    cluster.machines, cluster.coordinator.bad = ["a", "b", "c"], ["c", "a", "b"]  # the worst first
    policy = cluster.policy(2, 3)
    assert cluster.start(policy) == (2, {"ray.io/node-id": "!in(c)"})
    said = cluster.coordinator.warned
    assert [message.partition(" is ")[0] for message in said[:1]] == ["machine ip-of-c (c)"]
    assert ["(a)" in said[1], "(b)" in said[2], len(said)] == [True, True, 3]
    assert "without it there is no room for cluster.min_workers=2: it is used until another comes" in said[1]


def test_bad_machine_is_used_again_when_it_is_no_longer_named(cluster: Cluster) -> None:
    cluster.machines, cluster.coordinator.bad = ["a", "b"], ["a"]
    policy = cluster.policy(1, 2)
    assert cluster.start(policy) == (1, {"ray.io/node-id": "!in(a)"})
    cluster.coordinator.bad = []
    assert cluster.start(policy) == (2, None)
    assert cluster.requests[-1] == 2


def test_coordinator_that_names_no_bad_machines_or_fails_to_is_no_obstacle(cluster: Cluster) -> None:
    def fail(_: Any) -> None:
        raise ray.exceptions.RayActorError

    cluster.machines = ["a", "b"]
    cluster.monkeypatch.setattr(Coordinator, "bad_nodes", fail)
    assert cluster.start(cluster.policy(2, 2)) == (2, None)
    cluster.monkeypatch.delattr(Coordinator, "bad_nodes")
    assert cluster.start(cluster.policy(2, 2)) == (2, None)
    assert cluster.coordinator.warned == []


def test_group_on_a_bad_machine_is_replaced_without_a_loss(cluster: Cluster) -> None:
    """Also by one of the same size, when a spare machine is there."""
    cluster.machines = ["a", "b", "c"]
    policy = cluster.policy(2, 2)
    assert cluster.start(policy) == (2, None)
    cluster.coordinator.bad = ["a"]
    assert cluster.look(policy, 2) == [], "it has been asked to store its state first"
    cause = "attempts failed again and again on a machine: 2 -> 2 workers"
    assert cluster.coordinator.calls == [("ask_to_save", [], cause, True)]
    assert cluster.replace(policy, 2) == {"ray.io/node-id": "!in(a)"}


def test_group_on_a_bad_machine_is_replaced_if_its_attempts_end_before_their_state_is_stored(cluster: Cluster) -> None:
    cluster.machines = ["a", "b"]
    policy = cluster.policy(1, 2)
    assert cluster.start(policy) == (2, None)
    cluster.coordinator.bad = ["b"]
    assert cluster.look(policy, 2, 5) == []
    cluster.coordinator.asked = False  # the attempt failed, once more
    (decision,) = cluster.look(policy, 2, 1)
    assert decision.num_workers == 1
    assert cluster.coordinator.calls[-1] == ("resizing",)
    assert cluster.place(policy, 1) == {"ray.io/node-id": "!in(b)"}


def test_group_leaves_a_drained_machine_for_one_that_is_ready(cluster: Cluster) -> None:
    """The size stays: it is the machines that change, before the notice is over."""
    cluster.machines = ["a", "b", "c"]
    policy = cluster.policy(2, 2)
    assert cluster.start(policy) == (2, None)
    cluster.draining = {"c": 0}
    assert cluster.look(policy, 2, 60) == [], "nobody is on it"
    assert cluster.coordinator.calls == [("ask_to_save", ["c"], "machines are being drained", False)]
    cluster.coordinator.asked = False
    cluster.draining = {"b": 0}
    assert cluster.look(policy, 2, 60) == [], "it has been asked to store its state first"
    calls = cluster.coordinator.calls[1:]
    assert calls[-1] == ("ask_to_save", ["b"], "machines are being drained: 2 -> 2 workers", True)
    cluster.replace(policy, 2)
    assert cluster.coordinator.used == ["a", "c"]


def test_state_is_stored_where_no_other_machine_is_ready(cluster: Cluster) -> None:
    cluster.machines = ["a", "b"]
    policy = cluster.policy(2, 2)
    assert cluster.start(policy) == (2, None)
    cluster.draining = {"b": 0}
    assert cluster.look(policy, 2, 60) == []
    assert cluster.coordinator.calls == [("ask_to_save", ["b"], "machines are being drained", False)]


# Too few machines.


def test_waiting_for_machines_is_said_at_once_and_each_minute(cluster: Cluster) -> None:
    cluster.machines, cluster.draining = ["a", "b"], {"b": 0}
    policy = cluster.policy(2, 3)
    until = cluster.now + 130
    while cluster.now < until:
        assert policy.make_decision_for_non_running_worker_group() == NoopDecision()
    said = cluster.coordinator.warned
    assert len(said) == 3, "at 0, 60 and 120 s"
    assert said[0] == (
        "waiting for machines for 2 workers with 1 CPU each (there are 1, with room for 1, and 1 being drained). "
        "Without an autoscaler, add machines or lower cluster.min_workers."
    )
    cluster.machines += ["c"]
    assert cluster.start(policy) == (2, None)
    cluster.machines = ["a"]
    assert policy.make_decision_for_non_running_worker_group() == NoopDecision()
    assert len(cluster.coordinator.warned) == 4, "another time of waiting begins"
