"""S3 servers that tests start on loopback, in processes of their own, and a proxy that makes them misbehave."""

from __future__ import annotations

import http.client
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import s3fs

from cluster.daemons import S3Folder, free_port, start_server
from tests.ceph import Ceph

BUCKET = "bucket"
KEY, SECRET = Ceph.key, Ceph.secret
os.environ |= {"S3_TEST_KEY": KEY, "S3_TEST_SECRET": SECRET}


class Server:
    """An S3 server with one bucket, started on loopback; after `kill` (SIGKILL) `start` brings it back.

    moto: memory only, takes any key. rclone: a folder, so that it survives SIGKILL; checks keys; no create-once put.
    ceph: Ceph's RADOS Gateway on a disk of its own.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self._server: _Moto | S3Folder | Ceph = {
            "moto": _Moto,
            "rclone": lambda f: S3Folder(f, KEY, SECRET),
            "ceph": Ceph,
        }[kind](folder)
        self.endpoint = self._server.endpoint

    def start(self) -> None:
        self._server.start()
        s3fs.S3FileSystem(endpoint_url=self.endpoint, key=KEY, secret=SECRET, skip_instance_cache=True).makedirs(
            BUCKET, exist_ok=True
        )

    def kill(self) -> None:
        self._server.kill()

    @property
    def options(self) -> dict[str, Any]:
        return storage_options(self.endpoint)


def storage_options(endpoint: str) -> dict[str, Any]:
    """Secrets are given by the names of the variables set above."""
    return {"endpoint_url": endpoint, "key": "$S3_TEST_KEY", "secret": "$S3_TEST_SECRET"}


class _Moto:
    def __init__(self, folder: Path) -> None:
        self._port, self._log = free_port(), folder / "server.log"
        self.endpoint = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = start_server(command, self.endpoint, self._log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


Kind = Literal["500", "503", "403", "404", "silent", "reset", "truncated", "slow", "lost"]
"""silent: no answer. reset: the connection breaks off. truncated, slow: of the body. lost: done, but the client hears
nothing."""


@dataclass
class Fault:
    kind: Kind
    method: str
    match: str = ""
    """Part of the request's path."""
    times: float = 1
    seen: int = 0


@dataclass
class FaultyProxy:
    """Forwards HTTP to `target`, except where a fault says otherwise. `log` has every request's method and path."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    on_request: Callable[[str, str], None] = lambda method, path: None
    """Called before a request is forwarded."""
    on_lost: Callable[[str], None] = lambda path: None
    """Called after a request whose answer is kept back, with its path."""

    def __post_init__(self) -> None:
        self._server = _Threads(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        # `shutdown` waits for the next poll, which is 0.5 s away by default: 75 s in all tests that have a proxy.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, kind: Kind, method: str, match: str = "", times: float = 1) -> Fault:
        self.faults.append(Fault(kind, method, match, times))
        return self.faults[-1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault_for(self, method: str, path: str) -> Kind | None:
        for fault in self.faults:
            if fault.method == method and fault.match in path and fault.seen < fault.times:
                fault.seen += 1
                return fault.kind
        return None


class _Threads(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    request_queue_size = 64


_ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "404": (404, "NoSuchBucket"),
}


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self._body()
        self.proxy.log.append((self.command, self.path))
        self.proxy.on_request(self.command, self.path)
        fault = self.proxy.fault_for(self.command, self.path)
        if fault in _ERRORS:
            status, code = _ERRORS[fault]
            self._answer(status, [], f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
            return
        if fault == "silent":
            time.sleep(30)
            self.close_connection = True
            return
        if fault == "reset":
            self._break_off()
            return
        try:
            upstream = http.client.HTTPConnection(self.proxy.target.removeprefix("http://"), timeout=120)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            answer = upstream.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # the server is down
            self._break_off()
            return
        upstream.close()
        if fault == "lost":
            self.proxy.on_lost(self.path)
            self._break_off()
        else:
            self._answer(answer.status, answer.getheaders(), content, fault)

    def _break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            self.headers["Content-Length"] = str(sum(map(len, pieces)))
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Kind | None = None) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of HEAD: the object's
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if fault == "slow":
            for start in range(0, len(content), max(1, len(content) // 10)):
                self.wfile.write(content[start : start + max(1, len(content) // 10)])
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass
