"""Two drivers of one run, started within a second of each other, one of them stopped for a while.

Real processes, a real S3 server or a local folder, real training. Ray is left out: each process does what
runtime/driver.py does without it. The two have configs that decide the result differently, so that a mix would show.
A driver is taken for dead after `PATIENCE_S` here, and beats every `BEAT_S`, so that one that is stopped is taken over
within a round; all else is as it is in use. `benchmarks/two_drivers.py` plays many rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from relora_ray.checkpoint import owner, ownership, read_history
from relora_ray.checkpoint.manifest import key_of
from relora_ray.checkpoint.owner import owning
from relora_ray.checkpoint.ownership import attempt_key, term_of
from relora_ray.commands.checkpoints import verify
from relora_ray.config import RunConfig
from relora_ray.loop import run_attempt
from relora_ray.modeling.parallel import World
from relora_ray.runs.metrics import Record
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import MODEL, begin, check_run
from relora_ray.storage import Storage
from tests.s3 import BUCKET, Server
from tests.tiny import stored_losses, tiny_config

PATIENCE_S, BEAT_S = 3.0, 0.5
STEPS = 30
ROUND_S = 240.0
"""Who has not ended by then hangs."""
MAX_PAIRS = 6
OTHER = ("seed=4", "optimizer.learning_rate=5.0e-3")
"""How the config of the second driver differs."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "transformers.models.llama.modeling_llama", "s3fs", "aiobotocore.session", "tests.test_two_drivers"]
)


@dataclass(frozen=True)
class Plan:
    """What is done in a round. When it happens in the processes is up to the machine."""

    seed: int
    remote: bool
    keep_last: int
    other: str
    """How the second config differs."""
    order: tuple[int, int]
    """Whose driver starts first: config 0 or 1."""
    gap_s: float
    waits: tuple[bool, bool]
    """By config: whether its driver waits for the other's end."""
    victim: int
    """In the order of starting."""
    stop_after_s: float
    """Since it was started, unless ..."""
    stop_at_change: int
    """... this is not 0: it stops itself before it changes something in storage for the n-th time."""
    stop_for_s: float


def draw(seed: int) -> Plan:
    choose = random.Random(seed)
    return Plan(
        seed=seed,
        remote=seed % 2 == 1,
        keep_last=(100, 2)[seed // 2 % 2],
        other=choose.choice(OTHER),
        order=choose.choice([(0, 1), (1, 0)]),
        gap_s=choose.uniform(0.0, 1.0),
        waits=(choose.random() < 0.5, choose.random() < 0.5),
        victim=int(choose.random() < 0.3),
        stop_after_s=choose.uniform(0.0, 6.0),
        stop_at_change=choose.randint(1, 90) if choose.random() < 0.5 else 0,
        stop_for_s=choose.uniform(0.1, 2.0) if choose.random() < 0.25 else choose.uniform(PATIENCE_S, 9.0),
    )


def drive(cfg: RunConfig, config: int, wait: bool, log: str, stop_at_change: int) -> None:
    """What runtime/driver.py does, less Ray."""
    torch.set_num_threads(1)
    ownership.PATIENCE_S, owner.BEAT_S = PATIENCE_S, BEAT_S
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(kind: str, **what: Any) -> None:
        os.write(file, json.dumps({"kind": kind, "pid": os.getpid(), "config": config, **what}).encode() + b"\n")

    _announce_changes(note, stop_at_change)
    note("start")
    how, why = "finished", ""
    try:
        with owning(run_storage(cfg), wait=wait) as hold:
            attempt = hold.term.attempt(1)
            note("term", number=hold.term.number, attempt=attempt)
            cfg = begin(cfg, hold.term)

            def end(reason: str) -> None:
                note("end", how="lost", why=reason)
                os._exit(0)

            def on_record(record: Record) -> None:
                if record["kind"] in ("attempt", "checkpoint", "checkpoint_missed"):
                    note(record["kind"], step=record["step"], attempt=attempt)

            hold.when_lost(end)
            run_attempt(cfg, World(), attempt=attempt, on_record=on_record)
    except Exception as error:
        how, why = type(error).__name__, str(error)
    note("end", how=how, why=why)


def _announce_changes(note: Callable[..., None], stop_at: int) -> None:
    count, lock = [0], threading.Lock()

    def announce(name: str) -> None:
        original = getattr(Storage, name)

        def announced(self: Storage, path: str, *args: Any) -> None:
            with lock:
                count[0] += 1
                stops = count[0] == stop_at
            if stops:
                os.kill(os.getpid(), signal.SIGSTOP)
            original(self, path, *args)
            note(name, path=f"{self.url}/{path}")  # what was refused, such as a claim that came too late, is no change

        setattr(Storage, name, announced)

    for name in ("put", "put_new", "delete"):
        announce(name)


def configs(plan: Plan, data: Path, folder: Path, server: Server) -> tuple[RunConfig, RunConfig]:
    """Of the two drivers."""
    common = [f"steps={STEPS}", "checkpoint.save_async=true", f"checkpoint.keep_last={plan.keep_last}"]
    if plan.remote:
        common += [f"storage_options={json.dumps(server.options)}", "storage_retry_s=30"]
        folder = Path(f"{BUCKET}/two-{plan.seed}-{os.urandom(4).hex()}")
    made = [tiny_config(data, folder, *common, *more) for more in ((), (plan.other,))]
    if plan.remote:
        made = [cfg.model_copy(update={"storage": f"s3://{folder}"}) for cfg in made]
    return made[0], made[1]


class Round:
    """Plays one plan. Pairs are started until the run is at its end, as whoever runs a cluster would: the one whose
    driver was taken over, or refused while the owner stood still, is started again."""

    def __init__(self, plan: Plan, cfgs: tuple[RunConfig, RunConfig], log: Path) -> None:
        self._plan, self._cfgs, self._log = plan, cfgs, log
        self._choose = random.Random(-plan.seed)
        self._processes: list[BaseProcess] = []
        self._began, self._stopped_at, self._is_resumed = 0.0, 0.0, False
        log.touch()

    def play(self) -> None:
        """Returns when all processes have ended. AssertionError if one hangs, or if the run does not come to its end
        however often it is started."""
        plan, until = self._plan, time.monotonic() + ROUND_S
        try:
            self._start_pair(plan.order, plan.gap_s, plan.stop_at_change)
            while True:
                alive = [process for process in self._processes if process.is_alive()]
                assert time.monotonic() < until, f"after {ROUND_S:g} s {[p.pid for p in alive]} have not ended"
                self._stop_or_resume()
                stands_still = [self._victim] if self._stopped_at and not self._is_resumed else []
                if not [process for process in alive if process not in stands_still]:
                    if not any(record.get("how") == "finished" for record in read_log(self._log)):
                        assert len(self._processes) < 2 * MAX_PAIRS, f"not at its end after {MAX_PAIRS} starts of both"
                        order = self._choose.choice([(0, 1), (1, 0)])
                        self._start_pair(order, self._choose.uniform(0.0, 1.0), 0)
                    elif not stands_still:
                        return
                time.sleep(0.01)
        finally:
            for process in self._processes:
                process.kill()  # SIGKILL ends those that are stopped, too
                process.join()

    @property
    def _victim(self) -> BaseProcess:
        return self._processes[self._plan.victim]

    def _start_pair(self, order: tuple[int, int], gap_s: float, stop_at_change: int) -> None:
        for number, config in enumerate(order):
            stop_at = stop_at_change if number == self._plan.victim else 0
            args = (self._cfgs[config], config, self._plan.waits[config], str(self._log), stop_at)
            process = _context.Process(target=drive, args=args)
            process.start()
            self._processes.append(process)
            if number == 0:
                time.sleep(gap_s)
        self._began = self._began or time.monotonic()

    def _stop_or_resume(self) -> None:
        now, plan = time.monotonic(), self._plan
        if not self._stopped_at:
            if not plan.stop_at_change and now - self._began > plan.stop_after_s:
                self._signal(signal.SIGSTOP)
            if _is_stopped(self._victim):
                self._stopped_at = now
                self._note("stopped")
        elif not self._is_resumed and now - self._stopped_at > plan.stop_for_s:
            self._is_resumed = True
            self._note("resumed")
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._victim.is_alive() and self._victim.pid is not None:
            os.kill(self._victim.pid, number)

    def _note(self, kind: str) -> None:
        with open(self._log, "ab") as file:
            file.write(json.dumps({"kind": kind, "pid": self._victim.pid}).encode() + b"\n")


def _is_stopped(process: BaseProcess) -> bool:
    try:
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_bytes().splitlines()]


@dataclass(frozen=True)
class Expected:
    """Of an undisturbed run."""

    train: dict[int, float]
    eval: dict[int, float]
    model: str


def outcome_of(cfg: RunConfig) -> Expected:
    """What a run that is at its end has stored."""
    model = sha256(run_storage(cfg).get(f"{MODEL}/model.safetensors")).hexdigest()
    return Expected(stored_losses(cfg), stored_losses(cfg, "eval"), model)


def undisturbed(data: Path, folder: Path) -> dict[str, Expected]:
    """By what the config differs in."""
    folder.mkdir(exist_ok=True)
    cfgs = {
        override: tiny_config(data, folder / str(number), f"steps={STEPS}", *filter(None, [override]))
        for number, override in enumerate(("", *OTHER))
    }
    log = folder / "log.jsonl"
    processes = [_context.Process(target=drive, args=(cfg, 0, False, str(log), 0)) for cfg in cfgs.values()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [r["how"] for r in read_log(log) if r["kind"] == "end"] == ["finished"] * len(cfgs)
    found = {override: outcome_of(cfg) for override, cfg in cfgs.items()}
    assert all(sorted(expected.train) == list(range(1, STEPS + 1)) for expected in found.values())
    assert len({expected.model for expected in found.values()}) == len(found), "the configs decide the result"
    return found


REFUSED = ("RunBusyError", "ConfigError")
GIVEN_UP = ("lost", "SupersededError", "CheckpointError")


def check(plan: Plan, cfgs: tuple[RunConfig, RunConfig], log: Path, expected: dict[str, Expected]) -> dict[str, Any]:
    """See from outside that one of the two had the run at a time. Returns what happened."""
    records, storage = read_log(log), run_storage(cfgs[0])
    by_process: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_process.setdefault(record["pid"], []).append(record)

    for pid, own in by_process.items():
        ends = [record for record in own if record["kind"] == "end"]
        assert len(ends) == 1, f"process {pid} ended without a word"
        how, why = ends[0]["how"], ends[0]["why"]
        assert how in ("finished", *REFUSED, *GIVEN_UP), (pid, how, why)
        if how == "CheckpointError":
            assert "stores nothing more" in why or "two runs have been started under one name" in why, why
        if how in REFUSED:
            _check_that_nothing_was_written(how, own, records, storage)

    history = read_history(storage)
    line = [history.read(path) for path in history.line]
    assert line, "there are checkpoints"
    assert not history.unreadable
    assert line[-1].step == STEPS
    assert [m.step for m in line] == sorted({m.step for m in line})
    assert [m.key for m in line] == sorted(m.key for m in line), "of two owners one follows the other"

    # All is of one config: that of whoever made the first checkpoint.
    (setup,) = {m.setup for m in line}
    assert setup is not None
    config_of = {record["attempt"]: record["config"] for record in records if record["kind"] == "term"}
    owners = {attempt.partition(".")[0] + attempt[attempt.index("-") :]: attempt for attempt in config_of}
    winner = config_of[owners[setup.folder.removeprefix("setup/")]]
    attempts = sorted(config_of, key=attempt_key)
    acknowledged = {
        attempt: [r["step"] for r in records if r["kind"] == "checkpoint" and r["attempt"] == attempt]
        for attempt in attempts
    }
    first = next(attempt for attempt in attempts if acknowledged[attempt])
    assert config_of[first] == winner
    assert {config_of[m.attempt] for m in line} == {winner}
    assert {config_of[attempt] for attempt in attempts if acknowledged[attempt]} == {winner}
    assert len({m.identity for m in line}) == 1
    ended_well = {r["config"] for r in records if r["kind"] == "end" and r["how"] == "finished"}
    assert ended_well == {winner}, "whoever has another config was refused, also at the end"
    check_run(cfgs[winner])
    with pytest.raises(Exception, match="holds a run of another config"):
        check_run(cfgs[1 - winner])

    # Nothing that was acknowledged is lost, and nothing was acknowledged after somebody else went on.
    newest = -1
    for attempt in attempts:
        began = [r["step"] for r in records if r["kind"] == "attempt" and r["attempt"] == attempt]
        if began:
            assert began[0] >= newest, (attempt, began[0], newest)
        if acknowledged[attempt]:
            assert acknowledged[attempt][0] > newest, (attempt, acknowledged)
        assert acknowledged[attempt] == sorted(set(acknowledged[attempt]))
        newest = max([newest, *acknowledged[attempt]])
    kept = {(m.attempt, m.step) for m in line}
    for attempt, steps in acknowledged.items():
        lost = {(attempt, step) for step in steps} - kept
        assert not lost or plan.keep_last < 100, (lost, history.line)
    assert {key_of(path) for path in history.line} == {m.key for m in line}

    assert [(step, wrong) for step, wrong in verify(storage, None) if wrong] == []
    assert outcome_of(cfgs[winner]) == expected[plan.other if winner else ""]
    return _what_happened(plan, records, winner)


def _check_that_nothing_was_written(
    how: str, records: list[dict[str, Any]], everybodys: list[dict[str, Any]], storage: Storage
) -> None:
    """But for its own sign of life, and the claim of its term if it was refused for its config: whoever claims also
    removes the sign of life of the owner before."""
    kinds = ("put", "put_new", "delete")
    changed = {(r["kind"], r["path"].removeprefix(f"{storage.url}/")) for r in records if r["kind"] in kinds}
    own = {path for kind, path in changed if kind == "put" and path.startswith("drivers/")}
    assert len(own) == 1, own
    allowed = {(kind, path) for kind in ("put", "delete") for path in own}
    if how != "RunBusyError":
        terms = {r["number"] for r in records if r["kind"] == "term"}
        allowed |= {("put_new", f"terms/{number:04d}.json") for number in terms}
        before = {term_of(r["attempt"]).driver for r in everybodys if r["kind"] == "term" and r["number"] + 1 in terms}
        allowed |= {("delete", f"drivers/{driver}.json") for driver in before}
        allowed |= {("delete", ownership.BEFORE_TERMS)}
    assert changed <= allowed, (how, changed - allowed)


def _what_happened(plan: Plan, records: list[dict[str, Any]], winner: int) -> dict[str, Any]:
    at = {(r["kind"], r["pid"]): number for number, r in enumerate(records)}
    ends = {r["pid"]: r["how"] for r in records if r["kind"] == "end"}
    claims = [(number, r["pid"]) for number, r in enumerate(records) if r["kind"] == "term"]
    takeovers = [
        (number, pid, {other for before, other in claims if before < number < at["end", other]})
        for number, pid in claims
    ]
    takeovers = [takeover for takeover in takeovers if takeover[2]]
    stopped = next((r["pid"] for r in records if r["kind"] == "stopped"), 0)
    owned = at.get(("term", stopped), len(records)) < at.get(("stopped", stopped), 0)
    taken_over = owned and any(stopped in owners for _, _, owners in takeovers)
    return {
        "seed": plan.seed,
        "storage": "s3" if plan.remote else "folder",
        "winner": "first" if plan.order[0] == winner else "second",
        "processes": len(ends),
        "terms": len(claims),
        "takeovers": len(takeovers),
        "in_vain": sum(ends[pid] == "ConfigError" for _, pid, _ in takeovers),
        "of_running": sum(
            bool(owners - {stopped}) or not at["stopped", stopped] < number < at["resumed", stopped]
            for number, _, owners in takeovers
        ),
        "ends": sorted(ends.values()),
        "stopped": ("owner" if owned else "no owner") if stopped else "not stopped",
        "taken_over": taken_over,
        "came_back": ends[stopped] if taken_over else "",
        "late_puts": sum(
            r["kind"] in ("put", "put_new") and r["pid"] == stopped for r in records[at["resumed", stopped] :]
        )
        if taken_over
        else 0,
    }


def play_and_check(
    plan: Plan, data: Path, folder: Path, server: Server, expected: dict[str, Expected]
) -> dict[str, Any]:
    """What happened in a round; `folder` keeps the log and, of a local one, the run."""
    cfgs, log = configs(plan, data, folder / "runs", server), folder / "log.jsonl"
    Round(plan, cfgs, log).play()
    return check(plan, cfgs, log, expected)


def test_run_is_that_of_one_of_two_drivers(data: Path, tmp_path: Path, moto: Server) -> None:
    """Three rounds at once, in which whoever starts first stops itself for longer than it has the others' patience."""
    expected = undisturbed(data, tmp_path / "undisturbed")

    def play(seed: int) -> dict[str, Any]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        return play_and_check(draw(seed), data, folder, moto, expected)

    with ThreadPoolExecutor(3) as pool:
        rounds = list(pool.map(play, (5, 34, 39)))
    assert {found["storage"] for found in rounds} == {"folder", "s3"}
    assert any(found["came_back"] for found in rounds), rounds
