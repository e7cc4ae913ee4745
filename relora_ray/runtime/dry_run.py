"""What a run would meet, before anything is spent: `python -m relora_ray.launch CONFIG --dry-run`.

The config and the run's folder are checked by `preflight`; here storage, data and machines are. Nothing is left behind.
"""

from __future__ import annotations

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
from relora_ray.runs import data_storage, open_data, run_storage
from relora_ray.runtime.address import cluster_address
from relora_ray.runtime.driver import connected

KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Kubernetes sets it in every container."""
AUTOSCALING = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on the head: the kinds of machines, and how many there may be."""


@dataclass(frozen=True)
class Finding:
    subject: str
    fine: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.fine else 'PROBLEM':8} {self.subject:8} {self.text}"


def dry_run(cfg: RunConfig) -> Iterator[Finding]:
    """`cfg`: as `preflight` returned it."""
    tokens = cfg.steps * cfg.tokens_per_step
    yield Finding("config", True, f"{cfg.name}: {cfg.method.kind}, {cfg.steps:,} updates, {tokens:,} tokens")
    for subject, look in (("storage", _storage), ("data", _data), ("machines", _machines)):
        try:
            fine, text = look(cfg)
        except ReloraError as error:
            fine, text = False, str(error)
        yield Finding(subject, fine, text)


def _storage(cfg: RunConfig) -> tuple[bool, str]:
    storage = run_storage(cfg)
    refuses = storage.honours_put_new()
    text = f"{storage.url}: a probe was written, read and deleted"
    if not refuses:
        text += "; its server ignores If-None-Match: never let two drivers train this run"
    return True, text


def _data(cfg: RunConfig) -> tuple[bool, str]:
    index, storage = open_data(cfg), data_storage(cfg)
    wrong = [file for file, size in _shard_sizes(index).items() if storage.size(file) != size]
    if wrong:
        return (
            False,
            f"{storage.url}: {len(wrong)} files are missing or cut short, such as {wrong[0]}. Prepare it again.",
        )
    count = index.splits["train"].num_tokens
    epochs = cfg.steps * cfg.tokens_per_step / count
    return True, f"{storage.url}: fingerprint {index.fingerprint}, {count:,} tokens, to be read {epochs:.2f} times"


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
        gpus = torch.cuda.device_count()
        text = f"{wanted}, in a local Ray: RAY_ADDRESS is not set; {os.cpu_count()} CPUs and {gpus} GPUs are here"
        return cluster.workers * bundle["GPU"] <= gpus, text
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
