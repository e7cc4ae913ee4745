"""Fixtures: a small real dataset, and configs of tiny runs on it. Nothing is faked."""

from __future__ import annotations

import bz2
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# One thread per process: two cores serve several gloo ranks, and bits depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from relora_ray.config import RunConfig
from relora_ray.conformance.__main__ import make_data
from tests import ceph
from tests.s3 import FaultyProxy, Server
from tests.tiny import tiny_config

torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell starts what is behind a `&` so, and processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

FIRST = ("runtime", "test_kills", "conformance", "test_cli")
"""What takes longest is begun first, so that both processes of a test run end at about the same time."""

SLOW = (
    "conformance", "data/test_claim", "runtime/test_autoscaling", "runtime/test_elastic.py", "runtime/test_faults",
    "runtime/test_gauges", "test_tracking", "is_found_when_it_is_installed",
    "runtime/test_jobs", "runtime/test_meeting", "runtime/test_methods", "runtime/test_notice", "runtime/test_sweep",
    "runtime/test_train", "runtime/test_launch_errors", "simulation", "on_a_server", "test_ranks_store_it_once",
    "test_two_ranks_are_told_too", "on_several_ranks", "spread_over_ranks", "test_elsewhere", "test_a_merge_compiles",
    "test_ablations", "test_checkpoints.py", "test_cli", "test_cluster_files", "test_commands_between", "test_compiled",
    "test_contract", "test_core_trains_with_ray_not_installed", "test_distributed", "test_fork", "test_golden",
    "test_hf_export", "test_kills", "test_playground", "test_second_looks", "test_stop_wins_over_all", "test_trial",
    "test_weights", "test_remote_runs", "test_rollback", "test_storage", "test_throughput", "test_two_drivers",
    "test_architecture", "test_large_vocabularies", "read_at_any_world_size", "test_errors_keep_their_class",
    "test_cluster_of_ray_address", "test_several_epochs", "test_page_in_browser", "test_a_long_run_is_drawn",
    "test_harness", "are_ray_tasks", "planning/test_count", "test_plan.py",
)  # fmt: skip
"""Clusters, servers, several processes, other architectures, and all that takes minutes: `make check` does without."""

ROOT = Path(__file__).parent.parent
AUSTEN = ROOT / "configs/quickstart/austen.txt.bz2"
TOKENIZER = ROOT / "configs/quickstart/tokenizer"


def pytest_collection_finish() -> None:
    """What was imported stays. Each run collects garbage once, and would look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _forget_the_test()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    _forget_the_test()


def _forget_the_test() -> None:
    """Runs of different tests have one environment, and so one server that forks what trains for them."""
    os.environ["PYTEST_CURRENT_TEST"] = "a test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of remote data go to the tests' own folder."""
    os.environ["RELORA_RAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def austen_excerpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 200,000 characters of the novels, as plain text."""
    path = tmp_path_factory.mktemp("text") / "excerpt.txt"
    path.write_text(bz2.decompress(AUSTEN.read_bytes()).decode()[:200_000])
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of about 50,000 tokens, in several shards: the conformance suite's."""
    return Path(make_data(AUSTEN, TOKENIZER, tmp_path_factory.mktemp("data")))


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> RunConfig:
    """ReLoRA: 3 warm-start updates and 3 cycles of 3."""
    return tiny_config(data, tmp_path)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """`server("moto")`: an S3 server of this kind (see Server), one for the whole session. Skips the test where Ceph is
    not installed and cannot be."""
    running: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind == "ceph" and (why := ceph.install()):
            pytest.skip(f"Ceph cannot be installed: {why}")
        if kind not in running:
            running[kind] = Server(kind, tmp_path_factory.mktemp(kind))
            running[kind].start()
        return running[kind]

    yield get
    for started in running.values():
        started.kill()


@pytest.fixture
def moto(server: Callable[[str], Server]) -> Server:
    return server("moto")


@pytest.fixture
def proxy(moto: Server) -> Iterator[FaultyProxy]:
    """In front of moto."""
    proxy = FaultyProxy(moto.endpoint)
    yield proxy
    proxy.close()
