"""What every registered method must keep. A new method joins by one entry in CASES."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relora_ray.checkpoint.checkpointer import split_state
from relora_ray.config import ModelConfig, RunConfig
from relora_ray.config.method import config_class, kinds
from relora_ray.conformance.processes import run_ranks
from relora_ray.errors import NotMergeableError
from relora_ray.loop import run_attempt
from relora_ray.methods.base import Boundary, build_method
from relora_ray.modeling.optim import state_bytes, state_tensors
from relora_ray.modeling.parallel import World
from relora_ray.runs.batches import open_batches
from relora_ray.runs.run import bare_model, new_model
from relora_ray.runs.setting import check_run
from relora_ray.storage import Storage
from tests.tiny import assert_loads_as_the_live_model, live, losses, run, state_digest, tiny_config

PLAIN = {"kind": "cosine", "warmup_steps": 1}
JAGGED = {"kind": "jagged_cosine", "warmup_steps": 1, "restart_warmup_steps": 1}
LORA = {"kind": "lora", "lora_rank": 4, "alpha": 8}
RELORA = {"kind": "relora", "lora_rank": 4, "alpha": 8, "merge_every_steps": 3}

CASES = {
    "full": ({"kind": "full"}, PLAIN),
    "lora": (LORA, PLAIN),
    "lora-warm": ({**LORA, "warm_start_steps": 3}, PLAIN),
    "relora": (RELORA, JAGGED),
    "relora-warm": ({**RELORA, "warm_start_steps": 3}, JAGGED),
    "relora-magnitude": ({**RELORA, "reset": {"kind": "magnitude", "ratio": 0.8}}, JAGGED),
    "relora-random": ({**RELORA, "reset": {"kind": "random", "adam_step": "keep"}}, JAGGED),
    "relora-none": ({**RELORA, "reset": {"kind": "none"}}, JAGGED),
    "relora-bf16-int8": ({**RELORA, "frozen_weights": "bf16_int8", "warm_start_steps": 3}, JAGGED),
    "relora-bf16": ({**RELORA, "frozen_weights": "bf16"}, JAGGED),
    "relora-as-published": (
        {**RELORA, "compat": "reference", "reset": {"kind": "zero", "adam_step": "keep"}, "warm_start_steps": 3},
        JAGGED,
    ),
    "relora-plans": (
        {**RELORA, "lora_rank": {0: 4, 4: 6, 8: 2}, "merge_every_steps": {0: 2, 4: 4}, "trainable_scaling": True},
        JAGGED,
    ),
    "relora-gain-dropout": ({**RELORA, "trainable_scaling": True, "dropout": 0.1, "warm_start_steps": 3}, JAGGED),
}


# Every other kind that is installed, somebody else's too, by the settings that its own section gives for this.
for _kind in kinds():
    if not any(method["kind"] == _kind for method, _ in CASES.values()):
        _tiny = {"kind": _kind, **config_class(_kind).tiny}
        CASES[_kind] = (_tiny, JAGGED if config_class(_kind)(**_tiny).cycles(12) else PLAIN)


@pytest.fixture(params=CASES)
def cfg(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> RunConfig:
    method, schedule = CASES[request.param]
    plain = ["optimizer.weight_decay=0"] if "compat" in method else []
    return tiny_config(data, tmp_path, *plain, method=method, schedule=schedule)


def test_first_step_moves_every_layer(cfg: RunConfig) -> None:
    """Some trainable tensor of every module that has any gets a gradient that is not all zero."""
    method = build_method(cfg)
    model = new_model(cfg)
    method.adapt(model, 0)
    batch = open_batches(cfg, World()).train.step(0)[0]
    model(input_ids=batch.inputs, labels=batch.inputs).loss.backward()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            assert any(p.grad is not None and bool(p.grad.any()) for p in own), name


def test_interrupted_equals_uninterrupted_bitwise_at_every_step(cfg: RunConfig, request: pytest.FixtureRequest) -> None:
    whole, records = run(cfg.model_copy(update={"name": "whole"}))
    expected, final = losses(records), state_digest(whole)
    boundaries = {r["step"]: r["digest"] for r in records if r["kind"] == "boundary"}
    phases = ["train", "boundary", "checkpoint"] if boundaries else ["train", "checkpoint"]
    # Every step for those that differ in structure; around boundaries for those that differ in numbers.
    case = request.node.callspec.params["cfg"]
    thorough = case == cfg.method.kind or case in ("lora-warm", "relora-warm", "relora-plans")
    for phase in phases:
        # Each life begins where the one before was interrupted: what is wrong in one is wrong in all that follow.
        broken = cfg.model_copy(update={"name": f"broken-{phase}"})
        points = [r["step"] for r in records if r["kind"] == phase and (thorough or r["step"] in (3, 5, 6, 7, 12))]
        if not points:  # no boundary without merges and warm start
            continue
        for step in [*points, None]:
            ended, life = live(partial(run, broken), step, phase)
            resumed_at = next(r["step"] for r in life if r["kind"] == "attempt")
            assert step is None or resumed_at <= step
            last = cfg.steps if step is None else step
            done = {s: loss for s, loss in expected.items() if resumed_at < s <= last}
            assert losses(life) == done, f"{phase} {step}"
            assert {r["step"]: r["digest"] for r in life if r["kind"] == "boundary"}.items() <= boundaries.items()
        assert ended is not None
        assert state_digest(ended[0]) == final, phase


def whole_run(cfg: RunConfig) -> tuple[int, dict[int, float]]:
    """On one of several ranks."""
    records: list[Any] = []
    state = run_attempt(check_run(cfg), World.current(), on_record=records.append)
    return state_digest(state), losses(records)


@pytest.mark.parametrize("cfg", kinds(), indirect=True)
def test_other_processes_come_to_the_same(cfg: RunConfig) -> None:
    """An interpreter of its own, which has other hashes of strings: to the same bits. Two ranks: to each other's, and
    to those losses but for the order of sums."""
    state, records = run(cfg.model_copy(update={"name": "here"}))
    (alone,) = run_ranks(1, whole_run, cfg.model_copy(update={"name": "alone"}))
    assert alone == (state_digest(state), losses(records))
    first, second = run_ranks(2, whole_run, cfg.model_copy(update={"name": "two"}))
    assert first[0] == second[0]
    assert first[1] == pytest.approx(losses(records), rel=1e-3)


def test_boundary_keeps_the_function(cfg: RunConfig) -> None:
    """Switching and merging change how the weights are held, not what they compute."""
    method = build_method(cfg)
    frozen_weights = getattr(cfg.method, "frozen_weights", "fp32")
    bound = {"fp32": 1e-5, "bf16_int8": 1e-3, "bf16": 3e-2}[frozen_weights]  # 24, 16 and 8 bits of mantissa
    ids = open_batches(cfg, World()).validation.step(0)[0].inputs
    for boundary in (s for s in range(1, 13) if method.is_boundary(s)):
        model = new_model(cfg).eval()
        method.adapt(model, boundary - 1)
        optimizer = method.build_optimizer(model)
        with torch.no_grad():
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(noise, alpha=0.1)
            before = model(input_ids=ids).logits
            was = {id(p) for p in model.parameters() if p.requires_grad}
            report = method.on_boundary(Boundary(model, optimizer, boundary, seed=cfg.seed))
            after = model(input_ids=ids).logits
        assert (after - before).abs().max() <= bound * before.abs().max()
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for group in report.optimizer.param_groups for p in group["params"]} == trained
        assert report.new_parameters is (trained != was), "DDP is built anew where what is trained changes"
        if cfg.method.kind in ("lora", "relora"):
            assert report.num_layers == 14, "of two blocks"


def test_export_equals_the_live_model(cfg: RunConfig) -> None:
    state, _ = run(cfg)
    folder = f"{cfg.storage}/{cfg.name}/model"
    if not cfg.method.exports:
        assert not Path(folder).exists()
        with pytest.raises(NotMergeableError):
            build_method(cfg).dense_state_dict(state.model)
        return
    assert_loads_as_the_live_model(folder, state, open_batches(cfg, World()).validation.step(0)[0].inputs)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 2048


def test_base_and_delta_hold_everything_once(cfg: RunConfig) -> None:
    for step in (0, 12):
        _check_base_and_delta(cfg, step)


def _check_base_and_delta(cfg: RunConfig, step: int) -> None:
    method = build_method(cfg)
    model = new_model(cfg)
    method.adapt(model, step)
    optimizer = method.build_optimizer(model)
    frozen = method.frozen_names(model)
    base, delta = split_state(model, optimizer, frozen)
    whole = {f"model.{name}" for name in model.state_dict()}
    assert set(base) == {f"model.{name}" for name in frozen}
    assert {n for n in delta if n.startswith("model.")} == whole - set(base)
    assert not {n for n, p in model.named_parameters() if p.requires_grad} & frozen
    assert {n for n, p in model.named_parameters() if not p.requires_grad} <= frozen, "or it is in every checkpoint"
    kept = {f"optimizer.{name}" for name in state_tensors(model, optimizer)}
    assert {n for n in delta if n.startswith("optimizer.")} == kept
    assert {n.rpartition(".")[0] for n in kept} == {
        f"optimizer.{n}" for n, p in model.named_parameters() if p.requires_grad
    }


def test_boundaries_are_a_function_of_the_step(cfg: RunConfig) -> None:
    method = build_method(cfg)
    warm = cfg.warm_start_steps
    expected = {warm} - {0}
    if cfg.method.kind not in ("full", "lora", "relora"):
        expected = set(cfg.method.boundaries(12))
    if cfg.method.kind == "relora":
        settings: Any = cfg.method
        late = int(settings.compat == "reference")
        varied = isinstance(settings.merge_every_steps, dict)
        expected |= {2, 4, 8, 12} if varied else set(range(warm + 3 + late, 13, 3))
    assert {s for s in range(13) if method.is_boundary(s)} == expected
    assert [method.last_boundary(s) for s in range(13)] == [
        max((b for b in expected if b <= s), default=0) for s in range(13)
    ]


def test_adapters_of_another_rank_begin_anew_and_all_else_goes_on(data: Path, tmp_path: Path) -> None:
    method, schedule = CASES["relora-plans"]
    cfg = tiny_config(data, tmp_path, "method.rslora=true", method=method, schedule=schedule)
    relora = build_method(cfg)
    model = new_model(cfg)
    relora.adapt(model, 3)
    optimizer = relora.build_optimizer(model)
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
    report = relora.on_boundary(Boundary(model, optimizer, 4, seed=cfg.seed))
    assert report.new_parameters
    assert {id(p) for group in report.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moment = report.optimizer.state[parameter]["exp_avg"]
        assert bool((moment == (0.0 if "lora_" in name else 1.0)).all()), name
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert layer.lora_A.shape == (6, 32)
    assert layer.lora_B.shape == (48, 6)
    assert layer.scale == pytest.approx(8 / 6**0.5)
    fresh = new_model(cfg)
    relora.adapt(fresh, 4)
    assert torch.equal(fresh.get_submodule("model.layers.1.mlp.up_proj").lora_A, layer.lora_A), "a function of the step"
    unchanged = relora.on_boundary(Boundary(model, report.optimizer, 12, seed=cfg.seed))
    assert not unchanged.new_parameters


def test_bytes_are_counted_as_they_are_made(cfg: RunConfig) -> None:
    """Each tensor once, by its role, and none grows with the updates: what a checkpoint is restored into is there."""
    method = build_method(cfg)
    model = new_model(cfg)
    method.adapt(model, 0)
    optimizer = method.build_optimizer(model)
    before = state_bytes(model, optimizer)
    assert before["weights"] == sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())
    stopped = cfg.model_copy(update={"train": cfg.train.model_copy(update={"stop_after_steps": 2})})
    state, records = run(stopped)
    assert next(r for r in records if r["kind"] == "attempt")["state_bytes"] == before
    assert state_bytes(state.model, state.optimizer) == before


def test_structure_is_known_without_values(cfg: RunConfig) -> None:
    """On the meta device: names, shapes and types are those that a run has."""
    shapes = []
    for device in ("meta", "cpu"):
        model = bare_model(cfg, device=device)
        build_method(cfg).adapt(model, 12)
        shapes.append({name: (t.shape, t.dtype) for name, t in model.state_dict().items()})
    assert shapes[0] == shapes[1]


def test_finished_run_is_left_alone(cfg: RunConfig) -> None:
    first, _ = run(cfg)
    again, records = run(cfg)
    assert state_digest(first) == state_digest(again)
    assert {r["kind"] for r in records} == {"attempt", "end"}
    assert Storage(f"{cfg.storage}/{cfg.name}").exists("model/config.json") is cfg.method.exports


def test_function_is_that_of_the_dense_weights_on_gpt2(cfg: RunConfig, tmp_path: Path) -> None:
    """Whose layers keep their weight as (in, out), with a bias."""
    config = transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    config.save_pretrained(tmp_path / "gpt2")
    gpt2 = cfg.model_copy(update={"model": ModelConfig(huggingface=str(tmp_path / "gpt2"))})
    if not cfg.method.exports:
        return
    method, model, plain = build_method(gpt2), bare_model(gpt2), bare_model(gpt2).eval()
    method.adapt(model, 0)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise, alpha=0.1)
        method.refresh(model)
        ids = torch.arange(48).view(2, 24)
        plain.load_state_dict(method.dense_state_dict(model))
        live, dense = model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits
    assert (live - dense).abs().max() <= 1e-5 * dense.abs().max()
