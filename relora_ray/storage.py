"""Plain objects under one folder or URL: put, read, list, delete. All that a run writes goes through here.

A put is atomic: readers see the whole object or none. On the local disk that is a temporary file, fsync and
rename; object stores do it by themselves. Every failure ends in one StorageError that names the object.

Remote operations that fail in passing (time-outs, 500, 503, a connection or a body that breaks off) are tried
again, each try logged, with a growing pause of random length, until `retry_s` seconds have passed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import platform
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
import yaml

from relora_ray.errors import ConfigError, StorageError
from relora_ray.masking import REFERENCE, SECRET_NAME, masked, remember

T = TypeVar("T")
Options = Mapping[str, Any]

logger = logging.getLogger(__name__)

RETRY_S = 60.0

_TEMPORARY = ".partial-"
_PAUSE_S = (0.25, 8.0)
"""The first pause between two tries and the longest; each is shortened by up to half at random."""
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Causes that neither a second try nor a restart removes."""
_S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
"""Seconds without a byte; and one try, because trying again is done here."""
_CALL_S = 90.0
_SLOWEST_BYTES_PER_S = 500_000
"""What one remote call may take at most; reading is bounded by the client's read time-out besides."""
_file_systems: dict[tuple[int, str, str], Any] = {}
"""By process, kind and options: a client for every Storage would cost a tenth of a second and a connection each."""


class Storage:
    """Objects below `url` (a local folder, or any fsspec URL such as s3://bucket/prefix).

    Paths are relative, with "/" between parts. Instances are cheap and picklable.
    """

    def __init__(self, url: str, options: Options | None = None, *, retry_s: float = RETRY_S) -> None:
        """`options` go to the fsspec file system (endpoint_url, key, secret, ... for s3); a value `$NAME` is read from
        the environment of the process that uses it. ConfigError if the URL or an option cannot be used."""
        self.is_local = "://" not in url or url.startswith("file://")
        self.url = os.path.abspath(url.removeprefix("file://")) if self.is_local else url.rstrip("/")
        self._options, self._retry_s = dict(options or {}), retry_s
        if not self.is_local:
            self._fs, self._root = _open(self.url, self._options)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.url, self._options, self._retry_s))  # options as given: no secret is pickled

    def child(self, path: str) -> Storage:
        """The same storage below `path`, on the same connections."""
        return self._moved(lambda here: f"{here}/{path}")

    def sibling(self, name: str) -> Storage:
        """The folder `name` beside this one, on the same connections."""
        return self._moved(lambda here: f"{here.rpartition('/')[0]}/{name}")

    def _moved(self, place: Callable[[str], str]) -> Storage:
        other = Storage.__new__(Storage)
        other.__dict__.update(self.__dict__)
        other.url = place(self.url)
        if not self.is_local:
            other._root = place(self._root)
        return other

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object, replacing any other."""
        if self.is_local:
            self._guard("write", path, lambda: self._put_local(path, data, os.replace), len(data))
        else:
            self._guard("write", path, lambda: self._call("pipe_file", self._at(path), data), len(data))

    def put_new(self, path: str, data: bytes) -> None:
        """Write a whole object that must not exist yet; FileExistsError if it does.

        On object stores this is a conditional put. Where the server ignores the condition (`honours_put_new`) only
        an object that is there already is seen, and of two writers at the same moment both believe that they won.
        """
        if not self.is_local and self.exists(path):
            raise FileExistsError(f"{self.url}/{path} exists already")
        self._create(path, data)

    def _create(self, path: str, data: bytes) -> None:
        def create() -> None:
            if self.is_local:
                self._put_local(path, data, _link_new)
                return
            try:
                self._call("pipe_file", self._at(path), data, mode="create")
            except OSError as error:
                # How Ceph refuses, and how s3fs names any request that is not valid.
                if error.errno != errno.EINVAL or not self._call("exists", self._at(path)):
                    raise
                raise FileExistsError(str(error)) from error

        try:
            self._guard("write", path, create, len(data))
        except StorageError as error:
            if error.exists:
                raise FileExistsError(f"{self.url}/{path} exists already") from None
            raise

    def honours_put_new(self) -> bool:
        """Write, read and delete a probe; whether the server refuses to create an object that exists.

        StorageError if one of the three is not allowed.
        """
        path = f"probe-{uuid.uuid4().hex}"
        try:
            with contextlib.suppress(FileExistsError):  # of a try whose answer was lost
                self._create(path, b"1")
            try:
                self._create(path, b"2")
            except FileExistsError:
                return self.get(path) == b"1"
            return False
        finally:
            self.delete(path)

    def get(self, path: str) -> bytes:
        """The whole object. StorageError (`missing`) if there is none."""
        if self.is_local:
            return self._guard("read", path, lambda: _read(self._at(path)))
        return bytes(self._guard("read", path, lambda: self._call("cat_file", self._at(path))))

    def size(self, path: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            if self.is_local:
                return self._guard("look up", path, lambda: os.stat(self._at(path)).st_size)
            return int(self._guard("look up", path, lambda: self._call("size", self._at(path))))
        except StorageError as error:
            if error.missing:
                return None
            raise

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def list(self, prefix: str = "", *, unfinished: bool = False) -> list[str]:
        """Paths of all objects below `prefix`, sorted; local writes that were broken off only if `unfinished`."""
        root = self._at(prefix)
        if self.is_local:
            found = self._guard("list", prefix, lambda: _walk(root))
            base = self.url
        else:
            try:
                found = self._guard("list", prefix, lambda: self._call("find", root))
            except StorageError as error:
                if error.missing:
                    return []
                raise
            base = self._root
        paths = [path[len(base) :].lstrip("/").replace(os.sep, "/") for path in found]
        return sorted(path for path in paths if unfinished or _TEMPORARY not in path)

    def delete(self, prefix: str) -> None:
        """Remove an object or everything below a prefix. Nothing there is no error."""

        def delete() -> None:
            target = self._at(prefix)
            if not self.is_local:
                if self._call("exists", target):
                    self._call("rm", target, recursive=True)
                    if self._call("exists", target):  # s3fs does not look at what a bulk delete answers
                        raise PermissionError("it is still there: deleting is not allowed")
            elif os.path.isdir(target):
                shutil.rmtree(target)
            elif os.path.exists(target):
                os.remove(target)

        self._guard("delete", prefix, delete)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the file system, within a time in which it can be done: aiohttp may wait for ever to be allowed
        to send a body. (Read time-outs begin when it is sent.)"""
        if getattr(self._fs, "async_impl", False):
            num_bytes = sum(len(arg) for arg in args if isinstance(arg, bytes))
            kwargs["timeout"] = _CALL_S + num_bytes / _SLOWEST_BYTES_PER_S
        return getattr(self._fs, name)(*args, **kwargs)

    def _at(self, path: str) -> str:
        root = self.url if self.is_local else self._root
        return f"{root}/{path}" if path else root

    def _put_local(self, path: str, data: bytes, publish: Callable[[str, str], None]) -> None:
        target = self._at(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = os.path.join(os.path.dirname(target), f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, target)
            _sync_folder(os.path.dirname(target))
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def _guard(self, action: str, path: str, operation: Callable[[], T], size_bytes: int | None = None) -> T:
        """The result of `operation`. Remote ones that fail in passing are tried again; StorageError in the end."""
        size = "" if size_bytes is None else f" ({size_bytes:,} bytes)"
        what = f"cannot {action} {self.url}/{path}{size}"
        began, attempt = time.monotonic(), 1
        while True:
            try:
                return operation()
            except Exception as error:  # s3fs and others let errors of their own through, besides OSError
                if self.is_local and not isinstance(error, OSError):
                    raise
                reason = masked(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
                lasting = (
                    self.is_local or isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_CODES
                )
                passed_s = time.monotonic() - began
                pause_s = min(_PAUSE_S[0] * 2 ** (attempt - 1), _PAUSE_S[1]) * random.uniform(0.5, 1.0)
                if lasting or passed_s + pause_s > self._retry_s:
                    tried = "" if lasting else f" ({attempt} tries in {passed_s:.0f} s)"
                    failure = StorageError(f"{what}: {reason}{tried}.{_advice(error)}")
                    failure.restart_helps = getattr(error, "errno", None) not in _LASTING_CODES
                    failure.missing = isinstance(error, FileNotFoundError)
                    failure.exists = isinstance(error, FileExistsError)
                    raise failure from None  # the cause may show a secret in a traceback
                attempt += 1
                logger.warning("%s: %s; try %d in %.1f s", what, reason, attempt, pause_s)
                time.sleep(pause_s)


def add_options_argument(parser: argparse.ArgumentParser) -> None:
    """`--storage-option key=value`, for commands that are given URLs and no config: see `parse_options`."""
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the file system of s3:// and other URLs, such as endpoint_url=http://HOST:9000; may be repeated",
    )


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """`["endpoint_url=http://127.0.0.1:9000"]` -> options; values are YAML. ConfigError if one is not key=value."""
    options = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"storage option {item!r} is not of the form key=value, such as endpoint_url=http://HOST:9000."
            )
        options[name] = yaml.safe_load(value)
    return options


def _open(url: str, options: Options) -> tuple[Any, str]:
    """An fsspec file system, and the URL's path in it."""
    # Cached listings and shared instances hide what other clients wrote.
    given = {"use_listings_cache": False, "skip_instance_cache": True, **_resolved(options)}
    is_s3 = url.startswith(("s3://", "s3a://"))
    if is_s3:
        given["config_kwargs"] = _S3_CLIENT | given.get("config_kwargs", {})
    place = "s3" if is_s3 else "/".join(url.split("/")[:3])  # others take a host or account from the URL
    key = (os.getpid(), place, repr(given))  # not across a fork: s3fs does not survive one
    if key not in _file_systems:
        try:
            fs, _ = fsspec.core.url_to_fs(url, **given)
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(f"{url} cannot be used as storage: {masked(str(error))}.") from error
        if is_s3:
            fs.retries = 1
        _file_systems[key] = fs
    return _file_systems[key], str(_file_systems[key]._strip_protocol(url))


def _resolved(value: Any, name: str = "") -> Any:
    """`value` with every `$NAME` in it replaced from the environment; secrets are remembered, to be masked."""
    if isinstance(value, Mapping):
        return {key: _resolved(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, str) and REFERENCE.fullmatch(value):
        variable = value.strip("${}")
        if not os.environ.get(variable):
            raise ConfigError(
                f"storage_options name the environment variable {variable}, which is not set on {platform.node()}. Set "
                f"it for the driver and on every machine that trains."
            )
        value = os.environ[variable]
        remember(value)
    elif isinstance(value, str) and SECRET_NAME.search(name):  # of the command line: a config may not have it
        remember(value)
    return value


def _restore(url: str, options: Options, retry_s: float) -> Storage:
    return Storage(url, options, retry_s=retry_s)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _link_new(temporary: str, target: str) -> None:
    os.link(temporary, target)  # fails if the target exists, unlike a rename
    os.remove(temporary)


def _sync_folder(folder: str) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(root: str) -> list[str]:
    """All files below `root`. A folder that cannot be read is an error and not an empty one."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    return [os.path.join(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names]


def _advice(error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return " Free space there (checkpoint.keep_last says how many checkpoints are kept), or move the run."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return " Check who owns the folder, or choose another storage."
    return ""
