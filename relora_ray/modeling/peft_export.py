"""An adapter for peft, beside a plain Hugging Face folder of the frozen base: together they are the trained model.

peft itself builds and writes it, and loads it once, as a user would, before it counts as written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ray.errors import ConfigError, ExportError
from relora_ray.modeling.architecture import in_training
from relora_ray.modeling.hf_export import LOADED_UP_TO_BYTES, TOLERANCE, sample_logits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraUpdate:
    """The update scale * B A of every adapted matrix, where scale is alpha / lora_rank, or with `rslora` alpha /
    sqrt(lora_rank)."""

    lora_rank: int
    alpha: float
    rslora: bool
    dropout: float
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """A (r, in) and B (out, r), fp32, by the plain model's path of the layer, at each that it has; of a stack of
    experts (experts, r, in) and (experts, out, r), by the path of the parameter."""


def require_peft() -> Any:
    """The library. ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "an adapter is written and checked by peft, which is not installed: pip install 'relora-ray[adapter]'."
        ) from error
    return peft


def write_adapter(update: LoraUpdate, config: Any, folder: str, *, base_name: str) -> None:
    """Write adapter_config.json and the tensors, in fp32. `config`: of the base, as transformers has it; `base_name`:
    what the adapter calls it. ExportError if peft cannot have these layers."""
    peft = require_peft()
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config)
        shell.name_or_path = base_name  # peft writes the model's own, a folder of this machine
        settings = _settings(peft, update, shell, base_name)
        try:
            net = peft.get_peft_model(shell, settings, low_cpu_mem_usage=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ExportError(f"peft has no adapter for this model: {error} Export it without --adapter.") from error
    places = _places(peft, net)
    if wrong := sorted(places.keys() ^ update.factors.keys()):
        raise ExportError(
            f"peft would have adapters on other layers than the run: {wrong[0]} and {len(wrong) - 1} more are on one "
            f"side only, as it is where several blocks share a layer. Export it without --adapter."
        )
    for path, layer in places.items():
        for factor, tensor in zip((layer.lora_A, layer.lora_B), _as_peft(*update.factors[path]), strict=True):
            if factor["default"].weight.shape != tensor.shape:
                raise ExportError(f"peft has another shape for the adapter of {path}. Export it without --adapter.")
            factor["default"].weight = nn.Parameter(tensor, requires_grad=False)
    net.save_pretrained(folder, save_embedding_layers=False)


def check_adapter(
    update: LoraUpdate, dense: dict[str, torch.Tensor], logits: torch.Tensor, base: str, folder: str, *, device: str
) -> None:
    """See that peft loads base and adapter as the model that was trained, whose `sample_logits` these are, on such a
    `device`. `dense`: the base in fp32, in whatever dtype its folder has it. ExportError if not."""
    if 4 * sum(tensor.numel() for tensor in dense.values()) > LOADED_UP_TO_BYTES:
        logger.info("the adapter is not loaded for a test, as its base is large: names and shapes are peft's own")
        return
    peft = require_peft()
    try:
        net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        tensors = net.state_dict()
        with torch.no_grad():
            for name, tensor in dense.items():
                tensors[name].copy_(tensor)  # so that rounding to the folder's dtype plays no part in what follows
        in_training(net.config)
        net = peft.PeftModel.from_pretrained(net, folder)
        for path, layer in _places(peft, net).items():
            for factor, tensor in zip((layer.lora_A, layer.lora_B), _as_peft(*update.factors[path]), strict=True):
                if not torch.equal(factor["default"].weight, tensor):
                    raise ConfigError(f"the adapter of {path} has other values there.")
        difference, largest = (sample_logits(net) - logits).abs().max().item(), logits.abs().max().item()
        if not difference <= TOLERANCE[device] * largest:
            raise ConfigError(f"its logits differ by {difference:.2g}, where the largest is {largest:.2g}.")
    except Exception as error:  # peft and transformers raise what they like
        raise ExportError(
            f"base and adapter do not load in peft as the model that was trained: {error} Nothing was written; an "
            f"export without --adapter is not concerned."
        ) from error


def _settings(peft: Any, update: LoraUpdate, shell: nn.Module, base_name: str) -> Any:
    stacks = sorted(path for path, (a, _) in update.factors.items() if a.ndim == 3)
    linears = update.factors.keys() - set(stacks)
    whole = update.alpha == int(update.alpha)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=update.lora_rank,
        lora_alpha=int(update.alpha) if whole else update.alpha,
        use_rslora=update.rslora,
        lora_dropout=0.0 if stacks else update.dropout,  # adapters of experts have none, and peft refuses both
        fan_in_fan_out=any(isinstance(shell.get_submodule(path), Conv1D) for path in linears),
        target_modules=_named(shell, linears),
        target_parameters=stacks or None,
        inference_mode=True,
    )


def _named(shell: nn.Module, paths: Iterable[str]) -> list[str]:
    """Last segments of paths, if no other module has one of these; else the paths themselves."""
    wanted = set(paths)
    names = {path.rpartition(".")[2] for path in wanted}
    matched = {path for path, _ in shell.named_modules(remove_duplicate=False) if path.rpartition(".")[2] in names}
    return sorted(names if matched == wanted else wanted)


def _places(peft: Any, net: nn.Module) -> dict[str, Any]:
    """peft's layers, as `LoraUpdate.factors` names them."""
    lora = peft.tuners.lora
    found: dict[str, Any] = {}
    for path, module in net.base_model.model.named_modules(remove_duplicate=False):  # type: ignore[union-attr]
        if not isinstance(module, lora.LoraLayer) or path.endswith(".base_layer"):
            continue
        if not isinstance(module, lora.layer.ParamWrapper):
            found[path] = module
        while isinstance(module, lora.layer.ParamWrapper):  # one within the other, where a module has several stacks
            found[f"{path}.{module.parameter_name}"] = module
            module = module.base_layer
    return found


def _as_peft(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """peft stacks the experts' ranks: A (experts * r, in), and B (out, r * experts), with experts the inner index."""
    if a.ndim == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()
