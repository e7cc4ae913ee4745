"""The process on a machine that has imported all that training needs: which one fits this process. See prefork.py.

Ray and torch are not imported here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import resource
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import relora_ray
from relora_ray.runtime import prefork

PRELOAD = ("relora_ray.runtime.trainer", "transformers.models.llama.modeling_llama", "s3fs", "aiobotocore.session")


def begin() -> str:
    """Have it start, if there is none, and do not wait. Its address, which other processes may be told."""
    return prefork.begin(_key(), PRELOAD)


def spawn(pipe: Connection, target: str, *args: Any, first: str = "") -> prefork.Child:
    """See `prefork.spawn`."""
    return prefork.spawn(_key(), PRELOAD, pipe, target, *args, first=first)


def warm_up() -> None:
    """Have everything imported on this machine. Returns when it is."""
    prefork.warm(_key(), PRELOAD)


def _key() -> str:
    """Of the server that forks the processes that train: agents share one, of other jobs too, that have the same files
    and rights, code and environment. A driver that is started again finds it with everything imported."""
    environment = [(name, value) for name, value in sorted(os.environ.items()) if not prefork.OF_ONE_ASKER.match(name)]
    files = sorted({*_code(), *_fsspecs_settings()})
    return hashlib.sha256(repr((_inherited(), [_state_of(path) for path in files], environment)).encode()).hexdigest()


def _inherited() -> list[Any]:
    """What a process has from the one that forked it, and cannot always give itself: containers (which may share a
    network), rights, limits, processors."""
    kept = ("Umask", "Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "Cpus_allowed:", "Mems_allowed:")
    status = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kept)]
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid", "user", "net", "ipc", "cgroup")]
    limits = [
        resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT")
    ]
    own = [Path(f"/proc/self/{name}").read_text() for name in ("cgroup", "oom_score_adj")]
    root = os.stat("/")
    priority = (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))
    return [spaces, status, limits, own, priority, (root.st_dev, root.st_ino)]


def _code() -> Iterator[str]:
    """Files and folders that change with what the server has imported: for packages that were installed the folder in
    which an installation changes something, for others all their files."""
    folders = {"relora_ray": os.path.dirname(relora_ray.__file__)}
    for name in ("torch", *(module.partition(".")[0] for module in PRELOAD)):
        if (found := importlib.util.find_spec(name)) and found.origin:
            folders.setdefault(name, os.path.dirname(found.origin))
    for name, folder in folders.items():
        above = os.path.dirname(folder)
        is_archived = not os.path.isdir(folder)
        if is_archived or (name != "relora_ray" and above.endswith("-packages")):
            yield above
        else:
            for at, _, files in os.walk(folder, followlinks=True):
                yield from (os.path.join(at, file) for file in files if file.endswith(".py"))


def _fsspecs_settings() -> Iterator[str]:
    """It reads them once, when it is imported."""
    folder = os.environ.get("FSSPEC_CONFIG_DIR", os.path.expanduser("~/.config/fsspec"))
    with contextlib.suppress(OSError):
        yield from (os.path.join(folder, name) for name in os.listdir(folder))


def _state_of(path: str) -> tuple[Any, ...]:
    try:
        found = os.stat(path)
    except OSError:  # an editor's lock that leads nowhere, or removed since
        return (path,)
    return (path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
