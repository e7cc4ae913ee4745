"""Pages that are made anew for whoever looks at them, over HTTP, for this machine unless it is told otherwise.

Nothing can be changed through them. A request is answered only if it names this server by an
address or a known name, so that no web site can have a browser ask for it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import platform
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from relora_ray.errors import ConfigError, ReloraError
from relora_ray.masking import masked

LOOPBACK = "127.0.0.1"
MOST_S = 15.0
"""A client that takes longer to ask is not waited for."""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
SCRIPTS = "; script-src 'unsafe-inline' 'unsafe-eval'"
"""A page with scripts says itself which ones: a browser keeps to both policies."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Page:
    """An HTML text that `render` gives; it is called by one thread at a time, and not more often than each `every_s`
    seconds, after which a browser asks again, unless the page is `still`. `scripts`: there are some in it."""

    def __init__(
        self, render: Callable[[], str], *, every_s: float, still: bool = False, scripts: bool = False
    ) -> None:
        self._render, self._every_s, self._lock = render, every_s, threading.Lock()
        self._made, self._text = -every_s, ""
        self.headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY + (SCRIPTS if scripts else ""),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
        }
        if not still:
            self.headers["Refresh"] = f"{max(1, round(every_s))}"

    def text(self) -> str:
        with self._lock:
            if time.monotonic() - self._made >= self._every_s:
                self._text, self._made = self._render(), time.monotonic()
            return self._text


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, pages: Mapping[str, Page], *, host: str = LOOPBACK, port: int = 0) -> None:
        """`pages` by path, such as /. ConfigError if the port cannot be had."""
        self.pages = pages
        self._names = {"localhost", platform.node().lower(), host.lower()}
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"nothing can listen at {host}:{port}: {error.strerror or error}. Give another port to --serve, or 0 "
                f"for any that is free."
            ) from error

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def is_named(self, host: str) -> bool:
        """Whether a Host header is this server's: any address, as a web site has none of them for a name, or one of its
        names."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = MOST_S
    server_version, sys_version = "relora-ray", ""

    def do_GET(self) -> None:
        if not self.server.is_named(self.headers.get("Host", "")):
            return self._say(HTTPStatus.FORBIDDEN, "This server is asked for under a name that is not its own.\n")
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            return self._say(HTTPStatus.NOT_FOUND, f"There is {' and '.join(self.server.pages)}.\n")
        try:
            content = page.text()
        except ReloraError as error:
            return self._say(HTTPStatus.SERVICE_UNAVAILABLE, masked(f"{error}\n"))
        self._answer(HTTPStatus.OK, content.encode(), page.headers)
        return None

    do_HEAD = do_GET

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, text.encode(errors="replace"), {"Content-Type": "text/plain; charset=utf-8"})

    def _answer(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody needs to know on the console who looks."""
