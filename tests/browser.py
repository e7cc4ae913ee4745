"""A real browser for tests of pages: headless Chromium, told what to do by its DevTools protocol. Nothing is faked."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def find_browser() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """One page in it, with what it complained of and asked for since it was opened."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._address, self._number = address, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._address, max_msg_size=0)

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer. AssertionError if it was refused."""
        return self._loop.run_until_complete(self._tell(method, params))

    async def _tell(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            said = json.loads(await self._socket.receive_str(timeout=120))
            if said.get("id") == self._number:
                assert "error" not in said, (method, said)
                return dict(said["result"])
            self._hear(said)

    def _hear(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        if said.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:1000])
        elif said.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"])[:1000])
        elif said.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            if "GL Driver Message" not in params["entry"]["text"]:  # of how fast it draws
                self.complaints.append(params["entry"]["text"])
        elif said.get("method") == "Network.requestWillBeSent" and params["request"]["url"][:5] != "data:":
            self.requests.append(params["request"]["url"])

    def open(self, page: str, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Show a URL, in a window of this size, on a machine whose colours are light or dark; until it has drawn."""
        self.complaints.clear()
        self.requests.clear()
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.tell("Page.navigate", url="about:blank")
        self.tell("Page.navigate", url=page)
        self.wait("location.protocol !== 'about:' && document.documentElement?.dataset.drawn === 'yes'")

    def js(self, expression: str) -> Any:
        """Its value. AssertionError if it threw."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < until, (condition, self.complaints)
            time.sleep(0.05)

    def choose(self, selector: str, value: str) -> None:
        """As a user does in a select."""
        at = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{at}.value = {json.dumps(value)}; {at}.dispatchEvent(new Event('change', {{bubbles: true}}))")

    def screenshot(self, to: Path) -> None:
        """Of the whole page."""
        image = self.tell("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        to.write_bytes(base64.b64decode(image))

    def close(self) -> None:
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """`folder`: empty, for what it stores."""
    found = find_browser()
    assert found is not None
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [found, *QUIET, *as_root, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tab = Tab(_address(folder, process))
        try:
            yield tab
        finally:
            tab.close()
    finally:
        process.terminate()
        process.wait()


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Of its first tab. AssertionError if it has not started in a minute."""
    told, until = folder / "DevToolsActivePort", time.monotonic() + 60
    while not told.exists() or len(told.read_text().splitlines()) < 2:
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        assert time.monotonic() < until, "the browser says no port"
        time.sleep(0.05)
    with urlopen(f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list") as answer:
        pages = [target for target in json.load(answer) if target["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])
