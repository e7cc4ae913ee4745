"""Digests; the rest of the world needs several processes: test_distributed."""

from __future__ import annotations

import pytest
import torch

from relora_ray.keyed import key
from relora_ray.parallel import World, digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_any_single_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [(torch.randn(5, 3) * 9).to(dtype), (torch.randn(4) * 9).to(dtype)]
    before = digest(tensors)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    for tensor in tensors:
        flat = tensor.view(-1).view(integers)
        for element in range(flat.numel()):
            for bit in range(8 * tensor.element_size() - 1):
                flat[element] ^= 1 << bit
                assert digest(tensors) != before
                flat[element] ^= 1 << bit
    assert digest(tensors) == before


def test_digest_sees_order_and_layout_does_not_matter() -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    assert digest([a, b]) != digest([b, a])
    assert digest([a.T.contiguous().T]) == digest([a])
    assert digest([]) == 0
    assert 0 <= digest([a]) < 2**63


def test_world_of_one_needs_no_group() -> None:
    world = World.current()
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    assert world.sum(1.5, 2.0) == [1.5, 2.0]
    assert world.broadcast({"a": 1}) == {"a": 1}
    world.assert_same(3, "anything")
    model = torch.nn.Linear(2, 2)
    assert world.wrap(model, warm_up=lambda m: m.weight.sum()) is model


def test_keys_are_pinned_and_distinct() -> None:
    """These numbers must never change: they decide every draw of every run."""
    assert key(1, "lora_A", 3, "model.layers.0.mlp.up_proj") == PINNED
    assert (
        len({key(1, "a", 2), key(1, "a", "2"), key(1, "a2"), key(2, "a", 1), key(1, "a", 2, ""), key(1, "b", 2)}) == 6
    )
    assert all(0 <= key(s, "x") < 2**63 for s in range(1000))


PINNED = 8834406846883839852
