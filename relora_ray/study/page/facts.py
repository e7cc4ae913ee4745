"""What a page says of one run, as plain data: a pure function of what the run has told.

Steps count as `relora_ray.runs.metrics.mark_abandoned` says. Times: `seconds` are those that went into steps that
count, up to a step (updates, boundaries, evaluations, waits for saves); `clock` is seconds since 1970; `dollars` are
paid for every worker of an attempt from its first record to its last, for work that was lost too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from relora_ray.runs.metrics import Record, of_one_text, sets_of, structures
from relora_ray.runs.tally import SECONDS
from relora_ray.study.run_log import RunLog, number

Number = float | None


@dataclass(frozen=True, repr=False)
class Attempt:
    name: str
    world_size: int
    from_step: int
    to_step: int
    """The last that it made, also if that does not count."""
    begin: float
    end: float
    """Of its first and its last record."""
    cause: str
    lost_from: float | None
    """When it made the first step that does not count; None if all do."""
    lost_steps: int
    lost_s: float
    """Updates that do not count, and the seconds that went into them."""
    speeds: Sequence[tuple[float, Number]]
    """When, and tokens per second, by update."""


@dataclass(frozen=True)
class Interruption:
    """Why an attempt began that was not the first, and what that has cost."""

    attempt: str
    change: str
    """resize, failure, or restart where nobody was there to say."""
    cause: str
    world_size: int
    from_step: int | None
    steps_lost: int
    lost_s: float
    down_s: float
    at: float


@dataclass(frozen=True)
class Point:
    """Where a run was after an update."""

    step: int
    tokens: int
    seconds: float
    clock: float
    dollars: Number


@dataclass(frozen=True)
class Mark:
    """Something that happened after an update."""

    point: Point
    kind: str
    text: str


@dataclass(frozen=True, repr=False)  # it may hold a million numbers
class Facts:
    log: RunLog
    label: str
    steps: int
    """Finished updates that count."""
    places: Sequence[Point]
    """Of every update that counts."""
    train: Sequence[Record]
    evals: Sequence[tuple[Point, float]]
    """Held-out losses that are finite, of the run's own rows; of as many as were evaluated last."""
    evals_apart: int
    """Evaluations of more or fewer of them: how many is no part of what a run is, and may change."""
    eval_tokens: Number
    """Held-out tokens of each of `evals`."""
    named_evals: Mapping[str, Sequence[tuple[Point, float]]]
    """The same of each set of `data.validation`: of the text that it has now, if it was exchanged."""
    marks: Sequence[Mark]
    attempts: Sequence[Attempt]
    interruptions: Sequence[Interruption]
    useful_s: float
    passed_s: float
    before: Point | None
    """Where the run was of which this is a fork, when it was forked: its places count from there on. None if this is
    none, or the other is gone."""
    states: Sequence[tuple[str, Mapping[str, int]]]
    """When, and bytes by role on each worker; only where they differ from those before."""
    peak_bytes: Number
    num_parameters: Number
    num_trainable: Number
    checkpoints: Sequence[Record]
    updates: Sequence[Record]
    last_clock: float
    dollars: Number
    """Paid for all attempts, and for what they stand on."""

    @property
    def seconds(self) -> float:
        """In steps that count, with those of the run that it was forked from."""
        return self.useful_s + (self.before.seconds if self.before is not None else 0.0)

    @property
    def finished(self) -> bool:
        return self.steps >= self.log.cfg.steps

    @property
    def last(self) -> Point | None:
        return self.places[-1] if self.places else None

    @property
    def loss(self) -> Number:
        """The last held-out loss."""
        return self.evals[-1][1] if self.evals else None

    @property
    def held_out(self) -> tuple[Any, ...]:
        """What decides on which text its losses are."""
        data = self.log.cfg.data
        return data.fingerprint, data.seq_len, self.eval_tokens or self.log.cfg.train.eval_rows

    @property
    def goodput(self) -> Number:
        return self.useful_s / self.passed_s if self.passed_s > 0 else None


def run_facts(log: RunLog, label: str, *, dollars_per_hour: float | None = None) -> Facts:
    """`dollars_per_hour`: of one worker."""
    where = _Where.of(log, dollars_per_hour)
    attempts, train = where.attempts, where.train
    last_clock = max((a.end for a in attempts), default=0.0)
    structure = structures(log.kinds)
    evals = of_one_text(log.latest("eval"))
    return Facts(
        log=log,
        label=label,
        steps=train[-1]["step"] if train else min((a.from_step for a in attempts), default=0),
        places=[where(record["step"]) for record in train],
        train=train,
        evals=_evals(evals, where),
        evals_apart=len(log.latest("eval")) - len(evals),
        eval_tokens=number(evals[-1], "tokens") if evals else None,
        named_evals={name: _evals(of_one_text(log.latest(f"eval/{name}")), where) for name in sets_of(log.kinds)},
        marks=sorted(_marks(log, where), key=lambda mark: mark.point.step),
        attempts=attempts,
        interruptions=list(_interruptions(log, attempts)),
        useful_s=where.useful_s,
        passed_s=max(where.useful_s, last_clock - min((a.begin for a in attempts), default=last_clock)),
        before=where.before,
        states=list(_states(structure)),
        peak_bytes=max((n for r in log.kinds["end"] if (n := number(r, "peak_memory_bytes"))), default=None),
        num_parameters=number(structure[0], "num_parameters") if structure else None,
        num_trainable=number(structure[-1], "num_trainable") if structure else None,
        checkpoints=log.latest("checkpoint"),
        updates=log.latest("updates"),
        last_clock=last_clock,
        dollars=where.dollars(last_clock),
    )


def _times(log: RunLog) -> dict[int, float]:
    """By a record's id, when it was made. Versions that did not say are taken to have gone on from the attempt's begin
    without a pause but those that are recorded."""
    found: dict[int, float] = {}
    for _, records in log.attempts:
        now = 0.0
        for record in records:
            said = number(record, "unix_time")
            now = said if said is not None else now + _spent(record)
            found[id(record)] = now
    return found


def _spent(record: Record) -> float:
    """Seconds that went into what a record tells of."""
    return max(0.0, number(record, SECONDS[record["kind"]]) or 0.0) if record["kind"] in SECONDS else 0.0


def _attempt(name: str, records: Sequence[Record], times: Mapping[int, float]) -> Attempt | None:
    """None if it has not come to train: its first record is missing."""
    if not records or records[0]["kind"] != "attempt":
        return None
    first = records[0]
    lost = [record for record in records if "abandoned" in record]
    steps = [record for record in records if record["kind"] == "train"]
    return Attempt(
        name=name,
        world_size=first["world_size"],
        from_step=first["step"],
        to_step=max((record["step"] for record in steps), default=first["step"]),
        begin=times[id(first)],
        end=max(times[id(record)] for record in records),
        cause=str(first.get("cause", "")),
        lost_from=min((times[id(record)] - _spent(record) for record in lost), default=None),
        lost_steps=sum(record["kind"] == "train" for record in lost),
        lost_s=sum(map(_spent, lost)),
        speeds=[(times[id(record)], number(record, "tokens_per_s")) for record in steps],
    )


class _Where:
    """From a step that counts to its place: tokens, seconds, clock, dollars."""

    @classmethod
    def of(cls, log: RunLog, price: float | None) -> _Where:
        times = _times(log)
        attempts = [found for name, records in log.attempts if (found := _attempt(name, records, times)) is not None]
        before = (
            cls.of(log.parent, price)(log.origin.step) if log.parent is not None and log.origin is not None else None
        )
        return cls(log, attempts, times, price, before)

    def __init__(
        self,
        log: RunLog,
        attempts: Sequence[Attempt],
        times: Mapping[int, float],
        price: float | None,
        before: Point | None,
    ) -> None:
        self.train, self.attempts, self.before = log.latest("train"), attempts, before
        self._tokens_per_step = log.cfg.tokens_per_step
        timed = [name for name, records in log.kinds.items() if records and records[0]["kind"] in SECONDS]
        spent = sorted((r["step"], _spent(r)) for name in timed for r in log.latest(name))
        self._steps = [step for step, _ in spent]
        self._seconds = list(accumulate(seconds for _, seconds in spent))
        self.useful_s = self._seconds[-1] if self._seconds else 0.0
        evals = log.latest("eval")
        clocks = {r["step"]: times[id(r)] for r in [*log.latest("attempt"), *evals, *self.train]}
        self._clock_steps = sorted(clocks)
        self._clocks = [clocks[step] for step in self._clock_steps]
        self._in_order, self._price = sorted(attempts, key=lambda a: a.begin), price
        self._begins = [attempt.begin for attempt in self._in_order]
        hours = (a.world_size * (a.end - a.begin) / 3600 for a in self._in_order)
        self._hours = list(accumulate(hours, initial=0.0))

    def __call__(self, step: int) -> Point:
        until = bisect_right(self._steps, step)
        at = bisect_right(self._clock_steps, step)
        clock = self._clocks[max(0, at - 1)] if self._clocks else 0.0
        return Point(
            step=step,
            tokens=step * self._tokens_per_step,
            seconds=(self._seconds[until - 1] if until else 0.0) + (self.before.seconds if self.before else 0.0),
            clock=clock,
            dollars=self.dollars(clock),
        )

    def dollars(self, clock: float) -> Number:
        """Paid until then; None without a price."""
        if self._price is None:
            return None
        before = (self.before.dollars if self.before is not None else None) or 0.0
        number = bisect_right(self._begins, clock) - 1
        if number < 0:
            return before
        attempt = self._in_order[number]
        hours = self._hours[number] + attempt.world_size * (min(clock, attempt.end) - attempt.begin) / 3600
        return before + self._price * hours


def _evals(records: Sequence[Record], where: _Where) -> list[tuple[Point, float]]:
    return [(where(record["step"]), loss) for record in records if (loss := number(record, "loss")) is not None]


def _marks(log: RunLog, where: _Where) -> list[Mark]:
    marks = []
    for record in log.latest("boundary"):
        kind, pruned = record["boundary_kind"], number(record, "state_pruned") or 0.0
        text = f"{kind} after step {record['step']:,}"
        if (layers := number(record, "num_layers")) is not None:
            text += f", {layers:,} layers"
        if kind == "switch":
            kind = "end of the warm start"
        elif kind == "merge" and pruned:
            kind, text = "merge and reset", f"{text}, {pruned:.0%} of their moments pruned"
        marks.append(Mark(where(record["step"]), kind, text))
    for rollback in log.rollbacks:
        marks.append(Mark(where(rollback.to_step), "rollback", str(rollback)))
    for record in log.kinds["attempt"][1:]:
        if "abandoned" not in record:
            cause = str(record.get("cause", "")) or "started again"
            marks.append(Mark(where(record["step"]), "restart", f"attempt {record.get('attempt', '')}: {cause}"))
    return marks


def _interruptions(log: RunLog, attempts: Sequence[Attempt]) -> list[Interruption]:
    """One for every attempt but the first: as the coordinator's page has it, or by the records alone."""
    pages = {str(page.get("attempt")): page for page in log.restarts}
    found = []
    for before, now in pairwise(attempts):
        page = pages.get(now.name, {})
        said, lost = number(page, "steps_lost"), max(0, before.to_step - now.from_step)
        down = number(page, "down_s")
        found.append(
            Interruption(
                attempt=now.name,
                change=str(page.get("change", "restart")),
                cause=str(page.get("cause", now.cause)),
                world_size=now.world_size,
                from_step=now.from_step,
                steps_lost=lost if said is None else int(said),
                lost_s=before.lost_s,
                down_s=max(0.0, now.begin - before.end) if down is None else down,
                at=now.begin,
            )
        )
    return found


def _states(structure: Sequence[Record]) -> list[tuple[str, Mapping[str, int]]]:
    found: list[tuple[str, Mapping[str, int]]] = []
    for record in structure:
        said = record.get("state_bytes")
        if not isinstance(said, dict):
            continue
        roles = {str(role): int(n) for role in said if (n := number(said, role))}
        when = f"from step {record['step']:,}"
        if roles and (not found or found[-1][1] != roles):
            found.append((when, roles))
    return found
