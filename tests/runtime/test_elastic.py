"""A real Ray cluster whose machines come and go under a run; nothing is faked but that they are one machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group_table

from relora_ray.checkpoint import list_manifests
from relora_ray.config import RunConfig
from relora_ray.runs.metrics import Record, read, read_all, read_pages
from relora_ray.runs.places import run_storage
from relora_ray.runtime import driver, elastic
from relora_ray.runtime.preflight import preflight
from tests.cluster import Machines
from tests.runtime.bad_machines import NamesBadMachines
from tests.tiny import losses, run, stored_losses, tiny_config

STEADY = 20
ENOUGH = "that is enough"


@pytest.fixture
def machines() -> Iterator[Machines]:
    cluster = Machines(1, setup_hook="tests.hooks.slow_down")
    yield cluster
    cluster.shutdown()


def test_rays_private_classes_are_as_expected() -> None:
    """If this fails, Ray has changed: see what relora_ray/runtime/elastic.py needs of it."""
    assert elastic.missing == ""
    assert elastic._what_is_unknown() == ""
    assert issubclass(elastic.trainer_class(None, "run"), DataParallelTrainer)


def test_other_version_of_ray_falls_back_to_its_own_policy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(ScalingPolicy, "_send_resource_request")
    assert elastic.trainer_class(None, "run") is DataParallelTrainer
    assert "there is no ElasticScalingPolicy._send_resource_request" in caplog.text


def drive(
    cfg: RunConfig, actions: list[tuple[int, Callable[[], None]]], at_end: Callable[[], None] = lambda: None
) -> Events:
    """Run the driver in a thread, and here each action when so many workers have trained for `STEADY` steps (Ray adds
    machines on the main thread only). When an attempt that follows on the last one has done so, the run is ended,
    wherever it is."""
    events, ended = Events(), threading.Event()
    failures: list[BaseException] = []
    made: list[Any] = []

    class Coordinators:
        """Ray's, and kept to be told to end."""

        def __init__(self, actor: Any) -> None:
            self._actor = actor

        def options(self, **options: Any) -> Any:
            return SimpleNamespace(
                remote=lambda *args: made.append(self._actor.options(**options).remote(*args)) or made[0]
            )

    def run_driver() -> None:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver, "CoordinatorActor", Coordinators(driver.CoordinatorActor))
                driver.run(cfg, on_event=events)
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run_driver, daemon=True).start()
    num_attempts = 0
    for world_size, action in actions:
        while not (events.world_size == world_size and events.is_steady):
            assert not ended.wait(0.05), f"it ended before {world_size} workers trained: {failures}"
        num_attempts = events.num_attempts
        action()
    while not (events.num_attempts > num_attempts and events.is_steady):
        assert not ended.wait(0.05), f"it ended before another attempt trained: {failures}"
    at_end()
    ray.get(made[0].supersede.remote(ENOUGH))
    assert ended.wait(100)
    assert [str(failure) for failure in failures] == [ENOUGH]
    return events


def assert_is_undisturbed(cfg: RunConfig, alone: RunConfig) -> list[Record]:
    """All losses are those of one process that nobody disturbs, whose records are returned."""
    found = stored_losses(cfg)
    assert list(found) == list(range(1, len(found) + 1)), "no step is missing"
    train = alone.train.model_copy(update={"stop_after_steps": len(found)})
    _, records = run(alone.model_copy(update={"train": train}))
    assert found == pytest.approx(losses(records), rel=1e-5)
    return records


class Events:
    """What the driver's events said of the newest attempt."""

    def __init__(self) -> None:
        self.world_size = self.from_step = self.step = self.num_attempts = 0
        self.said: list[str] = []

    @property
    def is_steady(self) -> bool:
        return self.step >= self.from_step + STEADY

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "attempt":
            self.world_size, self.from_step = event["world_size"], event["step"]
            self.num_attempts += 1
        if event["kind"] == "train":
            self.step = event["step"]
        if event["kind"] == "log":
            self.said.append(event["message"])


def test_workers_come_and_go_and_the_result_stays(machines: Machines, data: Path, tmp_path: Path) -> None:
    """1 -> 3 -> 2 workers: losses, merges, and no step is done twice."""
    overrides = (
        "steps=10000", "method.warm_start_steps=25", "method.merge_every_steps=25", "checkpoint.save_every_steps=50",
        "checkpoint.save_async=true", "schedule.warmup_steps=20", "schedule.restart_warmup_steps=20",
        "optimizer.learning_rate=1e-3", "data.seq_len=128", "global_batch_rows=12",
    )  # fmt: skip
    cfg = preflight(tiny_config(data, tmp_path / "a", "cluster.workers=3", "cluster.min_workers=1", *overrides))

    def add_two() -> None:
        machines.add()
        machines.add()

    drive(cfg, [(1, add_two), (3, lambda: machines.drain(machines.nodes[1], 120))])
    storage = run_storage(cfg)
    attempts = read_all(storage, "attempt")
    assert [a["world_size"] for a in attempts] in ([1, 3, 2], [1, 2, 3, 2]), "the resizes took place"
    restarts = read_pages(storage, "restarts")
    assert [r["change"] for r in restarts] == ["start"] + ["resize"] * (len(attempts) - 1)
    assert {r["steps_lost"] for r in restarts} == {0}
    expected = assert_is_undisturbed(cfg, tiny_config(data, tmp_path / "b", *overrides))
    boundaries = [r["step"] for r in expected if r["kind"] == "boundary"]
    assert boundaries
    assert [b["step"] for b in read(storage, "boundary")] == boundaries
    assert [p["step"] for p in read_pages(storage, "ledger")] == boundaries


def test_group_leaves_a_machine_within_its_notice(data: Path, tmp_path: Path) -> None:
    """Two workers and no fewer. The state is stored at once; when another machine is there, the two go on with it."""
    overrides = (
        "steps=10000", "method.warm_start_steps=5000", "method.merge_every_steps=5000", "schedule.warmup_steps=20",
        "checkpoint.save_every_steps=10000", "schedule.restart_warmup_steps=20", "optimizer.learning_rate=1e-3",
        "data.seq_len=64",
    )  # fmt: skip
    cfg = preflight(tiny_config(data, tmp_path / "a", "cluster.workers=2", *overrides))
    cluster = Machines(2, setup_hook="tests.hooks.slow_down")
    try:
        stays, leaves = cluster.nodes
        used: list[set[str]] = []

        def notice() -> None:
            cluster.drain(leaves, 120)
            stored.append(wait_for(lambda: next((s for s in list_manifests(run_storage(cfg)) if s), None)))
            used.append(nodes_in_use())
            cluster.add()
            wait_for(lambda: len(nodes_in_use() - {leaves.node_id}) == 2 or None, seconds=90)
            used.append(nodes_in_use())
            cluster.lose(leaves)

        stored: list[int] = []
        drive(cfg, [(2, notice)])
        (new,) = used[1] - used[0]
        assert used == [{stays.node_id, leaves.node_id}, {stays.node_id, new}]
    finally:
        cluster.shutdown()
    restarts = read_pages(run_storage(cfg), "restarts")
    assert [(r["change"], r["world_size"]) for r in restarts] == [("start", 2), ("resize", 2)]
    assert restarts[1]["cause"] == "machines are being drained: 2 -> 2 workers"
    assert restarts[1]["from_step"] > stored[0]
    assert restarts[1]["steps_lost"] == 0
    assert_is_undisturbed(cfg, tiny_config(data, tmp_path / "b", *overrides))


def test_bad_machine_is_left_and_not_used_again(
    machines: Machines, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 -> 1 -> 2 workers, the last of them on the new machine; only whom the coordinator names is faked."""
    machines.add()
    actor = ray.remote(num_cpus=0, max_concurrency=10_000)(NamesBadMachines)
    monkeypatch.setattr(driver, "CoordinatorActor", actor)
    overrides = ("steps=10000", "method.warm_start_steps=5000", "method.merge_every_steps=5000", "data.seq_len=128")
    cfg = preflight(tiny_config(data, tmp_path / "a", "cluster.workers=2", "cluster.min_workers=1", *overrides))
    bad, good = machines.nodes[0].node_id, machines.nodes[1].node_id
    used: list[set[str]] = []

    def name_bad() -> None:
        used.append(nodes_in_use())
        Path(cfg.storage, "bad").write_text(bad)

    def add() -> None:
        used.append(nodes_in_use())
        machines.add()

    events = drive(cfg, [(2, name_bad), (1, add)], lambda: used.append(nodes_in_use()))
    assert used == [{bad, good}, {good}, {good, machines.nodes[2].node_id}]
    assert [r["steps_lost"] for r in read_pages(run_storage(cfg), "restarts")] == [0, 0, 0]
    assert [message for message in events.said if "machine" in message] == [
        f"machine {machines.nodes[0].node_ip_address} ({bad}) is left out: attempts failed there again and again. "
        f"The run goes on with others."
    ]


def nodes_in_use() -> set[str]:
    """Ids of the machines where workers are."""
    groups = placement_group_table().values()
    return {node for group in groups if group["state"] == "CREATED" for node in group["bundles_to_node_id"].values()}


def wait_for(found: Callable[[], int | None], seconds: float = 30) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (value := found()) is not None:
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing came in {seconds} s")
