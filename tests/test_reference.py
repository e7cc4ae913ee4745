"""What the published code does, where it differs: its arithmetic under `compat: reference`, and its checkpoints.

The folders read here are written in the published format by this file; benchmarks/against_reference.py does the same
with the published code itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from relora_ray.config import OptimizerConfig, RunConfig
from relora_ray.errors import ConfigError
from relora_ray.methods.adapter import adapter_parameters
from relora_ray.methods.base import build_method
from relora_ray.methods.lowrank.config import ResetConfig
from relora_ray.methods.lowrank.layer import low_rank_layers
from relora_ray.methods.lowrank.reset import prune_state_
from relora_ray.modeling.optim import build_adamw
from relora_ray.modeling.parallel import World
from relora_ray.modeling.reference import read_reference
from relora_ray.modeling.schedule import lr_multiplier
from relora_ray.runs.batches import open_batches
from relora_ray.runs.run import new_model
from relora_ray.runtime.preflight import preflight
from tests.tiny import Crash, crash_at, run, tiny_config

AS_PUBLISHED = {
    "kind": "relora", "lora_rank": 4, "alpha": 8, "merge_every_steps": 4, "compat": "reference",
    "reset": {"kind": "zero", "adam_step": "keep"},
}  # fmt: skip
SCHEDULE = {"kind": "jagged_cosine", "warmup_steps": 1, "restart_warmup_steps": 1}


@pytest.fixture
def as_published(data: Path, tmp_path: Path) -> RunConfig:
    return published_config(data, tmp_path)


def published_config(data: Path, folder: Path, *overrides: str, **method: object) -> RunConfig:
    return tiny_config(
        data, folder, "optimizer.weight_decay=0", *overrides, method=AS_PUBLISHED | method, schedule=SCHEDULE
    )


def test_warm_start_is_a_run_of_its_own(data: Path, tmp_path: Path) -> None:
    """Published, the second stage is a second start: a fresh optimizer, and a schedule over the updates left."""
    cfg = published_config(data, tmp_path, "steps=15", warm_start_steps=3)
    alone = published_config(data, tmp_path, "steps=12")
    assert [lr_multiplier(s, cfg) for s in range(3, 15)] == [lr_multiplier(s, alone) for s in range(12)]
    with pytest.raises(Crash):
        run(cfg, crash_at(3, "boundary"))
    state, records = run(cfg)
    assert [r["step"] for r in records if r["kind"] == "boundary"] == [3, 8, 12]
    assert {float(state.optimizer.state[p]["step"]) for p in state.model.parameters() if p.requires_grad} == {12.0}


def test_reset_only_where_the_learning_rate_restarts(data: Path, tmp_path: Path) -> None:
    cfg = published_config(data, tmp_path, "schedule.restart_every_steps=8", "steps=16")
    _, records = run(cfg)
    pruned = {r["step"]: r["state_pruned"] for r in records if r["kind"] == "boundary"}
    assert pruned.keys() == {5, 9, 13}
    assert pruned[9] > 0.99
    assert pruned[13] < 0.99  # at 5 there is nothing yet: no adapter has had a gradient


def test_no_adapter_learns_before_the_first_merge(as_published: RunConfig) -> None:
    method = build_method(as_published)
    model = new_model(as_published)
    method.adapt(model, 0)
    batch = open_batches(as_published, World()).train.step(0)[0]
    model(input_ids=batch.inputs, labels=batch.inputs).loss.backward()
    assert all(not p.any() and not p.grad.any() for _, p in adapter_parameters(model))


def test_merges_come_one_update_late_and_the_last_cycle_has_none(as_published: RunConfig) -> None:
    state, records = run(as_published)
    merges = [r for r in records if r["kind"] == "boundary"]
    assert [r["step"] for r in merges] == [5, 9]
    assert all(layer.lora_B.any() for layer in low_rank_layers(state.model).values())
    steps = {float(state.optimizer.state[p]["step"]) for _, p in adapter_parameters(state.model)}
    assert steps == {12.0}, "Adam's step is kept"


@pytest.mark.parametrize(
    ("kind", "ratio", "kept"), [("zero", 0.5, 0.001), ("random", 0.8, 0.2), ("magnitude", 0.9, 0.1)]
)
def test_masks_of_m_and_v_are_drawn_apart(kind: str, ratio: float, kept: float) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(300, 400))
    module = nn.ParameterList([parameter])
    optimizer = build_adamw(module, OptimizerConfig(learning_rate=1e-3))
    for _ in range(3):
        parameter.grad = torch.randn(300, 400)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    reset = ResetConfig.model_validate({"kind": kind, "ratio": ratio, "adam_step": "keep"})
    prune_state_(optimizer, [("x", parameter)], reset, seed=0, boundary=5, as_published=True)
    state = optimizer.state[parameter]
    masks = [state[k] != 0 for k in ("exp_avg", "exp_avg_sq")]
    assert not torch.equal(*masks)
    for name, mask in zip(("exp_avg", "exp_avg_sq"), masks, strict=True):
        assert float(mask.double().mean()) == pytest.approx(kept, rel=0.3)
        if kind == "magnitude":
            threshold = torch.quantile(before[name].abs().flatten(), ratio)
            assert torch.equal(mask, before[name].abs() > threshold), "the published threshold"
    assert float(state["step"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset": {"kind": "zero"}}, r"needs method.reset.adam_step='keep'"),
        ({"reset": {"kind": "none"}}, r"needs method.reset"),
        ({"trainable_scaling": True}, r"needs method.trainable_scaling=false"),
        ({"merge_every_steps": 1}, r"needs method.merge_every_steps of 2 or more"),
    ],
)
def test_settings_that_the_published_code_does_not_have_are_refused(
    data: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        published_config(data, tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay=0.01 with method.compat='reference'"):
        published_config(data, tmp_path, "optimizer.weight_decay=0.01")


class PublishedLinear(nn.Module):
    """The published layer's tensors under their published names."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float | None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.alpha_over_r = 16 / rank
        if scaling is not None:
            self.scaling = nn.Parameter(torch.tensor([scaling]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scaling.tanh() if hasattr(self, "scaling") else self.alpha_over_r
        return nn.functional.linear(x, self.weight) + self.lora_B(self.lora_A(x)) * scale


def published_checkpoint(folder: Path, scaling: float | None = None) -> transformers.PreTrainedModel:
    """A LLaMA in mid-cycle, saved as the published code saves it; returns the live model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ("attn" in path or "mlp" in path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PublishedLinear(module, 4, scaling))
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old transformers versions saved
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["attn", "mlp"], "quantize": None}
    (folder / "relora_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("scaling", [None, 0.7])
def test_published_checkpoint_starts_a_run_with_its_function(data: Path, tmp_path: Path, scaling: float | None) -> None:
    live = published_checkpoint(tmp_path / "published", scaling)
    folder = tmp_path / "published"
    cfg = published_config(data, tmp_path, f"model={{huggingface: {folder}, init_from: {folder}}}")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = live(input_ids=ids).logits
        assert (new_model(cfg).eval()(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    state, _ = run(cfg)
    assert state.position.step == 12


def test_unreadable_published_checkpoints_are_refused(tmp_path: Path) -> None:
    published_checkpoint(tmp_path / "a")
    settings = tmp_path / "a/relora_config.json"
    good = json.loads(settings.read_text())
    settings.write_text(json.dumps(good | {"quantize": "4bit"}))
    with pytest.raises(ConfigError, match="quantize='4bit', which is not read"):
        read_reference(str(tmp_path / "a"))
    settings.write_text("{}")
    with pytest.raises(ConfigError, match="needs r and lora_alpha"):
        read_reference(str(tmp_path / "a"))
    settings.write_text(json.dumps(good))
    weights = tmp_path / "a/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_reference(str(tmp_path / "a"))
    weights.rename(tmp_path / "a/pytorch_model.bin")
    with pytest.raises(ConfigError, match="is a pickle and is not read"):
        read_reference(str(tmp_path / "a"))


def test_published_checkpoint_whose_head_is_apart_is_no_source_of_a_tied_model(data: Path, tmp_path: Path) -> None:
    published_checkpoint(tmp_path / "published")
    cfg = tiny_config(data, tmp_path, "model.tie_embeddings=true", f"model.init_from={tmp_path}/published")
    for refused in (preflight, new_model):
        with pytest.raises(ConfigError, match=r"has model.embed_tokens.weight and lm_head.weight apart"):
            refused(cfg)
