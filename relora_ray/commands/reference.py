"""Every key of a config: as lines for a terminal, as docs/config.md, and as a JSON schema for editors.

    python -m relora_ray.commands.reference docs/config.md     writes the page anew; a test holds it to the sections

All is read from the sections' own docstrings (config/keys.py).
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from relora_ray.config import RunConfig, nearest
from relora_ray.config.keys import Key, all_keys, method_sections, sweep_keys
from relora_ray.config.lengths import DOCS, SHARES, SHORT
from relora_ray.config.method import BUILT_IN
from relora_ray.errors import ConfigError
from relora_ray.sweep.space import SweepConfig

WIDTH = 100
SECTIONS = {
    "": "The run",
    "model": "model: what is trained",
    "data": "data: what it reads",
    "method": "method: how weights are trained",
    "optimizer": "optimizer: AdamW",
    "schedule": "schedule: the learning rate",
    "train": "train: how an update is made",
    "checkpoint": "checkpoint: what is stored, and how often",
    "cluster": "cluster: processes and machines",
    "tracking": "tracking: who else is told",
    "sweep": "sweep: many runs",
}


def lines(section: str | None) -> Iterator[str]:
    """The keys of a section, or of all (None), with type, default and docstring. ConfigError if there is no such."""
    found = list(_keys())
    if section is not None:
        wanted = [key for key in found if key.dotted == section or key.dotted.startswith(f"{section}.")]
        if not wanted:
            known = [name for name in SECTIONS if name]
            raise ConfigError(
                f"{section!r} is neither a section nor a key.{nearest(section, [*known, *(k.dotted for k in found)])} "
                f"The sections are {', '.join(known)}."
            )
        found = wanted
    for dotted, same in _together(found):
        kinds = f" ({', '.join(k.kind for k in same)})" if same[0].kind else ""
        yield f"{dotted}: {same[0].type}{_default(same[0])}{kinds}"
        yield from textwrap.wrap(same[0].doc, WIDTH, initial_indent="    ", subsequent_indent="    ")


def _keys() -> Iterator[Key]:
    yield from all_keys()
    yield from sweep_keys(SweepConfig)


def _together(keys: Sequence[Key]) -> Iterator[tuple[str, list[Key]]]:
    """Keys that several kinds of method have from one class are one."""
    found: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        found.setdefault((key.dotted, key.doc, key.default), []).append(key)
    yield from ((dotted, same) for (dotted, _, _), same in found.items() if same[0].dotted != "method.kind")
    if kinds := [key for key in keys if key.dotted == "method.kind"]:
        listed = ", ".join(key.kind for key in kinds)
        yield "method.kind", [Key("method.kind", f"one of {listed}", "required", "How weights are trained.")]


def _default(key: Key) -> str:
    return {"required": ", required", "": ""}.get(key.default, f", default {key.default}")


def page() -> str:
    """docs/config.md: what comes with the package."""
    out = [
        "# Config keys\n",
        "Every key of a run's YAML, from the docstrings of the sections. `relora-ray launch --keys [SECTION]` prints",
        "the same, with the methods that are installed besides. *Steps* are optimizer updates. A key in *italics* is",
        "given in place of the one above it.\n",
    ]  # fmt: skip
    builtin = [key for key in _keys() if key.kind in ("", *BUILT_IN)]
    for section, title in SECTIONS.items():
        mine = [key for key in builtin if _section(key) == section]
        out.append(f"## {title}\n")
        kinds = section == "method"
        out += [f"| key | {'of | ' if kinds else ''}type | default | |", f"|---|---{'|---' if kinds else ''}|---|---|"]
        for dotted, same in _together(mine):
            name = f"*`{dotted}`*" if dotted in SHORT else f"`{dotted}`"
            of = f"{', '.join(key.kind for key in same) or 'all'} | " if kinds else ""
            out.append(f"| {name} | {of}{_cell(same[0].type)} | {_cell(same[0].default)} | {_cell(same[0].doc)} |")
        out.append("")
    return "\n".join(out)


def _section(key: Key) -> str:
    return key.dotted.partition(".")[0] if "." in key.dotted else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def schema() -> dict[str, Any]:
    """A JSON schema of configs and sweeps, for editors. It knows keys, types and bounds; the rules between keys are the
    launcher's. Lengths may be shares, and a sweep's rows may bring what the config itself lacks."""
    found = RunConfig.model_json_schema()
    defs = found["$defs"]
    defs.pop("MethodConfig", None)
    kinds = []
    for section in method_sections().values():
        own = section.model_json_schema()
        defs |= own.pop("$defs", {})
        own["required"] = [
            "kind",
            *(name for name in own.get("required", []) if f"method.{name}" not in SHORT.values()),
        ]
        kinds.append(own)
    found["properties"]["method"] = {"description": "How weights are trained.", "anyOf": kinds}
    sweep = SweepConfig.model_json_schema()
    defs |= sweep.pop("$defs", {})
    sweep["properties"]["space"] = {
        "type": "object",
        "description": sweep["properties"]["space"].get("description", ""),
    }
    found["properties"]["sweep"] = sweep
    tracking = found["properties"]["tracking"]
    found["properties"]["tracking"] = {"anyOf": [tracking, {"type": "string"}, {"type": "array"}]}  # names, too
    for short, full in SHORT.items():
        place, _, name = full.partition(".")
        for its in kinds if place == "method" else [_section_schema(found, place)]:
            _add_short(its, short, name)
    found["required"] = ["name", "global_batch_rows", "data"]
    found["$schema"], found["title"] = "https://json-schema.org/draft/2020-12/schema", "relora-ray config"
    return found


def _section_schema(found: dict[str, Any], name: str) -> dict[str, Any]:
    field = found["properties"][name]
    reference = field.get("$ref") or next(item["$ref"] for item in field["allOf"])
    section: dict[str, Any] = found["$defs"][reference.rpartition("/")[2]]
    return section


def _add_short(section: dict[str, Any], short: str, full: str) -> None:
    if full not in section["properties"]:
        return
    share = {"type": "string", "pattern": r"^\d{1,3}(\.\d+)?\s*%$"}
    count = {"type": "integer", "exclusiveMinimum": 0}
    section["properties"][short.partition(".")[2]] = (share if short in SHARES else count) | {
        "description": DOCS[short]
    }
    if full in section.get("required", []):
        section["required"] = [name for name in section["required"] if name != full]


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given:
        Path(given[0]).write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
