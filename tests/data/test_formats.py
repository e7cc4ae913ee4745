"""What a file is, by its content, and the documents in it. Nothing is faked; files are made by other writers."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from relora_ray.data.documents import Reading, read_documents
from relora_ray.data.formats import Rules
from relora_ray.data.sources import find_sources
from relora_ray.errors import DataError
from tests.conftest import ROOT

DOCUMENTS = [f'Document {i} of "birds", {{{i}}}, and the sea.\nIt has two lines.' for i in range(5)]
LINES = "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(DOCUMENTS)).encode()
TWO = LINES[: LINES.index(b"\n") + 1], LINES[LINES.index(b"\n") + 1 :]
TEXT = "\n<|endoftext|>\n".join(DOCUMENTS).encode()


def read(path: Path | str, reading: Reading | None = None, **rules: str) -> list[str]:
    sources = find_sources([str(path)], form=rules.get("form", "")).sources
    return list(read_documents(sources, Rules(**rules), reading or Reading()))


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    rows = [["id", "text"], *([i, d] for i, d in enumerate(DOCUMENTS))]
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.jsonlines", LINES),
        ("a.JSON.GZ", gzip.compress(LINES)),
        ("no-ending", LINES),
        ("a.txt", LINES),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstd(LINES)),
        ("two.jsonl.zst", zstd(LINES[:100]) + zstd(LINES[100:])),
        ("two.jsonl.gz", gzip.compress(LINES[:100]) + gzip.compress(LINES[100:])),
        ("packed-without-ending", gzip.compress(LINES)),
        ("a.jsonl.zip", zipped({"a.jsonl": LINES})),
        ("two.zip", zipped({"x/a.jsonl": TWO[0], "__MACOSX/x/._a.jsonl": b"\0", ".b": b"\0", "x/b.jsonl": TWO[1]})),
        ("a.jsonl.gz.zip", zipped({"a.jsonl.gz": gzip.compress(LINES)})),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("blank.jsonl", b"\n  \n" + LINES.replace(b"\n", b"\n\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("utf16.jsonl", LINES.decode().encode("utf-16")),
        ("array.json", json.dumps([json.loads(line) for line in LINES.splitlines()]).encode()),
        ("pretty.json", json.dumps([json.loads(line) for line in LINES.splitlines()], indent=2).encode()),
        ("a.csv", table(",")),
        ("A.CSV.gz", gzip.compress(b"\xef\xbb\xbf" + table(","))),
        ("a.txt.zst", zstd(TEXT)),
        ("crlf.txt", TEXT.replace(b"\n", b"\r\n")),
        ("utf16.txt", b"\xff\xfe" + TEXT.decode().encode("utf-16-le")),
        ("utf32.txt", TEXT.decode().encode("utf-32")),
        ("bom.txt", b"\xef\xbb\xbf" + TEXT.replace(b"<|endoftext|>", b"\xef\xbb\xbf<|endoftext|>")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_file_gives_the_same_documents(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    if "txt" in name and name != "a.txt":  # the line break before a separator belongs to the document
        found = [document.removesuffix("\n") for document in found]
    assert found == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES)[:-12], r"cut.jsonl.gz: cannot be read as jsonl: it is cut off"),
        ("cut.txt.bz2", bz2.compress(TEXT)[:-12], r"cut.txt.bz2: cannot be read as .*: it is cut off"),
        ("cut.txt.xz", lzma.compress(TEXT)[:-12], r"cut.txt.xz: cannot be read as .*: it is cut off"),
        ("cut.jsonl.zst", zstd(LINES)[:-12], r"cut.jsonl.zst: cannot be read as .*: it is cut off"),
        ("junk.txt.gz", gzip.compress(TEXT) + b"junk", r"junk.txt.gz: .* something else behind its compressed"),
        ("cut.zip", zipped({"a.jsonl": LINES})[:-40], r"cut.zip: cannot be read as zip: File is not a zip file"),
        ("twice.json", b'[{"text": "a", "text": "b"}]', r"twice.json, record 1 has 'text' twice"),
        ("cut.json", b'[{"text": "a"}, {"text"', r"cut.json.* record 2 is not JSON"),
        ("ended.json", b'[{"text": "a"}', r"ended.json ends within a JSON array, after 1 records: it is cut off"),
        ("two.json", b'[{"text": "a"}]\n[{"text": "b"}]', r"two.json goes on behind its JSON array"),
        ("empty.gz", b"", r"empty.gz is empty, which no .gz file is"),
        ("plain.txt.gz", TEXT, r"plain.txt.gz is not what its ending says: it begins with b'Docume'"),
        ("a.tar.gz", b"", "is a tar archive"),
        ("a.parquet", b"no parquet", r"a.parquet: cannot be read as parquet: it begins with b'no p'"),
        ("jis.txt", ("\u3053\u3093\u306b\u3061\u306f\n" * 9).encode("iso2022_jp"), "is text in ISO-2022"),
        ("texts.jsonl.br", b"\x8b\x02\x80random", r"is compressed \(\.br\), which is not read"),
        ("semi.csv", b"id;text\n1;one\n", "has one column in its first line, 'id;text', as if ';' stood between"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of git-lfs"),
        ("page.txt", b"<!DOCTYPE html>\n<html>404</html>", r"is markup.*--format text to take it as it is"),
        ("a.docx", zipped({"[Content_Types].xml": b"<x/>"}), "a.docx is an office document"),
        ("mixed.zip", zipped({"a.jsonl": LINES, "README.md": b"# Read me"}), "mixed.zip holds files of 2 kinds"),
        ("a.npy", b"\x93NUMPY\x01\0", "is an array of numpy"),
        ("arrow", b"ARROW1\0\0\xff", "is an Arrow file"),
        ("utf16.txt", TEXT.decode().encode("utf-16-le"), r"utf16.txt is not text in UTF-8: byte 1 is zero.*UTF-16LE"),
        ("utf16.txt", TEXT.decode().encode("utf-16-be"), r"utf16.txt is not text in UTF-8: byte 0 is zero.*UTF-16BE"),
        ("latin.txt", b"One.\nTwo caf\xe9.\n", r"latin.txt:2 is not UTF-8: it has the byte 0xe9. Convert the file"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"latin.jsonl:2 is not UTF-8: it has the byte 0xe9"),
        ("later.txt", b"One.\n<|endoftext|>\n" + b"a" * 70_000 + b"\nT\0w\0o\0", r"later.txt:4 has a zero byte"),
        ("later16.txt", b"\xff\xfe" + TEXT.decode().encode("utf-16-le") + b"x", r"later16.txt: cannot be read as text"),
        ("a.csv", b"id,content\n1,a\n", r"a.csv has no columns 'text' in its first line, which names id, content"),
        ("twice.csv", b"text,text\n1,a\n", r"twice.csv has 2 columns 'text'"),
        ("open.csv", b'text\n"never closed\n', r"open.csv:2 is not CSV: unexpected end of data"),
        ("cells.csv", b"id,text\n1,a\n2,b,c\n", r"cells.csv:3 has 3 cells, and the first line 2"),
        ("quoted.tsv", b'id\ttext\n1\t"a ""b"""\n', r"quoted.tsv:2 begins its text with a quotation mark"),
        ("pretty.json", b'{\n  "text": "a"\n}\n', r"pretty.json:1 is not JSON.*Each line must be one object"),
        ("twice.jsonl", b'{"text": "a", "id": 1, "text": "b"}\n', r"twice.jsonl:1 has 'text' twice. Which one is"),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"}\n", r"deep.jsonl:1 is not JSON"),
        ("digits.jsonl", b'{"text": ' + b"1" * 5_000 + b"}\n", r"digits.jsonl:1 is not JSON"),
        ("null.jsonl", b'{"text": null}\n', r"null.jsonl:1 has null in field 'text', not text"),
        ("list.jsonl", b'{"text": ["a"]}\n', r"list.jsonl:1 has a list in field 'text', not text"),
        ("number.jsonl", b'{"text": 3}\n', r"number.jsonl:1 has a number in field 'text', not text"),
        ("bare.jsonl", b'"a"\n', r"bare.jsonl:1 is a string, not an object with a field 'text'"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"half.jsonl:2 has half a character.*\\ud83d"),
        ("data.jsonl.sha256", b"0" * 64 + b"  data.jsonl\n", "is named like a list of checksums"),
        ("sums.txt", b"0" * 64 + b"  data.jsonl\n", "sums.txt is a list of checksums"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_cannot_be_read_is_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name == "a.tar.gz":
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(__file__)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "beginning", ["[Illustration]", "[1] Introduction", "{{Infobox", "[[File:x.jpg]]", "{\\bf bold}", "ORCHARDS", "<s>"]
)
def test_text_that_only_begins_like_something_else_is_text(beginning: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{beginning} and so on.\n")
    assert read(tmp_path / "a.txt") == [f"{beginning} and so on.\n"]


def test_format_text_takes_anything_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert read(tmp_path / "a.jsonl", form="text") == [LINES.decode()]


def test_bad_records_are_counted_and_passed_over(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', "no json", '{"text": null}', '{"other": "x"}', '{"text": "  "}', '{"text": "last"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reading = Reading(skip_bad=3)
    assert read(tmp_path / "a.jsonl", reading) == ["good", "last"]
    assert (reading.num_bad, reading.num_empty) == (3, 1)
    assert [problem.where.rpartition(":")[2] for problem in reading.first_bad] == ["2", "3", "4"]
    with pytest.raises(DataError, match=r":4 has no text .* bad record number 3, and --skip-bad=2 lets fewer pass.*:2"):
        read(tmp_path / "a.jsonl", Reading(skip_bad=2))


def test_a_bad_document_of_text_is_passed_over_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One.\n<|endoftext|>\nTwo.\nCaf\xe9.\n<|endoftext|>\nThree.\n")
    reading = Reading(skip_bad=1)
    assert read(tmp_path / "a.txt", reading) == ["One.\n", "Three.\n"]
    assert reading.first_bad[0].where.endswith("a.txt:4")


def test_empty_files_are_named(tmp_path: Path) -> None:
    for name, content in {"empty.txt": "", "blank.txt": " \n\n", "empty.jsonl": "", "ok.txt": "Text."}.items():
        (tmp_path / name).write_text(content)
    reading = Reading()
    names = [str(tmp_path / name) for name in ("empty.txt", "blank.txt", "empty.jsonl", "ok.txt")]
    assert list(read_documents(find_sources(names).sources, Rules(), reading)) == ["Text."]
    assert reading.without_documents == names[:3]


def test_long_records_in_an_array_are_read_in_pieces(tmp_path: Path) -> None:
    """Larger than what is read at once, and cut anywhere."""
    records = [{"text": f"{i} " + "\u00e9" * (700_000 * (i % 3))} for i in range(7)]
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    assert read(tmp_path / "a.json") == [record["text"] for record in records]


def test_dotted_field_leads_into_records(tmp_path: Path) -> None:
    nested = {"data": {"text": "inner"}, "data.title": "exact"}
    (tmp_path / "a.jsonl").write_text(json.dumps(nested) + "\n")
    assert read(tmp_path / "a.jsonl", text_field="data.text") == ["inner"]
    assert read(tmp_path / "a.jsonl", text_field="data.title") == ["exact"]
    with pytest.raises(DataError, match=r"no text in field 'data\.body'"):
        read(tmp_path / "a.jsonl", text_field="data.body")


def test_parquet_columns_of_every_kind_of_text(tmp_path: Path) -> None:
    kinds: dict[str, Callable[[], pyarrow.Array]] = {
        "string": lambda: pyarrow.array(DOCUMENTS),
        "large": lambda: pyarrow.array(DOCUMENTS, pyarrow.large_string()),
        "coded": lambda: pyarrow.array(DOCUMENTS).dictionary_encode(),
        "data": lambda: pyarrow.array([{"text": d} for d in DOCUMENTS]),
        "a.b": lambda: pyarrow.array(DOCUMENTS),
        "holes": lambda: pyarrow.array([None, *DOCUMENTS[1:]]),
        "bytes": lambda: pyarrow.array([d.encode() for d in DOCUMENTS]),
        "lists": lambda: pyarrow.array([[d] for d in DOCUMENTS]),
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: make() for name, make in kinds.items()}), path)
    for name in ("string", "large", "coded", "data.text", "a.b"):
        assert read(path, text_field=name) == DOCUMENTS, name
    assert read(path, Reading(skip_bad=1), text_field="holes") == DOCUMENTS[1:]
    for name, message in {
        "holes": r"a.parquet, row 1 has null in field 'holes'",
        "bytes": r"column 'bytes' is binary, not text",
        "lists": r"column 'lists' is list<.*>, not text",
        "data": r"column 'data' is struct<.*>, not text",
        "data.body": r"no field 'body' in column 'data'",
        "missing": r"no column 'missing', only string, large",
    }.items():
        with pytest.raises(DataError, match=message):
            read(path, text_field=name)


def test_one_record_that_is_no_text_is_no_reason_against_the_file(tmp_path: Path) -> None:
    """Bytes in a column of strings, which pyarrow does not look at; and a zero byte in a file's first block."""
    texts = [d.encode() for d in DOCUMENTS]
    texts[2] = b"caf\xe9"
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), pyarrow.array(texts, pyarrow.binary()).buffers())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a.parquet, row 3 is not UTF-8: it has the byte 0xe9"):
        read(path)
    assert read(path, Reading(skip_bad=1)) == DOCUMENTS[:2] + DOCUMENTS[3:]
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(lines[0].replace(b"birds", b"bi\0ds") + b"".join(lines[1:]))
    with pytest.raises(DataError, match=r"a.jsonl:1 has a zero byte"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", Reading(skip_bad=1)) == DOCUMENTS[1:]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read(path)


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES)], ids=["plain", "gz"])
def test_standard_input_is_read_once(content: bytes) -> None:
    script = (
        "import json; from relora_ray.data.documents import *; from relora_ray.data.sources import find_sources;"
        "print(json.dumps(list(read_documents(find_sources(['-']).sources, Rules(), Reading()))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=content, capture_output=True, cwd=ROOT, env=os.environ, check=True
    )
    assert json.loads(done.stdout) == DOCUMENTS


def twice_in_a_zip() -> bytes:
    """As `zip -u` and Python's append mode leave it."""
    buffer = io.BytesIO()
    for content in TWO:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr("a.jsonl", content)
    return buffer.getvalue()


def two_columns() -> bytes:
    buffer = io.BytesIO()
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.bz2", bz2.compress(TWO[0]) + bz2.compress(TWO[1])[1:], "cannot be read as jsonl"),
        ("a.jsonl.bz2", bz2.compress(TWO[0]) + TWO[1], "cannot be read as jsonl"),
        ("a.jsonl.xz", lzma.compress(TWO[0]) + lzma.compress(TWO[1])[1:], "cannot be read as jsonl"),
        ("a.jsonl.xz", lzma.compress(TWO[0]) + TWO[1], "cannot be read as jsonl"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], "it is cut off"),
        ("a.zip", twice_in_a_zip, r"has 2 files of the name a\.jsonl"),
        ("a.csv", b"text\r\nfirst half\rsecond half\r\nnext\r\n", r"a cell has a lone carriage return"),
        ("a.tsv", b"text\nfirst half\rsecond half\nnext\n", r"a cell has a lone carriage return"),
        ("a.parquet", two_columns, r"has 2 columns 'text'"),
    ],
)  # fmt: skip
def test_nothing_is_lost_or_cut_without_a_word(
    name: str, content: bytes | Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_streams_one_after_the_other_and_padding_are_read(tmp_path: Path) -> None:
    for name, pack in (("a.jsonl.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(TWO[0]) + b"\0" * 512 + pack(TWO[1]) + b"\0" * 4)
        assert read(tmp_path / name) == DOCUMENTS
    (tmp_path / "old.csv").write_bytes(table(",").replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    assert read(tmp_path / "old.csv") == [d.replace("\n", "\r") for d in DOCUMENTS]


def test_what_a_zip_has_besides_documents_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(
        zipped({"./a.jsonl": TWO[0], "_posts/b.jsonl": TWO[1], ".c/d.jsonl": b"x", "_SUCCESS": b""})
    )
    reading = Reading()
    assert read(tmp_path / "a.zip", reading) == DOCUMENTS
    assert [name.rpartition("a.zip/")[2] for name in reading.left_out] == [".c/d.jsonl", "_SUCCESS"]
