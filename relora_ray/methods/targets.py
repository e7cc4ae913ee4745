"""Which matrices of a model a method is for, and which it cannot have."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from relora_ray.config.method import OnBlocks
from relora_ray.config.planned import all_values
from relora_ray.errors import ConfigError

logger = logging.getLogger(__name__)

FROZEN = "they are frozen"
NOT_NAMED = "method.target_modules does not name them"
SAME = 1e-4
"""Two ways to compute a linear layer differ by less, relative to its output."""


@dataclass
class Targets:
    linears: list[tuple[str, ...]] = field(default_factory=list)
    """Of each distinct weight the paths of the layers that have it."""
    stacks: list[str] = field(default_factory=list)
    """Parameters that hold the matrices of experts, (experts, out, in) or (experts, in, out)."""
    left: dict[str, str] = field(default_factory=dict)
    """Matrices in the blocks that stay trained in full, and why."""
    sizes: dict[str, int] = field(default_factory=dict)

    def say_what_is_left(self, architecture: str) -> None:
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            by_reason.setdefault(reason, []).append(path)
        for reason in by_reason.keys() - {FROZEN, NOT_NAMED}:
            paths = by_reason[reason]
            logger.warning(
                "%s: %d matrices in the blocks stay trained in full (%.1f M), such as %s: %s",
                architecture, len(paths), sum(self.sizes[path] for path in paths) / 1e6, paths[0], reason,
            )  # fmt: skip


def find_targets(model: nn.Module, cfg: OnBlocks, *, stacks: bool = True) -> Targets:
    """What `cfg` is for; without `stacks`, linear layers only. ConfigError for a name that matches nothing, a rank
    above the smaller side of a layer that is named or of all of them, and a model that has nothing it could be for."""
    linears, experts = dict(block_linears(model)), dict(block_stacks(model))
    names = {path.rpartition(".")[2] for path in (*linears, *experts)}
    asked = () if cfg.target_modules == "all-linear" else cfg.target_modules
    for key, given in (("target_modules", asked), ("leave_out", cfg.leave_out)):
        if unknown := [name for name in given if not any(_is_called(path, name) for path in (*linears, *experts))]:
            raise ConfigError(
                f"method.{key} has {min(unknown)!r}, which is the last path segment of no linear layer in the blocks "
                f"of {type(model).__name__}. Its linear layers and stacks of experts are {', '.join(sorted(names))}."
            )
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no linear layers inside its blocks, which method.kind={cfg.kind} is for."
        )
    found = Targets()
    users = _users(model)
    by_weight: dict[int, list[str]] = {}
    for path, linear in linears.items():
        by_weight.setdefault(id(linear.weight), []).append(path)
    for paths in by_weight.values():
        _judge_linear(found, cfg, linears, paths, users[id(linears[paths[0]].weight)])
    for path, stack in experts.items():
        if stacks:
            _judge_stack(found, cfg, path, stack, users[id(stack)])
        else:
            found.left[path] = f"{cfg.kind} is for linear layers only"
    found.left |= _other_matrices(model, found, {*linears, *experts})
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.sizes[name] = found.sizes[name.removesuffix(".weight")] = parameter.numel()
    if not found.linears and not found.stacks:
        why = "; ".join(sorted(set(found.left.values())))
        raise ConfigError(f"{type(model).__name__} has no matrix in its blocks that can have adapters: {why}.")
    return found


def put_(model: nn.Module, paths: Iterable[str], layer: nn.Module) -> None:
    """Have `layer` at all these paths: those of layers that share one weight."""
    for path in paths:
        model.set_submodule(path, layer)


def _judge_linear(
    found: Targets,
    cfg: OnBlocks,
    linears: dict[str, nn.Linear | Conv1D],
    paths: list[str],
    users: set[str],
) -> None:
    """Layers at `paths` have one weight, which `users` use."""
    layers = [linears[path] for path in paths]
    reason = _not_asked_for(cfg, paths, layers[0].weight)
    if not reason and len({(id(layer.bias), isinstance(layer, Conv1D)) for layer in layers}) > 1:
        reason = "layers share the weight and differ in their bias or layout"
    if not reason and users != set(paths):
        reason = f"the weight is shared with {min(users - set(paths))}, which is no linear layer of a block"
    if not reason and not all(_is_linear(layer) for layer in layers):
        reason = f"{type(layers[0]).__name__} computes something else than a linear layer"
    if not reason:
        reason = _too_narrow(cfg, paths[0], tuple(layers[0].weight.shape))
    if reason:
        found.left |= dict.fromkeys(paths, reason)
    else:
        found.linears.append(tuple(paths))


def _judge_stack(found: Targets, cfg: OnBlocks, path: str, stack: nn.Parameter, users: set[str]) -> None:
    reason = _not_asked_for(cfg, [path], stack)
    if not reason and users != {path.rpartition(".")[0]}:
        reason = "several modules share the parameter"
    reason = reason or _too_narrow(cfg, path, tuple(stack.shape[1:]))
    if reason:
        found.left[path] = reason
    else:
        found.stacks.append(path)


def _not_asked_for(cfg: OnBlocks, paths: list[str], weight: torch.Tensor) -> str:
    def named(names: tuple[str, ...]) -> bool:
        return any(_is_called(path, name) for path in paths for name in names)

    if not weight.requires_grad:
        return FROZEN
    if named(cfg.leave_out):
        return "method.leave_out names them"
    return "" if cfg.target_modules == "all-linear" or named(cfg.target_modules) else NOT_NAMED


def _is_called(path: str, name: str) -> bool:
    """Whether `name` is the end of a path: its last segment, or several."""
    return f".{path}".endswith(f".{name}")


def _too_narrow(cfg: OnBlocks, path: str, shape: tuple[int, ...]) -> str:
    largest, side = max(all_values(cfg.ranks)), min(shape)
    if largest <= side:
        return ""
    if cfg.target_modules != "all-linear":
        raise ConfigError(
            f"method.{cfg.rank_key}={cfg.ranks} is more than {side}, the smaller side of {path} {shape}. Use a rank of "
            f"at most {side}, or take {path.rpartition('.')[2]} out of method.target_modules."
        )
    return f"their smaller side is less than method.{cfg.rank_key}={cfg.ranks}"


@torch.no_grad()
def _is_linear(layer: nn.Linear | Conv1D) -> bool:
    """Whether the layer computes x W^T + b, which is tried out where its class may do something else."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer) and not any(hooks):
        return True
    if layer.weight.is_meta:
        layer = copy.deepcopy(layer).to_empty(device="cpu")
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.normal_() if tensor.is_floating_point() else tensor.zero_()
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        y = layer(x)
    except Exception:  # it takes something else
        return False
    expected = F.linear(x, weight, layer.bias)
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
        return False
    return bool((y - expected).norm() <= SAME * expected.norm())


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Linear layers inside the model's lists of blocks, at every path: not the head, not the embeddings."""
    blocks = _blocks(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, Conv1D)) and path.startswith(blocks) and module.weight.ndim == 2:
            yield path, module


def block_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters inside the blocks that hold a matrix for each expert, as Hugging Face's classes `...Experts` do."""
    blocks = _blocks(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(blocks) and "expert" in f"{path}.{type(module).__name__}".lower():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and not isinstance(module, _ConvNd):
                    yield f"{path}.{name}", parameter


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """How the paths of all that is in lists of blocks begin."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _users(model: nn.Module) -> dict[int, set[str]]:
    """By parameter, the paths of the modules that have it."""
    users: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(path)
    return users


def _other_matrices(model: nn.Module, found: Targets, known: set[str]) -> dict[str, str]:
    """Of the blocks, those that are neither linear layers nor stacks of experts."""
    blocks = _blocks(model)
    return {
        name: "they are no linear layers"
        for name, parameter in model.named_parameters()
        if name.startswith(blocks) and parameter.ndim >= 2 and not {name, name.rpartition(".")[0]} & known
    }
