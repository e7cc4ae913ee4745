"""Real Ray clusters of several machines, all on this one, whose machines can be added, drained and lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from relora_ray.runtime.notice import drain


class Machines:
    """A head without CPUs, where the driver is, and machines of one CPU each."""

    def __init__(
        self, count: int, *, setup_hook: str = "", env: dict[str, str] | None = None, apart: bool = False
    ) -> None:
        """`setup_hook`, `env`: what is called in each of Ray's workers of this process, and their variables. `apart`:
        each machine has to import what it needs for itself, as real ones have to."""
        self._apart = apart
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")  # there is no dashboard
        self._folder = tempfile.mkdtemp(prefix="ray-")  # short: its sockets' paths have a limit
        os.environ["RAY_TMPDIR"] = self._folder
        without = {"include_dashboard": False, "include_log_monitor": False}  # nobody reads here what workers print
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **without})
        self.address = self._cluster.address
        here = {"PYTHONPATH": str(Path(__file__).parent.parent)}
        hooked = {"env_vars": here | (env or {}), "worker_process_setup_hook": setup_hook} if setup_hook else None
        # Now, or it may be on any of the machines.
        ray.init(address=self.address, log_to_driver=False, runtime_env=hooked)
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
        named = {"env_vars": {"MACHINE": uuid.uuid4().hex}} if self._apart else {}
        settings = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_log_monitor": False, **named}
        try:
            node = self._cluster.add_node(**settings)
        except Exception:  # Ray gives it 30 s, which are few on a machine that is busy
            node = self._cluster.add_node(**settings)
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
