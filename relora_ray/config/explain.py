"""What is wrong with a config, in words: key, value, rule and fix of what pydantic found.

A key that is not known is looked for in all sections, and by the names that other programs give it. A name of theirs is
never taken for ours: the message says what the key is here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from relora_ray.config.aliases import ALIASES
from relora_ray.config.keys import Key, all_keys, doc_of, plain, section_of, types_in
from relora_ray.config.method import MethodConfig
from relora_ray.config.section import Section, nearest
from relora_ray.location import shown

RULES = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_pattern_mismatch": "does not match the pattern {pattern}",
    "tuple_type": "must be a list",
    "dict_type": "must be keys and values",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "too_short": "must have at least {min_length}",
}
"""By pydantic's type of error."""
_BRANCH = re.compile(r"(constrained-)?(int|float|str|bool)$|(dict|tuple|list|literal|function-\w+|nullable|Range)\b.*")
"""What pydantic puts into a location for a branch of a union: no key."""


def explain(
    detail: Any, method: type[MethodConfig] | None = None, at: type[Section] | None = None, prefix: str = ""
) -> list[str]:
    """One pydantic error as lines. `method`: the class of the config's method. `at`, `prefix`: of another section than
    a run's config, and what it is called."""
    keys = key_of(detail)
    dotted = ".".join([prefix, *keys] if prefix else keys)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "complete" or (
        detail["type"] == "value_error" and (not prefix or not keys)
    ):  # ours, as they are
        return message.splitlines()
    if detail["type"] == "secret_option":  # its value must not be shown
        return [f"{dotted}.{message}"]
    if detail["type"] == "field_rule":
        return [f"{dotted}={shown(detail['input'])} {message}"]
    section = _inside(at, keys[:-1]) if at is not None else section_of(keys[:-1], method)
    if detail["type"] == "extra_forbidden":
        return [_unknown(dotted, detail["input"], section, method, prefix)]
    field = section.model_fields.get(keys[-1]) if section and keys else None
    doc = f"  {doc_of(field)}" if field and field.description else ""
    if detail["type"] == "missing":
        return [f"{dotted} is missing: it has no default. Set {dotted}=...{doc}"]
    hidden = "storage_options" in keys or isinstance(detail["input"], (dict, list))
    value = _number(detail["input"]) if hidden else shown(detail["input"])
    rule = _rule(detail, message)
    return [f"{dotted}={value} {rule}{'' if rule.endswith('?') else '.'}{doc}"]


def key_of(detail: Any) -> list[str]:
    """Where a pydantic error is, less the branch of a union that it was met in."""
    keys = [str(part) for part in detail["loc"]]
    while len(keys) > 1 and _BRANCH.fullmatch(keys[-1]):
        keys.pop()
    return keys


def _rule(detail: Any, message: str) -> str:
    context = detail.get("ctx") or {}
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        given = detail["input"]
        hint = nearest(given, allowed) if isinstance(given, str) else ""
        listed = ", ".join(plain(name) for name in allowed)
        return f"must be one of {listed}" + (f".{hint}" if hint else "")
    if template := RULES.get(detail["type"]):
        return template.format(**context)
    return f"is not taken: {message[0].lower()}{message[1:]}"


def _inside(section: type[Section], path: Sequence[str]) -> type[Section] | None:
    for part in path:
        field = section.model_fields.get(part)
        found = _sections(field.annotation) if field else []
        if not found:
            return None
        section = found[0]
    return section


def _sections(annotation: Any) -> list[type[Section]]:
    return [t for t in types_in(annotation) if isinstance(t, type) and issubclass(t, Section)]


def _number(value: Any) -> str:
    """A number as it is, and *** for what may hold a secret where nobody knows what it is."""
    return repr(value) if isinstance(value, (int, float)) else "***"


def _unknown(
    dotted: str, value: Any, section: type[Section] | None, method: type[MethodConfig] | None, prefix: str
) -> str:
    """What a key that is not known may have been meant as."""
    path, _, leaf = dotted.rpartition(".")
    known = list(section.model_fields) if section else []
    listed = f" Known here: {', '.join(known)}." if known else ""
    if prefix:
        return f"unknown key {dotted}={_number(value)}.{nearest(leaf, known)}{listed}"
    return f"unknown key {dotted}={_number(value)}.{_meant(path, leaf, known, method)}{listed}"


def _meant(path: str, leaf: str, known: list[str], method: type[MethodConfig] | None) -> str:
    mine = method.model_fields["kind"].default if method else ""
    others = [key for key in all_keys() if key.section != path or (path == "method" and key.kind != mine)]
    usable = list(dict.fromkeys(key.dotted for key in others if key.kind in ("", mine)))
    exact = [dotted for dotted in usable if dotted.rpartition(".")[2] == leaf]
    owners = sorted({key.kind for key in others if key.leaf == leaf and key.kind not in ("", mine)})
    here = nearest(leaf, known)
    if exact and leaf != "kind":
        return f" It is {' or '.join(exact[:3])}."
    if said := ALIASES.get(leaf.lower().replace("-", "_")):
        return f" {said}"
    if owners and path in ("", "method"):
        return (
            f"{here if path else ''} It belongs to kind {' and '.join(owners)}: method.kind={owners[0]} makes the "
            f"section one of that."
        )
    return here if here else _nearest_elsewhere(leaf, others, usable)


def _nearest_elsewhere(leaf: str, others: Sequence[Key], usable: Sequence[str]) -> str:
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(usable)}
    close = nearest(leaf, list(leaves), 0.75)
    name = re.search(r"'([^']+)'", close)
    return f" Did you mean {leaves[name[1]]!r}?" if name else ""
