"""From a file's bytes to documents: text, JSON lines or one JSON array, CSV, TSV and Parquet, compressed or in a zip.

What is wrong with a single record is a `Problem`, and the reading goes on behind it; what is wrong with the file is a
DataError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from relora_ray.data.kinds import Content, check_one_kind, decoded, encoding_of, is_beside, kind_by_name, look
from relora_ray.errors import DataError


@dataclass(frozen=True)
class Problem:
    """A record that is no document."""

    where: str
    """File and line, row or number."""
    reason: str
    """As the end of a sentence that begins with `where`."""


@dataclass(frozen=True)
class Beside:
    """A file in an archive that is no document, like those that are left out of folders."""

    name: str


@dataclass(frozen=True)
class TextRead:
    """That a file of plain text has come to its end."""

    num_separators: int


Item = str | Problem | Beside | TextRead


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How documents are found in a file."""

    form: str = ""
    """One of FILE_FORMATS; empty: by content and name."""
    text_field: str = "text"
    """Of a record; dots lead into records within it, unless there is a field of the whole name."""
    separator: str = r"<\|endoftext\|>"
    """A regular expression for whole lines that stand between documents of plain text."""


def read_items(stream: BinaryIO, name: str, rules: Rules) -> Iterator[Item]:
    """The documents of one file, in its order, among them the records that are none.

    `stream` is read once from its beginning to its end; Parquet and zip need one that can seek. `name`: for messages,
    and for its ending. DataError if it cannot be read, or holds what is not read.
    """
    what = rules.form or kind_by_name(name)
    try:
        content = look(stream, name, rules.form)
        what = content.form
        if what == "zip":
            yield from _zipped(content.stream, name, rules)
        elif what == "parquet":
            yield from _parquet(content.stream, name, rules.text_field)
        else:
            yield from _characters(content, name, rules)
    except _UNREADABLE as error:
        raise _unreadable(name, what, error) from error


def check_file(stream: BinaryIO, name: str, rules: Rules) -> None:
    """DataError if the beginning of the file shows that it cannot be read."""
    try:
        content = look(stream, name, rules.form)
        if content.form not in ("zip", "parquet"):
            encoding_of(content.head, name)
    except _UNREADABLE as error:
        raise _unreadable(name, rules.form or kind_by_name(name), error) from error


_UNREADABLE = (
    OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error, RuntimeError,
)  # fmt: skip
"""What the libraries raise for content that is none. RuntimeError: a zip with a password."""


def _unreadable(name: str, what: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be read as {what}: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError) or "Truncated" in str(error):
        return f"it is cut off ({error}). Fetch it again."
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error):  # its first bytes were those of one
        return "it has something else behind its compressed data. Fetch it again, or unpack it and look at its end."
    if "requires too much memory" in str(error):
        return "it was compressed with a long window. Give it as a stream: zstd -d --long=31 -c FILE | ... prepare -."
    if isinstance(error, UnicodeError):
        return f"{error}. Convert it to UTF-8 (iconv -f ENCODING -t UTF-8)."
    return (
        f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Check the file, or name its --format."
    )


def _zipped(stream: io.BufferedReader, name: str, rules: Rules) -> Iterator[Item]:
    if not stream.seekable():
        raise DataError(f"{name} is a zip, which cannot be read from a stream. Give it as a file, or unpack it first.")
    with zipfile.ZipFile(stream) as archive:
        members = [member.filename for member in archive.infolist() if not member.is_dir()]
        if "[Content_Types].xml" in members:
            raise DataError(f"{name} is an office document. Save it as plain text first.")
        if twice := [member for member, count in Counter(members).items() if count > 1]:
            raise DataError(
                f"{name} has {members.count(twice[0])} files of the name {twice[0]}, as one to which files were added "
                f"again. Unpack it, see which is the document, and give that."
            )
        beside = [member for member in members if is_beside(member) or member.startswith("__MACOSX/")]
        yield from (Beside(f"{name}/{member}") for member in beside)
        wanted = [member for member in members if member not in beside]
        if not rules.form:
            check_one_kind(wanted, name)
        for member in wanted:
            with archive.open(member) as file:
                if rules.form == "parquet" or member.lower().endswith(".parquet"):
                    raise DataError(f"{name} holds Parquet ({member}). Unpack it first.")
                yield from read_items(file, f"{name}/{member}", rules)  # type: ignore[arg-type]


def _characters(content: Content, name: str, rules: Rules) -> Iterator[Item]:
    form, encoding = content.form, encoding_of(content.head, name)
    # What is not UTF-8 comes through as lone surrogates, by which the line is found that has it.
    errors = "surrogateescape" if encoding == "utf-8" else "strict"
    newline = None
    if form in ("csv", "tsv"):
        # Rows end with \n: a lone \r within a cell is found by the reader, which would begin a row there otherwise.
        newline = "\r" if b"\r" in content.head and b"\n" not in content.head else "\n"
    file = io.TextIOWrapper(content.stream, "utf-8-sig" if encoding == "utf-8" else encoding, errors, newline)
    if form == "text":
        yield from _text(file, name, rules.separator)
    elif form in ("csv", "tsv"):
        yield from _table(file, name, rules.text_field, form)
    elif decoded(content.head, encoding).lstrip().startswith("["):
        yield from _array(file, name, rules.text_field)
    else:
        yield from _lines(file, name, rules.text_field)


def _text(file: TextIO, name: str, separator: str) -> Iterator[Item]:
    between = re.compile(separator)
    lines: list[str] = []
    first, num_separators = 1, 0
    for number, line in enumerate(file, 1):
        content = line.removeprefix("\ufeff")  # of a file that was appended to another
        if between.fullmatch(content.rstrip("\r\n")):
            num_separators += 1
            yield from _document(lines, name, first)
            lines, first = [], number + 1
        else:
            lines.append(content)
    yield from _document(lines, name, first)
    yield TextRead(num_separators)


def _document(lines: list[str], name: str, first: int) -> Iterator[Item]:
    """Of plain text, whose first line has number `first`; nothing if it is blank."""
    text = "".join(lines)
    if not text.strip():
        return
    if flaw := _flaw(text, raw=True):
        position, reason = flaw
        line = first + text.count("\n", 0, position)
        yield Problem(f"{name}:{line}", reason)
    else:
        yield text


class _KeyTwice(Exception):
    """A record has two texts."""


def _one_text(text_field: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes a dict of a JSON object. Python's own takes the last of two equal keys without a word."""

    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and [key for key, _ in pairs].count(text_field) > 1:
            raise _KeyTwice(f"has {text_field!r} twice. Which one is meant is not known: keep one.")
        return found

    return record


def _lines(file: TextIO, name: str, text_field: str) -> Iterator[Item]:
    one_text = _one_text(text_field)
    for number, line in enumerate(file, 1):
        content, where = line.removeprefix("\ufeff"), f"{name}:{number}"
        if not content.strip():
            continue
        if flaw := _flaw(content, raw=True):
            yield Problem(where, flaw[1])
            continue
        try:
            record = json.loads(content, object_pairs_hook=one_text)
        except _KeyTwice as error:
            yield Problem(where, str(error))
        except (ValueError, RecursionError) as error:
            yield Problem(
                where,
                f"is not JSON: {error}. Each line must be one object; if it is no JSON at all, give --format text.",
            )
        else:
            yield text_of(record, text_field, where)


def _array(file: TextIO, name: str, text_field: str) -> Iterator[Item]:
    """Of one JSON array, which need not fit into memory as a whole."""
    decoder, space = json.JSONDecoder(object_pairs_hook=_one_text(text_field)), re.compile(r"\s*")
    buffer, at, number, ended = file.read(2**20).removeprefix("\ufeff"), 0, 0, False

    def more() -> bool:
        nonlocal buffer, at, ended
        added = file.read(max(2**20, len(buffer) - at))  # doubled, or a long record would be parsed many times
        buffer, at, ended = buffer[at:] + added, 0, not added
        return not ended

    def next_character() -> str:
        nonlocal at
        while (at := space.match(buffer, at).end()) == len(buffer):  # type: ignore[union-attr]
            if not more():
                raise DataError(f"{name} ends within a JSON array, after {number:,} records: it is cut off.")
        return buffer[at]

    assert next_character() == "["
    at += 1
    while next_character() != "]":
        number += 1
        while True:
            try:
                record, end = decoder.raw_decode(buffer, at)
                if end < len(buffer) or ended:
                    break
            except _KeyTwice as error:
                raise DataError(f"{name}, record {number} {error}") from error
            except ValueError as error:
                if ended:
                    raise DataError(f"{name}, record {number} is not JSON: {error}.") from error
            more()
        at = end
        yield text_of(record, text_field, f"{name}, record {number}")
        if (mark := next_character()) == ",":
            at += 1
        elif mark != "]":
            raise DataError(f"{name} has {mark!r} after record {number} of its JSON array, where a comma belongs.")
    rest = buffer[at + 1 :].strip() or file.read().strip()
    if rest:
        raise DataError(f"{name} goes on behind its JSON array, with {rest[:20]!r}. Give one array, or JSON lines.")


def _table(file: TextIO, name: str, text_field: str, form: str) -> Iterator[Item]:
    """CSV by RFC 4180; TSV as IANA has it, without quotation marks around cells. The first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    if form == "csv":
        reader = csv.reader(file, strict=True)
    else:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(reader, None)
    if header is None:
        return
    if header.count(text_field) != 1:
        separator = next((s for s in ";|\t" if len(header) == 1 and s in header[0]), None)
        if separator is not None:
            raise DataError(
                f"{name} has one column in its first line, {header[0][:80]!r}, as if {separator!r} stood between "
                f"columns. Write it with commas, or with tabs as a .tsv."
            )
        raise DataError(
            f"{name} has {header.count(text_field) or 'no'} columns {text_field!r} in its first line, which names "
            f"{', '.join(header[:20])[:200]}. Set --text-field, or give --format text if it is no table."
        )
    column, line = header.index(text_field), reader.line_num
    try:
        for row in reader:
            where, line = f"{name}:{line + 1}", reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                yield Problem(where, f"has {len(row)} cells, and the first line {len(header)}.")
            elif form == "tsv" and row[column].startswith('"'):
                yield Problem(
                    where,
                    "begins its text with a quotation mark, which may belong to the text or to the table. Convert the "
                    "table to JSON lines or Parquet.",
                )
            else:
                yield _sound(row[column], where, raw=True)
    except csv.Error as error:
        advice = "Are its quotation marks closed?"
        if "new-line character" in str(error):
            error, advice = csv.Error("a cell has a lone carriage return (\\r)"), "Put the cell in quotation marks."
        raise DataError(f"{name}:{line + 1} is not {form.upper()}: {error}. {advice}") from error


def _parquet(stream: io.BufferedReader, name: str, text_field: str) -> Iterator[Item]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(stream)
    schema = parquet.schema_arrow
    if twice := [column for column, count in Counter(schema.names).items() if count > 1]:
        raise DataError(
            f"{name} has {schema.names.count(twice[0])} columns {twice[0]!r}. Write it with different names."
        )
    top = text_field if text_field in schema.names else text_field.partition(".")[0]
    if top not in schema.names:
        raise DataError(f"{name} has no column {text_field!r}, only {', '.join(schema.names)}. Set --text-field.")
    kind = schema.field(top).type
    for part in text_field[len(top) + 1 :].split(".") if top != text_field else ():
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(part) < 0:
            raise DataError(f"{name} has no field {part!r} in column {top!r}, which is {kind}. Set --text-field.")
        kind = kind.field(part).type
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(check(value) for check in is_text) and not pyarrow.types.is_null(value):
        raise DataError(f"{name}: column {text_field!r} is {kind}, not text. Set --text-field, or convert it.")
    row = 0
    for batch in parquet.iter_batches(batch_size=256, columns=[text_field]):
        try:
            records: Iterable[Any] = batch.to_pylist()
        except UnicodeDecodeError:  # of one of them, and it does not say of which
            records = (_row(batch.slice(n, 1)) for n in range(len(batch)))
        for record in records:
            row += 1
            where = f"{name}, row {row}"
            yield Problem(where, record) if isinstance(record, str) else text_of(record, text_field, where)


def _row(one: Any) -> Any:
    """The only row of a batch, or what is wrong with it."""
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return f"is not UTF-8: it has the byte 0x{error.object[error.start]:02x}."


# What a record says.


def text_of(record: Any, name: str, where: str) -> Item:
    """The text in a field of a record."""
    if not isinstance(record, dict):
        return Problem(where, f"is {_kind(record)}, not an object with a field {name!r}.")
    value, found = record, name in record
    if found:
        value = record[name]
    elif "." in name:
        for part in name.split("."):
            found = isinstance(value, dict) and part in value
            if not found:
                break
            value = value[part]
    if not found:
        has = ", ".join(map(str, record)) or "none"
        return Problem(where, f"has no text in field {name!r} (it has {has}). Set --text-field.")
    if not isinstance(value, str):
        return Problem(where, f"has {_kind(value)} in field {name!r}, not text.")
    return _sound(value, where, raw=False)


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        bytes: "bytes",
        str: "a string",
    }
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _sound(text: str, where: str, *, raw: bool) -> Item:
    """The text, without a byte-order mark, if it has no flaw."""
    flaw = _flaw(text, raw=raw)
    return Problem(where, flaw[1]) if flaw else text.removeprefix("\ufeff")


def _flaw(text: str, *, raw: bool) -> tuple[int, str] | None:
    """Where and why a text cannot be one. `raw`: it came from the file as it is, so that a lone surrogate stands for a
    byte that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if raw and 0xDC80 <= code <= 0xDCFF:
            return error.start, (
                f"is not UTF-8: it has the byte 0x{code - 0xDC00:02x}. Convert the file, such as by "
                f"iconv -f WINDOWS-1252 -t UTF-8 (GB18030 and SHIFT_JIS are usual for Chinese and Japanese)."
            )
        return error.start, f"has half a character, the lone surrogate \\u{code:04x}."
    if raw and "\0" in text:
        return text.index("\0"), "has a zero byte, which no text has. Is a part of the file UTF-16?"
    return None
