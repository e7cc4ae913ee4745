"""Models: a LLaMA of the reference's sizes, or any Hugging Face causal language model.

Weights start from a keyed seed, in fp32 on the CPU, the same on every rank and machine type.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from torch import nn

from relora_ray.config import ModelConfig
from relora_ray.errors import ConfigError, first_words
from relora_ray.keyed import key
from relora_ray.modeling.architecture import Architecture, hf_config, in_training

LEAK = 1e-5
"""A change of a logit, relative to the largest, that is no rounding."""


def build_model(
    model: ModelConfig, *, seq_len: int, seed: int, device: str = "cpu", architecture: Architecture | None = None
) -> nn.Module:
    """A freshly initialised causal language model in fp32. `device="meta"` gives shapes without memory.
    `architecture`: what the run has stored of `model.huggingface`, which is then not read."""
    config = in_training(hf_config(model, seq_len, architecture))
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(key(seed, "model"))
            built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # a class of transformers raises what it likes
        if device != "meta" and not isinstance(error, ValueError):
            raise  # it may be that memory for the tensors is missing, which is no fault of the config
        settings = config.get_text_config().to_dict()
        named = [name for name, value in settings.items() if isinstance(error, KeyError) and value in error.args]
        raise ConfigError(
            f"model.huggingface={model.huggingface!r} is no causal language model that can be built here: "
            f"{type(error).__name__}: {first_words(error)}{f' ({named[0]} in its config.json)' if named else ''}"
        ) from error
    if device != "meta":
        _draw_padding_rows_(built, key(seed, "padding"))
        _draw_hash_tables_(built, key(seed, "hash routing"))
    freeze_(built, model.frozen)
    return built.train()


@torch.no_grad()
def _draw_padding_rows_(model: nn.Module, seed: int) -> None:
    """Have the row of pad_token_id be one as any other, in every table of tokens (Gemma 4 has one for each block
    besides): rows here have no padding, and the data's own id of that number (Phi-3 ends documents with it) would be
    read as zero, and never trained."""
    generator = torch.Generator().manual_seed(seed)
    for embedding in model.modules():
        row = getattr(embedding, "padding_idx", None)
        if row is None or not isinstance(embedding, nn.Embedding) or len(embedding.weight) != embedding_rows(model):
            continue
        embedding.padding_idx = None
        weight = embedding.weight
        if not weight[row].count_nonzero():
            others = torch.cat([weight[:row], weight[row + 1 :]]).std()
            weight[row] = others.cpu() * torch.randn(weight.shape[1], generator=generator)


@torch.no_grad()
def _draw_hash_tables_(model: nn.Module, seed: int) -> None:
    """Draw which experts a token id goes to where that is a fixed table ("hash routing", DeepSeek-V4): transformers
    leaves it at zero for a checkpoint to fill, and every token would go to the first expert."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        table = getattr(module, "tid2eid", None)
        if isinstance(table, torch.Tensor) and not table.count_nonzero():
            num_experts = int(module.num_experts)  # type: ignore[arg-type]
            experts = torch.rand(len(table), num_experts, generator=generator).argsort(dim=1)
            table.copy_(experts[:, : table.shape[1]])


def freeze_(model: nn.Module, segments: Iterable[str]) -> None:
    """Take out of training what has these segments in its name. ConfigError for one that nothing has."""
    for segment in segments:
        found = [p for name, p in model.named_parameters() if is_in(segment, name)]
        if not found:
            raise ConfigError(
                f"model.frozen has {segment!r}, which is in the name of no parameter of {type(model).__name__}. Names "
                f"look like {next(model.named_parameters())[0]}."
            )
        for parameter in found:
            parameter.requires_grad_(False)


def is_in(segment: str, name: str) -> bool:
    """Whether a dotted name has this segment, or these several in a row."""
    return f".{segment}." in f".{name}."


@torch.no_grad()
def check_causal(model: nn.Module, ids: torch.Tensor | None = None) -> None:
    """See that no token of a row (`ids`: [1, tokens], default: eight) looks ahead: some architectures load as causal
    models and are not. ConfigError.

    What leaks is of the logits' own size, rounding is a millionth of it: experts are given other rows together.
    """
    was_training = model.training
    model.eval()
    first = torch.arange(8).view(1, 8) if ids is None else ids
    half = first.shape[1] // 2
    second = first.clone()
    second[0, half:] = 0
    before, after = (model(input_ids=row).logits[0, :half].float() for row in (first, second))
    model.train(was_training)
    if (before - after).abs().max() > LEAK * before.abs().max():
        raise ConfigError(
            f"{type(model).__name__} is not causal: changing the last tokens changes earlier predictions, so it would "
            f"be trained to copy. Set is_decoder in its config.json, or take another architecture."
        )


def embedding_rows(model: nn.Module) -> int:
    """Rows of the input embedding: token ids must be below this."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def num_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
