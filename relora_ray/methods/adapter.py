"""What merge and reset need of a module: LoRA's layers are such, and other forms can be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from relora_ray.keyed import key
from relora_ray.methods.precision import full_fp32


class Adapter(nn.Module):
    """A frozen weight W, and trained tensors that add something to it."""

    def merged(self) -> torch.Tensor:
        """W and what is added, in fp32 and in W's layout: a new tensor."""
        raise NotImplementedError

    def merge_(self) -> None:
        """Make that W. The trained tensors are stale until `redraw_`."""
        raise NotImplementedError

    def redraw_(self, seed: int) -> None:
        """Trained tensors anew from `seed`, so that nothing is added: the same on every rank and device."""
        raise NotImplementedError

    def refresh_(self) -> None:
        """Bring up to date what is derived from W and the trained tensors, in place."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors, by their names in this module."""
        yield from (found for found in self.named_parameters() if found[1].requires_grad)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """By the path of the plain model's layer, or of its parameter where that is a stack of experts. One that is at
    several paths is at the first."""
    return {plain_path(path): module for path, module in model.named_modules() if isinstance(module, Adapter)}


def plain_path(path: str) -> str:
    """`experts.parametrizations.down_proj.0`, as torch names a parametrized tensor, is experts.down_proj."""
    module, of_a_parameter, parameter = path.rpartition(".parametrizations.")
    return f"{module}.{parameter.partition('.')[0]}" if of_a_parameter else path


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors of all that adapters train."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield from ((f"{path}.{name}", parameter) for name, parameter in module.trained())


def merge_all_(model: nn.Module) -> int:
    """Merge every adapter into its weight; returns how many there are."""
    found = adapters(model).values()
    with full_fp32():
        for adapter in found:
            adapter.merge_()
    return len(found)


def redraw_all_(model: nn.Module, *, seed: int, boundary: int) -> None:
    """Draw every adapter anew, keyed by (seed, boundary, path): the same on every rank, with no broadcast.

    `boundary` is the number of finished updates where the cycle begins.
    """
    for path, adapter in adapters(model).items():
        adapter.redraw_(key(seed, "lora_A", boundary, path))


def refresh_all_(model: nn.Module) -> None:
    for adapter in adapters(model).values():
        adapter.refresh_()
