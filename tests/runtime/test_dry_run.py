"""What a dry run finds. Clusters that grow are in test_autoscaling."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from relora_ray.config import ClusterConfig, ModelConfig, RunConfig
from relora_ray.errors import ConfigError
from relora_ray.runs.places import run_storage
from relora_ray.runtime.dry_run import _fit, _memory, dry_run, workers_that_fit
from relora_ray.runtime.preflight import preflight
from relora_ray.storage import Storage
from tests.cluster import Machines
from tests.tiny import run, tiny_config


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(data, tmp_path / "runs")


def found(cfg: RunConfig) -> list[str]:
    return [str(finding) for finding in dry_run(preflight(cfg))]


def test_all_is_well_and_nothing_is_left_behind(cfg: RunConfig) -> None:
    lines = found(cfg)
    assert [line.split()[:2] for line in lines] == [
        ["ok", w] for w in ("config", "storage", "data", "memory", "machines")
    ]
    assert "tiny: relora, 12 updates, 1,728 tokens" in lines[0]
    assert run_storage(cfg).list() == []


def test_run_that_is_there_is_compared_and_not_touched(cfg: RunConfig) -> None:
    run(cfg)
    before = sorted(run_storage(cfg).list())
    assert all(line.startswith("ok") for line in found(cfg))
    with pytest.raises(ConfigError, match=r"seed: 3 there, 4 here"):
        found(cfg.model_copy(update={"seed": 4}))
    assert sorted(run_storage(cfg).list()) == before


def test_shard_that_is_cut_short_is_named(cfg: RunConfig, tmp_path: Path) -> None:
    whole, broken = Storage(cfg.data.path), Storage(str(tmp_path / "data"))
    for path in whole.list():
        broken.put(path, whole.get(path))
    shard = next(path for path in broken.list() if "train" in path)
    broken.put(shard, broken.get(shard)[:-2])
    lines = found(cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": broken.url})}))
    assert lines[2].startswith("PROBLEM")
    assert f"1 files are missing or cut short, such as {shard}" in lines[2]


def test_storage_that_cannot_be_written_is_a_problem(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = preflight(cfg)
    monkeypatch.setattr("relora_ray.runtime.dry_run.run_storage", lambda cfg: Storage("/proc/nowhere"))
    assert [finding.fine for finding in dry_run(checked)] == [True, False, True, True, True]


def test_gpus_that_are_not_there_are_a_problem(cfg: RunConfig) -> None:
    lines = found(cfg.model_copy(update={"cluster": cfg.cluster.model_copy(update={"gpus_per_worker": 1})}))
    assert lines[-1].startswith("PROBLEM  machines 1 workers of 1 CPU(s) and 1 GPU(s), in a local Ray")
    assert lines[-1].endswith("Set RAY_ADDRESS, lower cluster.workers, or set cluster.gpus_per_worker=0")


def test_problems_do_not_hide_each_other_and_are_told_once(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}[name])
    changed = cfg.model_copy(
        update={
            "steps": 2_400_000,  # of 144 tokens each: some thousand times the data
            "model": cfg.model.model_copy(update={"init_from": str(tmp_path / "nowhere")}),
            "cluster": cfg.cluster.model_copy(update={"workers": 4000}),
        }
    )
    lines = [str(finding) for finding in dry_run(changed)]
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert [line.split()[1] for line in problems] == ["model", "data", "memory", "machines"]
    model, data, memory, machines = problems
    assert f"model.init_from='{tmp_path}/nowhere'" in model
    assert "times. After 40 times it teaches nothing more: prepare more text, or set steps to" in data
    assert "MB in micro-batches of 3 rows, most in warm start; the share of a worker in this machine" in memory
    assert "Lower train.micro_batch_rows, or take what has more" in memory
    assert "workers would take turns. Lower cluster.workers or cluster.cpus_per_worker" in machines


def test_data_that_are_missing_are_told_once(cfg: RunConfig, tmp_path: Path) -> None:
    data = cfg.data.model_copy(update={"path": str(tmp_path / "none")})
    lines = [str(finding) for finding in dry_run(cfg.model_copy(update={"data": data}))]
    assert sum("PROBLEM" in line for line in lines) == 1
    assert lines[1].startswith("PROBLEM  data     ")


def test_memory_of_gpus_is_that_of_their_kind(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA and Ray would say of GPUs is made up: there are none here."""
    large = cfg.model_copy(update={"model": ModelConfig(size="7b"), "cluster": ClusterConfig(gpus_per_worker=1)})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    l4 = SimpleNamespace(name="NVIDIA L4", total_memory=24 * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: l4)
    fine, text = _memory(large)
    assert not fine
    assert "most in warm start; NVIDIA L4 has 21.8 GB" in text
    monkeypatch.setattr("relora_ray.runtime.dry_run.cluster_address", lambda: "somewhere")
    monkeypatch.setattr("relora_ray.runtime.dry_run.connected", lambda cfg: nullcontext())
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H200": 1.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert _memory(large) == (True, text.replace("NVIDIA L4 has 21.8 GB", "H200 has 132.9 GB").partition(". Lower")[0])
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 1.0, "accelerator_type:Odd": 1.0}}])
    assert _memory(large)[1].endswith("what the GPUs have is not known")


@pytest.mark.parametrize(
    ("resources", "workers"),
    [({"CPU": 9}, 0), ({"CPU": 9, "GPU": 2}, 2), ({"CPU": 3, "GPU": 8}, 1), ({"CPU": 1, "GPU": 8}, 0), ({}, 0)],
)
def test_a_worker_fits_where_all_it_takes_is_there(resources: dict[str, float], workers: int) -> None:
    assert _fit({"CPU": 2, "GPU": 1}, resources) == workers


CLUSTER = """
max_workers: 5
head_node_type: head
available_node_types:
  head: {resources: {CPU: 8}, max_workers: 0}
  four: {resources: {CPU: 32, GPU: 4}, max_workers: 2}
  one: {resources: {CPU: 8, GPU: 1}, max_workers: 10}
"""


@pytest.mark.parametrize(("bundle", "at_most"), [({"CPU": 2, "GPU": 1}, 11), ({"CPU": 8, "GPU": 0}, 12)])
def test_cluster_is_filled_with_what_its_autoscaler_may_bring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: dict[str, float], at_most: int
) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    there = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 32.0, "GPU": 4.0}}]
    monkeypatch.setattr("ray.nodes", lambda: there)
    assert workers_that_fit(bundle, str(tmp_path / "cluster.yaml")) == (_fit(bundle, {"CPU": 8}), at_most)
    assert workers_that_fit(bundle, str(tmp_path / "nowhere")) == (_fit(bundle, {"CPU": 8}), None)


def test_cluster_of_ray_address_is_looked_at(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(1)
    try:
        ray.shutdown()
        monkeypatch.setenv("RAY_ADDRESS", machines.address)
        assert found(cfg)[-1] == "ok       machines 1 workers of 1 CPU(s) and 0 GPU(s): 1 fit now"
        larger = cfg.model_copy(update={"cluster": cfg.cluster.model_copy(update={"workers": 3, "min_workers": 2})})
        line = found(larger)[-1]
        assert line.startswith("PROBLEM  machines 2 to 3 workers of 1 CPU(s) and 0 GPU(s): 1 fit now. Unless an autosc")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        assert found(larger)[-1].startswith(
            "ok       machines 2 to 3 workers of 1 CPU(s) and 0 GPU(s): 1 fit now. The run"
        )
    finally:
        machines.shutdown()
