"""A trained model as a plain Hugging Face folder: config.json, safetensors, no code of ours.

A folder is loaded once, as a user would, before it counts as written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from relora_ray.errors import ConfigError, ExportError
from relora_ray.modeling.architecture import function_differences, in_training, language_model_parts
from relora_ray.modeling.small import pad_moves_others
from relora_ray.modeling.weights import check_weights

logger = logging.getLogger(__name__)

LOADED_UP_TO_BYTES = 2**31
"""Models up to this, in fp32, are loaded for the test, which takes as much memory once more. Of larger ones names,
shapes, headers of files and settings are compared."""
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Logits may differ by this, relative to the largest, from those of a model on such a device. On one CPU it is 1e-7 to
1e-6; a GPU may be told to multiply in TF32, with 10 bits of mantissa. Settings and tensors are compared as well, and
exactly: this is for what they do not show."""
_SAMPLE = (
    "It was a truth, universally acknowledged:\n\n  1 + 1 = 2. It wasn't; I'D say they'll pay $12,345.60 in 1997-03-14."
    "\t\u00e9 e\u0301 \u4e86\u89e3 \U0001f600\r\n    def f(x): return x**2  # \ufb01n\u00a0"
)
"""What tokenizers are compared on: where their rules differ, which are contractions, digits, runs of white space and
forms of one character."""


def write_hf_folder(
    trained: nn.Module,
    dense: dict[str, torch.Tensor],
    config: Any,
    folder: str,
    *,
    dtype: torch.dtype,
    begin_token_id: int | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write dense fp32 weights, as `dtype`, into a folder that has the tokenizer, if there is one.

    `trained`: the model that they are of, which is run on a few tokens. `config`: as `export_config` made it.
    `begin_token_id`: what a text that is generated from nothing begins behind; default: the config's.
    `max_shard_size`: of one file of weights, such as 4GB, unless a single tensor is larger; default: transformers' own.
    ExportError if what was written does not load as that model.
    """
    tokenizer = load_exported_tokenizer(folder)
    config.use_cache = True
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if getattr(shell, "generation_config", None) is not None:
        shell.generation_config = transformers.GenerationConfig.from_model_config(shell.config)
        if begin_token_id is not None:
            shell.generation_config.bos_token_id = begin_token_id
    transformers.utils.logging.disable_progress_bar()
    # Tied weights appear twice in a state dict and once in a file; the architecture knows which.
    tied = set(getattr(shell, "all_tied_weights_keys", None) or {})
    stored = {name: _as(tensor, dtype) for name, tensor in dense.items() if name not in tied}
    shell.save_pretrained(folder, state_dict=stored, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    del stored
    _tell_earlier_versions(Path(folder, "config.json"))
    check_hf_folder(trained, dense, shell.config, folder, dtype=dtype)
    check_exported_tokenizer(folder, tokenizer)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers stay so: bf16 has none beyond 256."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tell_earlier_versions(path: Path) -> None:
    """Write what rotary embeddings need also where transformers 4 looks for it, which would silently take its defaults:
    under its names of this architecture, which are those that a present version reads as the same."""
    raw = json.loads(path.read_text())
    for part in [raw, *(value for value in raw.values() if isinstance(value, dict))]:
        read = transformers.AutoConfig.from_pretrained(path).to_dict()
        for keys in _earlier_names(part.get("rope_parameters") or {}):
            before = dict(part)
            part.update(keys)
            path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
            try:
                is_known = transformers.AutoConfig.from_pretrained(path).to_dict() == read
            except Exception:  # a class of transformers raises what it likes
                is_known = False
            if not is_known:
                part.clear()
                part.update(before)
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _earlier_names(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Keys in which version 4 may look for these settings, each kind of architecture in some of them."""
    local: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):  # settings for each kind of layer
        rope, local = rope["full_attention"], rope.get("sliding_attention") or {}
    if not isinstance(rope.get("rope_theta"), (int, float)):
        return []
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    theta, part = rope["rope_theta"], rope.get("partial_rotary_factor")
    earlier: list[dict[str, Any]] = []
    if (nearby := local.get("rope_theta")) is not None:
        earlier += [{"global_rope_theta": theta, "local_rope_theta": nearby}, {"rope_local_base_freq": nearby}]
    earlier += [{"rope_theta": theta, "rope_scaling": scaling if scaling.get("rope_type") != "default" else None}]
    earlier += [{"rotary_emb_base": theta}]
    earlier += [{name: part} for name in ("partial_rotary_factor", "rotary_pct") if part is not None]
    return earlier


def export_config(
    config: Any, tokenizer: Any, *, end_token_id: int, own_ids: bool, begin_token_id: int | None = None
) -> Any:
    """The configuration with the ids of its special tokens: those of the tokenizer where it has them, else the
    architecture's, if they are its own (`own_ids`) and there is such a row. What ends a document of the data is the end
    of a sequence if nobody says another; what begins one there (`begin_token_id`) is what begins one."""
    parts = list(language_model_parts(config))
    rows = getattr(parts[-1], "vocab_size", None)
    for name, default in (("bos_token_id", end_token_id), ("eos_token_id", end_token_id), ("pad_token_id", None)):
        own: Any = default
        if own_ids:
            own = next((n for part in parts if (n := getattr(part, name, None)) is not None), None)
        said = getattr(tokenizer, name, None)
        if name == "bos_token_id" and begin_token_id is not None:
            said = begin_token_id
        if name == "pad_token_id" and said not in (None, own) and own is not None and pad_moves_others(config):
            said = None  # it is no mere name of padding: RoBERTa's positions begin behind it
        if said is not None and not (isinstance(own, list) and said in own):
            own = said
        known = [n for n in (own if isinstance(own, list) else [own]) if n is not None and 0 <= n < (rows or n + 1)]
        value: Any = known if isinstance(own, list) and known else next(iter(known), None)
        if value is None and name == "eos_token_id":
            value = end_token_id
        for part in parts:
            setattr(part, name, value)
    return config


def check_hf_folder(
    trained: nn.Module, dense: dict[str, torch.Tensor], config: Any, folder: str, *, dtype: torch.dtype
) -> None:
    """See that a folder loads in plain transformers as the model that was trained. ExportError if not."""
    try:
        if differing := function_differences(config, transformers.AutoConfig.from_pretrained(folder)):
            raise ConfigError(f"its config.json says something else: {'; '.join(differing)}.")
        num_bytes = 4 * sum(tensor.numel() for tensor in dense.values())
        if num_bytes > LOADED_UP_TO_BYTES:
            with torch.device("meta"):
                shell = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
            check_weights(shell, folder)
            logger.info(
                "the export is not loaded for a test, as its %.1f GB would be in memory twice: names, shapes, headers "
                "and settings are compared",
                num_bytes / 1e9,
            )
            return
        _check_by_loading(trained, dense, folder, dtype)
    except Exception as error:
        raise ExportError(
            f"the exported folder does not load as the model that was trained: {error} Nothing is lost: the "
            f"checkpoints are whole, and python -m relora_ray.export writes the folder when the cause is mended."
        ) from error


def _check_by_loading(trained: nn.Module, dense: dict[str, torch.Tensor], folder: str, dtype: torch.dtype) -> None:
    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
    )
    if wrong := {kind: sorted(map(str, names)) for kind, names in found.items() if names}:
        raise ConfigError(f"transformers reports {wrong}.")
    tensors = loaded.state_dict()
    for name, tensor in dense.items():
        if not torch.equal(tensors[name], _as(_as(tensor, dtype), torch.float32).cpu()):
            raise ConfigError(f"{name} has other values there.")
    for name, tensor in dense.items():
        tensors[name].copy_(tensor)  # so that rounding to `dtype` plays no part in what follows
    in_training(loaded.config)
    device = next(trained.parameters()).device
    ours, theirs = sample_logits(trained), sample_logits(loaded)
    difference, largest = (ours - theirs).abs().max().item(), ours.abs().max().item()
    if not difference <= TOLERANCE[device.type] * largest:
        raise ConfigError(f"its logits differ by {difference:.2g}, where the largest is {largest:.2g}.")


def sample_logits(model: nn.Module) -> torch.Tensor:
    """Of a few tokens, by a causal language model of transformers; fp32, on the CPU."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(7, 23)[None] % rows
    with _evaluating(model), torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids.to(next(model.parameters()).device)).logits
        return logits.float().cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def load_exported_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder; None if there is none. ExportError if it cannot be loaded."""
    if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and bare Exception from the Rust side
        raise ExportError(f"the tokenizer of the data does not load beside the model: {error}") from error


def check_exported_tokenizer(folder: str, before: Any) -> None:
    """See that the tokenizer of a folder is the one that it was before config.json was there. ExportError if not.

    For some architectures (Qwen2 is one) AutoTokenizer takes a class of theirs, whatever tokenizer_config.json says,
    which puts rules of its own in the place of the tokenizer's. That is said; PreTrainedTokenizerFast reads it rightly.
    """
    if before is None:
        return
    expected = _sample(before)
    if _sample(after := load_exported_tokenizer(folder)) == expected:
        return
    found = _sample(transformers.PreTrainedTokenizerFast.from_pretrained(folder))
    if found != expected:
        raise ExportError(
            f"the tokenizer of the data makes other tokens when it is loaded beside the model's config.json: "
            f"{found[:8]} instead of {expected[:8]}."
        )
    logger.warning(
        "AutoTokenizer reads the data's tokenizer as a %s beside this architecture's config.json, and makes other "
        "tokens than those that are trained on. Read that of the exported folder by PreTrainedTokenizerFast.",
        type(after).__name__,
    )


def _sample(tokenizer: Any) -> list[int]:
    return list(tokenizer(_SAMPLE, add_special_tokens=False).input_ids)
