"""Which Ray RAY_ADDRESS names, and whether it answers: ray.init itself asks one that does not for 14 minutes."""

from __future__ import annotations

import os
import re
import socket
import time

from ray._private.services import canonicalize_bootstrap_address_or_die

from relora_ray.errors import ConfigError

TRIES = 2
PAUSE_S = 1.0
ANSWER_S = 4.0
"""A head that is up answers within this."""
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins: the preface, and settings, of which there are none (RFC 9113, 3.4 and 6.5)."""
_SETTINGS = 4
"""The kind of a server's first frame, its fourth byte."""


def cluster_address() -> str:
    """RAY_ADDRESS as it is given to ray.init, or "" if a Ray of the driver's own is to be started. ConfigError for one
    that cannot be a cluster's."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local", "auto"):
        return "" if address == "local" else address
    scheme, is_url, place = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard, which takes jobs: submit this command there (ray job submit "
            f"--address {address} -- python -m relora_ray.launch ...). To join a cluster from one of its machines set "
            f"RAY_ADDRESS to its head's HOST:PORT, such as 10.0.0.1:6379."
        )
    if is_url and scheme != "ray":
        raise ConfigError(f"RAY_ADDRESS={address} begins with {scheme}://, which Ray does not know. Give {_FORM}.")
    port = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@\s]+):(\d{1,5})", place)
    if port is None or not 0 < int(port[2]) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS={address} is not of the form HOST:PORT, with a port of 1 to 65535. Give {_FORM}."
        )
    return address


_FORM = "the head's HOST:PORT, such as 10.0.0.1:6379; auto for one that runs on this machine; or unset it"


def refuse_if_dead(address: str) -> None:
    """Knock at it. ConfigError if nobody answers, or nobody who speaks as Ray does."""
    place = address.removeprefix("ray://")
    if address == "auto":
        try:
            place = canonicalize_bootstrap_address_or_die("auto")
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                "RAY_ADDRESS=auto, and no Ray runs on this machine. Start one: ray start --head."
            ) from error
    if wrong := knock(place):
        raise ConfigError(
            f"RAY_ADDRESS={address}: {wrong}. Start it (ray start --head), give the address of one that runs, or unset "
            f"it to start a Ray for this run."
        )


def knock(place: str) -> str:
    """What is wrong with the head at HOST:PORT, or "" if it answers."""
    host, _, port = place.rpartition(":")
    for number in range(TRIES):
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as connection:
                if _speaks_grpc(connection):
                    return ""
                return (
                    "what answers there is not Ray's head, whose port is 6379 unless it was started with another "
                    "(8265 is its dashboard's)"
                )
        except OSError as error:
            wrong = f"no Ray cluster answers there ({error.strerror or error})"
        if number + 1 < TRIES:
            time.sleep(PAUSE_S)
    return wrong


def _speaks_grpc(connection: socket.socket) -> bool:
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # it answers nobody without a certificate
        return True
    connection.sendall(_HTTP2)
    try:
        frame = connection.recv(9)
    except TimeoutError:
        return False
    return len(frame) > 3 and frame[3] == _SETTINGS
