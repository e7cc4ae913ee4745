"""From counts to seconds, bytes and dollars: pure arithmetic, each formula with its assumption.

What is not known before a run is stated, not hidden: the share of a GPU's peak that is reached (`utilisation`; 0.4 is
what well-tuned training of a large model reaches on A100s, Chowdhery et al. 2022, table 3), how fast storage takes
bytes, how often machines fail.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, replace

from relora_ray.config import RunConfig
from relora_ray.planning.count import Phase
from relora_ray.planning.goodput import DAY_S, Costs, goodput, longest_interval, mean_between_failures
from relora_ray.planning.machines import Machine
from relora_ray.planning.trace import Pass, chunk_tokens

HEADROOM = 0.05
"""Of a GPU's memory: blocks that the allocator cannot fill."""
CONTEXT_BYTES = 1.0e9
"""What CUDA, cuBLAS and NCCL take for themselves, about."""
COPY_BYTES_PER_S = 8e9
"""From a GPU to pinned memory: two thirds of PCIe 3.0 x16, which has 12.5 * 10^9 usable."""
RESTART_S = 11.7
"""From a lost machine to the next step of a small model, measured (benchmarks/results/elasticity.md)."""
STORAGE_MB_PER_S = 200.0
"""Of one machine, measured with a gateway on the same two cores (benchmarks/results/checkpoints.md)."""
NOTICES_S = (30.0, 120.0)
"""Google's and AWS's, before a spot machine is taken."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run, and what is assumed of them."""

    machine: Machine
    count: int
    flops_per_s: float
    """Of one GPU, as it is reached."""
    failures_per_day: float = 0.0
    """Of one machine."""
    price: float | None = None
    """Dollars an hour, of one machine."""
    storage_bytes_per_s: float = STORAGE_MB_PER_S * 1e6
    """That one machine reads or writes."""
    restart_s: float = RESTART_S
    """Without the time to read the state."""
    save_async: bool = True

    @property
    def workers(self) -> int:
        return self.count * self.machine.num_gpus


def rows_per_worker(cfg: RunConfig, workers: int) -> int:
    """Of an update; a rank that is short of one computes a row of weight zero."""
    return math.ceil(cfg.global_batch_rows / workers)


def memory(phase: Phase, taken: Pass, workers: int) -> dict[str, int]:
    """Bytes on one GPU by role, at the moment when most is there. Gradients are views of DDP's buckets, so that these
    take nothing more; but when DDP lays them out anew, once in each structure, old and new are there, before there are
    activations."""
    saved, others = taken.saved_bytes, taken.buffer_bytes
    buckets = phase.gradient_bytes if workers > 1 else 0
    return {**phase.state, "activations": saved, "logits": others, "buckets": max(0, buckets - saved - others)}


def usable_bytes(gpu_bytes: float) -> float:
    """Of a GPU's memory, what tensors can have."""
    return gpu_bytes * (1 - HEADROOM) - CONTEXT_BYTES


def fits(phase: Phase, rows: int, machine: Machine, workers: int) -> bool:
    return sum(memory(phase, phase.measure(rows), workers).values()) <= usable_bytes(machine.gpu.memory_bytes)


def largest_rows(cfg: RunConfig, phase: Phase, machine: Machine, workers: int) -> int:
    """The largest micro-batch that divides the global batch and fits; 0 if not one row does. Where logits are made in
    chunks, what a row more takes is nearly a straight line: it says where to look."""
    usable = usable_bytes(machine.gpu.memory_bytes)
    if sum(phase.state.values()) > usable:
        return 0
    choices = [rows for rows in range(1, cfg.global_batch_rows + 1) if cfg.global_batch_rows % rows == 0]
    low = -(-chunk_tokens(cfg.train, phase.vocabulary) // cfg.data.seq_len)
    one, two = (sum(memory(phase, phase.measure(rows), workers).values()) for rows in (low, 2 * low))
    slope = max(1.0, (two - one) / low)
    at = bisect(choices, low + (usable - one) / slope) - 1
    while at + 1 < len(choices) and fits(phase, choices[at + 1], machine, workers):
        at += 1
    while at >= 0 and not fits(phase, choices[at], machine, workers):
        at -= 1
    return choices[at] if at >= 0 else 0


def update_flops(cfg: RunConfig, taken: Pass, workers: int = 1) -> float:
    """Of one worker."""
    return taken.micro_flops * rows_per_worker(cfg, workers) / taken.rows + taken.update_flops


def frozen_gradient_flops(cfg: RunConfig, phase: Phase) -> float:
    """Of all workers: what the gradients of frozen matrices would take, 2 FLOPs an entry and token, and which nobody
    computes."""
    return 2.0 * phase.frozen_entries * cfg.tokens_per_step


def traffic_bytes(phase: Phase, workers: int) -> float:
    """That each worker sends an update: 2 (N - 1) / N of the gradients, as a ring all-reduce does (Patarasuk and Yuan
    2009), which no other can undercut."""
    return 2 * (workers - 1) / workers * phase.gradient_bytes


def reduce_s(phase: Phase, cluster: Cluster) -> float:
    """Seconds of it: a ring crosses from machine to machine once in each direction, whatever their GPUs. Inside of one
    machine it is taken to cost nothing."""
    if cluster.count == 1:
        return 0.0
    return traffic_bytes(phase, cluster.count) * 8 / (cluster.machine.network_gbps * 1e9)


@dataclass(frozen=True)
class Update:
    """Seconds of an update."""

    compute_s: float
    reduce_s: float
    """Of all gradients."""
    waits_s: float
    """Of them, those that the last backward pass does not hide."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.waits_s


def update(cfg: RunConfig, phase: Phase, taken: Pass, cluster: Cluster) -> Update:
    """DDP reduces buckets while the last micro-batch's backward pass goes on; what that does not hide is waited for."""
    rows = rows_per_worker(cfg, cluster.workers)
    last = taken.backward_flops * min(rows, taken.rows) / taken.rows / cluster.flops_per_s
    takes = reduce_s(phase, cluster)
    compute = update_flops(cfg, taken, cluster.workers) / cluster.flops_per_s
    return Update(compute, takes, max(0.0, takes - last))


def save_costs(phase: Phase, cluster: Cluster) -> Costs:
    """Each worker copies its share to host memory while training waits, and stores it behind training. After a failure
    every worker reads the whole state."""
    stored = phase.delta_bytes / (cluster.count * cluster.storage_bytes_per_s)
    copied = phase.delta_bytes / cluster.workers / COPY_BYTES_PER_S
    read = (phase.base_bytes + phase.delta_bytes) * cluster.machine.num_gpus / cluster.storage_bytes_per_s
    restart = cluster.restart_s + read
    return Costs(copied, stored, restart) if cluster.save_async else Costs(copied + stored, 0.0, restart)


def notice_s(phase: Phase, cluster: Cluster, update_s: float) -> float:
    """From a notice to a stored delta: the update under way, the copy, and storing by the machines that stay."""
    stay = max(1, cluster.count - 1)
    return (
        update_s
        + phase.delta_bytes / (stay * cluster.machine.num_gpus) / COPY_BYTES_PER_S
        + phase.delta_bytes / (stay * cluster.storage_bytes_per_s)
    )


@dataclass(frozen=True)
class Outcome:
    """A whole run on so many machines."""

    machines: int
    update_s: float
    """Of the last phase."""
    save_every_steps: int
    goodput: float
    """The share of the time that counts, in the last phase."""
    days: float
    """inf if it would never end."""
    dollars: float | None
    tokens_per_s: float
    """That count, over the whole run."""


def outcome(
    cfg: RunConfig, phases: list[tuple[Phase, Pass]], cluster: Cluster, every_steps: int | None = None
) -> Outcome:
    """`every_steps`: updates between saves; default: `sensible_interval`, in each phase."""
    mean_s = mean_between_failures(cluster.failures_per_day, cluster.count)
    total, share, seconds, steps = 0.0, 1.0, 0.0, every_steps or 0
    for phase, taken in phases:
        seconds, costs = update(cfg, phase, taken, cluster).seconds, save_costs(phase, cluster)
        steps = every_steps or sensible_interval(cfg, phase, cluster, seconds)
        share = goodput(steps * seconds, costs, mean_s)
        total += phase.steps * seconds / share if share else math.inf
    dollars = None if cluster.price is None else cluster.price * cluster.count * total / 3600
    tokens = cfg.steps * cfg.tokens_per_step
    return Outcome(cluster.count, seconds, steps, share, total / DAY_S, dollars, tokens / total if total else 0.0)


def sensible_interval(cfg: RunConfig, phase: Phase, cluster: Cluster, update_s: float) -> int:
    """Updates between saves: the most that cost half a percent beside the best, rounded down to two digits. The
    config's without failures."""
    mean_s = mean_between_failures(cluster.failures_per_day, cluster.count)
    if mean_s == math.inf:
        return cfg.checkpoint.save_every_steps
    steps = min(longest_interval(save_costs(phase, cluster), mean_s, update_s), cfg.steps)
    digit = 10 ** max(0, len(str(steps)) - 2)
    return max(1, steps // digit * digit)


def at(cluster: Cluster, count: int) -> Cluster:
    """The same kind of machine, so many of them."""
    return replace(cluster, count=count)


def counts(cfg: RunConfig, cluster: Cluster) -> list[int]:
    """Numbers of machines to look at: doubling from one up to a row a worker, with the one that was asked for."""
    most = max(cluster.count, cfg.global_batch_rows // cluster.machine.num_gpus, 1)
    doubled = {2**n for n in range(13) if 2**n <= most}
    return sorted(doubled | {cluster.count})
