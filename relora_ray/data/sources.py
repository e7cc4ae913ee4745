"""From what is named on the command line to files: paths, patterns, folders, URLs, standard input, datasets.

A name that exists is a name, whatever characters it has; only what does not exist may be a pattern. All is looked up
before any work begins, so that the last of a thousand sources is not found missing after hours.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from relora_ray.data.kinds import check_one_kind, is_beside, is_checksum
from relora_ray.errors import ConfigError, DataError
from relora_ray.location import shown
from relora_ray.storage import Options, Remote

STDIN = "-"
_PATTERN = re.compile(r"[*?\[]")
_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?:[\w.-]+")
"""A hub name with a configuration, which no path looks like: allenai/c4:en."""


@dataclass(frozen=True)
class Source:
    name: str
    """A path, a URL, `-`, or a dataset's name."""
    kind: Literal["file", "saved", "hub"] = "file"
    options: Options = field(default_factory=dict)
    """For the file system of a URL."""

    @property
    def label(self) -> str:
        """For messages."""
        return "standard input" if self.name == STDIN else shown(self.name)[1:-1]

    @property
    def key(self) -> str:
        """Equal for two names of one file."""
        return os.path.realpath(self.name) if self.kind == "file" and "://" not in self.name else self.name

    @property
    def is_plain_file(self) -> bool:
        """Whether a look into it costs little, and takes nothing away."""
        return self.kind == "file" and os.path.isfile(self.name)

    def open(self) -> BinaryIO:
        """A new stream of a file's bytes. DataError or StorageError."""
        if self.name == STDIN:
            if sys.stdin is None:
                raise DataError("standard input is closed, and - names it. Give a file, or a pipe.")
            return sys.stdin.buffer
        if "://" in self.name:
            return Remote(self.name, self.options).open()
        try:
            return open(self.name, "rb")
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror}.") from error


@dataclass
class Found:
    sources: list[Source]
    left_out: list[str]
    """Files in folders that are no documents: hidden, markers, checksums."""


def find_sources(names: Sequence[str], *, form: str = "", options: Callable[[str], Options] = lambda name: {}) -> Found:
    """The files and datasets that `names` stand for, in order; those of a folder or pattern sorted by path.

    `form`: `saved` and `hub` decide what a name is. `options`: for the file system of a URL. DataError for what is not
    there, ConfigError for a file that is named twice.
    """
    found = Found([], [])
    for name in names:
        found.sources += _find(name, form, options(name), found.left_out)
    seen: dict[str, str] = {}
    for source in found.sources:
        if source.key in seen:
            raise ConfigError(
                f"{source.label} is given twice (as {seen[source.key]}, too): its documents would count double. Name "
                f"it once."
            )
        seen[source.key] = source.label
    return found


def _find(name: str, form: str, options: Options, left_out: list[str]) -> Iterable[Source]:
    name = os.path.expanduser(name.removeprefix("file://"))
    if form in ("saved", "hub"):
        return [Source(name, "saved" if form == "saved" else "hub", options)]
    if name == STDIN:
        return [Source(name)]
    if os.path.isdir(name):
        if any(os.path.exists(os.path.join(name, mark)) for mark in ("state.json", "dataset_dict.json")):
            return [Source(name, "saved")]
        return _chosen(name, _walk(name), form, left_out)
    if os.path.exists(name):
        if is_checksum(name) and not form:
            raise DataError(f"{name} is named like a list of checksums. Leave it out, or name its --format.")
        return [Source(name)]
    if "://" in name:
        return _remote(name, options, form, left_out)
    if _PATTERN.search(name):
        return _matching(name, form, left_out)
    if os.path.lexists(name):
        raise DataError(f"{name} is a link to nothing: {os.readlink(name)} does not exist.")
    if _HUB.fullmatch(name) and not os.path.isdir(name.partition("/")[0]):
        return [Source(name, "hub")]
    raise DataError(f"{name}: no such file or folder. If it is a dataset of the Hugging Face hub, add --format hub.")


def _walk(folder: str) -> Iterator[str]:
    """All files below a folder, through links to folders, too."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from error

    above: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in above:  # a link that leads back
            folders.clear()
            continue
        above.add(real)
        yield from (os.path.join(here, file) for file in files)


def _matching(pattern: str, form: str, left_out: list[str]) -> list[Source]:
    paths = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        what = "matches folders only: give FOLDER/**/*" if paths else "no file matches it: give one that exists"
        raise DataError(f"{pattern} is no file, and as a pattern {what}.")
    base = _PATTERN.split(pattern)[0].rpartition("/")[0]
    return _chosen(base, files, form, left_out, what=pattern)


def _chosen(
    folder: str, paths: Iterable[str], form: str, left_out: list[str], *, what: str = "", options: Options | None = None
) -> list[Source]:
    """Of the files below a folder those that are documents, by path; all of one kind, unless `form` says which."""
    every = sorted(paths)
    beside = {path for path in every if is_beside(path[len(folder) :].lstrip("/"))}
    left_out += sorted(beside)
    chosen = [path for path in every if path not in beside]
    if not chosen:
        raise DataError(f"{what or folder} has no files" + (" but hidden ones and checksums." if beside else "."))
    if not form:
        check_one_kind(chosen, what or folder)
    if broken := [path for path in chosen if "://" not in path and not os.path.exists(path)]:
        raise DataError(f"{broken[0]} is a link to nothing: {os.readlink(broken[0])} does not exist.")
    local = [path for path in chosen if "://" not in path]
    for path in local:
        _refuse_special(path)
    once: dict[str, str] = {}
    for path in local:  # a link beside what it leads to is one document
        if (first := once.setdefault(os.path.realpath(path), path)) != path:
            left_out.append(f"{path} (the same file as {first})")
            chosen.remove(path)
    return [Source(path, "file", options or {}) for path in chosen]


def _refuse_special(path: str) -> None:
    """DataError for a pipe and a device in a folder, which could be waited for without end. By its own name it is read:
    a shell's <(command) is one."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise DataError(
            f"{path} is no file, but a pipe, a socket or a device. Leave it out, or give what it has as standard "
            f"input: ... prepare -."
        )


def _remote(url: str, options: Options, form: str, left_out: list[str]) -> list[Source]:
    """One object of that very name, or all below it, or all that match it."""
    source, remote = Source(url, "file", options), Remote(url, options)
    if (kind := remote.kind()) == "file":
        return [source]
    is_pattern = _PATTERN.search(url) and not url.startswith(("http://", "https://"))  # a query is none
    if not kind and not is_pattern:
        raise DataError(f"{source.label}: no such object, and none below it. Check the name, and --storage-option.")
    if not (found := remote.below()):
        raise DataError(f"{source.label}: no object matches it, or lies below it.")
    base = url if kind else _PATTERN.split(url)[0].rpartition("/")[0]
    return _chosen(base, found, form, left_out, what=source.label, options=options)


def refuse_out_within(out: str, named: Sequence[str], sources: Sequence[Source]) -> None:
    """ConfigError if what is written to `out` would be read by the same command, now or when it is run again."""
    target = (
        out.rstrip("/")
        if "://" in out and not out.startswith("file://")
        else os.path.realpath(out.removeprefix("file://"))
    )
    folders = [name for name in named if os.path.isdir(name) or ("://" in name and not _PATTERN.search(name))]
    for folder in folders:
        place = folder.rstrip("/") if "://" in folder else os.path.realpath(folder)
        if f"{target}/".startswith(f"{place}/"):
            raise ConfigError(f"--out {out} lies in {folder}, which is read. Choose an --out beside it.")
    for source in sources:
        if source.kind == "file" and source.key.startswith(f"{target}/"):
            raise ConfigError(f"{source.label} lies in --out {out}. Choose an --out of its own.")
