"""Plain objects under one folder or URL: put, read, list, delete. All that a run writes goes through here.

A put is atomic: readers see the whole object or none. On the local disk that is a temporary file, fsync and
rename; object stores do it by themselves. Every failure ends in one StorageError that names the object.

Names are taken letter by letter: nothing is expanded, deleting is by exact key, and a path that would leave the folder
is refused, as names may come from what somebody put there.

Remote operations that fail in passing (time-outs, 500, 503, a connection or a body that breaks off) are tried
again, each try logged, with a growing pause of random length, until `retry_s` seconds have passed.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import logging
import os
import platform
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import yaml

from relora_ray import clock
from relora_ray.errors import ConfigError, StorageError
from relora_ray.location import secret_in_url, shown
from relora_ray.masking import REFERENCE, masked, must_be_reference, remember

T = TypeVar("T")
Options = Mapping[str, Any]

logger = logging.getLogger(__name__)

RETRY_S = 60.0

_TEMPORARY = ".partial-"
"""How the name of a file begins that is being written; a run may be called what it likes."""
_PAUSE_S = (0.25, 8.0)
"""The first pause between two tries and the longest; each is shortened by up to half at random."""
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Causes that neither a second try nor a restart removes."""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Of botocore, before anything is sent."""
_S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
"""Seconds without a byte; and one try, because trying again is done here."""
_CALL_S = 90.0
_SLOWEST_BYTES_PER_S = 500_000
"""What one remote call may take at most; reading is bounded by the client's read time-out besides."""
_NUM_AT_ONCE = 16
"""Small requests under way at once."""
_UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f\\]")
"""Paths that are no plain name below a folder: empty parts, . and .., control characters, backslashes."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""How file systems without hard links answer, such as gcsfuse and other buckets that are mounted."""
_file_systems: dict[tuple[int, str, str], Any] = {}
"""By process, kind and options: a client for every Storage would cost a tenth of a second and a connection each."""


def is_unfinished(path: str) -> bool:
    """Whether this is a local write that is under way or was broken off."""
    return path.rpartition("/")[2].startswith(_TEMPORARY)


class Storage:
    """Objects below `url` (a local folder, or any fsspec URL such as s3://bucket/prefix).

    Paths are relative, with "/" between parts. Instances are cheap and picklable.
    """

    def __init__(self, url: str, options: Options | None = None, *, retry_s: float = RETRY_S) -> None:
        """`options` go to the fsspec file system (endpoint_url, key, secret, ... for s3); a value `$NAME` is read from
        the environment of the process that uses it. ConfigError if the URL or an option cannot be used."""
        self.is_local = "://" not in url or url.startswith("file://")
        self.url = os.path.abspath(url.removeprefix("file://")) if self.is_local else url.rstrip("/")
        self._options, self.retry_s, self._call_s = dict(options or {}), retry_s, _CALL_S
        if not self.is_local:
            self._fs, self._root = _open(self.url, self._options)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.url, self._options, self.retry_s))  # options as given: no secret is pickled

    def child(self, path: str) -> Storage:
        """The same storage below `path`, on the same connections."""
        return self._moved(lambda here: f"{here}/{path}")

    def parent(self) -> Storage:
        """The folder above, on the same connections."""
        return self._moved(lambda here: here.rpartition("/")[0])

    def sibling(self, name: str) -> Storage:
        """The folder `name` beside this one, on the same connections."""
        return self._moved(lambda here: f"{here.rpartition('/')[0]}/{name}")

    def patient(self, call_s: float) -> Storage:
        """The same, on the same connections, for small objects whose time passes: a call is given up after `call_s`
        seconds, and not tried again."""
        other = self._moved(lambda here: here)
        other.retry_s, other._call_s = 0.0, call_s
        return other

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

    def put_file(self, path: str, source: str) -> None:
        """Write a whole object, replacing any other, with the content of a file on this machine: of any size, as it is
        never in memory as a whole."""
        size = os.path.getsize(source)
        if self.is_local:
            self._guard("write", path, lambda: self._put_local(path, Path(source), os.replace), size)
        else:
            send = {"num_bytes": size}
            self._guard("write", path, lambda: self._call("put_file", source, self._at(path), **send), size)

    def put_new(self, path: str, data: bytes) -> None:
        """Write a whole object that must not exist yet; FileExistsError if it does.

        On object stores this is a conditional put, and on a disk a hard link, or where there are none an exclusive
        open. Where the server ignores the condition (`honours_put_new`) the object is replaced.
        """

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
        """Write, read and delete a probe; whether creating an object that exists is refused here.

        StorageError if one of the three is not allowed.
        """
        path = f"probe-{uuid.uuid4().hex}"
        with contextlib.suppress(FileExistsError):  # of a try whose answer was lost
            self.put_new(path, b"1")
        try:
            try:
                self.put_new(path, b"2")
            except FileExistsError:
                return self.get_expected(path) == b"1"
            return False
        finally:
            self.delete(path)

    def get(self, path: str, *, at_most: int | None = None) -> bytes:
        """The whole object. StorageError (`missing`) if there is none, or if it has more than `at_most` bytes: what
        others may have put there must not fill this process's memory."""
        return self._get(path, at_most, lambda: False)

    def get_expected(self, path: str, *, at_most: int | None = None) -> bytes:
        """The whole object, which is known to have been there.

        A gateway in failover, a replica that lags or a cached look-up may deny it for a while. So it is asked for again
        for `retry_s` seconds; on a disk, as long as its folder lists it.
        """
        return self._get(
            path, at_most, (lambda: os.path.basename(path) in self._names(path)) if self.is_local else None
        )

    def _get(self, path: str, at_most: int | None, may_come: Callable[[], bool] | None) -> bytes:
        """`may_come`: whether it pays to ask for a missing one again."""

        def read() -> bytes:
            if self.is_local:
                with open(self._at(path), "rb") as file:
                    return file.read(-1 if at_most is None else at_most + 1)
            if at_most is None:
                return bytes(self._call("cat_file", self._at(path)))
            try:
                return bytes(self._call("cat_file", self._at(path), start=0, end=at_most + 1))
            except FileNotFoundError:
                raise
            except OSError:  # S3 has no range of an empty object to give
                if self._call("size", self._at(path)) == 0:
                    return b""
                raise

        data = self._guard("read", path, read, missing_may_come=may_come)
        if at_most is not None and len(data) > at_most:
            raise StorageError(
                f"{self.url}/{path} has more than {at_most:,} bytes, the most that a record of its kind may have. "
                f"Nothing of ours wrote it: see who else can write there."
            )
        return data

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of an object that has so many: what a growing one has more than before. StorageError
        (`missing`) if there is none."""

        def read() -> bytes:
            if self.is_local:
                with open(self._at(path), "rb") as file:
                    file.seek(start)
                    return file.read(end - start)
            return bytes(self._call("cat_file", self._at(path), start=start, end=end))

        return self._guard("read", path, read) if end > start else b""

    def _names(self, path: str) -> builtins.list[str]:
        with contextlib.suppress(OSError):
            return os.listdir(os.path.dirname(self._at(path)))
        return []

    def size(self, path: str) -> int | None:
        """Bytes of an object, or None if there is none: a storage that denies it is asked once more, as it may be wrong
        in passing."""

        def look() -> int:
            return os.stat(self._at(path)).st_size if self.is_local else int(self._call("size", self._at(path)))

        return self._unless_denied(lambda: self._guard("look up", path, look))

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def list(self, prefix: str = "", *, unfinished: bool = False) -> list[str]:
        """Paths of all objects below `prefix`, sorted; local writes that were broken off only if `unfinished`.

        A server that says there is no such place is asked again: there it means the bucket, or a gateway that fails
        over, and taken for an empty folder it would begin a run anew.
        """
        root = self._at(prefix)
        if self.is_local:
            found = self._guard("list", prefix, lambda: _walk(root))
            base = self.url
        else:
            found = self._guard("list", prefix, lambda: self._call("find", root), missing_may_come=None)
            base = self._root
        paths = [path[len(base) :].lstrip("/").replace(os.sep, "/") for path in found]
        # Consoles and mounts put empty objects where they show folders.
        return sorted(p for p in paths if p[-1:] != "/" and (unfinished or not is_unfinished(p)))

    def folders(self, prefix: str) -> builtins.list[str]:
        """Names directly below `prefix`, sorted; nothing below them is listed."""
        root = self._at(prefix)

        def look() -> list[str]:
            if self.is_local:
                return os.listdir(root)
            return [str(path).rstrip("/") for path in self._call("ls", root, detail=False)]

        try:
            found = self._guard("list", prefix, look)
        except StorageError as error:
            if error.missing:
                return []
            raise
        names = {path.rpartition("/")[2] for path in found if path != root}
        return sorted(name for name in names if not is_unfinished(name))

    def list_surely(self, prefix: str) -> builtins.list[str]:
        """As `list`, until two answers in a row are the same: one may be old, and something is decided by this."""
        found = self.list(prefix)
        until, looks = clock.monotonic() + self.retry_s, 1
        # At least ten times: the time may have passed while this process stood still.
        while not self.is_local and (looks < 10 or clock.monotonic() < until):
            before, found, looks = found, self.list(prefix), looks + 1
            if found == before:
                break
        return found

    def get_listed(self, path: str, *, at_most: int | None = None) -> bytes | None:
        """An object that a listing showed, or None if it has been removed since."""
        try:
            return self.get(path, at_most=at_most)
        except StorageError as error:
            if not error.missing:
                raise
        if path not in self.list_surely(path.rpartition("/")[0]):
            return None
        return self.get_expected(path, at_most=at_most)

    def find(self, path: str, *, at_most: int | None = None) -> bytes | None:
        """The whole object, or None if there is none: like `size`, a storage that denies it is asked once more."""
        return self._unless_denied(lambda: self.get(path, at_most=at_most))

    def _unless_denied(self, ask: Callable[[], T]) -> T | None:
        """The answer, or None if a storage says that there is no such object: twice, where it is not a disk."""
        for _ in range(1 if self.is_local else 2):
            try:
                return ask()
            except StorageError as error:
                if not error.missing:
                    raise
        return None

    def delete(self, path: str) -> None:
        """Remove one object, by its exact name. None there is no error."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                if self.is_local:
                    os.remove(self._at(path))
                else:
                    self._call("rm_file", self._at(path))

        self._guard("delete", path, delete)

    def delete_below(self, prefix: str) -> None:
        """Remove all objects below a folder, each by its exact name. Nothing there is no error."""
        assert prefix, "a whole storage is never removed at once"
        if self.is_local and os.path.islink(self._at(prefix)):  # what it leads to is somebody else's
            self.delete(prefix)
            return
        paths = self.list(prefix, unfinished=True)
        in_parallel(self.delete, paths)
        if not self.is_local:
            if paths and (left := self.list_surely(prefix)):  # a server may say yes and do nothing
                raise StorageError(f"{self.url}/{left[0]} is still there after it was deleted: is that allowed?")
            return
        for folder, _, _ in os.walk(self._at(prefix), topdown=False):
            with contextlib.suppress(OSError):  # somebody else's files came meanwhile
                os.rmdir(folder)

    def copy(self, path: str, to: Storage, to_path: str) -> None:
        """Copy an object within one file system, by the server where it can do so."""
        if not self.is_local and not to.is_local:
            with contextlib.suppress(StorageError, NotImplementedError):
                self._guard("copy", path, lambda: self._call("cp_file", self._at(path), to._at(to_path)))
                if to.size(to_path) == self.size(path):
                    return
        to.put(to_path, self.get(path))

    def _call(self, name: str, *args: Any, num_bytes: int = 0, **kwargs: Any) -> Any:
        """A method of the file system, within a time in which it can be done: aiohttp may wait for ever to be allowed
        to send a body. (Read time-outs begin when it is sent.) `num_bytes`: those sent that are not in `args`."""
        if getattr(self._fs, "async_impl", False):
            num_bytes += sum(len(arg) for arg in args if isinstance(arg, bytes))
            kwargs["timeout"] = self._call_s + num_bytes / _SLOWEST_BYTES_PER_S
        return getattr(self._fs, name)(*args, **kwargs)

    def _at(self, path: str) -> str:
        if path and _UNSAFE.search(path):
            raise StorageError(
                f"{path!r} is no name of an object below {self.url}: names have no empty parts, '.', '..', backslashes "
                f"or control characters. If it came from storage, somebody has changed what is there."
            )
        root = self.url if self.is_local else self._root
        return f"{root}/{path}" if path else root

    def _put_local(self, path: str, data: bytes | Path, publish: Callable[[str, str], None]) -> None:
        target = self._at(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = os.path.join(os.path.dirname(target), f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, 2**24)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, target)
            _sync_folder(os.path.dirname(target))
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def _guard(
        self,
        action: str,
        path: str,
        operation: Callable[[], T],
        size_bytes: int | None = None,
        missing_may_come: Callable[[], bool] | None = lambda: False,
    ) -> T:
        """The result of `operation`. Remote ones that fail in passing are tried again; StorageError in the end.
        `missing_may_come`: whether one that is not there is tried again too (None: yes)."""
        size = "" if size_bytes is None else f" ({size_bytes:,} bytes)"
        what = f"cannot {action} {self.url}/{path}{size}"
        began, attempt = clock.monotonic(), 1
        while True:
            try:
                return operation()
            except Exception as error:  # s3fs and others let errors of their own through, besides OSError
                if self.is_local and not isinstance(error, OSError):
                    raise
                reason = masked(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
                lasting = (
                    self.is_local
                    or isinstance(error, _LASTING)
                    or getattr(error, "errno", None) in _LASTING_CODES
                    or type(error).__name__ in _NO_CREDENTIALS
                )
                if isinstance(error, FileNotFoundError):
                    lasting = missing_may_come is not None and not missing_may_come()
                passed_s = clock.monotonic() - began
                pause_s = min(_PAUSE_S[0] * 2 ** (attempt - 1), _PAUSE_S[1]) * random.uniform(0.5, 1.0)
                # One that is expected is asked for twice: the time may have passed while this process stood still.
                again = isinstance(error, FileNotFoundError) and attempt == 1 and self.retry_s > 0
                if lasting or (passed_s + pause_s > self.retry_s and not again):
                    tried = "" if lasting else f" ({attempt} tries in {passed_s:.0f} s)"
                    failure = StorageError(f"{what}: {reason}{tried}.{_advice(error)}")
                    failure.restart_helps = getattr(error, "errno", None) not in _LASTING_CODES
                    failure.missing = isinstance(error, FileNotFoundError)
                    failure.exists = isinstance(error, FileExistsError)
                    raise failure from None  # the cause may show a secret in a traceback
                attempt += 1
                logger.warning("%s: %s; try %d in %.1f s", what, reason, attempt, pause_s)
                clock.sleep(pause_s)


class Remote:
    """What somebody wrote at a URL: looked up, listed and read, and tried again as all else here.

    The URL is taken letter by letter (`::`, `@` and `[` belong to the name), but for chains of fsspec's such as
    simplecache::s3://bucket/key, which get no options.
    """

    def __init__(self, url: str, options: Options | None = None) -> None:
        """ConfigError if the URL or an option cannot be used."""
        scheme, _, rest = url.partition("://")
        self.url, self._by_ranges = url, "::" not in scheme and scheme not in ("http", "https")
        if "::" in scheme:
            self._storage = Storage("memory://")
            self._storage._fs, self._path = fsspec.core.url_to_fs(url)
        else:
            self._storage = Storage(f"{scheme}://{rest.partition('/')[0]}", options)
            self._path = str(self._storage._fs._strip_protocol(url))
        for secret in (rest.partition("?")[2], rest.partition("@")[0] if secret_in_url(url) else ""):
            remember(secret)  # of a signed URL, or a password
        self._storage.url, _, self._name = shown(url)[1:-1].rpartition("/")  # for messages

    def kind(self) -> str:
        """`file`, `directory` for what has objects below it, or empty: there is nothing of that name."""
        try:
            return str(self._guard("look up", lambda: self._storage._fs.info(self._path)["type"]))
        except StorageError as error:
            if error.missing:
                return ""
            raise

    def below(self) -> list[str]:
        """URLs of all objects below, or of those that match if the name is a pattern: *, ? and [a-z] stand for parts of
        a name, ** for any number of folders."""
        fs, is_pattern = self._storage._fs, re.search(r"[*?\[]", self._path) is not None
        find = fs.glob if is_pattern and not self.kind() else fs.find
        found = self._guard("list", lambda: find(self._path, detail=True))
        scheme = self.url.partition("://")[0]
        # Consoles and mounts put empty objects where they show folders.
        names = [name for name, info in found.items() if info["type"] == "file" and not name.endswith("/")]
        return sorted(name if "://" in name else f"{scheme}://{name}" for name in names)

    def open(self) -> io.BufferedReader:
        """A stream of one object, which can seek."""
        if not self._by_ranges:
            stream: io.BufferedReader = self._guard("read", lambda: self._storage._fs.open(self._path, "rb"))
            return stream
        size = self._guard("look up", lambda: int(self._storage._fs.info(self._path)["size"]))
        return io.BufferedReader(_Ranges(self._read, size), 2**23)

    def _read(self, start: int, end: int) -> bytes:
        data = bytes(
            self._guard("read", lambda: self._storage._call("cat_file", self._path, start=start, end=end)),
        )
        if len(data) != end - start:
            raise StorageError(f"{self.url} changed while it was read: bytes {start:,} to {end:,} are {len(data):,}.")
        return data

    def _guard(self, action: str, operation: Callable[[], T]) -> T:
        return self._storage._guard(action, self._name, operation)


class _Ranges(io.RawIOBase):
    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read_range(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)


def in_parallel(action: Callable[[str], object], paths: Iterable[str]) -> None:
    """Do it to all, some at a time; raises the first error."""
    with ThreadPoolExecutor(_NUM_AT_ONCE, thread_name_prefix="relora-ray-storage") as pool:
        for future in [pool.submit(action, path) for path in paths]:
            future.result()


def add_options_argument(parser: argparse.ArgumentParser) -> None:
    """`--storage-option key=value`, for commands that are given URLs and no config: see `parse_options`."""
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the file system of s3:// and other URLs, such as endpoint_url=http://HOST:9000 or 'secret=$NAME', "
        "which is read from the environment; may be repeated",
    )


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """`["endpoint_url=http://127.0.0.1:9000"]` -> options; values are YAML. ConfigError, which shows none of them, if
    one is not key=value or is a URL with a secret. Other secrets may be written out: these options are not stored."""
    options = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"storage option {re.split(r'[^A-Za-z0-9_.]', item)[0]!r} is not of the form key=value, such as "
                f"endpoint_url=http://HOST:9000."
            )
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"storage option {name}=... is not valid YAML. Put the value in quotes, or in a variable: "
                f"'{name}=$NAME'."
            ) from None
        _refuse_secret_urls(options[name], name)
    return options


def _refuse_secret_urls(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_secret_urls(inner, f"{name}.{key}")
    elif isinstance(value, str) and (problem := secret_in_url(value)):
        raise ConfigError(f"storage option {name}={shown(value)} {problem}")


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
    """`value` with every `$NAME` in it replaced from the environment. What may be secret is remembered, to be masked;
    `name` is the option's, dotted."""
    if isinstance(value, Mapping):
        return {key: _resolved(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, f"{name}.{i}") for i, inner in enumerate(value)]
    if isinstance(value, str) and REFERENCE.fullmatch(value):
        variable = value.strip("${}")
        if not os.environ.get(variable):
            raise ConfigError(
                f"storage_options name the environment variable {variable}, which is not set on {platform.node()}. Set "
                f"it for the driver and on every machine that trains."
            )
        value = os.environ[variable]
        remember(value)
    elif must_be_reference(name, value):  # of the command line: a config may not have it
        remember(str(value))
    return value


def _restore(url: str, options: Options, retry_s: float) -> Storage:
    return Storage(url, options, retry_s=retry_s)


def _link_new(temporary: str, target: str) -> None:
    try:
        os.link(temporary, target)  # fails if the target exists, unlike a rename
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _say_once_that_there_are_no_links(os.path.dirname(target))
        with open(temporary, "rb") as file, open(target, "xb") as new:
            new.write(file.read())
            new.flush()
            os.fsync(new.fileno())
    os.remove(temporary)


@lru_cache
def _say_once_that_there_are_no_links(folder: str) -> None:
    logger.warning(
        "%s has no hard links: objects that must be new are opened exclusively instead. A reader may see a part of one "
        "for a moment, and tries again.",
        folder,
    )


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
    if type(error).__name__ in _NO_CREDENTIALS:
        return " Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or storage_options that name variables."
    return ""
