"""What is counted of a run as it goes on, and that it stays small. Events are made by hand, storage is real."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint.manifest import Manifest
from relora_ray.checkpoint.ownership import Term
from relora_ray.errors import StorageError
from relora_ray.runs.metrics import MetricsLog, latest, read_kinds
from relora_ray.runs.tally import MAX_POINTS, MAX_RESTARTS, ProgressLog, Tally, latest_page, read_tally, replay
from relora_ray.storage import Storage

DRIVER = "1f2e3d4c"


def name(number: int, term: int = 1) -> str:
    return Term(term, DRIVER).attempt(number)


def begin(number: int, cause: str = "the run was started", term: int = 1) -> dict[str, Any]:
    return {"kind": "begin", "attempt": name(number, term), "world_size": 2, "cause": cause}


def attempt(number: int, step: int, term: int = 1, **more: Any) -> dict[str, Any]:
    return {"kind": "attempt", "attempt": name(number, term), "step": step, "world_size": 2} | more


def lost(number: int, cause: str) -> dict[str, Any]:
    return {"kind": "lost", "attempt": name(number), "cause": cause}


def train(step: int, step_s: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "step_s": step_s, "loss": 2.5, "tokens_per_s": 100.0} | more


def restart(number: int, change: str = "failure", down_s: float = 10.0, steps_lost: int = 3) -> dict[str, Any]:
    return {
        "kind": "restart", "attempt": name(number), "change": change, "cause": f"because of {number}\nTraceback",
        "world_size": 2, "from_step": 0, "steps_lost": steps_lost, "down_s": down_s, "unix_time": 1000.0 + number,
    }  # fmt: skip


def manifest(step: int, attempt: str) -> Manifest:
    return Manifest.model_validate(
        {
            "step": step, "tokens": step * 10, "boundary": 0, "base": None, "counters": {}, "identity": "",
            "delta": {"folder": f"delta/step-{step:08d}-{attempt}", "objects": [], "digest": 0}, "data_fingerprint": "",
            "attempt": attempt, "world_size": 2, "versions": {}, "unix_time": 2000.0,
        }
    )  # fmt: skip


def told(*events: dict[str, Any], now: float | None = None) -> Tally:
    tally = Tally()
    for event in events:
        tally.add(event, now)
    return tally


def again(tally: Tally) -> Tally:
    """As the next owner has it."""
    return Tally.load(json.dumps(tally.page(), allow_nan=False).encode())


def test_steps_boundaries_evaluations_and_waits_for_saves_are_useful() -> None:
    tally = told(attempt(1, 0), {"kind": "eval", "step": 0, "eval_s": 3.0}, train(1), train(2))
    tally.add({"kind": "boundary", "step": 2, "boundary_s": 0.5})
    tally.add(train(3))
    tally.add({"kind": "checkpoint", "step": 2, "blocked_s": 0.25})
    assert tally.useful_s == 6.75
    assert tally.step == 3
    assert tally.committed_step == 2


def test_what_is_done_again_counts_once() -> None:
    tally = told(attempt(1, 0), *(train(step) for step in range(1, 11)))
    tally.add({"kind": "boundary", "step": 6, "boundary_s": 0.5})
    tally.add({"kind": "eval", "step": 5, "eval_s": 0.25})
    tally.committed(5, "manifests/five.json")
    tally.add(attempt(2, 5))
    assert tally.useful_s == 5.25, "what belongs to step 5 is in its checkpoint; the boundary at 6 is done again"
    assert tally.step == 5
    for step in (6, 7):
        tally.add(train(step, step_s=2.0))
    tally.add({"kind": "boundary", "step": 6, "boundary_s": 0.5})
    assert tally.useful_s == pytest.approx(9.75)
    assert (tally.committed_step, tally.manifest) == (5, "manifests/five.json")


def test_event_that_is_told_twice_counts_once() -> None:
    """Ray makes a call to an actor again if its answer was lost."""
    events = [
        attempt(1, 0), {"kind": "eval", "step": 0, "eval_s": 1.0}, train(1), train(1),
        {"kind": "boundary", "step": 1, "boundary_s": 0.5}, {"kind": "boundary", "step": 1, "boundary_s": 0.5},
    ]  # fmt: skip
    tally = told(events[0], *events)
    assert tally.useful_s == 2.5
    assert tally.attempts == 1


def test_going_back_before_the_newest_checkpoint_drops_what_came_after() -> None:
    tally = told(attempt(1, 0), *(train(step) for step in range(1, 31)))
    tally.committed(20, "manifests/twenty.json")
    tally.committed(30, "manifests/thirty.json")
    tally.add(attempt(2, 10))
    assert tally.useful_s == 10
    assert (tally.step, tally.committed_step, tally.manifest) == (10, 10, "")
    assert tally.loss is None, "that of step 30 is not the run's"


def test_far_back_seconds_are_known_nearly() -> None:
    """At the newest steps to the last digit; at step 3 of 100,000, which is between two that are kept, by a line."""
    tally = told(attempt(1, 0), *(train(step, step_s=1 + step % 2) for step in range(1, 100_001)))
    assert tally.useful_s == 150_000
    assert len(tally.useful) <= MAX_POINTS
    recent, far = again(tally), again(tally)
    recent.add(attempt(2, 99_960))
    assert recent.useful_s == 149_940
    far.add(attempt(2, 33_333))
    assert far.useful_s == pytest.approx(50_000, abs=3)
    assert far.useful[-1][0] == 33_333


def test_going_back_to_before_all_that_is_known_leaves_nothing() -> None:
    tally = told(attempt(1, 50), train(51), train(52))
    tally.add(attempt(2, 20))
    assert tally.useful_s == 0
    tally.add(train(21))
    assert tally.useful_s == 1


def test_attempts_without_a_step_are_counted_with_the_last_cause() -> None:
    tally = told(begin(1), attempt(1, 0), train(1), lost(1, "rank 0: killed"))
    assert (tally.without_step, tally.running) == (0, False)
    tally.add(begin(2, "rank 0: killed"))
    tally.add(lost(2, "rank 1: no CUDA device\nTraceback"))
    assert (tally.without_step, tally.last_cause) == (1, "rank 1: no CUDA device")
    tally.add(begin(3, "rank 1: no CUDA device"))
    assert tally.running
    assert tally.without_step == 1, "the one that has begun has not failed yet"
    tally.add(attempt(3, 0))
    tally.add(begin(4, "Ray replaced the worker group"))
    assert (tally.without_step, tally.last_cause) == (2, "Ray replaced the worker group")
    assert again(tally) == tally
    tally.add(train(1))
    assert (tally.without_step, tally.attempts) == (0, 4)


def test_loss_of_an_earlier_attempt_does_not_end_the_latest() -> None:
    tally = told(begin(1), begin(2), lost(1, "rank 0: killed"))
    assert tally.running
    assert tally.without_step == 1


def test_attempt_on_a_finished_run_is_not_one_without_a_step() -> None:
    tally = told(begin(1), begin(2), attempt(2, 12))
    assert tally.without_step == 1
    tally.add({"kind": "end", "step": 12})
    tally.add(begin(3))
    assert tally.without_step == 0


def test_resizes_and_failures_are_counted_apart() -> None:
    tally = told(restart(1, "start"), restart(2), restart(3, "resize", 5.0, 0), restart(4, steps_lost=1))
    assert tally.failures.model_dump() == {"count": 2, "down_s": 20.0, "steps_lost": 4}
    assert tally.resizes.model_dump() == {"count": 1, "down_s": 5.0, "steps_lost": 0}
    assert [r.cause for r in tally.restarts] == [f"because of {n}" for n in (1, 2, 3, 4)]
    assert told().failures.count == 0, "no two tallies share their counts"


def test_times_are_kept() -> None:
    tally = Tally()
    tally.add(begin(1), 100.0)
    tally.add(attempt(1, 0), 110.0)
    tally.add(train(1), 120.0)
    tally.add(lost(1, "gone"), 130.0)
    assert (tally.began, tally.attempt_time, tally.step_time, tally.idle_since) == (100.0, 100.0, 120.0, 130.0)
    tally.committed(1, "manifests/one.json", 140.0)
    assert tally.unix_time == 140.0


def test_loss_that_is_no_number_can_be_stored() -> None:
    tally = told(attempt(1, 0), train(1, step_s=float("nan"), loss=float("nan"), tokens_per_s=float("inf")))
    assert (again(tally).loss, again(tally).tokens_per_s, again(tally).useful_s) == (None, None, 0)


def test_kinds_that_say_nothing_are_passed_over() -> None:
    events = [{"kind": "log", "level": "WARNING", "rank": 0, "message": "?"}, {"kind": "checkpoint_missed", "step": 3}]
    assert told(*events) == Tally()


def test_page_stays_small_whatever_the_run_does() -> None:
    """10,000 attempts of 10 steps each and no checkpoint after each first, with causes of a hundred lines."""
    tally, largest = Tally(), 0
    for number in range(1, 10_001):
        cause = f"rank {number}: " + "no space left on device, " * 50 + "\n" * 100
        tally.add(begin(number, cause), float(number))
        tally.add(attempt(number, 7 * number), float(number))
        for step in range(7 * number + 1, 7 * number + 11):
            tally.add(train(step), float(number))
        tally.add(restart(number) | {"cause": cause}, float(number))
        tally.add(lost(number, cause), float(number))
        if number % 500 == 0:
            largest = max(largest, len(json.dumps(tally.page())))
            tally = again(tally)
    assert largest < 20_000
    assert (tally.attempts, tally.failures.count) == (10_000, 10_000)
    assert [r.attempt for r in tally.restarts] == [name(n) for n in range(10_001 - MAX_RESTARTS, 10_001)]
    assert tally.useful_s == pytest.approx(7 * 9_999 + 10, rel=1e-3)


def test_page_of_a_later_version_is_read() -> None:
    tally = told(attempt(1, 0), train(1))
    assert Tally.load(json.dumps(tally.page() | {"weather": "fine"}).encode()) == tally


def test_progress_is_stored_under_the_names_of_term_and_driver(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    log = ProgressLog(storage, Term(12, DRIVER))
    log.add(begin(1, term=12))
    log.add(attempt(1, 0, term=12))
    log.add(train(1))
    log.committed(manifest(1, name(1, 12)))
    log.close()
    assert storage.list() == [f"progress/0012-{DRIVER}.json"]
    page = latest_page(storage)
    assert page == log.tally
    assert (page.term, page.step, page.committed_step) == (12, 1, 1)
    assert page.manifest == f"manifests/step-00000001-{name(1, 12)}.json"


def test_next_owner_goes_on_from_the_page_of_the_one_before(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = ProgressLog(storage, Term(1, DRIVER))
    for event in (begin(1), attempt(1, 0), train(1), lost(1, "gone"), begin(2)):
        first.add(event)
    first.close()
    second = ProgressLog(storage, Term(2, "aa"))
    assert (second.tally.term, second.tally.attempts, second.tally.useful_s) == (2, 2, 1.0)
    assert not second.tally.running, "it has begun nothing yet"
    assert (second.tally.without_step, second.tally.last_cause) == (1, "the driver ended")
    second.close()
    first._storage.put(first._path, json.dumps(Tally(attempts=99).page()).encode())  # late
    assert read_tally(storage, None) == second.tally


def test_latest_page_is_that_of_the_highest_number(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for term in (9_999, 10_000, 2):
        storage.put(f"progress/{term:04d}-{DRIVER}.json", json.dumps(Tally(attempts=term).page()).encode())
    storage.put("progress/note.txt", b"")
    page = latest_page(storage)
    assert page is not None
    assert (page.term, page.attempts) == (10_000, 10_000)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"attempts": "many"}'])
def test_page_that_cannot_be_read_is_no_page(tmp_path: Path, content: bytes) -> None:
    storage = Storage(str(tmp_path))
    storage.put(f"progress/0001-{DRIVER}.json", content)
    assert latest_page(storage) is None
    assert read_tally(storage, None) == Tally()


def test_slow_storage_holds_nobody_up_and_gets_the_newest_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, go, puts = Storage(str(tmp_path)), threading.Event(), []
    original = Storage.put

    def slow(self: Storage, path: str, data: bytes) -> None:
        assert go.wait(30)
        puts.append(path)
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", slow)
    log = ProgressLog(storage, Term(1, DRIVER))
    for number in range(1, 50):
        log.add(begin(number))
    assert storage.list() == []
    go.set()
    log.close()
    assert len(puts) <= 2, "those between are left out"
    page = latest_page(storage)
    assert page is not None
    assert page.attempts == 49


def test_failed_put_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storage, original, failures = Storage(str(tmp_path)), Storage.put, [1]

    def flaky(self: Storage, path: str, data: bytes) -> None:
        if failures:
            raise StorageError(f"down {failures.pop()}")
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", flaky)
    log = ProgressLog(storage, Term(1, DRIVER))
    log._thread.submit(lambda: None).result()  # the first put was tried
    log.add(begin(1))
    log.close()
    assert "stored later: down 1" in caplog.text
    assert latest_page(storage) == log.tally


def store(storage: Storage, *attempts: list[dict[str, Any]]) -> None:
    """As a run's metrics: each list begins with an attempt's record."""
    for records in attempts:
        log = MetricsLog(storage, records[0]["attempt"])
        for record in records:
            log.write(record)
        log.close()


def test_replay_of_the_log_counts_what_was_counted_live(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first = [attempt(1, 0, unix_time=50.0), {"kind": "eval", "step": 0, "eval_s": 3.0}]
    first += [train(step, step_s=step / 8) for step in range(1, 9)]
    second = [attempt(2, 4, unix_time=60.0), train(5, step_s=2.0), {"kind": "boundary", "step": 5, "boundary_s": 1.0}]
    third = [attempt(3, 5, cause="rank 1: gone", unix_time=70.0)]
    store(storage, first, second, third)
    storage.put(f"restarts/{name(2)}.json", json.dumps(restart(2)).encode())
    live = told(*first, *second, restart(2), *third)
    assert read_tally(storage, None) == live
    records = read_kinds(storage)
    assert live.useful_s == sum(
        sum(record[key] for record in latest(records[kind]))
        for kind, key in {"train": "step_s", "eval": "eval_s", "boundary": "boundary_s"}.items()
    )


def test_attempts_that_stored_no_metrics_are_counted() -> None:
    """Two that ended before their first record, between two that trained, and one that failed last."""
    failed = {"trained": False, "from_step": None, "steps_lost": 0, "down_s": 1.0}
    pages = [restart(n) | failed | {"ended_by": f"rank {n}: no CUDA device"} for n in (2, 3, 5)]
    tally = replay([(name(1), [attempt(1, 0), train(1)]), (name(4), [attempt(4, 0), train(1)])], [*pages, restart(4)])
    assert (tally.attempts, tally.without_step, tally.last_cause) == (5, 1, "rank 5: no CUDA device")
    assert tally.failures.model_dump() == {"count": 4, "down_s": 13.0, "steps_lost": 3}
    assert [r.attempt for r in tally.restarts] == [name(n) for n in (2, 3, 4, 5)]
    assert tally.useful_s == 1.0
    assert not tally.running
    assert replay([], [restart(9_999), restart(10_000)]).attempt == name(10_000)


def test_attempt_that_ended_without_a_step_is_counted_once_as_it_is_told() -> None:
    page = restart(1) | {"trained": False, "ended_by": "rank 0: full disk", "from_step": None}
    tally = told(begin(1), lost(1, "rank 0: full disk"), page, begin(2, "rank 0: full disk"))
    assert (tally.attempts, tally.without_step, tally.last_cause) == (2, 1, "rank 0: full disk")
    assert tally.running


def test_log_is_read_if_a_later_term_without_a_page_has_trained(tmp_path: Path) -> None:
    """As terms without a coordinator do. While the later term has committed nothing, the page is right."""
    storage = Storage(str(tmp_path))
    log = ProgressLog(storage, Term(1, DRIVER))
    log.close()
    store(storage, [attempt(1, 0, term=2), train(1), train(2)])
    assert read_tally(storage, manifest(0, name(1, 1))).step == 0
    assert read_tally(storage, manifest(2, name(1, 2))).step == 2
