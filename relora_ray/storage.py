"""Plain objects under one folder or URL: put, read, list, delete. All that a run writes goes through here.

A put is atomic: readers see the whole object or none. On the local disk that is a temporary file, fsync and
rename; object stores do it by themselves. Every failure ends in one StorageError that names the object.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from relora_ray.errors import ConfigError, StorageError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TEMPORARY = ".partial-"
_TRIES = 4
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Causes that neither a second try nor a restart removes."""


class Storage:
    """Objects below `url` (a local folder, or any fsspec URL such as s3://bucket/prefix).

    Paths are relative, with "/" between parts. Instances are cheap and picklable.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.is_local = "://" not in url or url.startswith("file://")
        self.url = os.path.abspath(url.removeprefix("file://")) if self.is_local else url.rstrip("/")
        self._options = options
        if not self.is_local:
            # Cached listings and shared instances hide what other clients wrote.
            options = {"use_listings_cache": False, "skip_instance_cache": True, **options}
            try:
                self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
            except (ValueError, ImportError) as error:
                raise ConfigError(f"{self.url} cannot be used as storage: {error}.") from error

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.url, self._options))

    def child(self, path: str) -> Storage:
        return Storage(f"{self.url}/{path}", **self._options)

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object, replacing any other."""
        if self.is_local:
            self._guard("write", path, lambda: self._put_local(path, data, os.replace), len(data))
        else:
            self._guard("write", path, lambda: self._fs.pipe_file(self._at(path), data), len(data))

    def put_new(self, path: str, data: bytes) -> None:
        """Write a whole object that must not exist yet; FileExistsError if it does.

        On object stores this is a conditional put, which not every server honours.
        """
        try:
            if self.is_local:
                self._guard("write", path, lambda: self._put_local(path, data, _link_new), len(data))
            else:
                self._guard("write", path, lambda: self._fs.pipe_file(self._at(path), data, mode="create"), len(data))
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise FileExistsError(f"{self.url}/{path} exists already") from error
            raise

    def append(self, path: str, data: bytes) -> None:
        """Add to the end of an object, creating it. Not atomic: for logs."""

        def append() -> None:
            if self.is_local:
                Path(self._at(path)).parent.mkdir(parents=True, exist_ok=True)
                with open(self._at(path), "ab") as file:
                    file.write(data)
            else:
                with self._fs.open(self._at(path), "ab") as file:
                    file.write(data)

        self._guard("append to", path, append, len(data))

    def get(self, path: str) -> bytes:
        """The whole object. StorageError, caused by FileNotFoundError, if there is none."""
        if self.is_local:
            return self._guard("read", path, Path(self._at(path)).read_bytes)
        return bytes(self._guard("read", path, lambda: self._fs.cat_file(self._at(path))))

    def size(self, path: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            if self.is_local:
                return self._guard("look up", path, lambda: os.stat(self._at(path)).st_size)
            return int(self._guard("look up", path, lambda: self._fs.size(self._at(path))))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects below `prefix`, sorted; unfinished local writes are left out."""
        root = self._at(prefix)
        if self.is_local:
            found = self._guard("list", prefix, lambda: _walk(root))
            base = self.url
        else:
            try:
                found = self._guard("list", prefix, lambda: self._fs.find(root))
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return []
                raise
            base = self._root
        paths = [path[len(base) :].lstrip("/").replace(os.sep, "/") for path in found]
        return sorted(path for path in paths if _TEMPORARY not in path)

    def delete(self, prefix: str) -> None:
        """Remove an object or everything below a prefix. Nothing there is no error."""

        def delete() -> None:
            target = self._at(prefix)
            if not self.is_local:
                if self._fs.exists(target):
                    self._fs.rm(target, recursive=True)
            elif os.path.isdir(target):
                shutil.rmtree(target)
            elif os.path.exists(target):
                os.remove(target)

        self._guard("delete", prefix, delete)

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
        for attempt in range(1, _TRIES + 1):
            try:
                return operation()
            except Exception as error:  # s3fs and others let errors of their own through, besides OSError
                if self.is_local and not isinstance(error, OSError):
                    raise
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                lasting = (
                    self.is_local or isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_CODES
                )
                if lasting or attempt == _TRIES:
                    failure = StorageError(f"{what}: {reason}.{_advice(error)}")
                    failure.restart_helps = getattr(error, "errno", None) not in _LASTING_CODES
                    raise failure from error
                logger.warning("%s: %s; try %d of %d", what, reason, attempt + 1, _TRIES)
                time.sleep(random.uniform(0.5, 1.0) * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def _restore(url: str, options: dict[str, Any]) -> Storage:
    return Storage(url, **options)


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
