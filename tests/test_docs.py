"""What README and docs point at is there: files, headings, commands and their options."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from relora_ray.__main__ import COMMANDS
from tests.commands import command
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@cache
def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_front_door() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert [page.name for page in PAGES[1:] if page.resolve() not in linked] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@cache
def options(module: str) -> set[str]:
    done = command(module, "--help")
    assert done.returncode == 0, done.stderr
    found = set(re.findall(r"--[a-z-]+", done.stdout))
    for name in re.findall(r"^    ([a-z]+) {2,}", done.stdout, re.MULTILINE):  # what it has of commands of its own
        found |= set(re.findall(r"--[a-z-]+", command(module, name, "--help").stdout))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_there_and_take_what_is_given(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    wrong = []
    for line in re.findall(
        r"(?:^ {4}|^> |^\$ |^|`)((?:relora-ray|python -m relora_ray\.)[^`\n#|]*)", text, re.MULTILINE
    ):
        words = line.split()
        name = " ".join(words[1:2]) if words[0] == "relora-ray" else words[2].removeprefix("relora_ray.")
        if not name or name.isupper() or name.startswith("-"):
            continue
        module = COMMANDS[name][0] if words[0] == "relora-ray" and name in COMMANDS else f"relora_ray.{name}"
        if importlib.util.find_spec(module.strip(".,")) is None:
            wrong.append(line)
            continue
        wrong += [f"{word} in {line}" for word in re.findall(r"(?<!\S)--[a-z-]+", line) if word not in options(module)]
    assert wrong == []


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """Each by its fixed words: `...` and single capitals stand for what differs."""
    code = "\n".join(path.read_text() for path in sorted((ROOT / "relora_ray").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    told = re.findall(r"^\| `([^|]*)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(told) > 20
    fragments = [part.strip(" :,") for message in told for part in re.split(r"\.\.\.|\b[A-Z]\b|`", message)]
    assert [part for part in fragments if part and part not in code] == []
