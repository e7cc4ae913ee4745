"""What `status` says of a run, and how much it reads to know it. Runs are written by hand, in a real folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint.ownership import Life, Term, claim
from relora_ray.commands.status import status
from relora_ray.config.file import to_yaml
from relora_ray.runs.metrics import MetricsLog
from relora_ray.runs.tally import Tally
from relora_ray.storage import Storage
from tests.test_tally import attempt, begin, lost, manifest, name, restart, train
from tests.tiny import tiny_config

NOW = 10_000.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run of 12 steps that has not begun."""
    storage = Storage(f"{tmp_path}/tiny")
    storage.put("config.yaml", to_yaml(tiny_config(tmp_path, tmp_path)).encode())
    return storage


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of storage. A listing of a folder is one request up to 1,000 objects."""
    asked: list[str] = []
    original = Storage._guard

    def guard(self: Storage, action: str, path: str, *args: Any, **more: Any) -> Any:
        asked.append(f"{action} {path}")
        return original(self, action, path, *args, **more)

    monkeypatch.setattr(Storage, "_guard", guard)
    return asked


def put_page(storage: Storage, tally: Tally, term: int = 1) -> None:
    storage.put(f"progress/{term:04d}-1f2e3d4c.json", json.dumps(tally.page()).encode())


def put_manifest(storage: Storage, step: int, attempt: str, unix_time: float = NOW - 30) -> None:
    record = manifest(step, attempt).model_copy(update={"unix_time": unix_time})
    storage.put(record.path, record.model_dump_json().encode())


def put_life(storage: Storage, age_s: float) -> None:
    term = claim(storage, "1f2e3d4c")
    life = Life(storage, term.driver)
    life.beat()
    path = f"drivers/{term.driver}.json"
    known = {"pid": 77, "host": "m1", "machine": "elsewhere", "unix_time": NOW - age_s}
    storage.put(path, json.dumps(json.loads(storage.get(path)) | known).encode())


def put_metrics(storage: Storage, attempt: str, *records: dict[str, Any]) -> None:
    log = MetricsLog(storage, attempt)
    for record in records:
        log.write(record)
    log.close()


def said(storage: Storage) -> str:
    return "\n".join(status(storage, NOW))


def test_a_handful_of_requests_however_often_the_run_was_restarted(storage: Storage, requests: list[str]) -> None:
    tally = Tally()
    for number in range(1, 301):
        events = [attempt(number, 0, unix_time=100.0 + number), train(1)]
        put_metrics(storage, name(number), *events)
        storage.put(f"restarts/{name(number)}.json", json.dumps(restart(number)).encode())
        for event in [*events, restart(number)]:
            tally.add(event)
    put_page(storage, tally)
    put_manifest(storage, 1, name(300))
    put_life(storage, 2.0)
    requests.clear()
    text = said(storage)
    assert len(requests) <= 12, requests
    assert f"attempt   {name(300)}: 2 worker(s)" in text
    assert "failures  300: 3000.0 s without training, 900 steps done again" in text
    assert "saved     step 1, 30 s ago; 0 steps after it are not" in text


def test_run_without_a_page_is_known_from_its_metrics(storage: Storage) -> None:
    """Of a version before, or without a coordinator. The 10,000th attempt is the latest."""
    first = [train(step, step_s=10.0) for step in range(1, 9)]
    put_metrics(storage, "9999-aa", attempt(1, 0, unix_time=NOW - 300) | {"attempt": "9999-aa"}, *first)
    second = attempt(2, 5, unix_time=NOW - 100) | {"attempt": "10000-bb", "world_size": 3}
    put_metrics(storage, "10000-bb", second, train(6, step_s=20.0))
    page = restart(2) | {"attempt": "10000-bb", "unix_time": NOW - 100}
    storage.put("restarts/10000-bb.json", json.dumps(page).encode())
    text = said(storage)
    assert "run tiny: no driver; the launch command continues it" in text
    assert "step      6 of 12\n" in text
    assert "attempt   10000-bb: 3 worker(s), since 100 s\n" in text
    assert "trained   loss 2.5000, 100 tokens/s\n" in text
    assert "failures  1: 10.0 s without training, 3 steps done again" in text
    assert "goodput   35.0%: 70 s of 3 min went into steps that count" in text


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [
        (4.0, "run tiny: driver 77 on m1, seen 4 s ago"),
        (90.0, "run tiny: driver 77 on m1, seen 90 s ago (it is gone, or the clocks differ); the launch command "
               "continues it"),
        (None, "run tiny: no driver; the launch command continues it"),
    ],
)  # fmt: skip
def test_who_trains_it_is_said(storage: Storage, age_s: float | None, expected: str) -> None:
    if age_s is not None:
        put_life(storage, age_s)
    assert said(storage).splitlines()[0] == expected


def test_sign_of_life_that_cannot_be_read_is_said(storage: Storage) -> None:
    put_life(storage, 0.0)
    storage.put("drivers/1f2e3d4c.json", b"?")
    assert said(storage).splitlines()[0] == "run tiny: its driver's sign of life cannot be read"


@pytest.mark.parametrize("gone", [True, False])
def test_finished_run_is_finished_whatever_its_driver_left_behind(storage: Storage, gone: bool) -> None:
    put_manifest(storage, 12, name(1))
    put_life(storage, 900.0 if gone else 1.0)
    state = said(storage).splitlines()[0]
    assert state == ("run tiny: finished" if gone else "run tiny: driver 77 on m1, seen 1 s ago")


def test_finished_run_without_its_model_says_so(storage: Storage) -> None:
    put_manifest(storage, 12, name(1))
    assert "the model is not exported: start the run again" in said(storage)
    storage.put("model/config.json", b"{}")
    assert "exported" not in said(storage)


def test_attempts_without_a_step_are_said_with_the_last_cause(storage: Storage) -> None:
    tally = Tally()
    for number in (1, 2, 3):
        tally.add(begin(number), NOW - 50)
        tally.add(lost(number, f"rank {number}: no CUDA device"), NOW - 40)
    put_page(storage, tally)
    put_life(storage, 2.0)
    text = said(storage)
    assert "no step   3 attempts in a row made no step; the last: rank 3: no CUDA device" in text
    assert "waiting   for machines, since 40 s" in text


def test_waiting_for_machines_is_said_while_no_attempt_is_under_way(storage: Storage) -> None:
    tally = Tally()
    tally.begin_term(1, NOW - 70)
    put_page(storage, tally)
    put_life(storage, 2.0)
    assert "waiting   for machines, since 70 s" in said(storage)
    tally.add(begin(1), NOW - 10)
    put_page(storage, tally)
    assert "waiting" not in said(storage)


def test_run_without_a_driver_waits_for_nothing(storage: Storage) -> None:
    tally = Tally()
    tally.begin_term(1, NOW - 70)
    put_page(storage, tally)
    assert "waiting" not in said(storage)


def test_page_of_the_latest_term_is_shown(storage: Storage) -> None:
    tally = Tally()
    for event in (begin(1), attempt(1, 0), train(3), {"kind": "checkpoint", "step": 2, "blocked_s": 0.0}):
        tally.add(event, NOW - 20)
    put_page(storage, Tally(step=11), term=9_999)
    put_page(storage, tally, term=10_000)
    put_manifest(storage, 2, Term(10_000, "1f2e3d4c").attempt(1))
    text = said(storage)
    assert "step      3 of 12" in text
    assert "trained   loss 2.5000, 100 tokens/s, 20 s ago" in text
    assert "saved     step 2, 30 s ago; 1 steps after it are not" in text


def test_checkpoint_may_be_ahead_of_the_page(storage: Storage) -> None:
    """The last page of a run that ended may not have been stored. But what the run went back from does not count."""
    tally = Tally()
    for event in (begin(1), attempt(1, 0), train(3)):
        tally.add(event, NOW - 20)
    put_page(storage, tally)
    put_manifest(storage, 5, name(1))
    assert "step      5 of 12" in said(storage)
    tally.add(attempt(2, 2), NOW)
    put_page(storage, tally)
    assert "step      2 of 12" in said(storage)


def test_newer_manifest_that_is_damaged_is_said(storage: Storage) -> None:
    put_manifest(storage, 2, name(1))
    storage.put(f"manifests/step-00000004-{name(1)}.json", b"{")
    text = said(storage)
    assert "saved     step 2" in text
    assert f"damaged   manifests/step-00000004-{name(1)}.json: " in text
