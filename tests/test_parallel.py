"""Digests; the rest of the world needs several processes: test_distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from relora_ray.conformance.processes import run_ranks
from relora_ray.errors import DamagedError, SupersededError
from relora_ray.keyed import key
from relora_ray.modeling.parallel import World, broadcast_bytes, digest, gather_bytes
from relora_ray.storage import Storage


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


def fail(error: Exception) -> Any:
    raise error


def outcome(action: Callable[[], Any]) -> tuple[str, str, bool | None, bool | None]:
    """How an action ends on this rank."""
    try:
        return "fine", str(action()), None, None
    except Exception as error:
        marks = [getattr(error, name, None) for name in ("missing", "restart_helps")]
        return type(error).__name__, str(error), *marks


def scenes_of_errors(folder: str) -> dict[str, Any]:
    world, cpu = World.current(), torch.device("cpu")
    superseded = SupersededError("another has it")
    return {
        "missing": outcome(lambda: world.on_first(lambda: Storage(folder).get("nowhere"))),
        "ours": outcome(lambda: world.on_first(lambda: fail(superseded))),
        "bug": outcome(lambda: world.on_first(lambda: fail(KeyError("x")))),
        "result": outcome(lambda: world.on_first(lambda: {"rank": world.rank, "paths": ["a", "b"]})),
        "on rank 1": outcome(lambda: world.on_all(lambda: world.rank < 1 or fail(DamagedError("its bytes are gone")))),
        "bug on rank 1": outcome(lambda: world.on_all(lambda: world.rank < 1 or fail(ValueError("y")))),
        "both": outcome(lambda: world.on_all(lambda: fail(DamagedError(f"of {world.rank}")))),
        "own result": outcome(lambda: world.on_all(lambda: world.rank)),
        "broadcast": world.broadcast({"a": [1, None, 2.5, "b"]} if world.is_first else None),
        "bytes": broadcast_bytes(b"\x00\xff" if world.is_first else b"", world.is_first, cpu),
        "empty": broadcast_bytes(b"", world.is_first, cpu),
        "gathered": gather_bytes(bytes([7]) * 3 * world.rank, world.size, cpu),
    }


def test_errors_keep_their_class_on_every_rank(tmp_path: Any) -> None:
    """Real gloo. What one rank meets, all hear of alike: the loop falls back on DamagedError, and on nothing else."""
    first, second = run_ranks(2, scenes_of_errors, str(tmp_path))
    for rank in (first, second):
        assert rank["missing"][0] == "StorageError"
        assert rank["missing"][2:] == (True, True)
        assert rank["ours"] == ("SupersededError", "another has it", None, False)
        assert rank["bug"][0] == "RankFailedError"
        assert rank["bug"][1].startswith("rank 0: KeyError: 'x' (in fail, ")
        assert rank["result"][:2] == ("fine", "{'rank': 0, 'paths': ['a', 'b']}")
        assert rank["on rank 1"][:2] == ("DamagedError", "rank 1: its bytes are gone")
        assert rank["bug on rank 1"][0] == "RankFailedError"
        assert rank["bug on rank 1"][1].startswith("rank 1: ValueError: y (in fail, ")
        assert rank["both"][:2] == ("DamagedError", "rank 0: of 0")
        assert rank["broadcast"] == {"a": [1, None, 2.5, "b"]}
        assert (rank["bytes"], rank["empty"]) == (b"\x00\xff", b"")
        assert rank["gathered"] == [b"", b"\x07\x07\x07"]
    assert [rank["own result"][1] for rank in (first, second)] == ["0", "1"]


def test_keys_are_pinned_and_distinct() -> None:
    """These numbers must never change: they decide every draw of every run."""
    assert key(1, "lora_A", 3, "model.layers.0.mlp.up_proj") == PINNED
    assert (
        len({key(1, "a", 2), key(1, "a", "2"), key(1, "a2"), key(2, "a", 1), key(1, "a", 2, ""), key(1, "b", 2)}) == 6
    )
    assert all(0 <= key(s, "x") < 2**63 for s in range(1000))


PINNED = 8834406846883839852


@pytest.mark.parametrize(("setting", "is_kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_memory_of_freed_tensors_is_kept_unless_the_environment_says_otherwise(
    setting: dict[str, str], is_kept: bool
) -> None:
    code = (
        "import psutil, torch\n"
        "from relora_ray.modeling.parallel import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "before = psutil.Process().memory_info().rss\n"
        "tensor = torch.ones(50_000_000)\n"
        "del tensor\n"
        "print((psutil.Process().memory_info().rss - before) / 200e6)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | setting, capture_output=True, text=True)
    share = float(done.stdout)
    assert share > 0.9 if is_kept else share < 0.1
