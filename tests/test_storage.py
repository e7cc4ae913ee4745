"""Plain objects: atomic puts, create-once, errors that name the object. Local disk, a full one, and S3 servers."""

from __future__ import annotations

import errno
import math
import os
import pickle
import socket
import subprocess
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relora_ray import clock
from relora_ray.errors import ConfigError, StorageError
from relora_ray.storage import Storage, parse_options
from tests.s3 import BUCKET, SECRET, FaultyProxy, Kind, Server, storage_options

REMOTE = ["moto", "rclone", "ceph"]


def s3_storage(endpoint: str, **options: object) -> Storage:
    """A prefix of its own."""
    return Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}", storage_options(endpoint) | options, retry_s=5)


@pytest.fixture(params=["local", "file", "memory", *REMOTE])
def storage(request: pytest.FixtureRequest, tmp_path: Path, server: Callable[[str], Server]) -> Storage:
    """A local folder, the same by URL, an fsspec file system that is not a folder, and S3 servers over a socket."""
    if request.param in REMOTE:
        return s3_storage(server(request.param).endpoint)
    return Storage(
        {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]
    )


def test_put_get_list_delete(storage: Storage) -> None:
    assert storage.list() == []
    storage.put("a/one", b"1")
    storage.put("a/b/two", b"22")
    storage.put("c", b"")
    storage.put("a/one", b"111")
    assert storage.list() == ["a/b/two", "a/one", "c"]
    assert storage.list("a/b") == ["a/b/two"]
    assert storage.list("nothing") == []
    assert (storage.get("a/one"), storage.size("a/one"), storage.size("c")) == (b"111", 3, 0)
    assert storage.size("nowhere") is None
    assert storage.folders("") == ["a", "c"]
    assert storage.folders("a") == ["b", "one"]
    assert storage.folders("nothing") == []
    storage.delete("c")
    storage.delete("c")
    assert storage.list() == ["a/b/two", "a/one"]
    storage.delete_below("a/b")
    storage.delete_below("a/b")
    assert storage.list() == ["a/one"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a[!b]"])
def test_names_are_taken_letter_by_letter(storage: Storage, name: str) -> None:
    """In a folder whose name would match its neighbours', nothing but its own is read or removed."""
    here = Storage(f"{storage.url}/{name}", storage._options, retry_s=1)
    for neighbour in ("a1", "ab", "a"):
        storage.put(f"{neighbour}/x/y", b"a neighbour's")
        storage.put(f"{neighbour}/y", b"a neighbour's")
    assert (here.list(), here.folders(""), here.exists("y")) == ([], [], False)
    with pytest.raises(StorageError):
        here.get("y")
    for path in ("x/y", "y", "x[1]/y", "x1/y"):
        here.put(path, b"mine")
    here.delete_below("x[1]")
    assert here.list() == ["x/y", "x1/y", "y"]
    here.delete("y")
    here.delete_below("x")
    assert here.list() == ["x1/y"]
    assert len(storage.list()) == 7
    assert {storage.get(f"{neighbour}/x/y") for neighbour in ("a1", "ab", "a")} == {b"a neighbour's"}


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/..", ".", "/x", "a//x", "a/", "a\\x", "a\nx"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    storage = Storage(str(tmp_path / "here"))
    (tmp_path / "x").write_bytes(b"outside")
    for action in (storage.get, storage.delete, storage.delete_below, storage.exists, lambda p: storage.put(p, b"")):
        with pytest.raises(StorageError, match="is no name of an object below"):
            action(path)
    assert (tmp_path / "x").read_bytes() == b"outside"


def test_object_that_is_larger_than_it_may_be_is_not_read(storage: Storage) -> None:
    storage.put("x", b"12345")
    assert storage.get("x", at_most=5) == storage.get_expected("x", at_most=9) == b"12345"
    with pytest.raises(StorageError, match="/x has more than 4 bytes, the most that a record of its kind may have"):
        storage.get("x", at_most=4)


def test_child_is_a_prefix(storage: Storage) -> None:
    storage.child("x/y").put("z", b"1")
    assert storage.get("x/y/z") == b"1"
    assert storage.child("x").list() == ["y/z"]
    assert pickle.loads(pickle.dumps(storage.child("x"))).get("y/z") == b"1"


def test_missing_object_is_named(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*nowhere/x: ") as caught:
        storage.get("nowhere/x")
    assert caught.value.missing


def test_put_new_refuses_a_second_time(storage: Storage, request: pytest.FixtureRequest) -> None:
    storage.put_new("once", b"first")
    if "rclone" in request.node.name:
        storage.put_new("once", b"second")
        assert storage.get("once") == b"second", "it ignores If-None-Match"
        return
    with pytest.raises(FileExistsError, match="once exists already"):
        storage.put_new("once", b"second")
    assert storage.get("once") == b"first"
    assert storage.list() == ["once"]


def test_probe_tells_whether_two_writers_can_be_told_apart(storage: Storage, request: pytest.FixtureRequest) -> None:
    """rclone is known to ignore If-None-Match; memory:// to check it."""
    assert storage.honours_put_new() is ("rclone" not in request.node.name)
    assert storage.list() == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_put_new_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """As on a bucket that is mounted as a folder: an exclusive open takes the link's place, which is said once."""

    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    for number in range(3):
        storage.put_new(f"once-{number}", b"first")
        with pytest.raises(FileExistsError, match=f"once-{number} exists already"):
            storage.put_new(f"once-{number}", b"second")
        assert storage.get(f"once-{number}") == b"first"
    assert storage.list(unfinished=True) == ["once-0", "once-1", "once-2"]
    assert caplog.text.count("has no hard links") == 1
    assert storage.honours_put_new()


def test_missing_object_that_is_expected_is_asked_for_again(proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)
    storage.put("x", b"1")
    fault = proxy.add("404", "GET", "/x", times=2)
    assert storage.get_expected("x") == b"1"
    assert fault.seen == 2
    proxy.add("404", "GET", "/x", times=1)
    with pytest.raises(StorageError) as caught:
        storage.get("x")
    assert caught.value.missing
    hasty = Storage(storage.url, storage_options(proxy.endpoint), retry_s=0.5)
    with pytest.raises(StorageError, match=r"\(\d+ tries in \d s\)") as caught:
        hasty.get_expected("nowhere")
    assert caught.value.missing


def test_listing_that_is_denied_is_not_an_empty_folder(proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)
    storage.put("manifests/x", b"1")
    fault = proxy.add("404", "GET", "list-type", times=2)
    assert storage.list("manifests") == ["manifests/x"]
    assert fault.seen == 2
    proxy.add("404", "GET", "list-type", times=math.inf)
    with pytest.raises(StorageError, match=r"cannot list .*\(\d+ tries in \d s\)"):
        storage.list("manifests")


def test_missing_object_on_a_disk_is_waited_for_only_if_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of a network file system may have cached that it is not there."""
    storage, original, opened = Storage(str(tmp_path)), open, []

    def stale(path: str, *args: object, **kwargs: object) -> object:
        opened.append(path)
        if len(opened) == 1:
            raise FileNotFoundError(errno.ENOENT, "stale", path)
        return original(path, *args, **kwargs)  # type: ignore[call-overload]

    storage.put("a/x", b"1")
    monkeypatch.setattr("builtins.open", stale)
    assert storage.get_expected("a/x") == b"1"
    assert len(opened) == 2
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.get_expected("a/nowhere")
    assert caught.value.missing
    assert time.monotonic() - began < 30, "the default is to try for a minute"


def test_folders_are_not_listed_through(proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)
    for number in range(3):
        storage.put(f"delta/{number}/x", b"")
    before = len(proxy.log)
    assert storage.folders("delta") == ["0", "1", "2"]
    assert all("delimiter" in path for method, path in proxy.log[before:] if method == "GET")


def test_large_object_goes_in_pieces(storage: Storage) -> None:
    data = os.urandom(2**20) * 101  # above s3fs's bound for one put
    storage.put("large", data)
    assert storage.size("large") == len(data)
    assert storage.get("large") == data


def test_unfinished_write_is_not_listed_and_leaves_no_object(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("x", b"old")
    (tmp_path / ".partial-dead").write_bytes(b"half")
    assert storage.list() == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    target = tmp_path / "disk"
    target.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_full_disk_is_an_error_that_loses_nothing(small_disk: Path) -> None:
    storage = Storage(str(small_disk))
    storage.put("kept", b"k" * 1000)
    with pytest.raises(
        StorageError, match=r"cannot write .*/big \(2,000,000 bytes\): No space left.*Free space there"
    ) as caught:
        storage.put("big", b"b" * 2_000_000)
    assert not caught.value.restart_helps
    with pytest.raises(StorageError, match="No space left"):
        storage.put("kept", b"x" * 2_000_000)
    assert storage.list() == ["kept"]
    assert storage.get("kept") == b"k" * 1000
    storage.put("small", b"fits again, so the failed write left no litter")
    assert sorted(os.listdir(small_disk)) == ["kept", "small"]


def test_folder_that_cannot_be_read_is_an_error_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty answer here would start a run again from step 0."""
    storage = Storage(str(tmp_path))
    storage.put("manifests/a", b"")

    def stale(path: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(StorageError, match=r"cannot list .*: Stale file handle"):
        storage.list("manifests")


FAST = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}


@pytest.mark.parametrize("kind", ["500", "503", "reset", "silent"])
@pytest.mark.parametrize("action", ["GET", "PUT", "HEAD"])
def test_failure_in_passing_is_tried_again(
    kind: Kind, action: str, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    storage = s3_storage(proxy.endpoint, **FAST)
    storage.put("x", b"1234")
    times = 4 if kind == "reset" else 2  # where a connection breaks off aiohttp tries once more by itself
    fault = proxy.add(kind, action, "/x", times)
    if action == "PUT":
        storage.put("x", b"56789")
        assert storage.get("x") == b"56789"
    else:
        assert (storage.get("x") if action == "GET" else storage.size("x")) in (b"1234", 4)
    assert fault.seen == times
    assert "; try 2 in " in caplog.text
    assert kind == "reset" or "; try 3 in " in caplog.text


@pytest.mark.parametrize("kind", ["truncated", "slow"])
def test_body_that_breaks_off_or_trickles(kind: Kind, proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint, **FAST)
    storage.put("x", bytes(100_000))
    fault = proxy.add(kind, "GET", "/x")
    assert storage.get("x") == bytes(100_000)
    assert fault.seen == 1


def test_failure_that_lasts_ends_within_its_bound(proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)
    proxy.add("503", "PUT", times=math.inf)
    with pytest.raises(StorageError, match=r"cannot write s3://.*/x \(1 bytes\): .*\(\d+ tries in \d+ s\)") as caught:
        storage.put("x", b"1")
    assert caught.value.restart_helps
    assert len(proxy.log) >= 4


@pytest.mark.parametrize("kind", ["403", "404"])
def test_refusal_is_not_tried_again(kind: Kind, proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)
    proxy.add(kind, "PUT", times=math.inf)
    with pytest.raises(StorageError, match=r"cannot write s3://.*/x"):
        storage.put("x", b"1")
    assert len(proxy.log) == 1


def test_bucket_that_does_not_exist_is_refused(moto: Server) -> None:
    storage = Storage("s3://nowhere/x", moto.options)
    with pytest.raises(StorageError, match=r"cannot write s3://nowhere/x/y .*bucket does not exist"):
        storage.put("y", b"1")


def test_answer_of_a_put_that_was_lost_does_not_hide_the_object(proxy: FaultyProxy) -> None:
    """The server stored it, the client never heard: the second try is refused by the first."""
    storage = s3_storage(proxy.endpoint)
    done: list[str] = []

    def lose_the_answer(method: str, path: str) -> None:
        if method == "PUT" and not done:
            done.append(path)
            s3_storage(proxy.target).child("").put("unused", b"")
            Storage(f"s3:/{path.partition('?')[0]}", storage_options(proxy.target)).put("", b"mine")

    proxy.on_request = lose_the_answer
    proxy.add("reset", "PUT")
    with pytest.raises(FileExistsError):
        storage.put_new("once", b"mine")
    assert storage.get("once") == b"mine"


@pytest.mark.parametrize("kind", ["rclone", "ceph"])
def test_wrong_key_is_refused_and_not_shown(
    server: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("S3_TEST_SECRET", "wrong-secret-value")
    storage = s3_storage(server(kind).endpoint)
    with pytest.raises(StorageError) as caught:
        storage.put("x", b"1")
    assert "wrong-secret-value" not in str(caught.value)


def test_secrets_in_messages_are_masked(monkeypatch: pytest.MonkeyPatch, proxy: FaultyProxy) -> None:
    storage = s3_storage(proxy.endpoint)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(f"request signed with {SECRET} was refused")

    monkeypatch.setattr(storage._fs, "pipe_file", refuse)
    with pytest.raises(StorageError, match=r"signed with \*\*\* was refused"):
        storage.put("x", b"1")


def test_secrets_are_not_pickled(moto: Server) -> None:
    storage = s3_storage(moto.endpoint)
    storage.put("x", b"1")
    pickled = pickle.dumps(storage)
    assert SECRET.encode() not in pickled
    assert pickle.loads(pickled).get("x") == b"1"


def test_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3_TEST_SECRET")
    with pytest.raises(ConfigError, match="name the environment variable S3_TEST_SECRET, which is not set on"):
        s3_storage("http://127.0.0.1:1")


def test_options_of_the_command_line() -> None:
    assert parse_options(["endpoint_url=http://x:9", "anon=true"]) == {"endpoint_url": "http://x:9", "anon": True}
    with pytest.raises(ConfigError, match="'anon' is not of the form key=value"):
        parse_options(["anon"])


@pytest.mark.parametrize("kind", ["rclone", "ceph"])
def test_server_that_is_down_for_a_while_is_waited_for(server: Callable[[str], Server], kind: str) -> None:
    """SIGKILL, and back after a second with all that was acknowledged."""
    killed = server(kind)
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}", storage_options(killed.endpoint))
    storage.put("before", b"1")
    killed.kill()
    back = threading.Timer(1.0, killed.start)
    back.start()
    storage.put("after", b"2")
    back.join()
    assert storage.list() == ["after", "before"]


def test_server_that_takes_no_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts the connection and says nothing: no read time-out is counted before the body is sent."""
    monkeypatch.setattr("relora_ray.storage._CALL_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        storage = s3_storage(f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StorageError, match="cannot write"):
            storage._guard("write", "x", lambda: storage._call("pipe_file", storage._at("x"), b"1"))
        assert time.monotonic() - began < 60


def test_delete_that_does_nothing_is_an_error(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = s3_storage(moto.endpoint)
    storage.put("a/x", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(storage._fs, "rm_file", lambda *args, **kwargs: None)
        with pytest.raises(StorageError, match=r"/a/x is still there after it was deleted"):
            storage.delete_below("a")
    storage.delete_below("a")
    assert storage.list() == []


def test_secret_is_not_in_the_traceback(monkeypatch: pytest.MonkeyPatch, moto: Server) -> None:
    storage = s3_storage(moto.endpoint)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(f"signed with {SECRET}")

    monkeypatch.setattr(storage._fs, "pipe_file", refuse)
    with pytest.raises(StorageError) as caught:
        storage.put("x", b"1")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_empty_objects_and_marks_of_folders_do_no_harm_on_a_server(moto: Server) -> None:
    """S3 answers a range of an empty object with an error, which was tried again for a minute: a claim whose record is
    empty stopped every start. And consoles create `pins/`, which is no name of an object of ours."""
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}", moto.options, retry_s=1)
    storage.put("terms/0001.json", b"")
    assert storage.get("terms/0001.json", at_most=100) == b""
    storage._fs.pipe_file(f"{storage._root}/pins/", b"")
    storage.put("pins/a", b"1")
    assert storage.list("pins") == ["pins/a"]
    storage.delete_below("pins")
    assert storage.list("pins") == []


def test_object_that_is_expected_is_asked_for_twice_though_the_process_stood_still(
    moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine was suspended in a request for longer than `retry_s`, and the answer was a wrong 404: the newest
    checkpoint counted as removed. Found by the simulation, seed 2868."""
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}", moto.options, retry_s=60)
    storage.put("a", b"1")
    original, now = Storage._call, [0.0]

    def suspended(self: Storage, name: str, *args: object, **options: object) -> object:
        if name == "cat_file" and not now[0]:
            now[0] = 100.0
            raise FileNotFoundError("a")
        return original(self, name, *args, **options)

    monkeypatch.setattr(Storage, "_call", suspended)
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    assert storage.get_expected("a") == b"1"


def test_old_listing_is_not_believed_though_the_process_stood_still(
    moto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine was suspended between two listings for longer than `retry_s`, and of two that differed the first, an
    old one, was believed: an attempt began without the newest checkpoint. Found by the simulation, seed 9657."""
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}", moto.options, retry_s=60)
    storage.put("a/new", b"1")
    original, answers, now = Storage.list, [["a/old"]], [0.0]

    def listing(self: Storage, prefix: str = "", **options: bool) -> list[str]:
        if answers:
            return answers.pop()
        now[0] = 100.0
        return original(self, prefix, **options)

    monkeypatch.setattr(Storage, "list", listing)
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    assert storage.list_surely("a") == ["a/new"]


def test_missing_credentials_are_said_at_once(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(clock, "sleep", lambda s: pytest.fail("it was tried again"))
    storage = Storage(f"s3://{BUCKET}/none", {"endpoint_url": moto.endpoint})
    with pytest.raises(StorageError, match=r"cannot write .*probe-.*NoCredentialsError.*Set AWS_ACCESS_KEY_ID"):
        storage.honours_put_new()
