"""Lengths that a config may give as shares, so that `steps=400` alone fits it: `method.warm_start: 25%`, `cycles: 5`.

They are made whole numbers of updates once, before the config is checked; what is stored, compared and shown has the
numbers alone. The rules:

    method.cycles             a count: method.merge_every_steps is what is left after the warm start, by this
    method.warm_start         of `steps`; where cycles follow, the number of updates next to it that leaves whole ones
    schedule.warmup           of `steps`, rounded to the nearest whole number, at least 1
    schedule.restart_warmup   of the shortest time between two restarts of the rate, rounded so
    train.eval_every          of `steps`, rounded so
    checkpoint.save_every     of `steps`, rounded so

A half is rounded up. Worked example: steps=402, warm_start: 25%, cycles: 5. A quarter is 100.5; five cycles of 60 leave
102 for the warm start, five of 61 leave 97: 102 is nearer, and so merge_every_steps=60.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction
from math import floor
from typing import Any

from pydantic import TypeAdapter, ValidationError

SHARES = {
    "method.warm_start": "method.warm_start_steps",
    "schedule.warmup": "schedule.warmup_steps",
    "schedule.restart_warmup": "schedule.restart_warmup_steps",
    "train.eval_every": "train.eval_every_steps",
    "checkpoint.save_every": "checkpoint.save_every_steps",
}
CYCLES, MERGE, WARM = "method.cycles", "method.merge_every_steps", "method.warm_start_steps"
SHORT = {**SHARES, CYCLES: MERGE}
"""Keys that are given in place of a number of updates, and the key of that number."""
PARTNERS = {**SHORT, **{full: short for short, full in SHORT.items()}}
"""Each by the other."""
_WHOLE = TypeAdapter(int)
_ROUNDED = "rounded to whole updates, at least 1."
DOCS = {
    "method.warm_start": "In place of `warm_start_steps`: a share of `steps`, such as 25%. Where cycles follow, it is "
    "the number of updates next to that which leaves whole ones.",
    CYCLES: "In place of `merge_every_steps`: how many cycles the updates after the warm start are.",
    "schedule.warmup": f"In place of `warmup_steps`: a share of `steps`, such as 5%, {_ROUNDED}",
    "schedule.restart_warmup": "In place of `restart_warmup_steps`: a share of the shortest time between two restarts, "
    f"such as 10%, {_ROUNDED}",
    "train.eval_every": f"In place of `eval_every_steps`: a share of `steps`, such as 25%, {_ROUNDED}",
    "checkpoint.save_every": f"In place of `save_every_steps`: a share of `steps`, such as 10%, {_ROUNDED}",
}


def resolve(raw: dict[str, Any], fields: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The config with whole numbers in place of shares, and what is wrong with those. `fields`: of its method's
    section. What is malformed for other reasons is left to the config's own check."""
    own = {short for short, full in SHORT.items() if not full.startswith("method.") or full.partition(".")[2] in fields}
    said = {short: value for short in SHORT if short in own and (value := _get(raw, short)) is not None}
    shares = {
        short: share for short, value in said.items() if short != CYCLES and (share := read_share(value)) is not None
    }
    problems, steps = list(_problems(raw, said, shares)), number_of_steps(raw)
    if problems or steps is None:
        return _changed(raw, [*said, *(full for full in SHARES.values() if is_share(_get(raw, full)))], {}), problems
    numbers, problems = _of_method(raw, steps, said, shares)
    raw = _changed(raw, said, numbers)
    later = {}
    for short, share in shares.items():
        if short != "method.warm_start":
            of = _between_restarts(raw, steps) if short == "schedule.restart_warmup" else steps
            later[SHORT[short]] = _rounded(share * of)
    return _changed(raw, (), later), problems


def _problems(raw: dict[str, Any], said: dict[str, Any], shares: dict[str, Fraction]) -> Iterator[str]:
    for short, full in SHARES.items():
        if is_share(value := _get(raw, full)):
            yield f"{full}={value!r} is a share, and this key is a number of updates. Write it as {short}: {value}."
    for short, value in said.items():
        if (number := _get(raw, SHORT[short])) is not None:
            yield f"{short}={value} and {SHORT[short]}={number} say the same twice. Remove one of the two."
        if short == CYCLES and _above_0(value) is None:
            yield f"method.cycles={value!r} is no number of cycles. Give a whole number above 0."
        elif short != CYCLES and short not in shares:
            yield _no_share(short, value)


def given(raw: dict[str, Any]) -> list[str]:
    """The lengths that are given in place of a number of updates, or as a share in the key of that."""
    return [short for short, full in SHORT.items() if _get(raw, short) is not None or is_share(_get(raw, full))]


def is_share(value: Any) -> bool:
    return isinstance(value, str) and value.strip().endswith("%")


def read_share(value: Any) -> Fraction | None:
    """`12.5%` -> 1/8; None for what is no share between 0 and 100 %, ends left out."""
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,3}(\.\d{1,6})?\s*%", value.strip()):
        return None
    share = Fraction(value.strip().rstrip("%").strip()) / 100
    return share if 0 < share < 1 else None


def number_of_steps(raw: dict[str, Any]) -> int | None:
    """As the config will have it, from `tokens` too; None if that is malformed."""
    if raw.get("steps") is not None:
        return _above_0(raw["steps"])
    data = raw.get("data")
    seq_len = data.get("seq_len", 512) if isinstance(data, dict) else None
    tokens, rows, seq_len = (_above_0(value) for value in (raw.get("tokens"), raw.get("global_batch_rows"), seq_len))
    return max(1, tokens // (rows * seq_len)) if tokens and rows and seq_len else None


def _above_0(value: Any) -> int | None:
    """A whole number as the config's own check reads it: `1e3` and `"1000"` too; None if it is none, or not above 0."""
    if isinstance(value, bool):
        return None
    try:
        number = _WHOLE.validate_python(value)
    except ValidationError:
        return None
    return number if number > 0 else None


def _of_method(
    raw: dict[str, Any], steps: int, said: dict[str, Any], shares: dict[str, Fraction]
) -> tuple[dict[str, Any], list[str]]:
    """The lengths of warm start and cycles, and what is wrong with them."""
    cycles, share, every = _above_0(said.get(CYCLES)), shares.get("method.warm_start"), _above_0(_get(raw, MERGE))
    if share is None:
        if cycles is None:
            return {}, []
        warm = _above_0(_get(raw, WARM)) or 0
        if warm >= steps:
            return {MERGE: 1}, []  # what is wrong with the warm start is said by its own rule
        if (steps - warm) % cycles:
            return {}, [_no_whole_cycles(steps, warm, cycles)]
        return {MERGE: (steps - warm) // cycles}, []
    what = f"method.warm_start={said['method.warm_start']}"
    if cycles is not None:
        length = _nearest_leaving((1 - share) * steps / cycles, (steps - 1) // cycles)
        if length is None:
            return {}, [
                f"method.cycles={cycles} with {what} does not fit steps={steps}: each cycle and the warm start have "
                f"one update at least. Use steps={cycles + 1} or more, or fewer cycles."
            ]
        return {MERGE: length, WARM: steps - cycles * length}, []
    if every is None:
        return {WARM: _rounded(share * steps)}, []
    number = _nearest_leaving((1 - share) * steps / every, (steps - 1) // every)
    if number is None:
        return {}, [
            f"{what} with method.merge_every_steps={every} does not fit steps={steps}: not one cycle is left. Use "
            f"steps={every + 1} or more, or shorter cycles."
        ]
    return {WARM: steps - number * every}, []


def _nearest_leaving(ideal: Fraction, most: int) -> int | None:
    """The whole number next to `ideal`, from 1 to `most`."""
    return min(max(_rounded(ideal), 1), most) if most >= 1 else None


def _no_whole_cycles(steps: int, warm: int, cycles: int) -> str:
    fits = sorted(
        {n for n in (warm + (steps - warm) // cycles * cycles, warm - (warm - steps) // cycles * cycles) if n > warm}
    )
    rest = steps - warm
    lower = next((n for n in range(cycles - 1, max(cycles - 1000, 0), -1) if rest % n == 0), None)
    higher = next((n for n in range(cycles + 1, min(cycles + 1000, rest) + 1) if rest % n == 0), None)
    counts = " or ".join(str(n) for n in (lower, higher) if n)
    return (
        f"method.cycles={cycles} does not divide the {rest} updates after method.warm_start_steps={warm}. Use "
        f"steps={' or '.join(map(str, fits))}, cycles={counts}, or a share as the warm start (method.warm_start: "
        f"{max(1, round(100 * warm / steps)) if warm else 25}%), which gives way so that cycles are whole."
    )


def _between_restarts(raw: dict[str, Any], steps: int) -> int:
    """Updates, at least, between two restarts of the rate; all of them where there is none."""
    every = _get(raw, "schedule.restart_every_steps") or _get(raw, MERGE)
    lengths = list(every.values()) if isinstance(every, dict) else [every]
    return min(filter(None, map(_above_0, lengths)), default=steps)


def _rounded(number: Fraction) -> int:
    return max(1, floor(number + Fraction(1, 2)))


def _no_share(short: str, value: Any) -> str:
    full = SHORT[short]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and 0 < value < 1:
            return f"{short}={value} is no share: write {short}: {100 * value:g}%."
        return f"{short}={value} is no share, such as 25%. A number of updates is {full}={value}."
    return f"{short}={value!r} is no share. Give a percentage above 0 and below 100, such as 25%, or updates as {full}."


def _get(raw: dict[str, Any], dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    node = raw.get(section)
    return node.get(name) if isinstance(node, dict) else None


def _changed(raw: dict[str, Any], gone: Iterable[str], put: dict[str, Any]) -> dict[str, Any]:
    """A copy with these keys taken out and those put in."""
    copy: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    for section, _, name in (dotted.partition(".") for dotted in gone):
        if isinstance(copy.get(section), dict):
            copy[section].pop(name, None)
    for dotted, value in put.items():
        section, _, name = dotted.partition(".")
        copy.setdefault(section, {})[name] = value
    return copy
