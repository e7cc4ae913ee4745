"""RAY_ADDRESS, without a Ray: what ray.init would ask for 14 minutes is refused in seconds."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from relora_ray.errors import ConfigError
from relora_ray.runtime import address as module
from relora_ray.runtime import driver, own_ray
from relora_ray.runtime.address import cluster_address, refuse_if_dead
from relora_ray.runtime.preflight import preflight
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://10.0.0.1:8265", "is a dashboard, which takes jobs"),
        ("https://ray.example.com", "is a dashboard"),
        ("10.0.0.1", "is not of the form HOST:PORT"),
        ("10.0.0.1:", "is not of the form HOST:PORT"),
        (":6379", "is not of the form HOST:PORT"),
        ("10.0.0.1:0", "with a port of 1 to 65535"),
        ("10.0.0.1:99999", "with a port of 1 to 65535"),
        ("10.0.0.1:6379/x", "is not of the form HOST:PORT"),
        ("user@10.0.0.1:6379", "is not of the form HOST:PORT"),
        ("::1:6379", "is not of the form HOST:PORT"),
        ("ray://10.0.0.1", "is not of the form HOST:PORT"),
        ("redis://10.0.0.1:6379", "begins with redis://, which Ray does not know"),
        ("10.0.0.1:6379 ", "is not of the form HOST:PORT"),
    ],
)
def test_address_that_cannot_be_a_clusters_is_refused_before_anything(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught:
        preflight(tiny_config(data, tmp_path / "runs"))
    assert f"RAY_ADDRESS={address} " in str(caught.value)
    assert said in str(caught.value)
    assert "such as 10.0.0.1:6379" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("", ""), ("local", ""), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379"), ("[::1]:6379", "[::1]:6379"),
        ("ray://head:10001", "ray://head:10001"), ("relora-head-svc:6379", "relora-head-svc:6379"),
    ],
)  # fmt: skip
def test_address_is_kept(address: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == kept


@pytest.fixture
def nobody() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def silent() -> Iterator[int]:
    """One that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def web() -> Iterator[int]:
    """A web server's, such as the dashboard's."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)


def test_dead_cluster_is_found_in_seconds(
    nobody: int, silent: int, web: int, monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    """By the driver, before it claims the run. What ends the process after ray.init must not be reached."""
    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    monkeypatch.setattr(module, "PAUSE_S", 0.1)
    monkeypatch.setattr(driver.ray, "init", lambda **_: os._exit(1))
    cfg = tiny_config(data, tmp_path / "runs")
    began = time.monotonic()
    for place, said in {
        f"127.0.0.1:{nobody}": "no Ray cluster answers there (Connection refused)",
        f"ray://127.0.0.1:{nobody}": "no Ray cluster answers there (Connection refused)",
        "no-such-host.invalid:6379": "no Ray cluster answers there (",
        f"127.0.0.1:{silent}": "what answers there is not Ray's head",
        f"127.0.0.1:{web}": "what answers there is not Ray's head",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", place)
        with pytest.raises(ConfigError) as caught:
            driver.run(preflight(cfg), on_event=lambda event: None)
        assert f"RAY_ADDRESS={place}: {said}" in str(caught.value)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "runs").exists(), "nothing was claimed"


def test_no_ray_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS=auto. Whether another test's Ray runs is not this test's affair: looking for one is faked."""

    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(module, "canonicalize_bootstrap_address_or_die", none)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=auto, and no Ray runs on this machine\. Start one: ray start"):
        refuse_if_dead("auto")


def test_head_that_answers_is_known() -> None:
    """Ray's head speaks gRPC, as this server does. Real ones are joined in test_dry_run."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        refuse_if_dead(f"127.0.0.1:{port}")
        refuse_if_dead(f"ray://127.0.0.1:{port}")
    finally:
        server.stop(None)


def deny(path: str) -> PermissionError:
    return PermissionError(13, "Permission denied", path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"), "Set RAY_TMPDIR to a short folder"),
        (deny(os.path.expanduser("~/.ray/auth_token")), "Set HOME to a folder that can be written"),
        (deny("/tmp/ray/session"), "Set RAY_TMPDIR to a folder that can be written"),
        (RuntimeError("the raylet died"), "is below /tmp/ray/session_latest/logs"),
    ],
)
def test_ray_that_does_not_start_says_what_to_do(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own errors; that they come from there is shown by test_launch_errors, with a real one."""
    monkeypatch.delenv("TMPDIR", raising=False)
    assert own_ray.why_not(error).startswith(f"{type(error).__name__}: ")
    assert said in own_ray.why_not(error)
