"""python -m tests.architectures > docs/architectures.md

Every causal architecture of transformers at a tiny width, taken through what a run does with it.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relora_ray.config import ModelConfig, RunConfig, TrainConfig
from relora_ray.errors import ConfigError
from relora_ray.methods.adapter import merge_all_, redraw_all_, refresh_all_
from relora_ray.methods.lowrank.config import ReloraConfig
from relora_ray.methods.lowrank.layer import LowRankStack, folded_state_dict, low_rank_layers, wrap_
from relora_ray.modeling.architecture import hf_config, position_limit, read_architecture
from relora_ray.modeling.hf_export import export_config, write_hf_folder
from relora_ray.modeling.model import build_model, check_causal
from relora_ray.modeling.optim import build_adamw
from relora_ray.modeling.small import small_config
from relora_ray.modeling.weights import check_weights, load_weights
from relora_ray.runs.trial import LONG, TOKENS, check_gradients, check_loss, mean_loss, trial_ids
from tests.tiny import tiny_config

INCOMPLETE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64},
    "dots1": {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""What the default config of an architecture lacks."""

ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Decoders only if their config says so, as here: is_decoder."""

LONG_ROWS = ("deepseek_v4",)
"""Some parts take part in long rows only."""

NOT_TRAINED = {
    "big_bird": "it looks ahead in rows of more than a few blocks: it is no causal model",
    "cpmant": "it looks ahead: it is no causal model",
    "prophetnet": "its own loss is another than the cross-entropy of the next token",
    "xlm": "it looks ahead: it is no causal model",
    "xlnet": "it looks ahead: it is no causal model",
}
"""Refused, and rightly."""

NOT_TRIED = {
    "blt": "reads bytes in patches, of sizes that its tiny form does not have",
    "cohere_compass_text": "its default config does not build",
    "dbrx": "its default config does not build",
    "emu3": "what is exported of it is no causal language model to transformers",
    "mllama": "what is exported of it is no causal language model to transformers",
    "dots3_note": "no tiny form",
    "dots3_note_text": "no tiny form",
    "gemma3n": "needs the library timm",
    "gemma3n_text": "no tiny form",
    "gemma4_assistant": "its default config does not build",
    "gemma4_unified_assistant": "no tiny form",
    "musicgen": "of music",
    "musicgen_melody": "of music",
    "qwen4_exp": "its default config does not build",
    "qwen4_exp_text": "its default config does not build",
    "reformer": "takes rows of one length only",
    "xmod": "needs to be told a language",
}


NOT_RECOMPUTED = ("ctrl", "gpt_neox_japanese", "openai-gpt")
"""Their blocks are none to transformers."""

HEAD = """# Architectures

Every causal language model of transformers {version}, at a tiny width (`python -m tests.architectures`): putting
adapters on changes no logit, every trained tensor has a gradient, a merge after five updates changes no logit, the loss
is the architecture's own, and the exported folder loads with the same logits. `tests/test_architectures.py` does it
again in every test run. With `train.recompute` gradients are the same bit for bit, and ctrl, gpt_neox_japanese and
openai-gpt are refused. What a model needs beside `model.huggingface` is said by the refusal that a run without it ends
in, before Ray starts.
"""


@dataclass
class Found:
    frozen: list[str] = field(default_factory=list)
    """What `model.frozen` must have."""
    leave_out: list[str] = field(default_factory=list)
    """What `method.leave_out` must have."""
    kinds: Counter[str] = field(default_factory=Counter)
    wrapping: float = 0.0
    """Largest change of a logit, relative to the largest logit."""
    merging: float = 0.0
    exporting: float = 0.0
    losses: list[float] = field(default_factory=list)
    recompute: bool = False
    """Whether blocks are computed again with train.recompute, to the same bits."""


def names() -> list[str]:
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_TRIED.keys())


def examine(model_type: str, folder: Path) -> Found:
    """ConfigError where a run would be refused."""
    given = INCOMPLETE.get(model_type, {}) | ({"is_decoder": True} if model_type in ENCODERS else {})
    config = small_config(CONFIG_MAPPING[model_type](**given))
    config.save_pretrained(folder / "config")
    cfg = tiny_config(
        folder, folder, "method.lora_rank=2", "method.alpha=4", "optimizer.learning_rate=1e-3",
        f"data.seq_len={TOKENS}", model={"huggingface": str(folder / "config")},
    )  # fmt: skip
    plain = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed)
    found, ids = Found(), trial_ids(plain, LONG if model_type in LONG_ROWS else TOKENS)
    check_causal(plain, trial_ids(plain, min(LONG, (position_limit(config.get_text_config()) or LONG) - 8))[:1, :-1])
    check_loss(plain, cfg, ids)
    found.frozen = _asked_for(plain, "model.frozen")
    model_cfg = cfg.model.model_copy(update={"frozen": tuple(found.frozen)})
    while True:
        model = _wrapped(cfg, model_cfg, found.leave_out)
        mean_loss(model, cfg, ids).backward()
        if not (more := _asked_for(model, "method.leave_out")):
            break
        assert not set(more) & set(found.leave_out)
        found.leave_out += more
    found.recompute = _recomputed(model, cfg, ids)
    before = _logits(build_model(model_cfg, seq_len=cfg.data.seq_len, seed=cfg.seed), ids)
    found.wrapping = _change(before, _logits(model, ids))
    _train(cfg, model, ids, found)
    before = _logits(model, ids)
    merge_all_(model)
    redraw_all_(model, seed=0, boundary=1)
    found.merging = _change(before, _logits(model, ids))
    _export(model_cfg, model, cfg.data.seq_len, folder)
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    exported.config.get_text_config().use_cache = exported.config.use_cache = False
    found.exporting = _change(before, _logits(exported, ids))
    found.kinds = Counter(type(layer).__name__ for layer in low_rank_layers(model).values())
    return found


def _export(model_cfg: ModelConfig, model: torch.nn.Module, seq_len: int, folder: Path) -> None:
    """And take the weights from there again, into the architecture as a run stores it."""
    out, dense = folder / "out", folded_state_dict(model)
    out.mkdir()
    architecture = read_architecture(model_cfg.huggingface)
    config = export_config(hf_config(model_cfg, seq_len, architecture), None, end_token_id=1, own_ids=True)
    write_hf_folder(model, dense, config, str(out), dtype=torch.float32)
    check_weights(build_model(model_cfg, seq_len=seq_len, seed=1, device="meta", architecture=architecture), str(out))
    again = build_model(model_cfg, seq_len=seq_len, seed=1, architecture=architecture)
    load_weights(again, str(out))
    assert all(torch.equal(tensor, dense[name]) for name, tensor in again.state_dict().items())


def _wrapped(cfg: RunConfig, model_cfg: ModelConfig, leave_out: list[str]) -> torch.nn.Module:
    assert isinstance(cfg.method, ReloraConfig)
    model = build_model(model_cfg, seq_len=cfg.data.seq_len, seed=cfg.seed)
    wrap_(model, cfg.method.model_copy(update={"leave_out": tuple(leave_out)}))
    redraw_all_(model, seed=0, boundary=0)
    return model


def _asked_for(model: torch.nn.Module, key: str) -> list[str]:
    """What the refusal says that `key` must be set to; nothing if it is not refused."""
    try:
        check_gradients(model)
    except ConfigError as error:
        asked = re.search(rf"{re.escape(key)}=\[(.*?)\]", str(error))
        if asked is None:
            raise
        return asked[1].split(",")
    return []


def _recomputed(model: torch.nn.Module, cfg: RunConfig, ids: torch.Tensor) -> bool:
    """False if it is refused."""
    model.train()

    def passed(train: TrainConfig) -> list[torch.Tensor]:
        torch.manual_seed(0)  # of dropout
        model.zero_grad()
        loss = mean_loss(model, cfg.model_copy(update={"train": train}), ids)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = passed(cfg.train)
    try:
        found = passed(cfg.train.model_copy(update={"recompute": True}))
    except ConfigError:
        return False
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return True


def _train(cfg: RunConfig, model: torch.nn.Module, ids: torch.Tensor, found: Found) -> None:
    model.train()
    optimizer = build_adamw(model, cfg.optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        loss = mean_loss(model, cfg, ids)
        loss.backward()
        optimizer.step()
        refresh_all_(model)
        found.losses.append(float(loss.detach()))


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    logits: torch.Tensor = model(input_ids=ids[:, :-1]).logits.float()
    return logits


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def row(model_type: str, found: Found) -> str:
    stacks = found.kinds[LowRankStack.__name__]
    what = "linear layers" + (" and stacked experts" if stacks else "")
    needs = [f"`model.frozen=[{','.join(found.frozen)}]`"] if found.frozen else []
    needs += [f"`method.leave_out=[{','.join(found.leave_out)}]`"] if found.leave_out else []
    needs += ["`is_decoder: true` in its config.json"] if model_type in ENCODERS else []
    return f"| {model_type} | {what} | {', '.join(needs)} |"


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for model_type in names():
        if model_type in NOT_TRAINED:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(model_type, examine(model_type, Path(folder))))
        print(rows[-1], file=sys.stderr)
    refused = "\n".join(f"| {name} | {why} |" for name, why in sorted((NOT_TRAINED | NOT_TRIED).items()))
    print(HEAD.format(version=transformers.__version__))
    print("| architecture | adapters are on | what it needs |\n|---|---|---|", *rows, sep="\n")
    print("\nNot trained, or not tried:\n\n| architecture | why |\n|---|---|", refused, sep="\n")


if __name__ == "__main__":
    main()
