"""Changes of a config before it is checked: keys put in, dropped, and a section that becomes another kind.

All work on the mapping that a YAML file is. The command line's `key=value` and `~key`, and the rows of a sweep, are
these. What is put in takes the place of the key that says the same in another way: `method.cycles` that of
`method.merge_every_steps` (lengths.py has the pairs).
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import get_annotations
from typing import Any

from relora_ray.config.lengths import PARTNERS
from relora_ray.config.method import MethodConfig, config_class


def put(raw: dict[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Put values in by dotted key, in place. Returns what a change of `method.kind` dropped, as text. ValueError, which
    begins with the key, if a section on the way is a value."""
    dropped = []
    if isinstance(kind := settings.get("method.kind"), str) and "method" not in settings:
        dropped = switch_method(raw, kind)
    for dotted in settings:
        partner = PARTNERS.get(dotted)
        if partner is not None and partner not in settings:
            drop(raw, partner)
    for dotted, value in settings.items():
        *sections, name = dotted.split(".")
        node = raw
        for section in sections:
            child = node[section] = {} if node.get(section) is None else node[section]
            if not isinstance(child, dict):
                raise ValueError(f"{dotted}=...: {section!r} is a value, not a section.")
            node = child
        node[name] = value
    return dropped


def drop(raw: dict[str, Any], dotted: str) -> bool:
    """Take a key, or a whole section, out: it has its default. Whether it was there."""
    *sections, name = dotted.split(".")
    node: Any = raw
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name not in node:
        return False
    del node[name]
    return True


def switch_method(raw: dict[str, Any], kind: str) -> list[str]:
    """Make the section `method` one of another kind: keys that both kinds have from the same base stay, all others go.

    Two kinds may have a key of one name that means two things: `alpha` scales LoRA's adapters by alpha / lora_rank, and
    GaLore's steps by alpha. So a key is shared only if both have it from one class. Returns what went, as key=value.
    Does nothing where one of the kinds is not known: the check says so.
    """
    method = raw.get("method")
    if not isinstance(method, dict) or method.get("kind") in (None, kind):
        return []
    try:
        before, after = config_class(str(method["kind"])), config_class(kind)
    except ValueError:
        return []
    kept = {
        key
        for key in before.model_fields.keys() & after.model_fields.keys()
        if _owner(before, key) is _owner(after, key)
    }
    kept |= {key for key, full in _SHORT.items() if full in kept}
    known = before.model_fields.keys() | _SHORT.keys()  # what nobody knows stays, and is refused
    gone = [key for key in method if key != "kind" and key in known and key not in kept]
    said = [f"method.{key}={method[key]}" for key in gone]
    raw["method"] = {key: value for key, value in method.items() if key not in gone} | {"kind": kind}
    return said


_SHORT = {"warm_start": "warm_start_steps", "cycles": "merge_every_steps"}


def _owner(section: type[MethodConfig], key: str) -> type:
    """The class that says what the key means."""
    return next(c for c in section.__mro__ if key in get_annotations(c))
