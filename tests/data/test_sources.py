"""Names of sources: what exists is a name, and only what does not may be a pattern. Real files; S3 served by moto."""

from __future__ import annotations

import functools
import gzip
import json
import os
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from relora_ray.data.documents import Reading, read_documents
from relora_ray.data.formats import Rules
from relora_ray.data.sources import find_sources, refuse_out_within
from relora_ray.errors import ConfigError, DataError
from relora_ray.storage import Storage
from tests.s3 import BUCKET, FaultyProxy, Kind, Server, storage_options


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(*names: Path | str, server: Server | None = None, **rules: str) -> list[str]:
    options = server.options if server else {}
    found = find_sources([str(name) for name in names], form=rules.get("form", ""), options=lambda name: options)
    return list(read_documents(found.sources, Rules(**rules), Reading()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents a, b and c, and what lies beside such files."""
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/.hidden").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(lines("a"))
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(lines("b")))
    (tmp_path / "in/deep/c.JSONL").write_bytes(lines("c"))
    for beside in ("_SUCCESS", ".a.jsonl.crc", "a.jsonl.md5", "SHA256SUMS", ".hidden/d.jsonl"):
        (tmp_path / "in" / beside).write_text("0" * 64)
    return tmp_path / "in"


def test_a_folder_is_all_documents_below_it(folder: Path) -> None:
    assert read(folder) == ["a", "b", "c"]
    left_out = find_sources([str(folder)]).left_out
    assert sorted(os.path.basename(path) for path in left_out) == [
        ".a.jsonl.crc", "SHA256SUMS", "_SUCCESS", "a.jsonl.md5", "d.jsonl",
    ]  # fmt: skip


def test_a_folder_of_several_kinds_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("# About")
    with pytest.raises(DataError, match=r"holds files of 2 kinds, such as README\.md, a\.jsonl\. Which are documents"):
        read(folder)
    assert read(f"{folder}/**/*.jsonl*") == ["a", "b"]
    assert len(read(folder, form="text")) == 4


def test_patterns_are_expanded_in_order(folder: Path) -> None:
    assert read(f"{folder}/*.jsonl") == ["a"]
    assert read(f"{folder}/**/*.[jJ]*[lL]") == ["a", "c"]
    with pytest.raises(DataError, match=r"x\*\.jsonl is no file, and as a pattern no file matches it"):
        read(f"{folder}/x*.jsonl")
    with pytest.raises(DataError, match="matches folders only"):
        read(f"{folder}/d*")


@pytest.mark.parametrize("name", ["a[1].jsonl", "a::b.jsonl", "a@b.jsonl", "what?.jsonl", "a*.jsonl", "zip::x.jsonl"])
def test_a_name_that_exists_is_no_pattern(name: str, tmp_path: Path, moto: Server) -> None:
    (tmp_path / name).write_bytes(lines("this"))
    (tmp_path / "a1.jsonl").write_bytes(lines("other"))
    assert read(tmp_path / name) == ["this"]
    url = f"s3://{BUCKET}/{tmp_path.name}"
    storage = Storage(url, moto.options)
    storage.put(name, lines("this"))
    storage.put("a1.jsonl", lines("other"))
    assert read(f"{url}/{name}", server=moto) == ["this"]


def test_links_are_followed_and_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/d.jsonl").write_bytes(lines("d"))
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / "deep/back").symlink_to(folder)
    assert read(folder) == ["a", "b", "c", "d"]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl is a link to nothing"):
        read(folder)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "data/books", "nowhere", "a/b/c.txt", "nowhere/docs.txt.gz"])
def test_a_mistyped_path_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the hub's libraries would try for most of a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "data").mkdir()
    began = time.monotonic()
    with pytest.raises(DataError, match=f"{name}: no such file or folder. If it is a dataset .* add --format hub"):
        read(name)
    assert time.monotonic() - began < 2


def test_hub_names_are_those_with_a_configuration_or_said_to_be() -> None:
    assert find_sources(["allenai/c4:en"]).sources[0].kind == "hub"
    assert find_sources(["allenai/c4"], form="hub").sources[0].kind == "hub"


def test_a_saved_dataset_is_one(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"meta": [{"text": "a"}, {"text": "b"}]}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", text_field="meta.text") == ["a", "b"]
    with pytest.raises(DataError, match="record 1 has no text in field 'text'"):
        read(tmp_path / "saved")


def test_a_file_given_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "same.jsonl").symlink_to(folder / "a.jsonl")
    first = folder / "a.jsonl"
    for names in ((first, first), (folder, f"{folder}/*.jsonl"), (first, tmp_path / "same.jsonl")):
        with pytest.raises(ConfigError, match=r"is given twice .*would count double"):
            read(*names)


def test_out_within_what_is_read_is_refused(folder: Path) -> None:
    sources = find_sources([str(folder)]).sources
    with pytest.raises(ConfigError, match=r"--out .*/in/out lies in .*/in, which is read"):
        refuse_out_within(f"{folder}/out", [str(folder)], sources)
    with pytest.raises(ConfigError, match=r"lies in --out"):
        refuse_out_within(str(folder), [f"{folder}/*"], sources)
    refuse_out_within(f"{folder}/out", [f"{folder}/a.jsonl"], find_sources([f"{folder}/a.jsonl"]).sources)
    refuse_out_within(f"{folder}-out", [str(folder)], sources)


def test_objects_below_a_prefix_or_matching_a_pattern(moto: Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    storage = Storage(url, moto.options)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), tmp_path / "a.parquet")
    contents = {
        "c4/a.json.gz": gzip.compress(lines("a")),
        "c4/deep/b.json.gz": gzip.compress(lines("b")),
        "c4/_SUCCESS": b"",
        "tables/a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }
    for path, content in contents.items():
        storage.put(path, content)
    assert read(f"{url}/c4/a.json.gz", server=moto) == ["a"]
    assert read(f"{url}/c4/*.json.gz", server=moto) == ["a"]
    assert read(f"{url}/c4/**/*.json.gz", server=moto) == ["a", "b"]
    assert read(f"{url}/c4", server=moto) == read(f"{url}/c4/", server=moto) == ["a", "b"]
    assert read(f"{url}/tables/*.parquet", server=moto) == ["p", "q"]
    with pytest.raises(DataError, match=r"c4/nothing\.json: no such object, and none below it"):
        read(f"{url}/c4/nothing.json", server=moto)
    with pytest.raises(DataError, match="no object matches it"):
        read(f"{url}/c4/*.parquet", server=moto)
    with pytest.raises(ConfigError, match="given twice"):
        read(f"{url}/c4", f"{url}/c4/a.json.gz", server=moto)


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncated"])
def test_a_server_that_fails_in_passing_loses_nothing(kind: Kind, proxy: FaultyProxy, tmp_path: Path) -> None:
    url, options = f"s3://{BUCKET}/{tmp_path.name}", storage_options(proxy.endpoint)
    texts = [f"{i} {'birds ' * 50}" for i in range(2_000)]
    Storage(url, options).put("a.jsonl", lines(*texts))
    fault = proxy.add(kind, "GET", "a.jsonl", times=2)
    found = find_sources([f"{url}/a.jsonl"], options=lambda name: options)
    assert list(read_documents(found.sources, Rules(), Reading())) == texts
    assert fault.seen == 2


def test_web_addresses_are_read_and_their_signatures_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("a")))
    monkeypatch.setattr("relora_ray.storage.RETRY_S", 1.0)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        assert read(f"{url}/a.jsonl.gz?signature=hidden") == ["a"]
        with pytest.raises(DataError, match=r"nothing\.jsonl\?\*\*\*: no such object") as raised:
            read(f"{url}/nothing.jsonl?signature=hidden")
        web.shutdown()
    assert "hidden" not in str(raised.value)


def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    for name in (folder, folder / "*"):
        with pytest.raises(DataError, match=r"pipe\.txt is no file, but a pipe"):
            find_sources([str(name)], form="text")


def test_a_link_beside_its_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "2024.txt").write_text("a document")
    (tmp_path / "latest.txt").symlink_to(tmp_path / "2024.txt")
    for name in (tmp_path, tmp_path / "*.txt"):
        found = find_sources([str(name)])
        assert [source.name for source in found.sources] == [str(tmp_path / "2024.txt")]
        assert found.left_out == [f"{tmp_path}/latest.txt (the same file as {tmp_path}/2024.txt)"]


def test_closed_standard_input_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read("-")
