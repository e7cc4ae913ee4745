"""From a YAML file and `key=value` overrides to a checked config, with messages that name key, value, rule and fix.

`load_config("configs/quickstart.yaml", ["steps=300"])` returns a frozen `RunConfig`, or raises one ConfigError
that lists every problem. The command line overrides keys and adds none.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from relora_ray.config.edit import drop, put
from relora_ray.config.explain import explain, key_of
from relora_ray.config.keys import section_of, types_in
from relora_ray.config.lengths import PARTNERS, SHORT, given, number_of_steps, resolve
from relora_ray.config.method import MethodConfig, config_class
from relora_ray.config.run import RunConfig
from relora_ray.config.section import flatten, nearest
from relora_ray.errors import ConfigError
from relora_ray.location import secret_in_url, shown

logger = logging.getLogger(__name__)


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
    raw = _unshared(raw)
    apply_overrides(raw, overrides or [])
    # A section whose lines are all commented out is null in YAML: it has its defaults.
    return {str(name): value for name, value in raw.items() if value is not None or not _is_section(str(name))}


def _unshared(node: Any) -> Any:
    """A copy in which what an alias (*) names a second time is of its own: an override is of one key."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def check(raw: dict[str, Any]) -> RunConfig:
    """The config that a mapping means. ConfigError lists all that is wrong with it."""
    method = _method_section(raw)
    unresolved = {tuple(SHORT[short].split(".")) for short in given(raw)}
    raw, lines = resolve(raw, method.model_fields if method else ())
    if not lines and number_of_steps(raw) is not None:
        unresolved = set()
    lines += _scalar_problems(raw, method)
    try:
        cfg = RunConfig.model_validate(raw)
    except ValidationError as error:
        found = dict[tuple[str, ...], Any]()
        for detail in error.errors():  # of a union the first branch says enough
            found.setdefault((*key_of(detail), detail["type"] if detail["type"] == "value_error" else ""), detail)
        # What follows from a share that could not be made a number is no mistake of its own.
        kept = [d for d in found.values() if not (unresolved and (d["loc"] == () or d["loc"] in unresolved))]
        lines += [line for detail in kept for line in explain(detail, method)]
        if not lines:
            lines = [line for detail in found.values() for line in explain(detail, method)]
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


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Put `key=value` in, and take `~key` out, in place. What another `method.kind` drops is told on the log.
    ConfigError for what is neither."""
    settings: dict[str, Any] = {}
    for item in overrides:
        if item.startswith("~"):
            if "=" in item:
                raise ConfigError(f"override {item.partition('=')[0]}=... : ~key drops a key, and takes no value.")
            names = [name for name in (item[1:], PARTNERS.get(item[1:])) if name]
            if any(_overlap(name, other) for name in names for other in settings):
                _put(raw, settings)
                settings = {}
            gone = [name for name in names if drop(raw, name) or settings.pop(name, None) is not None]
            if not gone:
                raise ConfigError(
                    f"override {item} drops nothing: the config does not set that, so that it has its default."
                    f"{nearest(item[1:], list(flatten(raw)))}"
                )
            continue
        dotted, value = _read_override(item)
        if any(_overlap(dotted, other) for other in settings):
            _put(raw, settings)  # one lies in the other: in the order in which they were given
            settings = {}
        settings.pop(dotted, None)
        settings[dotted] = value
    _put(raw, settings)


def _overlap(key: str, other: str) -> bool:
    """Whether one lies in the other."""
    return key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _put(raw: dict[str, Any], settings: dict[str, Any]) -> None:
    try:
        dropped = put(raw, settings)
    except ValueError as error:
        raise ConfigError(f"override {error}") from None
    if dropped:
        logger.warning(
            "method.kind=%s: dropped what belongs to the kind before, %s. What the kinds share stays, all else has its "
            "default.",
            settings["method.kind"],
            ", ".join(dropped),
        )


def _read_override(item: str) -> tuple[str, Any]:
    dotted, equals, value = item.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {item!r} is not of the form key=value, for example steps=300.")
    if not value.strip():
        raise ConfigError(f"override {dotted}= has no value. Give one, or ~{dotted} for its default.")
    if re.search(r"\s#", value) and value.strip()[0] not in "'\"":
        raise ConfigError(
            f"override {dotted}=...: YAML takes what follows a blank and # for a comment. Put it in quotes."
        )
    try:
        return dotted, yaml.load(value, _Loader)
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


def _method_section(raw: Any) -> type[MethodConfig] | None:
    """The class of the section `method` of what a file says, if there is such a kind."""
    method = raw.get("method")
    try:
        return config_class(str(method.get("kind"))) if isinstance(method, dict) else None
    except ValueError:
        return None


def _scalar_problems(raw: dict[str, Any], method: type[MethodConfig] | None) -> list[str]:
    """Values that pydantic would take and nobody can have meant: secrets, and true where a number belongs."""
    problems = []
    for dotted, value in flatten(raw).items():
        if isinstance(value, str) and (problem := secret_in_url(value)):
            problems.append(f"{dotted}={shown(value)} {problem}")
        *path, name = dotted.split(".")
        section = section_of(path, method)
        field = section.model_fields.get(name) if section else None
        if isinstance(value, bool) and field and bool not in types_in(field.annotation):
            problems.append(f"{dotted}={value} is neither a number nor a name. Give the value itself.")
    return problems


def _is_section(name: str) -> bool:
    field = RunConfig.model_fields.get(name)
    return field is not None and (name == "method" or get_origin(field.annotation) is dict or bool(section_of([name])))
