"""That pyproject.toml and constraints.txt agree."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
NEWEST = "3.14"
"""For which `pip install --dry-run --only-binary=:all: --python-version 3.14` resolved all pins."""


def needed() -> dict[str, SpecifierSet]:
    """What each pin that is installed here says of Python, as its own metadata has it."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    found = {}
    for name, version in pins:
        try:
            its = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if its["Version"].partition("+")[0] == version:
            found[name] = SpecifierSet(its["Requires-Python"] or "")
    return found


def test_pythons_that_are_allowed_are_those_of_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed, pins = SpecifierSet(project["requires-python"]), needed()
    assert len(pins) > 100
    for version in ("3.11", "3.12", "3.13", NEWEST):
        assert allowed.contains(f"{version}.0")
        assert [name for name, specifier in pins.items() if not specifier.contains(f"{version}.0")] == []
    assert not allowed.contains("3.10.99"), "some pin refuses it"
    assert [name for name, specifier in pins.items() if not specifier.contains("3.10.99")] != []
