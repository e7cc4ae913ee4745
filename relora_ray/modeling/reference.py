"""Checkpoints of the published ReLoRA code (Guitaricet/relora): plain weights with adapters beside them.

A folder has config.json, relora_config.json and model.safetensors, whose wrapped layers hold `weight`,
`lora_A.weight`, `lora_B.weight` and, with --train_scaling, `scaling`. Read through `model.init_from`, adapters are
merged: a run that starts from it computes the same function, with fresh adapters and optimizer state, as right after
a merge. Its optimizer.pt is a pickle and is not read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch
import torch

from relora_ray.errors import ConfigError

CONFIG = "relora_config.json"

# Constants that old transformers versions saved with the weights.
_CONSTANTS = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attention\.(bias|masked_bias))$")


def is_reference_folder(path: str) -> bool:
    return Path(path, CONFIG).is_file()


def read_reference(folder: str, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Dense fp32 weights of a checkpoint, adapters merged. ConfigError if it is not readable. `device="meta"`: their
    names and shapes, for which only headers of files are read."""
    try:
        settings = json.loads(Path(folder, CONFIG).read_text())
        scale = settings["lora_alpha"] / settings["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model.init_from={folder!r}: {CONFIG} is not one of the published ReLoRA code ({error!r}). It needs r and "
            f"lora_alpha."
        ) from error
    if settings.get("quantize"):
        raise ConfigError(
            f"model.init_from={folder!r} was trained with quantize={settings['quantize']!r}, which is not read. Merge "
            f"it with the published code first."
        )
    weights = {n: t.float() for n, t in _read_tensors(folder, device).items() if not _CONSTANTS.search(n)}
    dense = {n: t for n, t in weights.items() if not re.search(r"\.(lora_A\.weight|lora_B\.weight|scaling)$", n)}
    for name in [n for n in weights if n.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        factor = weights[f"{path}.scaling"].tanh() if f"{path}.scaling" in weights else scale
        try:
            update = factor * weights[f"{path}.lora_B.weight"] @ weights[name]
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"model.init_from={folder!r}: the adapters of {path} are not whole: {error}") from error
        dense[f"{path}.weight"] = dense[f"{path}.weight"] + update if f"{path}.weight" in dense else update
    return dense


def _read_tensors(folder: str, device: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise ConfigError(
            f"model.init_from={folder!r} has no model.safetensors. A pytorch_model.bin is a pickle and is not read: "
            f"load it with the published code and save it with safe_serialization=True."
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= safetensors.torch.load_file(file) if device == "cpu" else _shapes(file, device)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"model.init_from: {file} is not a readable safetensors file: {error}") from error
    return tensors


def _shapes(file: Path, device: str) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(file, framework="pt") as opened:
        return {name: torch.empty(opened.get_slice(name).get_shape(), device=device) for name in opened.keys()}  # noqa: SIM118
