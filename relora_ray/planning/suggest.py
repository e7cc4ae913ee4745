"""What should be chosen instead, as settings that can be pasted, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from relora_ray.config.file import parse_config, to_yaml
from relora_ray.errors import ConfigError, first_words
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.planning import forecast
from relora_ray.planning.count import Phase
from relora_ray.planning.plan import RunPlan

WORTH = 1.5
"""More machines are worth it while all of them together work no more than so many times the least hours."""


@dataclass(frozen=True)
class Suggestion:
    setting: str
    """`key=value`, or empty where no setting of a run helps."""
    reason: str


def suggestions(plan: RunPlan) -> Iterator[Suggestion]:
    """None if all is as it should be. Needs a machine: `plan.cluster`."""
    cfg, cluster = plan.cfg, plan.cluster
    if cluster is None:
        return
    gpu = cluster.machine.gpu
    if cfg.train.precision == "fp32" and gpu.bf16_tflops:
        yield Suggestion(
            "train.precision=bf16",
            f"a {gpu.name} multiplies bf16 {gpu.bf16_tflops / gpu.fp32_tflops:.0f} times as fast as fp32, and "
            f"activations take half; weights, adapters and moments stay fp32. It decides the result: for a new run.",
        )
    if cfg.train.precision == "bf16" and not gpu.bf16_tflops:
        yield Suggestion(
            "train.precision=fp32", f"a {gpu.name} has no bf16 units: it would compute no faster, and less exactly."
        )
    yield from _micro_batch(plan)
    yield from _cluster(plan)
    yield from _save_interval(plan)
    yield from _notices(plan)


def pasteable(plan: RunPlan) -> list[Suggestion]:
    """`suggestions`, of which all settings together are a config; one that the rest does not allow keeps its reason
    alone, with what is in the way."""
    found: list[Suggestion] = []
    taken: list[str] = []
    for each in suggestions(plan):
        settings = each.setting.split()
        try:
            parse_config(to_yaml(plan.cfg), [*taken, *settings])
        except ConfigError as error:
            words = f"{each.reason} {each.setting} needs other settings changed too: {first_words(error)}"
            found.append(Suggestion("", words))
            continue
        taken += settings
        found.append(each)
    return found


def _micro_batch(plan: RunPlan) -> Iterator[Suggestion]:
    assert plan.cluster is not None
    gpu, usable = plan.cluster.machine.gpu, forecast.usable_bytes(plan.cluster.machine.gpu.memory_bytes)
    at_once = forecast.rows_per_worker(plan.cfg, plan.workers)
    too_large = [column for column in plan.columns if not column.largest_rows]
    for column in too_large:
        yield from _less_state(plan, column.phase.name)
        if again := _recomputed_bytes(plan, column.phase):
            yield Suggestion(
                "train.recompute=true",
                f"one row of {column.phase.name} then takes {again / 1e9:.1f} GB of {usable / 1e9:.1f}, for a third "
                f"more multiplications; the bits are the same.",
            )
            continue
        state = sum(column.phase.state.values())
        what, taken = "the state alone takes", state
        if state <= usable:
            one_row = forecast.memory(column.phase, column.phase.measure(1), plan.workers)
            what, taken = "with one row it takes", sum(one_row.values())
        yield Suggestion(
            "",
            f"{column.phase.name} does not fit on {gpu.name}: {what} {taken / 1e9:.1f} GB of {usable / 1e9:.1f}. "
            f"DDP keeps all of it on every GPU: take one with more memory, or a smaller model.",
        )
    fitting = [column for column in plan.columns if column.largest_rows]
    if not fitting:
        return
    fits = min(column.largest_rows or 0 for column in fitting)
    best = max(n for n in range(1, fits + 1) if plan.cfg.global_batch_rows % n == 0 and n <= max(at_once, 1))
    if plan.rows > fits:
        yield Suggestion(
            f"train.micro_batch_rows={best}",
            f"{plan.rows} rows take {max(c.memory_bytes for c in fitting) / 1e9:.1f} GB, and a {gpu.name} has "
            f"{usable / 1e9:.1f}: {-(-at_once // best)} micro-batches an update. The result differs by rounding.",
        )
    elif best >= 2 * plan.rows:
        yield Suggestion(
            f"train.micro_batch_rows={best}",
            f"so many fit: {-(-at_once // best)} micro-batches an update instead of {-(-at_once // plan.rows)}, with "
            f"fewer kernels to start. The FLOPs are the same.",
        )


def _recomputed_bytes(plan: RunPlan, phase: Phase) -> int:
    """What one row takes if blocks are recomputed; 0 if they are already, or it does not fit then either."""
    assert plan.cluster is not None
    if phase.cfg.train.recompute:
        return 0
    train = phase.cfg.train.model_copy(update={"recompute": True})
    again = replace(phase, cfg=phase.cfg.model_copy(update={"train": train}), _passes={})
    taken = sum(forecast.memory(again, again.measure(1), plan.workers).values())
    return taken if taken <= forecast.usable_bytes(plan.cluster.machine.gpu.memory_bytes) else 0


def _less_state(plan: RunPlan, phase: str) -> Iterator[Suggestion]:
    method = plan.cfg.method
    if phase == "warm start" and isinstance(method, LoraConfig) and plan.last.largest_rows:
        ratio = "" if method.warm_start_lr_ratio == 1 else " method.warm_start_lr_ratio=1"
        yield Suggestion(
            f"method.warm_start_steps=0{ratio}",
            "the warm start is full-rank training and does not fit; the cycles do. Make it on larger GPUs, as a run of "
            "its own, and begin this one by model.init_from=RUN.",
        )
    elif isinstance(method, LoraConfig) and method.keeps_effective_weights(plan.cfg.train):
        saved = plan.last.memory["derived"] / 1e9
        yield Suggestion(
            "train.effective_weights=rebuilt",
            f"without the {saved:.1f} GB of effective weights; the bits are the same.",
        )


def _cluster(plan: RunPlan) -> Iterator[Suggestion]:
    assert plan.cluster is not None
    cluster, cfg = plan.cluster, plan.cfg
    better = [o for o in plan.outcomes() if o.days < math.inf]
    paid = {o.machines: o.machines * o.days for o in better}
    widest = max((n for n, cost in paid.items() if cost <= WORTH * min(paid.values())), default=cluster.count)
    workers = min(plan.workers, widest * cluster.machine.num_gpus)
    least = max(1, workers // 2)
    too_many = (cfg.cluster.min_workers or 0) > workers
    fewer = []
    if too_many or (cluster.failures_per_day and workers > 1 and cfg.min_workers > least):
        reason = "so that the run goes on without a lost machine until another has come."
        fewer = [Suggestion(f"cluster.min_workers={least}", reason)]
    is_lower = workers < cfg.cluster.workers
    if is_lower:  # at no point more than workers
        yield from fewer
    if cfg.cluster.workers == workers:
        pass
    elif workers < plan.workers:
        yield Suggestion(
            f"cluster.workers={workers}",
            f"{widest} machines take {paid[widest] / paid[cluster.count]:.0%} of the machine hours, and "
            f"{next(o.days for o in better if o.machines == widest):.1f} days.",
        )
    else:
        yield Suggestion(
            f"cluster.workers={workers}",
            f"one for each GPU of {cluster.count} {cluster.machine.name}; the config has {cfg.cluster.workers}.",
        )
    if not is_lower:
        yield from fewer
    if cfg.cluster.gpus_per_worker == 0:
        yield Suggestion("cluster.gpus_per_worker=1", "the config trains on the CPU.")
    step = plan.last.update
    assert step is not None
    if step.waits_s > 0.2 * step.compute_s:
        yield Suggestion(
            "",
            f"GPUs wait {step.waits_s / step.seconds:.0%} of an update for gradients: fewer machines, more GPUs in "
            f"each, or a faster network than {cluster.machine.network_gbps:g} Gbit/s.",
        )


def _save_interval(plan: RunPlan) -> Iterator[Suggestion]:
    assert plan.cluster is not None
    cfg, now = plan.cfg, plan.cfg.checkpoint.save_every_steps
    if not plan.cluster.failures_per_day:
        return
    best = plan.outcome(plan.cluster)
    as_it_is = plan.outcome(plan.cluster, every_steps=now)
    if best.goodput - as_it_is.goodput > 0.005 and best.save_every_steps != now:
        yield Suggestion(
            f"checkpoint.save_every_steps={best.save_every_steps}",
            f"goodput {best.goodput:.1%}; with {now} it is {as_it_is.goodput:.1%}, as a failure then costs "
            f"{now * best.update_s / 2:.0f} s on average.",
        )
    if cfg.checkpoint.keep_every_steps % best.save_every_steps and best.save_every_steps != now:
        yield Suggestion("checkpoint.keep_every_steps=0", "or a multiple of that.")


def _notices(plan: RunPlan) -> Iterator[Suggestion]:
    assert plan.cluster is not None
    step = plan.last.update
    assert step is not None
    needed = forecast.notice_s(plan.last.phase, plan.cluster, step.seconds)
    if plan.cluster.failures_per_day and needed > forecast.NOTICES_S[0]:
        yield Suggestion(
            "",
            f"a delta may take {needed:.0f} s from a notice on, {step.seconds:.0f} of them for the update under way: "
            f"a notice of 30 s is too short for it, and what was not saved before is lost.",
        )
