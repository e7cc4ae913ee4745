"""From a YAML file and `key=value` overrides to a checked config, with messages that name key, value, rule and fix.

`load_config("configs/quickstart.yaml", ["steps=300"])` returns a frozen `RunConfig`, or raises one ConfigError
that lists every problem. The command line overrides keys and adds none.
"""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from relora_ray.config import METHOD_KINDS, RunConfig, Section, flatten, nearest
from relora_ray.errors import ConfigError
from relora_ray.location import secret_in_url, shown


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The validated config in `path` with `key=value` overrides applied. Raises ConfigError."""
    return parse_config(read_text(path), overrides, source=str(path))


def read_text(path: str | Path) -> str:
    """Raises ConfigError."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}. Give a YAML file.") from error


def parse_config(text: str, overrides: list[str] | None = None, *, source: str = "config") -> RunConfig:
    return check(parse_mapping(text, overrides, source=source))


def parse_mapping(text: str, overrides: list[str] | None = None, *, source: str = "config") -> dict[str, Any]:
    """The YAML with overrides applied, not yet checked. ConfigError if it is none."""
    try:
        raw = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {_yaml_problem(error)}") from None  # the cause shows the text
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{source} holds {type(raw).__name__}, not a mapping of sections. See configs/quickstart.yaml."
        )
    try:
        json.dumps(raw, default=str)
    except (ValueError, RecursionError, TypeError):
        raise ConfigError(
            f"{source} refers to itself, by an anchor (&) within what it names, or is nested too deep."
        ) from None
    for item in overrides or []:
        _apply_override(raw, item)
    # A section whose lines are all commented out is null in YAML: it has its defaults.
    return {str(name): value for name, value in raw.items() if value is not None or not _is_section(str(name))}


def check(raw: dict[str, Any]) -> RunConfig:
    """The config that a mapping means. ConfigError lists all that is wrong with it."""
    lines = _scalar_problems(raw)
    try:
        cfg = RunConfig.model_validate(raw)
    except ValidationError as error:
        lines += [line for detail in error.errors() for line in _explain(detail)]
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return cfg


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (`010` is text, `13:20` and `no` too, `1e-3` is a number), and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        own = [key for key, _ in node.value if key.tag != f"{_TAG}merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key, key_node in zip(keys, own, strict=True):
            if keys.count(key) > 1:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} is there twice, once at line {line}. Keep one.")
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].removeprefix(_TAG) not in ("int", "float", "bool", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$", re.I),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML takes for something else than text, such as a run's name 1e3."""


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
}


def to_yaml(cfg: RunConfig) -> str:
    """`parse_config` gives it back."""
    return yaml.dump(cfg.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _apply_override(raw: dict[str, Any], item: str) -> None:
    dotted, equals, value = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {item!r} is not of the form key=value, for example steps=300.")
    if not value.strip():
        raise ConfigError(f"override {dotted}= has no value. Give one, or leave it out for the one before.")
    *sections, name = dotted.split(".")
    node = raw
    for section in sections:
        child = node[section] = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise ConfigError(f"override {dotted}=...: {section!r} is a value, not a section.")
        node = child
    try:
        node[name] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        problem = str(error) if type(error) is yaml.YAMLError else "Put it in quotes, or close its brackets."
        raise ConfigError(f"override {dotted}=...: the value is not valid YAML. {problem}") from None
    except RecursionError:
        raise ConfigError(f"override {dotted}=...: the value is not valid YAML: it is nested too deep.") from None


def _yaml_problem(error: yaml.YAMLError | RecursionError) -> str:
    """What is wrong and where, without the text around it, which may be a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark
    return f"{error.problem}" + (f" at line {mark.line + 1}, column {mark.column + 1}." if mark else ".")


def _explain(detail: Any) -> list[str]:
    """One pydantic error as lines of key, value, rule and fix."""
    loc = [str(part) for part in detail["loc"]]
    # A tagged union adds its tag to the location: ("method", "relora", "lora_rank").
    keys = [part for i, part in enumerate(loc) if not (i == 1 and loc[0] == "method" and part in METHOD_KINDS)]
    dotted = ".".join(keys)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # one of ours, complete as it is
        return message.splitlines()
    if detail["type"] == "secret_option":  # its value must not be shown
        return [f"{dotted}.{message}"]
    if detail["type"] == "field_rule":
        return [f"{dotted}={shown(detail['input'])} {message}"]
    section = _section_at(loc[:-1])
    if detail["type"] == "extra_forbidden":
        known = list(section.model_fields) if section else []
        hint = nearest(keys[-1], known)
        if keys[0] == "method" and (owners := [k for k, c in METHOD_KINDS.items() if keys[-1] in c.model_fields]):
            hint = f" It belongs to kind {' and '.join(owners)}: give the whole section, as in 'method={{kind: full}}'."
        return [f"unknown key {dotted}={_number(detail['input'])}.{hint} Known here: {', '.join(known)}."]
    field = section.model_fields.get(keys[-1]) if section and keys else None
    doc = " ".join((field.description or "").split()) if field else ""
    if detail["type"] == "missing":
        return [f"{dotted} is missing: it has no default. Set {dotted}=...{'  ' + doc if doc else ''}"]
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = detail["input"].get("kind") if isinstance(detail["input"], dict) else detail["input"]
        return [
            f"{dotted}.kind={given!r} is not a method. Use one of {', '.join(METHOD_KINDS)}."
            f"{nearest(str(given), list(METHOD_KINDS))}"
        ]
    hidden = "storage_options" in keys or isinstance(detail["input"], (dict, list))
    value = _number(detail["input"]) if hidden else shown(detail["input"])
    return [f"{dotted}={value}: {message[0].lower()}{message[1:]}.{'  ' + doc if doc else ''}"]


def _number(value: Any) -> str:
    """A number as it is, and *** for what may hold a secret where nobody knows what it is."""
    return repr(value) if isinstance(value, (int, float)) else "***"


def _scalar_problems(raw: dict[str, Any]) -> list[str]:
    """Values that pydantic would take and nobody can have meant: secrets, and true where a number belongs."""
    problems = []
    method = raw.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    for dotted, value in flatten(raw).items():
        if isinstance(value, str) and (problem := secret_in_url(value)):
            problems.append(f"{dotted}={shown(value)} {problem}")
        *path, name = dotted.split(".")
        section = _section_at([path[0], str(kind), *path[1:]] if path[:1] == ["method"] else path)
        field = section.model_fields.get(name) if section else None
        if isinstance(value, bool) and field and bool not in _types_in(field.annotation):
            problems.append(f"{dotted}={value} is neither a number nor a name. Give the value itself.")
    return problems


def _section_at(loc: list[str]) -> type[Section] | None:
    """The config class at a location, or None where the path leaves the known classes."""
    section: type[Section] = RunConfig
    for part in loc:
        if part in METHOD_KINDS and section is RunConfig:
            section = METHOD_KINDS[part]
            continue
        field = section.model_fields.get(part)
        if field is None:
            return None
        if part == "method":
            continue
        found = [t for t in _types_in(field.annotation) if isinstance(t, type) and issubclass(t, Section)]
        if not found:
            return None
        section = found[0]
    return section


def _is_section(name: str) -> bool:
    field = RunConfig.model_fields.get(name)
    return field is not None and (name == "method" or get_origin(field.annotation) is dict or bool(_section_at([name])))


def _types_in(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]
