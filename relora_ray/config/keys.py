"""All keys of a run's config: where each is, of what type, its default and what it is for.

Read from the sections themselves, so that nothing is written twice. The messages for unknown keys, `launch --keys`, the
schema for editors and docs/config.md come from here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relora_ray.config.lengths import DOCS, SHARES, SHORT
from relora_ray.config.method import MethodConfig, config_class, kinds
from relora_ray.config.run import RunConfig
from relora_ray.config.section import Section


@dataclass(frozen=True)
class Key:
    dotted: str
    type: str
    """In words: whole number, number, text, true or false, one of a, b, c; a list of ..."""
    default: str
    """As YAML would have it; "required" if there is none; empty if it stands for another key."""
    doc: str
    kind: str = ""
    """Of a method's own keys: whose."""

    @property
    def leaf(self) -> str:
        return self.dotted.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.dotted.rpartition(".")[0]


@cache
def all_keys() -> tuple[Key, ...]:
    """Of all sections, in the order of the classes; those of every installed method, each with its kind."""
    found = [key for key in _keys_of(RunConfig, "") if not key.dotted.startswith("method")]
    for kind, section in method_sections().items():
        found += [Key(k.dotted, k.type, k.default, k.doc, kind) for k in _keys_of(section, "method.")]
    return tuple(found)


def sweep_keys(section: type[Section]) -> list[Key]:
    """Of the section `sweep`, which is read elsewhere."""
    return list(_keys_of(section, "sweep."))


def method_sections() -> dict[str, type[MethodConfig]]:
    """By kind: of all methods whose package can be imported."""
    found = {}
    for kind in kinds():
        try:
            found[kind] = config_class(kind)
        except ValueError:
            continue
    return found


def _keys_of(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None and inner is not MethodConfig:
            yield from _keys_of(inner, f"{prefix}{name}.")
            continue
        yield Key(f"{prefix}{name}", type_text(field.annotation, field), default_text(field), doc_of(field))
        for short in (s for s, full in SHORT.items() if full == f"{prefix}{name}"):
            text = "share, such as 25%" if short in SHARES else "whole number above 0"
            yield Key(short, text, "", DOCS[short])


def doc_of(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else None
    return plain(value)


def plain(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}"
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def type_text(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in words, with the bounds that its field gives."""
    origin = get_origin(annotation)
    if origin is Annotated:
        bounds = _bounds(get_args(annotation)[1:])
        inner = type_text(get_args(annotation)[0])
        return f"{inner}{bounds}" if bounds not in inner else inner
    bounds = _bounds(field.metadata) if field is not None else ""
    if origin in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not type(None)]
        return " or ".join(dict.fromkeys(type_text(part) + (bounds if part in (int, float) else "") for part in parts))
    if origin is Literal:
        values = [plain(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin in (tuple, list):
        return f"list of {_many(type_text(get_args(annotation)[0]))}"
    if origin is dict:
        into = get_args(annotation)
        return "plan by step" if into == (int, int) else "keys and values"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, "keys and values") + bounds


def _many(text: str) -> str:
    words = {"whole number": "whole numbers", "number": "numbers", "text": "texts"}
    return next((many + text.removeprefix(one) for one, many in words.items() if text.startswith(one)), text)


def _bounds(metadata: Any) -> str:
    """` above 0`, ` from 0 to 1`, ... of what pydantic keeps of Field(gt=0)."""
    found: dict[str, Any] = {}
    for item in metadata:
        for constraint in getattr(item, "metadata", None) or [item]:
            for name in ("gt", "ge", "lt", "le"):
                if (value := getattr(constraint, name, None)) is not None:
                    found[name] = value
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return "".join(f", {words[name]} {value:g}" for name, value in found.items()).replace(", ", " ", 1)


def _section_in(annotation: Any) -> type[Section] | None:
    return next((t for t in types_in(annotation) if isinstance(t, type) and issubclass(t, Section)), None)


def types_in(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]


def section_of(path: list[str], method: type[MethodConfig] | None = None) -> type[Section] | None:
    """The config class at a location, or None where the path leaves the known classes. `method`: of its section."""
    section: type[Section] = RunConfig
    for part in path:
        field = section.model_fields.get(part)
        found = _section_in(field.annotation) if field is not None else None
        if found is MethodConfig:
            found = method
        if found is None:
            return None
        section = found
    return section


def section_at(dotted: str) -> type[Section] | None:
    """The section that a dotted key names, for the first kind of method that has it; None if it is none."""
    path = dotted.split(".")
    methods = list(method_sections().values()) if path[0] == "method" else [None]
    return next((section for method in methods if (section := section_of(path, method))), None)


def takes_list(dotted: str) -> bool:
    """Whether a key's own value may be a list, in any kind of method."""
    return any(key.type.startswith("list") or " or list" in key.type for key in all_keys() if key.dotted == dotted)
