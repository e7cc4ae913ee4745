"""What a plan counts without memory is what tiny real runs have: bytes by role, gradients, checkpoints, FLOPs,
activations and the most memory at a time. Nothing is faked: real tensors, autograd, optimizers, DDP's own buckets,
stored objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from relora_ray.checkpoint import read_history
from relora_ray.config import ModelConfig, RunConfig
from relora_ray.methods.base import Update, build_method
from relora_ray.modeling.optim import trainable
from relora_ray.modeling.parallel import World
from relora_ray.modeling.token_loss import TokenLoss
from relora_ray.planning.count import _trace, full_rank, phases
from relora_ray.runs.places import run_storage
from relora_ray.runs.state import TrainState, build_state
from tests.tiny import run, tiny_config

CLOSE = 0.05
"""What a plan promises. Counts are far nearer, where nothing else is said."""

KINDS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "lora_rank": 4, "alpha": 8},
    "relora": {"kind": "relora", "lora_rank": 4, "alpha": 8, "warm_start_steps": 3, "merge_every_steps": 3},
    "galore": {"kind": "galore", "rank": 4, "refresh_every_steps": 3},
    "sltrain": {"kind": "sltrain", "rank": 4, "alpha": 8, "density": 0.1},
}
WIDE = {"hidden_size": 64, "intermediate_size": 172, "num_layers": 2, "num_heads": 4, "vocab_size": 4096}
ROWS = 6


def config(kind: str, data: Path, folder: Path, *overrides: str) -> RunConfig:
    schedule = {"kind": "cosine", "warmup_steps": 1}
    if kind == "relora":
        schedule = {"kind": "jagged_cosine", "warmup_steps": 1, "restart_warmup_steps": 1}
    return tiny_config(data, folder, *overrides, method=KINDS[kind], schedule=schedule)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_a_run(kind: str, data: Path, tmp_path: Path) -> None:
    cfg = config(kind, data, tmp_path)
    _, records = run(cfg)
    found = phases(cfg)
    assert [(p.begins, p.steps) for p in found] == ([(0, 3), (3, 9)] if kind == "relora" else [(0, 12)])
    structures = [r for r in records if r["kind"] == "attempt"]
    structures += [r for r in records if r["kind"] == "boundary" and r["new_parameters"]]
    assert len(structures) == len(found)
    for phase, real in zip(found, structures, strict=True):
        own = {**phase.state, "weights": phase.state["weights"] + phase.state["adapters"]}
        del own["adapters"]
        assert own == real["state_bytes"]
        assert (phase.num_parameters, phase.trained) == (real["num_parameters"], real["num_trainable"])
    stored = [r for r in records if r["kind"] == "checkpoint"]
    in_mid_cycle = next(r for r in stored if r["step"] == 8)
    assert found[-1].delta_bytes == pytest.approx(in_mid_cycle["delta_bytes"], rel=CLOSE)
    assert found[-1].base_bytes == pytest.approx(in_mid_cycle["base_bytes"], rel=CLOSE)
    if kind == "relora":
        after_reset = next(r for r in stored if r["step"] == 9)
        assert found[-1].delta_after_reset_bytes == pytest.approx(after_reset["delta_bytes"], rel=CLOSE)
        assert found[-1].delta_after_reset_bytes < found[-1].delta_bytes
    assert read_history(run_storage(cfg)).head.delta.size_bytes == stored[-1]["delta_bytes"]


@pytest.mark.parametrize("reset", ["none", "magnitude"])
def test_delta_after_a_boundary_has_what_its_reset_leaves(reset: str, data: Path, tmp_path: Path) -> None:
    cfg = config("relora", data, tmp_path, f"method.reset.kind={reset}")
    _, records = run(cfg)
    stored = next(r for r in records if r["kind"] == "checkpoint" and r["step"] == 9)
    assert phases(cfg)[-1].delta_after_reset_bytes == pytest.approx(stored["delta_bytes"], rel=0.02)


@pytest.fixture(scope="module")
def group() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_what_lies_in_the_buckets_of_ddp(kind: str, data: Path, tmp_path: Path, group: None) -> None:
    cfg = config(kind, data, tmp_path)
    phase = phases(cfg)[-1]
    state = built(cfg, phase.begins)
    loss = TokenLoss(state.model, cfg.train)
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True, forward_sync_buffers=False, init_sync=False)
    for _ in range(3):  # buckets are laid out anew after the first pass, and told of after the third
        forward(wrapped, cfg, 2).backward()
    sizes = wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    assert sum(int(size) for size in str(sizes).split(",")) == phase.gradient_bytes


def built(cfg: RunConfig, step: int) -> TrainState:
    method = build_method(cfg)
    state = build_state(cfg, method, World(), step)
    method.refresh(state.model)
    return state


def forward(loss: torch.nn.Module, cfg: RunConfig, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, cfg.model.llama_vocab_size, (rows, cfg.data.seq_len + 1), generator=generator)
    total: torch.Tensor = loss(ids[:, :-1], ids[:, 1:], torch.ones(rows))
    return total / cfg.tokens_per_step


CASES = [*((kind, "bf16") for kind in KINDS), ("full", "fp32"), ("relora", "fp32")]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_flops_activations_and_memory_are_those_of_a_real_update(
    kind: str, precision: str, data: Path, tmp_path: Path
) -> None:
    cfg = config(kind, data, tmp_path, f"train.precision={precision}").model_copy(update={"model": ModelConfig(**WIDE)})
    found = phases(cfg)
    for phase in found[-1:] if precision == "fp32" else found:
        plan, state = phase.measure(ROWS), built(cfg, phase.begins)
        assert not plan.why_not
        loss = TokenLoss(state.model, cfg.train)
        for parameter in trainable(state.model):
            parameter.grad = torch.zeros_like(parameter)
        assert plan.saved_bytes == pytest.approx(kept_by_autograd(loss, cfg, state), rel=0.01)
        assert plan.peak_bytes == pytest.approx(most_allocated(loss, cfg), rel=CLOSE)
        assert plan.micro_flops + plan.update_flops == pytest.approx(counted_by_torch(loss, cfg, state), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_counted(kind: str, data: Path, tmp_path: Path) -> None:
    """Blocks' inputs in place of all that they keep, and their products once more."""
    wide = ModelConfig(**{**WIDE, "num_layers": 8})
    plain = config(kind, data, tmp_path).model_copy(update={"model": wide})
    cfg = plain.model_copy(update={"train": plain.train.model_copy(update={"recompute": True})})
    phase = phases(cfg)[-1]
    found, without, state = phase.measure(ROWS), phases(plain)[-1].measure(ROWS), built(cfg, phase.begins)
    assert not found.why_not
    loss = TokenLoss(state.model, cfg.train)
    for parameter in trainable(state.model):
        parameter.grad = torch.zeros_like(parameter)
    assert found.peak_bytes == pytest.approx(most_allocated(loss, cfg), rel=CLOSE)
    assert found.peak_bytes < 0.6 * without.peak_bytes
    assert found.saved_bytes < 0.5 * without.saved_bytes
    assert found.forward_flops == without.forward_flops
    assert found.micro_flops + found.update_flops == pytest.approx(counted_by_torch(loss, cfg, state), rel=0.02)
    assert 1.1 * without.micro_flops < found.micro_flops < 1.4 * without.micro_flops


def kept_by_autograd(loss: TokenLoss, cfg: RunConfig, state: TrainState) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*state.model.parameters(), *state.model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = forward(loss, cfg)
    total.backward()
    return sum(kept.values())


def most_allocated(loss: TokenLoss, cfg: RunConfig) -> int:
    """By torch's allocator, kernels' own buffers included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        forward(loss, cfg).backward()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def counted_by_torch(loss: TokenLoss, cfg: RunConfig, state: TrainState) -> int:
    """Of the method's own update, the optimizer's step included. Torch's counter does not know fused attention on a
    CPU, so that its products are made one by one here: one less, as scores are kept and not made again."""

    def backward(extra: object) -> float:
        total = forward(loss, cfg)
        total.backward()
        return float(total)

    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: addmm_flop(total, left, right)}  # lacking too
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        update = Update(state.model, state.optimizer, 0, seed=0, backward=backward)
        build_method(cfg).update(update)
    assert update.applied
    return counter.get_total_flops()


def test_depth_is_a_straight_line(data: Path, tmp_path: Path) -> None:
    """A deep LLaMA is counted by two shallow ones."""
    cfg = config("relora", data, tmp_path)
    deep = cfg.model_copy(update={"model": cfg.model.model_copy(update={"num_layers": 6})})
    for phase in phases(deep):
        assert phase.measure(3) == _trace(deep, phase.begins, 3)


def test_full_rank_beside_it_is_full_rank_training(data: Path, tmp_path: Path) -> None:
    plain = phases(config("full", data, tmp_path))[0]
    for kind in KINDS:
        cfg = config(kind, data, tmp_path)
        assert full_rank(cfg, phases(cfg)).state == plain.state
