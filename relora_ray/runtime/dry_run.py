"""What a run would meet, before anything is spent: `python -m relora_ray.launch CONFIG --dry-run`.

All that `preflight` checks, and storage, data, memory and machines besides. One problem hides no other, and each is
told once. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
import yaml

from relora_ray.config import RunConfig
from relora_ray.data.tokens import DataIndex
from relora_ray.errors import ReloraError
from relora_ray.planning.count import phases
from relora_ray.planning.forecast import memory, usable_bytes
from relora_ray.planning.machines import gpu_called
from relora_ray.runs.metrics import size_text
from relora_ray.runs.places import data_storage, run_storage, validation_storage
from relora_ray.runs.setting import open_data, open_validation
from relora_ray.runtime.address import cluster_address
from relora_ray.runtime.driver import connected
from relora_ray.runtime.preflight import CHECKS, as_here
from relora_ray.storage import Storage

KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Kubernetes sets it in every container."""
AUTOSCALING = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on the head: the kinds of machines, and how many there may be."""


MOST_EPOCHS = 40
"""Text that is read more often teaches nothing more (Muennighoff et al. 2023, "Scaling Data-Constrained Language
Models", section 6: repeating up to 4 times is nearly as good as new text, and above 40 it is worth nothing)."""


@dataclass(frozen=True)
class Finding:
    subject: str
    fine: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.fine else 'PROBLEM':8} {self.subject:8} {self.text}"


def dry_run(cfg: RunConfig) -> Iterator[Finding]:
    tokens = cfg.steps * cfg.tokens_per_step
    ends = "" if cfg.method.exports else ", and no model at the end: this method's has no dense weights"
    yield Finding("config", True, f"{cfg.name}: {cfg.method.kind}, {cfg.steps:,} updates, {tokens:,} tokens{ends}")
    told: set[str] = set()
    for subject, check in (("config", as_here), *CHECKS):
        try:
            cfg = check(cfg)
        except ReloraError as error:
            if str(error) not in told:
                yield Finding(subject, False, str(error))
            told.add(str(error))
    for subject, look in (("storage", _storage), ("data", _data), ("memory", _memory), ("machines", _machines)):
        try:
            fine, text = look(cfg)
        except ReloraError as error:
            fine, text = False, str(error)
        if text not in told:
            yield Finding(subject, fine, text)
        told.add(text)


def _storage(cfg: RunConfig) -> tuple[bool, str]:
    storage = run_storage(cfg)
    with _no_folder_left(storage):
        refuses = storage.honours_put_new()
    text = f"{storage.url}: a probe was written, read and deleted"
    if not refuses:
        text += "; its server ignores If-None-Match: never let two drivers train this run"
    return True, text


@contextlib.contextmanager
def _no_folder_left(storage: Storage) -> Iterator[None]:
    """On a disk, folders that the block makes go again, if they are empty then."""
    place = Path(storage.url)
    made = [path for path in (place, *place.parents) if not path.exists()] if storage.is_local else []
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has put something there meanwhile
            for path in made:
                path.rmdir()


def _data(cfg: RunConfig) -> tuple[bool, str]:
    index, storage = open_data(cfg), data_storage(cfg)
    sets = [(validation_storage(cfg, name), found) for name, found in open_validation(cfg).items()]
    for place, found in [(storage, index), *sets]:
        if wrong := [file for file, size in _shard_sizes(found).items() if place.size(file) != size]:
            text = f"{place.url}: {len(wrong)} files are missing or cut short, such as {wrong[0]}. Prepare it again."
            return False, text
    count = index.splits["train"].num_tokens
    epochs = cfg.steps * cfg.tokens_per_step / count
    text = f"{storage.url}: fingerprint {index.fingerprint}, {count:,} tokens, to be read {epochs:,.2f} times"
    if epochs > MOST_EPOCHS:
        few = max(1, int(MOST_EPOCHS * count // cfg.tokens_per_step))
        advice = f"prepare more text, or set steps to {few:,} or fewer"
        return False, f"{text}. After {MOST_EPOCHS} times it teaches nothing more: {advice}"
    return True, text


def _shard_sizes(index: DataIndex) -> dict[str, int]:
    """Bytes of every shard, as a .npy file of its tokens."""
    return {s.file: _npy_size(s.num_tokens, index.dtype) for split in index.splits.values() for s in split.shards}


def _npy_size(count: int, dtype: str) -> int:
    header, kind = io.BytesIO(), np.dtype(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": kind.str, "fortran_order": False, "shape": (count,)})
    return header.tell() + count * kind.itemsize


def _machines(cfg: RunConfig) -> tuple[bool, str]:
    cluster = cfg.cluster
    bundle = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    wanted = f"{cfg.min_workers}" if cfg.min_workers == cluster.workers else f"{cfg.min_workers} to {cluster.workers}"
    wanted += f" workers of {bundle['CPU']} CPU(s) and {bundle['GPU']} GPU(s)"
    if not cluster_address():
        gpus, cpus = torch.cuda.device_count(), os.cpu_count() or 1
        text = f"{wanted}, in a local Ray: RAY_ADDRESS is not set; {cpus} CPUs and {gpus} GPUs are here"
        if cluster.workers * bundle["GPU"] > gpus:
            return False, f"{text}. Set RAY_ADDRESS, lower cluster.workers, or set cluster.gpus_per_worker=0"
        if cluster.workers * bundle["CPU"] > cpus:
            return False, f"{text}: workers would take turns. Lower cluster.workers or cluster.cpus_per_worker"
        return True, text
    with connected(cfg):
        now, at_most = workers_that_fit(bundle)
    text = f"{wanted}: {now} fit now, {at_most} when the cluster has grown" if at_most else f"{wanted}: {now} fit now"
    if max(now, at_most or 0) >= cfg.min_workers:
        return True, text
    if at_most is None and os.environ.get(KUBERNETES):
        return True, f"{text}. The run will wait for more: KubeRay's maxReplicas says how many can come"
    advice = "Lower cluster.min_workers or what a worker takes, or let the cluster grow further"
    if at_most is None:
        advice = f"Unless an autoscaler brings more ({AUTOSCALING} does not say), the run will wait for them"
    return False, f"{text}. {advice}"


def _memory(cfg: RunConfig) -> tuple[bool, str]:
    """What a worker takes where most is there, as `relora-ray plan` counts it, and what its GPU or machine has."""
    of_gpus, rows = bool(cfg.cluster.gpus_per_worker), cfg.train.micro_batch_rows
    found = {p.name: sum(memory(p, p.measure(rows), cfg.cluster.workers).values()) for p in phases(cfg)}
    most = max(found, key=lambda name: found[name])
    text = f"tensors of a worker take {size_text(found[most])} in micro-batches of {rows} rows"
    text += f", most in {most}" if len(found) > 1 else ""
    there, name = _smallest_gpu(cfg) if of_gpus else _smallest_host(cfg)
    if there is None:
        return True, f"{text}; what the {'GPUs' if of_gpus else 'machines'} have is not known"
    text = f"{text}; {name} has {size_text(there)}"
    if found[most] <= there:
        return True, text
    advice = "Lower train.micro_batch_rows, or take what has more: relora-ray plan says what takes how much"
    return False, f"{text}. {advice}"


def _smallest_gpu(cfg: RunConfig) -> tuple[float | None, str]:
    """Bytes that tensors can have of the one with least, and its name; None if there is no knowing."""
    found: dict[str, float] = {}
    if cluster_address():
        with connected(cfg):
            resources = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        kinds = {kind.partition(":")[2] for each in resources for kind in each if kind.startswith("accelerator_type:")}
        gpus = {kind: gpu_called(kind) for kind in kinds}
        found = {kind: usable_bytes(gpu.memory_bytes) for kind, gpu in gpus.items() if gpu is not None}
    else:
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            found[properties.name] = usable_bytes(properties.total_memory)
    name = min(found, key=lambda name: found[name], default="")
    return found.get(name), name


def _smallest_host(cfg: RunConfig) -> tuple[float | None, str]:
    """The same of the machines' own memory, for each of the workers that fit on one."""
    if cluster_address():
        with connected(cfg):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        shares = [
            node["memory"] / workers
            for node in nodes
            if node.get("memory") and (workers := _fit({"CPU": cfg.cluster.cpus_per_worker}, node))
        ]
        return (min(shares), "the share of a worker") if shares else (None, "")
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None, ""
    return total / cfg.cluster.workers, "the share of a worker in this machine"


def workers_that_fit(bundle: Mapping[str, float], autoscaling: str = AUTOSCALING) -> tuple[int, int | None]:
    """How many workers that take `bundle` fit on the connected cluster's machines now, and when its autoscaler has
    brought all that it may; None if it is not known what that is."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    now = sum(_fit(bundle, resources) for resources in machines)
    try:
        config = yaml.safe_load(Path(autoscaling).expanduser().read_text())
    except OSError:
        return now, None
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    fit = {name: _fit(bundle, kind.get("resources", {})) for name, kind in kinds.items()}
    most, room = _fit(bundle, head.get("resources", {})), config.get("max_workers", 0)
    for name in sorted(kinds, key=lambda name: -fit[name]):  # the largest first
        count = min(kinds[name].get("max_workers", 0), room)
        most, room = most + count * fit[name], room - count
    return now, max(now, most)


def _fit(bundle: Mapping[str, float], resources: Mapping[str, float]) -> int:
    return int(min(resources.get(kind, 0) // amount for kind, amount in bundle.items() if amount))
