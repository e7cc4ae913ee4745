"""What every registered method must keep. A new method joins by one entry in CASES."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relora_ray.checkpoint.checkpointer import split_state
from relora_ray.config import RunConfig
from relora_ray.loop import open_batches
from relora_ray.methods import METHODS, build_method
from relora_ray.metrics import Record
from relora_ray.parallel import World
from relora_ray.runs import new_model
from relora_ray.storage import Storage
from tests.tiny import Crash, assert_loads_as_the_live_model, crash_at, losses, run, state_digest, tiny_config

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


@pytest.fixture(params=CASES)
def cfg(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> RunConfig:
    method, schedule = CASES[request.param]
    plain = ["optimizer.weight_decay=0"] if "compat" in method else []
    return tiny_config(data, tmp_path, *plain, method=method, schedule=schedule)


def test_every_registered_method_has_a_case() -> None:
    kinds = {method["kind"] for method, _ in CASES.values()}
    registered: Any = METHODS  # classes of configs
    assert {c.model_fields["kind"].default for c in registered} == kinds


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
    phases = ["train", "checkpoint"] if cfg.method.kind == "full" else ["train", "boundary", "checkpoint"]
    # Every step for the four that differ in structure; around boundaries for those that differ in numbers.
    thorough = request.node.callspec.params["cfg"] in ("full", "lora-warm", "relora-warm", "relora-plans")
    for phase in phases:
        # Each life begins where the one before was interrupted: what is wrong in one is wrong in all that follow.
        broken = cfg.model_copy(update={"name": f"broken-{phase}"})
        points = [r["step"] for r in records if r["kind"] == phase and (thorough or r["step"] in (3, 5, 6, 7, 12))]
        if not points:  # no boundary without merges and warm start
            continue
        for step in [*points, None]:
            life: list[Record] = []
            crash = crash_at(step, phase) if step is not None else None

            def on_record(record: Record, life: list[Record] = life, crash: Any = crash) -> None:
                life.append(record)
                if crash is not None:
                    crash(record)

            with pytest.raises(Crash) if crash else nullcontext():
                state, _ = run(broken, on_record)
            resumed_at = next(r["step"] for r in life if r["kind"] == "attempt")
            assert step is None or resumed_at <= step
            last = cfg.steps if step is None else step
            done = {s: loss for s, loss in expected.items() if resumed_at < s <= last}
            assert losses(life) == done, f"{phase} {step}"
            assert {r["step"]: r["digest"] for r in life if r["kind"] == "boundary"}.items() <= boundaries.items()
        assert state_digest(state) == final, phase


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
            report = method.on_boundary(model, optimizer, boundary)
            after = model(input_ids=ids).logits
        assert (after - before).abs().max() <= bound * before.abs().max()
        assert report.num_layers == 14


def test_export_equals_the_live_model(cfg: RunConfig) -> None:
    state, _ = run(cfg)
    folder = f"{cfg.storage}/{cfg.name}/model"
    assert_loads_as_the_live_model(folder, state, open_batches(cfg, World()).validation.step(0)[0].inputs)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 2048


def test_base_and_delta_hold_everything_once(cfg: RunConfig) -> None:
    method = build_method(cfg)
    model = new_model(cfg)
    method.adapt(model, 12)
    optimizer = method.build_optimizer(model)
    frozen = method.frozen_names(model)
    base, delta = split_state(model, optimizer, frozen)
    held = {n for n, p in model.named_parameters() if not p.requires_grad} | {
        n for n, _ in model.named_buffers() if n.endswith(".residual")
    }
    assert {n.removeprefix("model.") for n in base} == held
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n for n in delta if n.startswith("model.")} == {f"model.{n}" for n in trainable}
    assert len([n for n in delta if n.startswith("optimizer.")]) == 3 * len(trainable)


def test_boundaries_are_a_function_of_the_step(cfg: RunConfig) -> None:
    method = build_method(cfg)
    warm = cfg.warm_start_steps
    expected = {warm} - {0}
    if cfg.method.kind == "relora":
        late = int(cfg.method.compat == "reference")
        varied = isinstance(cfg.method.merge_every_steps, dict)
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
    report = relora.on_boundary(model, optimizer, 4)
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
    unchanged = relora.on_boundary(model, report.optimizer, 12)
    assert not unchanged.new_parameters


def test_finished_run_is_left_alone(cfg: RunConfig) -> None:
    first, _ = run(cfg)
    again, records = run(cfg)
    assert state_digest(first) == state_digest(again)
    assert {r["kind"] for r in records} == {"attempt", "end"}
    assert Storage(f"{cfg.storage}/{cfg.name}").exists("model/config.json")
