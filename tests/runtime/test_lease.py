"""One driver per run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relora_ray.errors import RunBusyError
from relora_ray.runtime import lease
from relora_ray.runtime.lease import PATH, only_driver
from relora_ray.storage import Storage


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "PATIENCE_S", 1.0)
    return Storage(str(tmp_path))


def test_second_driver_is_refused_and_told_who_has_the_run(storage: Storage) -> None:
    with only_driver(storage):
        with (
            pytest.raises(RunBusyError, match=r"is being trained by another driver, process \d+ on"),
            only_driver(storage),
        ):
            raise AssertionError("both have it")
        assert storage.exists(PATH), "the refused one leaves the other's"
    assert not storage.exists(PATH)
    with only_driver(storage):
        pass


def test_run_of_a_driver_that_is_gone_is_taken_over(storage: Storage) -> None:
    """From another machine: it does not change. From this one: its process is not there, so nothing is waited for."""
    storage.put(PATH, json.dumps({"id": "x", "host": "elsewhere", "pid": 1, "beat": 3, "unix_time": 0}).encode())
    with only_driver(storage):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = {"id": "x", "host": "any", "machine": lease._machine(), "pid": ended.pid, "beat": 3, "unix_time": 0}
    storage.put(PATH, json.dumps(here).encode())
    lease.PATIENCE_S = 1000.0
    with only_driver(storage):
        assert json.loads(storage.get(PATH))["id"] != "x"


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"host": 3}'])
def test_lease_that_cannot_be_read_is_nobodys(storage: Storage, content: bytes) -> None:
    storage.put(PATH, content)
    with only_driver(storage):
        pass


def test_driver_that_lost_its_lease_leaves_the_new_one(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    with only_driver(storage):
        storage.put(PATH, json.dumps({"id": "y", "host": "elsewhere"}).encode())
        for thread in lease.threading.enumerate():
            if thread.name == "relora-ray-lease":
                thread.join(5)
    assert json.loads(storage.get(PATH))["id"] == "y"
    assert "another driver, on elsewhere, has taken this run over" in caplog.text
