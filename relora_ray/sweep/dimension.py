"""What a sweep's space is made of: lists, ranges, and rows, which are named choices of a whole section.

    method.lora_rank: [4, 16, 64]                                       a list of values
    optimizer.learning_rate: {min: 1.0e-4, max: 1.0e-2, log: true}      a range
    method:                                                             rows
      - {kind: full}
      - {kind: lora, lora_rank: [8, 32]}
      - {name: relora, kind: relora, cycles: 4, schedule: {kind: jagged_cosine, restart_warmup: 10%}}

A row's keys are those of its section, or, where they begin with the name of another, that one's. It changes the config
as `key=value` does: what it does not name stays as the config has it, null is a key's default, and with another
`method.kind` what the two kinds share is kept. A list or a range in a row is a space of its own. A key that takes a
list (`target_modules`) has that list as its value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from relora_ray.config import RunConfig, Section, nearest, split_step
from relora_ray.config.keys import method_sections, section_at, takes_list
from relora_ray.config.lengths import SHORT
from relora_ray.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Value = int | float | str | bool
Settings = dict[str, Value]
"""One point: values by dotted key, and names of rows by section."""

DECIDED = (
    "name", "storage", "storage_options", "seed", "train.stop_after_steps", "train.eval_", "cluster.", "checkpoint.",
    "data.path", "data.fingerprint", "data.validation", "cluster", "checkpoint", "data.storage_options", "tracking",
)  # fmt: skip
"""Keys that a sweep sets itself, that make no difference to a result, or that decide how points are compared."""


class Range(Section):
    min: float
    max: float
    log: bool = False
    """Uniform in the logarithm."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.min < self.max:
            raise ValueError(f"min={self.min:g} is not less than max={self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"min={self.min:g} with log: true must be above 0")
        if self.whole and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError(f"min={self.min:g} and max={self.max:g} with whole: true must be whole numbers")
        return self

    def at(self, share: float) -> int | float:
        """From `min` at 0 to `max` at 1."""
        if self.log:
            value = math.exp(math.log(self.min) + share * (math.log(self.max) - math.log(self.min)))
        else:
            value = self.min + share * (self.max - self.min)
            if self.whole:  # each equally often, the ends too
                value = math.floor(self.min + share * (self.max - self.min + 1))
        return self.nearest(value)

    def nearest(self, value: float) -> int | float:
        """What is in the range; with six digits."""
        value = min(max(value, self.min), self.max)
        return round(value) if self.whole else float(f"{value:.6g}")


Plain = Annotated[tuple[Value, ...], Field(min_length=1)] | Range


class Row(Section):
    """One choice of a whole section."""

    name: str
    set: dict[str, Any]
    """By dotted key of the run's config; None for its default."""
    space: dict[str, Plain]
    """The row's own, by dotted key."""


Dimension = Annotated[tuple[Row, ...], Field(min_length=1)] | Plain


def is_rows(dimension: Dimension) -> TypeIs[tuple[Row, ...]]:
    return isinstance(dimension, tuple) and isinstance(dimension[0], Row)


def row_of(dimension: tuple[Row, ...], name: Value) -> Row:
    return next(row for row in dimension if row.name == name)


def names_of(space: Mapping[str, Dimension]) -> list[str]:
    """All that points may have settings for, in order: keys and sections, each section's rows' own keys behind it."""
    found: dict[str, None] = {}
    for name, dimension in space.items():
        found[name] = None
        if is_rows(dimension):
            found |= dict.fromkeys(key for row in dimension for key in row.space)
    return list(found)


def branches(space: Mapping[str, Dimension]) -> Iterator[dict[str, Plain]]:
    """The space without rows, one for each combination of them: a row is a list of its name, and has its own space
    behind it."""
    choices: list[list[dict[str, Plain]]] = []
    for name, dimension in space.items():
        if is_rows(dimension):
            choices.append([{name: (row.name,), **row.space} for row in dimension])
        else:
            choices.append([{name: dimension}])
    for parts in product(*choices):
        yield {name: dimension for part in parts for name, dimension in part.items()}


def walk(space: Mapping[str, Dimension], choose: Callable[[str, str, Plain], Value]) -> Settings:
    """A point, each of whose values `choose(id, name, dimension)` gives; `id` tells rows' own keys apart."""
    point: Settings = {}
    for name, dimension in space.items():
        if not is_rows(dimension):
            point[name] = choose(name, name, dimension)
            continue
        point[name] = chosen = choose(name, name, tuple(row.name for row in dimension))
        for inner, plain in row_of(dimension, chosen).space.items():
            point[inner] = choose(f"{name}[{chosen}].{inner}", inner, plain)
    return point


def num_combinations(plain: Mapping[str, Plain]) -> float:
    return math.prod(
        len(d) if isinstance(d, tuple) else d.max - d.min + 1 if d.whole else math.inf for d in plain.values()
    )


def read_space(raw: Any) -> dict[str, Dimension]:
    """What `sweep.space` says. ConfigError with all that is wrong with it, rows by their names."""
    problems: list[str] = []
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(
            "sweep.space must say what is tried, by key of the run's config: method.lora_rank: [4, 16], or "
            "method: [{kind: full}, {kind: lora, lora_rank: 8}]."
        )
    space: dict[str, Dimension] = {}
    for name, value in _flat(raw, ""):
        where = f"sweep.space.{name}"
        if f"{name}.".startswith(DECIDED) or name.startswith(DECIDED):
            problems.append(f"{where} is not for a sweep to search. Remove it.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (dict, Row)) for item in value):
            space[name] = _read_rows(name, list(value), problems)
        else:
            space[name] = _read_plain(where, name, value, problems)
    problems = problems or list(_overlaps(space))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return space


def _flat(raw: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """`{method: {lora_rank: [1]}}` is `{method.lora_rank: [1]}`: the command line's dots make it so."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and not value.keys() & set(Range.model_fields):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _read_plain(where: str, name: str, value: Any, problems: list[str]) -> Plain:
    """A list or a range; on a mistake something of the kind, and a line in `problems`."""
    problem = _range_problem(where, value) if isinstance(value, dict) else _list_problem(where, name, value)
    if not problem and isinstance(value, dict):
        try:
            return Range(**value)
        except ValueError as error:
            problem = f"{where}: {_first_words(error)}."
    if problem:
        problems.append(problem)
        return (0,)
    return tuple(value)


_RANGE = "A range is {min: 1, max: 8}, and log: true or whole: true besides."


def _range_problem(where: str, value: dict[Any, Any]) -> str:
    known = list(Range.model_fields)
    if unknown := [str(key) for key in value if key not in known]:
        return f"{where} has a range with {unknown[0]}, which it does not know.{nearest(unknown[0], known)} {_RANGE}"
    for key in ("min", "max"):
        number = value.get(key)
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            return f"{where} has a range whose {key} is {'no number' if key in value else 'missing'}. {_RANGE}"
        if not math.isfinite(number):
            return f"{where} has a range without an end: min and max must be finite."
    if wrong := [key for key in ("log", "whole") if not isinstance(value.get(key, False), bool)]:
        return f"{where} has a range with {wrong[0]}={value[wrong[0]]!r}: it is true or false."
    return ""


def _list_problem(where: str, name: str, value: Any) -> str:
    if value is None:
        return f"{where} has no values: list them, [1, 2], or remove it."
    if not isinstance(value, (list, tuple)):
        return (
            f"{where}={value!r} is one value, and nothing to choose from. List values, [{value}, ...], or write "
            f"{name}: {value} into the config itself."
        )
    if not value:
        return f"{where}=[] has no value. List at least one."
    if section_at(name) and all(isinstance(item, str) for item in value):
        return f"{where}={list(value)}: {name} is a section. Write its rows as {name}: [{{kind: {value[0]}}}, ...]."
    if odd := [item for item in value if not isinstance(item, (int, float, str, bool))]:
        return f"{where} lists {odd[0]!r}, which is no number, text or truth value. Only a section has rows of keys."
    if endless := [item for item in value if isinstance(item, float) and not math.isfinite(item)]:
        return f"{where} lists {endless[0]!r}, which is not finite. Remove it."
    if len(set(value)) < len(value):
        return f"{where}={list(value)} has a value twice: every run counts once. Remove one."
    return ""


def _first_words(error: ValueError) -> str:
    details: Any = getattr(error, "errors", lambda: [{"msg": str(error)}])()
    return str(details[0]["msg"]).removeprefix("Value error, ")


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


def _read_rows(section: str, items: list[Any], problems: list[str]) -> tuple[Row, ...]:
    where = f"sweep.space.{section}"
    if not section_at(section):
        problems.append(
            f"{where} lists keys and values, and such rows are for whole sections: method, optimizer, schedule, "
            f"model and train. List plain values."
        )
        return (Row(name="?", set={}, space={}),)
    if odd := [item for item in items if not isinstance(item, dict)]:
        hint = f" Write it as {{kind: {odd[0]}}}." if isinstance(odd[0], str) else ""
        problems.append(f"{where} row {items.index(odd[0]) + 1} is {odd[0]!r}, and not keys and values.{hint}")
        return (Row(name="?", set={}, space={}),)
    found = []
    for item, name in zip(items, _row_names(where, items, problems), strict=True):
        at = f"{where} row {name!r}"
        settings, space = dict[str, Any](), dict[str, Plain]()
        if not item.keys() - {"name"}:
            problems.append(f"{at} has no key besides its name. Give what it sets, such as kind.")
        for key, value in item.items():
            if key != "name":
                _read_setting(at, section, str(key), value, settings, space, problems)
        found.append(Row(name=name, set=settings, space=space))
    return tuple(found)


def _row_names(where: str, items: list[dict[str, Any]], problems: list[str]) -> list[str]:
    """As given, or else the kind, with the settings in which rows of one kind differ."""
    names = []
    for number, item in enumerate(items, 1):
        if "name" in item:
            if not isinstance(item["name"], str) or not NAME.fullmatch(item["name"]):
                problems.append(
                    f"{where} row {number} has name={item['name']!r}. A name is letters, digits and . _ = + - within."
                )
            names.append(str(item["name"]))
            continue
        alike = [other for other in items if "name" not in other and other.get("kind") == item.get("kind")]
        keys = dict.fromkeys(key for other in alike for key in other)
        differing = [k for k in keys if k in item and any(k not in o or o[k] != item[k] for o in alike)]
        parts = [str(item["kind"])] if item.get("kind") is not None else []
        parts += [f"{str(key).rpartition('.')[2]}={_word(item[key])}" for key in differing]
        if len(alike) == 1 and not parts:
            parts = [f"{str(key).rpartition('.')[2]}={_word(value)}" for key, value in item.items()]
        names.append(re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join(parts)).strip("-.") or f"row-{number}")
    for number, name in enumerate(names, 1):
        if name in names[: number - 1]:
            first = names.index(name) + 1
            problems.append(
                f"{where} rows {first} and {number} are both {name!r}. Give each a name of its own: {{name: ..., ...}}."
            )
    return names


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}-{_word(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "-".join(map(_word, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]


def _read_setting(
    at: str, section: str, key: str, value: Any, settings: dict[str, Any], space: dict[str, Plain], problems: list[str]
) -> None:
    """One key of a row: a value, a section's keys, or a list or range of the row's own."""
    dotted = _absolute(section, key)
    if dotted.startswith(DECIDED):
        problems.append(f"{at} sets {dotted}, which is not for a sweep to choose. Remove it there.")
    elif isinstance(value, dict) and value.keys() & {"min", "max"}:
        space[dotted] = _read_plain(f"{at}, {dotted}", dotted, value, problems)
    elif isinstance(value, dict) and section_at(dotted):
        for inner, v in value.items():
            _read_setting(at, section, f"{dotted}.{inner}", v, settings, space, problems)
    elif isinstance(value, list) and not takes_list(dotted):
        space[dotted] = _read_plain(f"{at}, {dotted}", dotted, value, problems)
    elif dotted in settings or dotted in space:
        problems.append(f"{at} gives {dotted} twice. Keep one.")
    else:
        settings[dotted] = _from_anywhere(value) if dotted in ("model.huggingface", "model.init_from") else value


def _from_anywhere(place: Any) -> Any:
    """A folder as trials find it, which run in folders of their own."""
    if not isinstance(place, str) or "://" in place:
        return place
    there = os.path.expanduser(place)
    return os.path.abspath(there) if os.path.exists(split_step(there)[0]) else place


def _absolute(section: str, key: str) -> str:
    """The dotted key that a row's key is: the section's own, or another's by its full name."""
    first = key.partition(".")[0]
    known = section_at(section)
    own = known is not None and first in known.model_fields
    if section.partition(".")[0] == "method":
        own = own or any(first in found.model_fields for found in method_sections().values())
    return key if not own and first in RunConfig.model_fields else f"{section}.{key}"


def _overlaps(space: Mapping[str, Dimension]) -> Iterator[str]:
    """Keys that two parts of the space would both decide."""
    seen: list[tuple[str, str]] = []
    for name, dimension in space.items():
        mine = [(name, f"sweep.space.{name}")] if not is_rows(dimension) else []
        for row in dimension if is_rows(dimension) else ():
            mine += [(key, f"sweep.space.{name} row {row.name!r}") for key in (*row.set, *row.space)]
        for key, where in mine:
            for other, theirs in seen:
                short, long = sorted((SHORT.get(key, key), SHORT.get(other, other)), key=len)
                if long == short or long.startswith(f"{short}."):
                    yield f"{where} and {theirs} both decide {long}. Keep it in one of them."
        seen += mine
