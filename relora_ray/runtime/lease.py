"""Only one driver trains a run: it keeps `driver.json` in the run's storage fresh while it lives.

A driver that finds another's waits to see whether it changes, so no two clocks are compared. What a killed one left
behind on the same machine is known by its process id, without a wait. Should two drivers start in the same moment,
attempts decide: the older one is refused its next commit.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relora_ray.errors import RunBusyError, StorageError
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

PATH = "driver.json"
BEAT_S = 5.0
PATIENCE_S = 3 * BEAT_S
"""A lease that does not change for so long is nobody's."""


@contextmanager
def only_driver(storage: Storage) -> Iterator[None]:
    """Hold the run's lease. RunBusyError if another driver has it; takes up to `PATIENCE_S` seconds if one had it."""
    _wait_until_free(storage)
    mine = {"id": uuid.uuid4().hex, "host": platform.node(), "machine": _machine(), "pid": os.getpid(), "beat": 0,
            "unix_time": time.time()}  # fmt: skip
    storage.put(PATH, json.dumps(mine).encode())
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(storage, mine, ended), name="relora-ray-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        try:
            if (_read(storage) or {}).get("id") == mine["id"]:
                storage.delete(PATH)
        except StorageError as error:
            logger.warning("%s stays behind: %s", PATH, error)


def _wait_until_free(storage: Storage) -> None:
    found = _read(storage)
    until = time.monotonic() + PATIENCE_S
    while found is not None and not _is_dead(found) and time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S))
        now = _read(storage)
        if now is not None and now != found:
            raise RunBusyError(
                f"{storage.url} is being trained by another driver, process {now.get('pid')} on {now.get('host')}: it "
                f"renewed {PATH} while this one looked on. Stop that one, or give this run another name."
            )
        found = now


def _is_dead(lease: dict[str, Any]) -> bool:
    """Whether its holder ran on this machine and is gone."""
    if not _machine() or lease.get("machine") != _machine() or not isinstance(lease.get("pid"), int):
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """What process ids belong to: containers on one machine have ids of their own, and a reboot begins anew. Empty
    where it cannot be known."""
    try:
        return f"{os.readlink('/proc/self/ns/pid')} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return ""


def _beat(storage: Storage, mine: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            found = _read(storage)
            if found is not None and found.get("id") != mine["id"]:
                logger.warning("another driver, on %s, has taken this run over", found.get("host"))
                return
            mine |= {"beat": mine["beat"] + 1, "unix_time": time.time()}
            storage.put(PATH, json.dumps(mine).encode())
        except Exception as error:  # a lease that is not renewed looks free
            logger.warning("%s could not be renewed: %s", PATH, error)


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.get(PATH))
        return found if isinstance(found, dict) else {}
    except StorageError as error:
        if error.missing:
            return None
        raise
    except ValueError:
        return {}
