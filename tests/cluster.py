"""Real Ray clusters of several machines, all on this one, whose machines can be added, drained and lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from relora_ray.runtime.notice import drain
from tests.s3 import free_port


class Machines:
    """A head without CPUs, where the driver is, and machines of one CPU each."""

    def __init__(self, count: int, *, runtime_env: dict[str, Any] | None = None) -> None:
        """`runtime_env`: of the job that this process becomes."""
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: its sockets' paths have a limit
        os.environ["RAY_TMPDIR"] = self._folder
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        # Now, or it may be on any of the machines.
        ray.init(address=self.address, log_to_driver=False, runtime_env=runtime_env)
        self.nodes: list[Any] = []
        for _ in range(count):
            self.add()

    def pid_of(self, title: str) -> int:
        """The one Ray worker of this cluster with that title."""
        nodes = [*self.nodes, self._cluster.head_node]
        daemons = {info.process.pid for n in nodes for infos in n.all_processes.values() for info in infos}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in daemons and (folder / "cmdline").read_text().startswith(title):
                    found.append(int(folder.name))
        assert len(found) == 1, found
        return found[0]

    def add(self) -> Any:
        node = self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        self.nodes.append(node)
        return node

    def lose(self, node: Any) -> None:
        """SIGKILL all of the machine's daemons."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """What a cloud's notice becomes: the machine will be taken away after so many seconds."""
        drain(self.address, node.node_id, time.time() + seconds, "a notice")

    def kill(self) -> None:
        """SIGKILL all daemons, while this process is still connected: it should end soon."""
        for node in [*self.nodes, self._cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        shutil.rmtree(self._folder, ignore_errors=True)


class Head:
    """A head as `ray start` makes it, on free ports of loopback, with dashboard and jobs; `start` returns when jobs can
    be submitted. All its daemons, and machines that its autoscaler starts, are children of one process.

    `autoscaling`: from its address to the autoscaler's config, as `ray start --autoscaling-config` takes it.
    """

    def __init__(
        self,
        num_cpus: int,
        *,
        autoscaling: Callable[[str], dict[str, Any]] | None = None,
        env: dict[str, str] | None = None,
    ):
        self._num_cpus, self._autoscaling = num_cpus, autoscaling
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: its sockets' paths have a limit
        here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs say `python`
        self.env = {**os.environ, "PATH": here, "RAY_AUTH_MODE": "disabled", **(env or {})}
        self.env.pop("RAY_ADDRESS", None)
        self.port, self.dashboard_port = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"

    def start(self) -> None:
        command = [
            *ray_command("start"), "--head", "--block", f"--port={self.port}", f"--num-cpus={self._num_cpus}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
            "--disable-usage-stats", f"--temp-dir={self.folder}", "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        if self._autoscaling is not None:
            config = self.folder / "autoscaling.json"
            config.write_text(json.dumps(self._autoscaling(self.address)))
            command.append(f"--autoscaling-config={config}")
        self.log = self.folder / "head.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        for _ in range(600):
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            if self._jobs_can_be_submitted():
                return
            time.sleep(0.2)
        raise AssertionError(f"no head in two minutes: {self.log.read_text()[-2000:]}")

    def _jobs_can_be_submitted(self) -> bool:
        listing = [*ray_command("job", "list"), "--address", self.dashboard]
        return (
            "will now block" in self.log.read_text()
            and not subprocess.run(listing, env=self.env, capture_output=True).returncode
        )

    def stop(self) -> None:
        """SIGKILL all of it."""
        family = [self._process, *psutil.Process(self._process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def ray_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *args]
