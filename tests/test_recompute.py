"""Activation recomputation: the same bits, fewer bytes, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from relora_ray.config import RunConfig, TrainConfig
from relora_ray.errors import ConfigError
from relora_ray.modeling.recompute import recompute_blocks_
from relora_ray.runtime.preflight import preflight
from tests.tiny import Crash, crash_at, losses, run, run_on, state_digest, stored_losses, tiny_config

CASES = {
    "relora": (),
    "dropout": ("method.dropout=0.1",),
    "bf16": ("train.precision=bf16", "train.loss_chunk_tokens=7"),
    "int8": ("method.frozen_weights=bf16_int8",),
    "full": ("method={kind: full}", "schedule.kind=cosine", "schedule.restart_warmup_steps=0"),
    "galore": ("method={kind: galore, rank: 4}", "schedule.kind=cosine", "schedule.restart_warmup_steps=0"),
    "sltrain": ("method={kind: sltrain, rank: 4}", "schedule.kind=cosine", "schedule.restart_warmup_steps=0"),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_are_the_same_bits(case: str, data: Path, tmp_path: Path) -> None:
    """Over a warm start and merges, where there are; and resumed with the other in the middle."""
    plain, expected = run(tiny_config(data, tmp_path, *CASES[case], "name=plain"))
    again = tiny_config(data, tmp_path, *CASES[case], "name=again", "train.recompute=true")
    with pytest.raises(Crash):
        run(again.model_copy(update={"train": plain_train(again)}), crash_at(5, "train"))
    state, _ = run(again)
    assert stored_losses(again) == losses(expected)
    assert state_digest(state) == state_digest(plain)


def plain_train(cfg: RunConfig) -> TrainConfig:
    return cfg.train.model_copy(update={"recompute": False})


@pytest.mark.slow
def test_two_ranks_are_the_same_bits(data: Path, tmp_path: Path) -> None:
    configs = [tiny_config(data, tmp_path, f"name=r{again}", f"train.recompute={again}") for again in ("false", "true")]
    for cfg in configs:
        run_on(2, cfg)
    plain, again = map(stored_losses, configs)
    assert plain == again
    assert len(plain) == 12


def test_model_without_blocks_is_refused_before_anything_is_spent(data: Path, tmp_path: Path) -> None:
    config = transformers.OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=2048)
    config.save_pretrained(tmp_path / "gpt")
    cfg = tiny_config(data, tmp_path, "train.recompute=true", model={"huggingface": str(tmp_path / "gpt")})
    with pytest.raises(ConfigError, match=r"train.recompute=true: OpenAIGPTLMHeadModel has no blocks"):
        preflight(cfg)


def test_it_is_of_training_alone() -> None:
    """An evaluation computes nothing twice."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    assert recompute_blocks_(model) == 3
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(model.training))
    ids = torch.arange(8)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    assert calls == [True, True, False]
