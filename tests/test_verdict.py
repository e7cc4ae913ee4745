"""Whether another attempt would meet an error again. The errors are raised by what raises them, not made up."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import socket
import threading
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import yaml
from torch import nn

from relora_ray.config.file import parse_config
from relora_ray.conformance.processes import run_ranks
from relora_ray.errors import ReloraError
from relora_ray.modeling.parallel import World
from relora_ray.storage import Storage
from relora_ray.verdict import in_words, verdict, without_numbers


def raised(action: Callable[[], Any]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def cut_safetensors(folder: Path, size: int) -> Any:
    path = folder / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(10, 10)}, path)
    path.write_bytes(path.read_bytes()[:size])
    return safetensors.torch.load_file(path)


def cut_pickle(folder: Path, share: float) -> Any:
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * share)])
    return torch.load(path)


def in_place() -> None:
    x = torch.zeros(3, requires_grad=True)
    y = x.exp()
    y.add_(1)
    y.sum().backward()


def twice() -> None:
    x = torch.zeros(3, requires_grad=True)
    y = (x * x).sum()
    y.backward()
    y.backward()


def refuses_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.settimeout(0.01)
        client.recv(1)


def deep() -> Any:
    return deep()


Z = torch.zeros
LASTING: dict[str, Callable[[Path], Any]] = {
    "no module": lambda _: importlib.import_module("flash_attn_that_nobody_has"),
    "no name": lambda _: getattr(importlib.import_module("os"), "no_such_function")(),  # noqa: B009
    "import of a name": lambda _: exec("from os import no_such_name"),
    "syntax": lambda _: compile("def f(:", "x.py", "exec"),
    "type": lambda _: len(5),
    "key": lambda _: {}["x"],
    "index": lambda _: [][3],
    "value": lambda _: int("x"),
    "undefined": lambda _: eval("no_such_variable"),
    "assert": lambda _: Z(3, device="cuda") if not torch.backends.cuda.is_built() else exec("assert False"),
    "zero": lambda _: 1 // 0,
    "recursion": lambda _: deep(),
    "abstract": lambda _: nn.Module()(Z(1)),
    "yaml": lambda _: yaml.safe_load("a: [1"),
    "config": lambda _: parse_config("name: 5"),
    "safetensors without a header": lambda folder: cut_safetensors(folder, 0),
    "safetensors with half a header": lambda folder: cut_safetensors(folder, 20),
    "safetensors with half its tensors": lambda folder: cut_safetensors(folder, 300),
    "half a pickle": lambda folder: cut_pickle(folder, 0.5),
    "no zip file": lambda _: zipfile.ZipFile(io.BytesIO(b"x" * 100)),
    "another model's weights": lambda _: nn.Linear(2, 3).load_state_dict(nn.Linear(3, 3).state_dict()),
    "no weights": lambda _: nn.Linear(2, 3).load_state_dict({}),
    "matrices": lambda _: nn.Linear(2, 3)(Z(2, 5)),
    "sum": lambda _: Z(3) + Z(4),
    "view": lambda _: Z(3).view(2, 2),
    "broadcast": lambda _: Z(3).add_(Z(2, 3)),
    "cat": lambda _: torch.cat([Z(1, 2), Z(1, 3)], 0),
    "expand": lambda _: Z(3).expand(4),
    "dtypes": lambda _: Z(2, 2) @ Z(2, 2, dtype=torch.int64),
    "token id": lambda _: nn.Embedding(4, 2)(torch.tensor([7])),
    "target": lambda _: nn.functional.cross_entropy(Z(2, 3), torch.tensor([5, 5])),
    "numpy": lambda _: np.zeros(3) + np.zeros(4),
    "meta": lambda _: Z(3, device="meta").tolist(),
    "no gradient": lambda _: Z(3).sum().backward(),
    "in place": lambda _: in_place(),
    "second backward": lambda _: twice(),
    "leaf": lambda _: Z(3, requires_grad=True).add_(1),
}  # fmt: skip
PASSING: dict[str, Callable[[Path], Any]] = {
    "refused": lambda _: refuses_connections(),
    "silent": lambda _: times_out(),
    "no such host": lambda _: socket.create_connection(("no-such-host.invalid", 80), timeout=5),
    "storage": lambda folder: Storage(str(folder)).get("nothing"),
}
FOLLOWS: dict[str, Callable[[Path], Any]] = {
    "nobody listens": lambda _: dist.TCPStore("127.0.0.1", 1, 2, False, timeout=timedelta(seconds=0.1)),
    "nobody comes": lambda _: dist.TCPStore("127.0.0.1", 0, 2, True, timeout=timedelta(seconds=0.1)),
    "nobody says": lambda _: dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=0.1)).get("k"),
}
UNKNOWN: dict[str, Callable[[Path], Any]] = {
    "memory": lambda _: Z(10**14),
    "numpy's memory": lambda _: np.zeros(10**14),
    "half an answer": lambda _: json.loads('{"a": '),
    "an empty file": lambda folder: cut_pickle(folder, 0),
    "not text": lambda _: b"\xff".decode(),
    "no file": lambda _: open("/nowhere"),  # noqa: SIM115
    "disk": lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "torch or Python, in words that nobody knows": lambda _: threading.Thread().join(),
}
TABLE = {"lasting": LASTING, "passing": PASSING, "follows": FOLLOWS, "unknown": UNKNOWN}
CASES = [(expected, name) for expected, cases in TABLE.items() for name in cases]


@pytest.mark.parametrize(("expected", "name"), CASES)
def test_verdict_on_what_is_raised(expected: str, name: str, tmp_path: Path) -> None:
    error = raised(lambda: TABLE[expected][name](tmp_path))
    assert verdict(error) == expected, f"{type(error).__mro__}: {error}"
    words = in_words(error)
    assert words.startswith(f"{type(error).__name__}: ")
    raised_here = not isinstance(error, ReloraError)
    assert ("Another attempt would meet it again: " in words) == (expected == "lasting" and raised_here)
    assert (" (in " in words) == raised_here, "the place is said"


CUDA = {
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB": "unknown",
    "CUDA error: uncorrectable ECC error encountered": "passing",
    "CUDA error: an illegal memory access was encountered": "passing",
    "CUDA error: device-side assert triggered": "unknown",
    "CUDA error: no kernel image is available for execution on the device": "unknown",
}


@pytest.mark.parametrize(("text", "expected"), CUDA.items())
def test_verdict_on_errors_of_gpus(text: str, expected: str) -> None:
    """torch's own classes; its messages as CUDA 12's run-time has them, since no GPU is here to raise them."""
    kind = torch.OutOfMemoryError if "out of memory" in text else torch.AcceleratorError
    error = raised(lambda: (_ for _ in ()).throw(kind(text)))
    assert verdict(error) == expected
    assert ("Lower train.micro_batch_rows" in in_words(error)) == (kind is torch.OutOfMemoryError)


class HalfUsed(nn.Module):
    """One of its layers takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x).sum()


def scenes_of_ddp(_: str) -> dict[str, Any]:
    """Two ranks: DDP's own words, and what becomes of one rank's error on the other."""
    torch.manual_seed(0)
    world = World.current()

    def train() -> None:
        wrapped = nn.parallel.DistributedDataParallel(HalfUsed())
        for _ in range(2):
            wrapped(torch.ones(1, 2)).backward()

    found = {}
    errors = {
        "unused": raised(train),
        "code": raised(lambda: world.on_all(lambda: world.rank < 1 or len(5))),
        "network": raised(lambda: world.on_first(refuses_connections)),
        "storage": raised(lambda: world.on_first(lambda: Storage("/nowhere").get("x"))),
    }
    for name, error in errors.items():
        found[name] = verdict(error), in_words(error), getattr(error, "rank", None)
    return found


def test_verdict_on_what_ranks_meet_together(tmp_path: Path) -> None:
    for said in run_ranks(2, scenes_of_ddp, str(tmp_path)):
        kind, words, _ = said["unused"]
        assert kind == "lasting", words
        assert "Expected to have finished reduction in the prior iteration" in words
        kind, words, rank = said["code"]
        assert (kind, rank) == ("lasting", 1), "one rank's verdict is all ranks'"
        assert words.startswith("rank 1: TypeError: object of type 'int' has no len()")
        kind, words, rank = said["network"]
        assert (kind, rank) == ("passing", 0), words
        assert (said["storage"][0], said["storage"][2]) == ("passing", 0)


def test_same_error_is_known_by_all_but_its_numbers() -> None:
    first = "CUDA out of memory. Tried to allocate 20.00 MiB. Process 12 has 79.1 GiB at 0x7fab12"
    second = "CUDA out of memory. Tried to allocate 512 KiB. Process 99 has 8 GiB at 0x55aa"
    assert without_numbers(first) == without_numbers(second)
    assert without_numbers("no file a.txt") != without_numbers("no file b.txt")
