"""Where the ranks of an attempt find each other: real stores and gloo groups, one thread a rank."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from relora_ray.runtime.agent import _interface, _listen
from relora_ray.runtime.messages import Cause, Start
from relora_ray.runtime.trainer import meeting

HOST = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[tuple[int, int]]:
    """A port, and the descriptor that its store takes over."""
    listener = _listen(HOST)
    yield listener.getsockname()[1], os.dup(listener.fileno())
    listener.close()


def start(rank: int, port: int, attempt: str = "0001.0001-aa", secret: str = "right") -> Start:
    return Start(attempt, rank, 2, HOST, port, Cause("start", "x"), secret)


def total(begun: Start, listener: int, value: float, timeout_s: float = 20) -> float:
    """The sum over the ranks that this one meets."""
    timeout = timedelta(seconds=timeout_s)
    group = dist.ProcessGroupGloo(meeting(begun, listener, timeout), begun.rank, begun.size, timeout=timeout)
    tensor = torch.tensor([value])
    group.allreduce([tensor]).wait()  # type: ignore[attr-defined]
    return float(tensor)


def test_ranks_of_two_attempts_at_one_port_do_not_mix(port: tuple[int, int]) -> None:
    """A rank 1 that has the port of an attempt that is over, where the next one listens, waits for its own rank 0."""
    number, listener = port
    with ThreadPoolExecutor(4) as pool:
        stranger = pool.submit(total, start(1, number, "0001.0002-aa"), -1, 100.0, 3)
        pair = [pool.submit(total, start(rank, number), listener, 1.0) for rank in (0, 1)]
        assert [rank.result() for rank in pair] == [2, 2]
        with pytest.raises(RuntimeError):
            stranger.result()


def test_who_does_not_know_the_secret_cannot_join(port: tuple[int, int]) -> None:
    number, listener = port
    with ThreadPoolExecutor(4) as pool:
        first: Future[float] = pool.submit(total, start(0, number), listener, 1.0, 20)
        stranger = pool.submit(total, start(1, number, secret="wrong"), -1, 100.0, 3)
        with pytest.raises(RuntimeError):
            stranger.result()
        assert not first.done(), "it waits for one who does"
        assert pool.submit(total, start(1, number), -1, 1.0).result() == first.result() == 2


def test_agent_listens_on_its_own_address_only() -> None:
    with _listen("127.0.0.2") as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_interface_of_an_address_is_found() -> None:
    names = [name for _, name in socket.if_nameindex()]
    assert _interface(HOST) in names
    assert _interface("203.0.113.1") == ""
