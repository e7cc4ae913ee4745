"""A Ray of the driver's own: on this machine, for one run or sweep, gone when the driver is.

It is what `ray.init(address="local")` starts, with three differences. It is started by a process of its own, beside
which the driver imports what it needs. It has a session of its own, so that a signal for the driver's process group, as
Ctrl-C, `timeout`, systemd and Slurm send one, leaves it alone until the driver has stored its state. And it has no
processes that nobody asks here: a dashboard's head, an autoscaler, what follows log files. Nor has it metrics for
Prometheus: a cluster has them.

Its token is the driver's own and lies in no file, unless RAY_AUTH_MODE says otherwise.

Uses ray._private.node.Node and RayParams, as ray.init does. Ray is imported by the process that is started, and not by
this module: a driver starts it first of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from relora_ray.config import ClusterConfig
from relora_ray.errors import ConfigError

START_S = 120.0
"""Ray has started within this."""
END_S = 30.0
"""And ended within this, or it is killed."""
SETTINGS = {"RAY_worker_niceness": "0", "RAY_worker_oom_score_adjustment": "0"}
"""Environment of Ray's daemons; what is set already stays. Ray's own defaults, 15 and 1000, give way to whatever else a
machine does: to the processes that train too, which are forked from a server that the driver has started."""
OF_WORKERS = "ray.train.v2._internal.execution.worker_group.worker"
"""What those import that Ray keeps ready for workers, while the run is looked at."""


def is_wanted() -> bool:
    """Whether RAY_ADDRESS asks for a Ray of the driver's own."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


class OwnRay:
    """Begins to start it; `address` waits until it is there."""

    @classmethod
    def to_train(cls, cluster: ClusterConfig) -> OwnRay:
        """With a slot for every worker, and one more: Ray keeps as many processes ready, and the coordinator is one."""
        num_cpus = cluster.workers * cluster.cpus_per_worker + 1
        at_a_time = min(num_cpus, 2 * (os.cpu_count() or 1))
        ready = {"RAY_preload_python_modules": OF_WORKERS, "RAY_worker_maximum_startup_concurrency": str(at_a_time)}
        return cls(num_cpus, ready)

    def __init__(self, num_cpus: int, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """`settings`: environment of Ray's daemons besides SETTINGS; what is set already stays."""
        if "RAY_AUTH_MODE" not in os.environ:  # for this process too, which is to join it
            os.environ["RAY_AUTH_MODE"] = "token"
            if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            if "ray" in sys.modules:  # it has read both
                _have_ray_read_again()
        code = f"import sys; sys.path[:] = {sys.path!r}; from relora_ray.runtime.own_ray import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(num_cpus)],
            env={**SETTINGS, **settings, **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._said: dict[str, str] | None = None

    def __enter__(self) -> OwnRay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Of its head, HOST:PORT. ConfigError, with what to do, if it does not start."""
        if self._said is None:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            self._said = json.loads(line or '{"error": "the process that starts it ended."}')
        if "error" in self._said:
            raise ConfigError(f"no Ray can be started here: {self._said['error']}")
        return self._said["address"]

    def close(self) -> None:
        """End it, if it lives. Returns when it is gone."""
        assert self._process.stdin is not None
        if self._said is None:  # nobody has joined it
            self._process.kill()  # what it has started ends with it
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _have_ray_read_again() -> None:
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def main() -> None:
    """The process that starts a Ray: says where it is, and ends it when the driver says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed meanwhile is no address
    try:
        node = _start(int(sys.argv[1]))
    except Exception as error:  # whatever it is, somebody must be told what to do
        print(json.dumps({"error": why_not(error)}), file=out, flush=True)
        raise SystemExit(1) from None
    print(json.dumps({"address": node.gcs_address}), file=out, flush=True)
    _have_processes_ready(node.gcs_address)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True)


def _start(num_cpus: int) -> Any:
    import ray._private.utils
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):
        def start_api_server(self, **_: Any) -> None:
            """None: without a dashboard it would count usage, which nobody is told."""

    # Of what reports to a dashboard only the part without which Ray's daemon ends.
    ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("there is no dashboard")
    ensure_token_if_auth_enabled()
    params = RayParams(num_cpus=num_cpus, include_dashboard=False, no_monitor=True, include_log_monitor=False)
    return LeanNode(params, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)


def _have_processes_ready(address: str) -> None:
    """Ray starts those that it keeps ready when the first driver has come, which would be the one that needs them."""
    import ray

    with contextlib.suppress(Exception):  # the driver is gone, or has come first: nothing depends on it
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        ray.shutdown()


def why_not(error: Exception) -> str:
    """Why a Ray does not start, and what to do."""
    return f"{in_short(error)} {_advice(error)}"


def in_short(error: Exception) -> str:
    """Its class and first line, as a sentence."""
    said = (str(error).strip().splitlines() or ["it does not say why"])[0]
    return f"{type(error).__name__}: {said}{'' if said.endswith('.') else '.'}"


def _advice(error: Exception) -> str:
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")
    folder = os.environ.get(variable, "/tmp")
    if "AF_UNIX" in str(error):
        return (
            f"Ray's sockets lie below {variable}={folder}, and the path of a socket may have 107 characters, of which "
            f"Ray needs about 70. Set RAY_TMPDIR to a short folder, such as /tmp."
        )
    path = str(getattr(error, "filename", None) or "")
    if path.startswith(os.path.expanduser("~/.ray")):
        return (
            f"Ray writes the token of the cluster that it starts into HOME={os.path.expanduser('~')}. Set HOME to a "
            f"folder that can be written."
        )
    if path:
        return f"Ray keeps its files below {variable}={folder}. Set RAY_TMPDIR to a folder that can be written."
    return f"What its processes say is below {folder}/ray/session_latest/logs."
