"""One owner per run: terms, signs of life, and who hears of whom. On a local folder; other drivers are played."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relora_ray import clock
from relora_ray.checkpoint import owner, ownership
from relora_ray.checkpoint.owner import owning
from relora_ray.checkpoint.ownership import (
    BEFORE_TERMS,
    Life,
    Term,
    attempt_key,
    claim,
    refuse_if_superseded,
    refuse_if_taken_over,
    sign_of_life,
    succeed,
    term_of,
)
from relora_ray.errors import RunBusyError, StorageError, SupersededError
from relora_ray.storage import Storage


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(owner, "BEAT_S", 0.2)
    monkeypatch.setattr(ownership, "PATIENCE_S", 1.0)
    return Storage(str(tmp_path))


def other_driver(storage: Storage, driver: str = "cccccccc", **life: object) -> Term:
    """Claims a term and gives one sign of life."""
    term = Term(len(storage.list("terms")) + 1, driver)
    storage.put_new(f"terms/{term.number:04d}.json", json.dumps({"driver": driver}).encode())
    record = {"host": "elsewhere", "pid": 1, "beat": 3, "unix_time": 0} | life
    storage.put(f"drivers/{driver}.json", json.dumps(record).encode())
    return term


def test_second_driver_is_refused_and_has_written_nothing(storage: Storage) -> None:
    with owning(storage) as hold:
        before = storage.list()
        with pytest.raises(RunBusyError, match=r"is being trained by another driver, process \d+ on"), owning(storage):
            raise AssertionError("both have it")
        assert storage.list() == before == [f"drivers/{hold.term.driver}.json", "terms/0001.json"]
        refuse_if_superseded(storage, hold.term.attempt(1))
    assert storage.list() == ["terms/0001.json"]
    with owning(storage) as hold:
        assert hold.term.number == 2


def test_refused_driver_leaves_no_more_than_it_found(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it ever puts is its own sign of life."""
    put: list[str] = []
    other_driver(storage)
    for name in ("put", "put_new"):
        original: Callable[..., None] = getattr(Storage, name)

        def noted(self: Storage, path: str, data: bytes, original: Callable[..., None] = original) -> None:
            put.append(path)
            original(self, path, data)

        monkeypatch.setattr(Storage, name, noted)
    monkeypatch.setattr(clock, "sleep", lambda s: storage.put("drivers/cccccccc.json", b'{"beat": %d}' % len(put)))
    with pytest.raises(RunBusyError), owning(storage):
        pass
    mine = [path for path in put if path != "drivers/cccccccc.json"]
    assert len(mine) == 1
    assert mine[0].startswith("drivers/")
    assert not storage.exists(mine[0])


def test_run_of_a_driver_that_is_gone_is_taken_over(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another machine: it does not change. From this one: its process is not there, so nothing is waited for."""
    other_driver(storage)
    with owning(storage) as hold:
        assert hold.term.number == 2
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    other_driver(storage, "dddddddd", machine=ownership._machine(), pid=ended.pid)
    monkeypatch.setattr(ownership, "PATIENCE_S", 1000.0)
    with owning(storage) as hold:
        assert hold.term.number == 4


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"host": 3}', b'{"pid": "x"}'])
@pytest.mark.parametrize("earlier", [True, False])
def test_sign_of_life_that_cannot_be_read_is_nobodys(storage: Storage, content: bytes, earlier: bool) -> None:
    """The one of a version without terms lies at the top."""
    if not earlier:
        other_driver(storage)
    storage.put(BEFORE_TERMS if earlier else "drivers/cccccccc.json", content)
    with owning(storage):
        assert not storage.exists(BEFORE_TERMS)


def test_term_that_cannot_be_read_is_a_claim(storage: Storage) -> None:
    storage.put("terms/0001.json", b"{")
    assert claim(storage).number == 2
    storage.put("terms/0003.json", b"")
    with pytest.raises(SupersededError, match="since term 3"):
        refuse_if_superseded(storage, "0002.0001-aa")


def test_driver_hears_that_another_has_taken_over(storage: Storage) -> None:
    heard = threading.Event()
    with owning(storage) as hold:
        hold.when_lost(lambda reason: heard.set())
        other_driver(storage)
        assert heard.wait(30)
        assert "belongs to driver cccccccc since term 2" in hold.lost
        late: list[str] = []
        hold.when_lost(late.append)
        assert late == [hold.lost]
    assert storage.exists("drivers/cccccccc.json"), "the new one's sign of life is left"


def test_waiting_driver_has_the_run_when_the_first_ends(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    entered, said = threading.Event(), "waiting for its end"

    def second() -> int:
        with owning(storage, wait=True) as hold:
            entered.set()
            return hold.term.number

    with ThreadPoolExecutor(1) as pool:
        with owning(storage):
            future = pool.submit(second)
            until = clock.monotonic() + 30
            while said not in caplog.text and clock.monotonic() < until:
                clock.sleep(0.05)
            assert not entered.is_set()
        assert future.result(30) == 2
    assert caplog.text.count(said) == 1


def test_many_that_claim_at_once_have_terms_of_their_own(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        terms = list(pool.map(lambda number: claim(storage, f"{number:08x}"), range(8)))
    assert sorted(term.number for term in terms) == list(range(1, 9))
    for term in terms:
        assert json.loads(storage.get(f"terms/{term.number:04d}.json"))["driver"] == term.driver


def test_claim_whose_answer_was_lost_is_known_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Storage.put_new

    def twice(self: Storage, path: str, data: bytes) -> None:
        original(self, path, data)
        original(self, path, data)

    monkeypatch.setattr(Storage, "put_new", twice)
    assert claim(storage, "aaaaaaaa") == Term(1, "aaaaaaaa")


def test_two_that_claim_one_term_where_nothing_is_created_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later put has it: the other one is told at once, or, if it had looked before, at its first commit."""
    monkeypatch.setattr(Storage, "put_new", Storage.put)
    first = claim(storage, "aaaaaaaa")
    refuse_if_superseded(storage, first.attempt(1))
    storage.put("terms/0001.json", b'{"driver": "bbbbbbbb"}')
    for refuse in (
        lambda: refuse_if_superseded(storage, first.attempt(1)),
        lambda: refuse_if_taken_over(storage, first),
    ):
        with pytest.raises(SupersededError, match="belongs to driver bbbbbbbb since term 1"):
            refuse()
    refuse_if_superseded(storage, Term(1, "bbbbbbbb").attempt(1))

    def overtaken(self: Storage, path: str, data: bytes) -> None:
        Storage.put(self, path, b'{"driver": "bbbbbbbb"}')

    monkeypatch.setattr(Storage, "put_new", overtaken)
    with pytest.raises(RunBusyError, match="two drivers claimed term 2 at the same moment"):
        claim(storage, "aaaaaaaa")


def test_coordinator_that_was_restarted_goes_on_in_its_drivers_name(storage: Storage) -> None:
    term = claim(storage, "aaaaaaaa")
    later = succeed(storage, succeed(storage, term))
    assert later == Term(3, "aaaaaaaa")
    assert succeed(storage, term) == Term(4, "aaaaaaaa"), "also by one that does not know of those between"
    with pytest.raises(SupersededError):
        refuse_if_superseded(storage, later.attempt(1))
    refuse_if_taken_over(storage, term)
    other_driver(storage)
    for superseded in (lambda: succeed(storage, term), lambda: refuse_if_taken_over(storage, term)):
        with pytest.raises(SupersededError, match="belongs to driver cccccccc since term 5; this is driver aaaaaaaa"):
            superseded()


@pytest.mark.parametrize("blind", ["get", "list"])
def test_later_term_is_seen_if_one_of_two_questions_is_answered_wrongly(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, blind: str
) -> None:
    term = claim(storage, "aaaaaaaa")
    other_driver(storage)
    original = Storage.get

    def missing(self: Storage, path: str, **options: int) -> bytes:
        if path == "terms/0002.json":
            error = StorageError("there is none")
            error.missing = True
            raise error
        return original(self, path, **options)

    if blind == "get":
        monkeypatch.setattr(Storage, "get", missing)
    else:
        monkeypatch.setattr(Storage, "list", lambda self, prefix="": ["terms/0001.json"])
    with pytest.raises(SupersededError):
        refuse_if_superseded(storage, term.attempt(1))


def test_storage_that_cannot_be_asked_is_not_an_answer(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    term = claim(storage, "aaaaaaaa")

    def down(self: Storage, *args: object, **options: object) -> bytes:
        raise StorageError("the service is down")

    monkeypatch.setattr(Storage, "get", down)
    with pytest.raises(StorageError, match="the service is down"):
        refuse_if_superseded(storage, term.attempt(1))


def test_sign_of_life_is_the_newest_owners(storage: Storage) -> None:
    assert sign_of_life(storage) is None
    first, second = claim(storage, "aaaaaaaa"), claim(storage, "bbbbbbbb")
    Life(storage, first.driver).beat()
    assert sign_of_life(storage) is None
    life = Life(storage, second.driver)
    life.beat()
    life.beat()
    found = sign_of_life(storage)
    assert found is not None
    assert found["beat"] == 2
    life.end()
    assert sign_of_life(storage) is None


def test_names_of_attempts_are_compared_as_numbers() -> None:
    term = Term(12, "1f2e3d4c")
    assert term.attempt(3) == "0012.0003-1f2e3d4c"
    assert term_of(term.attempt(3)) == term
    names = ["9999-ffffffff", "0001.0001-a", "0001.10000-a", "0002.0001-a", "10000.0001-a"]
    assert [attempt_key(name) for name in names] == [(0, 9999), (1, 1), (1, 10000), (2, 1), (10000, 1)]


@pytest.mark.parametrize("step", ["claim", "delete"])
def test_start_that_fails_leaves_no_sign_of_life(storage: Storage, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """One that failed after its claim, as the old sign of life could not be deleted, made the next wait 45 s."""

    def down(*args: object, **options: object) -> Term:
        raise StorageError("the service is down")

    original = Storage.delete
    if step == "claim":
        monkeypatch.setattr(owner, "claim", down)
    else:
        monkeypatch.setattr(
            Storage, "delete", lambda self, path: down() if path == BEFORE_TERMS else original(self, path)
        )
    with pytest.raises(StorageError, match="the service is down"), owning(storage):
        pass
    assert storage.list("drivers") == []


def test_first_sign_of_life_is_tried_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was busy for a moment ended the launch: signs of life are put once, as others follow."""
    seen: list[tuple[str, float]] = []
    original = Storage.put

    def put(self: Storage, path: str, data: bytes) -> None:
        seen.append((path, self.retry_s))
        original(self, path, data)

    monkeypatch.setattr(Storage, "put", put)
    with owning(storage):
        pass
    assert seen[0][0].startswith("drivers/")
    assert seen[0][1] == storage.retry_s > 0


def test_sign_of_life_of_a_driver_that_died_does_not_stay(storage: Storage) -> None:
    """A driver that was killed left one each time, for ever."""
    for number in range(3):
        driver = f"{number:08x}"
        Life(storage, driver).beat()
        claim(storage, driver)
    assert storage.list("drivers") == ["drivers/00000002.json"]
