"""SIGKILL at every phase of a save: of a training process, of one of two, and of the S3 server.

15 seeded points in the first two tests, or KILLS. After every kill: no acknowledged checkpoint is lost, and all are
whole. At the end: every loss of every life is the uninterrupted run's, bit for bit. Lives are forked from a server that
has imported everything, so that one takes about a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from relora_ray.checkpoint import checkpointer, list_manifests, read_manifest
from relora_ray.commands.checkpoints import prune, verify
from relora_ray.config import RunConfig
from relora_ray.loop import run_attempt
from relora_ray.modeling.parallel import World
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run
from relora_ray.storage import Storage
from tests.s3 import BUCKET, FaultyProxy, Server
from tests.tiny import tiny_config

Point = tuple[str, int]
"""A phase, and its how-manieth time in this life: the process dies there."""

PHASES = {
    "train": 6, "copy": 4, "base": 6, "delta": 8, "before commit": 4, "after commit": 4, "prune": 6, "acknowledged": 4,
    "terms": 1, "removals": 4,
}  # fmt: skip
"""With the number of times to choose from."""
STEPS = 27
KILLS = int(os.environ.get("KILLS", "15"))
"""Of these, every fifth is of one of two processes."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "s3fs", "aiobotocore.session", "tests.test_kills"]
)


def live(cfg: RunConfig, log: str, rank: int, size: int, meeting: str, point: Point | None) -> None:
    """One life of one rank: trains to the end, or to `point`."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    seen: Counter[str] = Counter()

    def reach(phase: str) -> None:
        seen[phase] += 1
        if point == (phase, seen[phase]):
            os.kill(os.getpid(), signal.SIGKILL)

    _announce_phases(reach)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def on_record(record: Record) -> None:
        if rank == 0:
            os.write(file, json.dumps(record).encode() + b"\n")
        reach({"train": "train", "checkpoint": "acknowledged"}.get(record["kind"], ""))

    run_attempt(cfg, World.current(), on_record=on_record)
    if size > 1:
        dist.destroy_process_group()


def _announce_phases(reach: Callable[[str], None]) -> None:
    put, put_new, delete, take = Storage.put, Storage.put_new, Storage.delete, checkpointer.HostCopies.take

    def announced_put(self: Storage, path: str, data: bytes) -> None:
        reach(path.partition("/")[0])
        put(self, path, data)

    def announced_put_new(self: Storage, path: str, data: bytes) -> None:
        is_manifest = path.startswith("manifests/")
        reach("before commit" if is_manifest else path.partition("/")[0])
        put_new(self, path, data)
        reach("after commit" if is_manifest else "")

    def announced_delete(self: Storage, path: str) -> None:
        reach("prune")
        delete(self, path)

    def announced_take(self: Any, kind: str, tensors: Any) -> Any:
        copies = take(self, kind, tensors)
        reach("copy")
        return copies

    Storage.put, Storage.put_new = announced_put, announced_put_new
    Storage.delete, checkpointer.HostCopies.take = announced_delete, announced_take


def one_life(cfg: RunConfig, log: Path, size: int, victim: int = 0, point: Point | None = None) -> bool:
    """Whether it came to the end. When one rank dies the others are ended too, as Ray does."""
    meeting = str(log.with_name(f"meeting-{os.urandom(4).hex()}"))
    ranks: list[BaseProcess] = [
        _context.Process(target=live, args=(cfg, str(log), rank, size, meeting, point if rank == victim else None))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in ranks])
    if any(process.exitcode for process in ranks):
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join()
    return all(process.exitcode == 0 for process in ranks)


def records_of(log: Path, kind: str) -> list[Record]:
    lines = log.read_bytes().splitlines() if log.exists() else []
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


@pytest.fixture
def run_on_s3(data: Path, server: Callable[[str], Server]) -> Callable[..., RunConfig]:
    def make(kind: str, *overrides: str, endpoint: str = "") -> RunConfig:
        storage = Path(f"{BUCKET}/kills-{os.urandom(4).hex()}")
        options = server(kind).options | ({"endpoint_url": endpoint} if endpoint else {})
        keep = [f"steps={STEPS}", "checkpoint.save_async=true", "checkpoint.keep_last=2", "storage_retry_s=30"]
        cfg = tiny_config(data, storage, *keep, *overrides, f"storage_options={json.dumps(options)}")
        return check_run(cfg.model_copy(update={"storage": f"s3://{storage}"}))

    return make


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step, of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert one_life(check_run(tiny_config(data, folder, f"steps={STEPS}")), folder / "log.jsonl", 1)
    return {record["step"]: record["loss"] for record in records_of(folder / "log.jsonl", "train")}


def killed_again_and_again(make: Callable[..., RunConfig], tmp_path: Path, *, seed: int, size: int, kills: int) -> None:
    whole_log, choose = tmp_path / "whole.jsonl", random.Random(seed)
    assert one_life(make("moto"), whole_log, size)
    expected = {record["step"]: record["loss"] for record in records_of(whole_log, "train")}
    assert sorted(expected) == list(range(1, STEPS + 1))
    done, tried = 0, Counter[str]()
    for number in range(10 * kills):
        if done == kills:
            break
        cfg, log = make("moto"), tmp_path / f"chain-{number}.jsonl"
        storage = run_storage(cfg)
        while done < kills:
            phase = choose.choice(list(PHASES))
            point = (phase, choose.randint(1, PHASES[phase]))
            ended = one_life(cfg, log, size, choose.randrange(size), point)
            done += not ended
            tried[phase] += not ended
            acknowledged = [record["step"] for record in records_of(log, "checkpoint")]
            steps = list_manifests(storage)
            assert max(steps, default=-1) >= max(acknowledged, default=-1), (point, steps, acknowledged)
            assert [(step, wrong) for step, wrong in verify(storage, None) if wrong] == [], point
            if ended:
                break
        assert one_life(cfg, log, size)
        for record in records_of(log, "train"):
            assert record["loss"] == expected[record["step"]], (number, record["step"])
        assert {record["step"] for record in records_of(log, "train")} == set(expected)
        assert list_manifests(storage)[-1] == STEPS
        list(prune(storage, keep_last=2, keep_every_steps=0, dry_run=False))  # what was written down last
        named = {part.folder for step in list_manifests(storage) for part in read_manifest(storage, step).parts}
        stored = {"/".join(p.split("/")[:2]) for kind in ("base", "delta") for p in storage.list(kind)}
        assert stored == named, "what crashes left behind is removed"
    print(f"{done} kills in {number} runs: {dict(tried)}")
    assert done == kills
    assert len(tried) >= min(kills, len(PHASES)) - 2


def test_training_process_killed_at_many_points(run_on_s3: Callable[..., RunConfig], tmp_path: Path) -> None:
    killed_again_and_again(run_on_s3, tmp_path, seed=1, size=1, kills=KILLS - KILLS // 5)


def test_one_of_two_processes_killed_at_many_points(run_on_s3: Callable[..., RunConfig], tmp_path: Path) -> None:
    killed_again_and_again(run_on_s3, tmp_path, seed=2, size=2, kills=KILLS // 5)


@pytest.mark.parametrize(
    ("kind", "phases"),
    [("rclone", ("base", "delta", "manifests")), ("ceph", ("manifests",))],
    ids=["rclone", "ceph"],
)
def test_server_killed_while_it_takes_an_object(
    run_on_s3: Callable[..., RunConfig], server: Callable[[str], Server], tmp_path: Path,
    uninterrupted: dict[int, float], phases: tuple[str, ...], kind: str,
) -> None:  # fmt: skip
    """Of each kind the second before it is stored, and the fourth after that and before the client hears. The server
    keeps what it acknowledged and is back after a moment: the run goes on, and nothing is lost or doubled."""
    killed = server(kind)
    proxy, puts, one_by_one = FaultyProxy(killed.endpoint), Counter[str](), threading.Lock()
    backs: dict[tuple[str, str], threading.Timer] = {}

    def kill(phase: str, when: str) -> None:
        with one_by_one:
            if (phase, when) not in backs:
                for back in backs.values():
                    back.join()
                killed.kill()
                backs[phase, when] = threading.Timer(0.5, killed.start)
                backs[phase, when].start()

    def phase_of(path: str) -> str:
        return next((phase for phase in phases if f"/{phase}/" in path), "")

    def on_request(method: str, path: str) -> None:
        if method == "PUT" and (phase := phase_of(path)):
            puts[phase] += 1
            if puts[phase] >= 2:
                kill(phase, "before")
            if puts[phase] >= 4 and (phase, "after") not in backs:
                proxy.add("lost", "PUT", path)  # again if the server is down just then

    proxy.on_request, proxy.on_lost = on_request, lambda path: kill(phase_of(path), "after")
    cfg, log = run_on_s3(kind, endpoint=proxy.endpoint), tmp_path / "log.jsonl"
    try:
        assert one_life(cfg, log, 1)
    finally:
        for back in backs.values():
            back.join()
        proxy.close()
    assert len(backs) == 2 * len(phases)
    assert {record["step"]: record["loss"] for record in records_of(log, "train")} == uninterrupted
    storage = Storage(f"{cfg.storage}/{cfg.name}", killed.options)
    assert [wrong for _, wrong in verify(storage, None) if wrong] == []
    assert list_manifests(storage)[-1] == STEPS
