"""What a file is. Its content says so; the name decides only where the content leaves it open (CSV is text, too).

Where the two contradict each other the file is refused. So is all that could be taken for text and is not: archives,
office documents, markup, text in another encoding.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from relora_ray.errors import DataError

FILE_FORMATS = ("text", "jsonl", "csv", "tsv", "parquet")
HEAD_BYTES = 2**16
"""How much of a file is looked at to see what it is."""


@dataclass(frozen=True)
class Content:
    """Of a file, unpacked unless it is a zip."""

    form: str
    stream: io.BufferedReader
    head: bytes


def look(stream: BinaryIO, name: str, form: str) -> Content:
    """`form`: one of FILE_FORMATS, or empty. DataError for what is not read."""
    content, head = _with_head(stream)
    if not head and (ending := _ending(name)) in (*_COMPRESSED, ".parquet"):
        raise DataError(f"{name} is empty, which no {ending} file is: it has not arrived. Fetch it again.")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Content("zip", content, head)
    if _ending(name) in _COMPRESSED and not _decompressor(head):
        raise DataError(
            f"{name} is not what its ending says: it begins with {head[:6]!r}. Fetch it again, or rename it if it is "
            f"unpacked already."
        )
    layers = 0
    while (unpack := _decompressor(head)) is not None:
        if (layers := layers + 1) > 2:
            raise DataError(f"{name} is compressed more than twice. Unpack it first.")
        content, head = _with_head(unpack(content))
    if layers and head.startswith(b"PK\x03\x04"):
        raise DataError(f"{name} holds a zip in another compression. Unpack it first.")
    form = form or _form(head, name)
    if form == "parquet" and (layers or not content.seekable()):
        raise DataError(f"{name} holds Parquet in a stream, which cannot be read. Give it as a file of its own.")
    return Content(form, content, head)


def _with_head(stream: Any) -> tuple[io.BufferedReader, bytes]:
    """A stream of the same bytes, and the first HEAD_BYTES of them."""
    head = b""
    while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(head))):
        head += more
    return io.BufferedReader(_Rejoined(head, stream), 2**20), head


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest, self._at = head, rest, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._rest.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = offset + self.tell(), io.SEEK_SET
        self._at = len(self._head)  # from now on, the rest says where one is
        return int(self._rest.seek(offset, whence))

    def tell(self) -> int:
        return self._at if self._at < len(self._head) else int(self._rest.tell())

    def readinto(self, buffer: Any) -> int:
        if self._at < len(self._head):
            part = self._head[self._at : self._at + len(buffer)]
            self._at += len(part)
        else:
            part = self._rest.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


_COMPRESSED = (".gz", ".bgz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".zip")


def _decompressor(head: bytes) -> Callable[[BinaryIO], Any] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda stream: gzip.GzipFile(fileobj=stream)
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return lambda stream: _Streams(stream, bz2.BZ2Decompressor)
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lambda stream: _Streams(stream, lzma.LZMADecompressor)
    if head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        return _zstandard
    return None


class _Streams(io.RawIOBase):
    """Compressed streams one after the other, and zeros between or behind them. What is none is an error: Python's own
    files end there without a word, and the rest of the documents would be missing."""

    def __init__(self, stream: BinaryIO, new: Callable[[], Any]) -> None:
        self._stream, self._new, self._decompressor, self._num_read = stream, new, new(), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_read

    def readinto(self, buffer: Any) -> int:
        while True:
            added = b""
            if self._decompressor.eof:
                added = self._decompressor.unused_data.lstrip(b"\0")
                while not added:
                    if not (more := self._stream.read(HEAD_BYTES)):
                        return 0
                    added = more.lstrip(b"\0")
                self._decompressor = self._new()
            elif self._decompressor.needs_input and not (added := self._stream.read(HEAD_BYTES)):
                raise EOFError("no end of a compressed stream")
            if found := self._decompressor.decompress(added, len(buffer)):
                buffer[: len(found)] = found
                self._num_read += len(found)
                return len(found)


def _zstandard(stream: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")


# What a name says.

_KINDS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl", ".txt": "text",
    ".text": "text", ".md": "text", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip
_CHECKSUMS = re.compile(
    r".*\.(md5|sha1|sha224|sha256|sha384|sha512|crc|crc32|crc32c)|(md5|sha\d+|checksum)s?(sums?)?(\.txt)?", re.I
)


_MARKERS = re.compile(
    r"_(success|committed.*|started.*|(common_)?metadata|temporary.*|delta_log|spark_metadata|logs?|readme.*)", re.I
)
"""What Spark, Hadoop, Delta and Parquet writers leave in a folder."""


def _ending(name: str) -> str:
    found = re.search(r"\.[A-Za-z0-9]+$", name.rpartition("/")[2])
    return found[0].lower() if found else ""


def _inner_ending(name: str) -> str:
    """The ending below those of compression: .jsonl of a.JSONL.gz."""
    while (ending := _ending(name)) in _COMPRESSED:
        name = name[: -len(ending)]
    return _ending(name)


def kind_by_name(name: str) -> str:
    """What the name promises: one of FILE_FORMATS, text if nothing else."""
    return _KINDS.get(_inner_ending(name), "text")


def is_checksum(path: str) -> bool:
    """Whether a file of that name holds other files' checksums."""
    return _CHECKSUMS.fullmatch(path.rpartition("/")[2]) is not None


def is_beside(path: str) -> bool:
    """Whether a file in a folder lies beside its documents: hidden, or named like the markers (`_SUCCESS`) and
    checksums that programs leave."""
    parts = [part for part in path.split("/") if part != "."]
    return any(part.startswith(".") or _MARKERS.fullmatch(part) for part in parts) or is_checksum(path)


def check_one_kind(paths: Iterable[str], where: str) -> None:
    """DataError if files that nobody has named one by one are not all of one kind: a README among them would be trained
    on."""
    kinds: dict[str, str] = {}
    for path in paths:
        ending = _inner_ending(path)
        kinds.setdefault(ending if ending == ".md" else _KINDS.get(ending, ending), path)
    if len(kinds) > 1:
        found = ", ".join(path.rpartition("/")[2] for path in sorted(kinds.values())[:4])
        raise DataError(
            f"{where} holds files of {len(kinds)} kinds, such as {found}. Which are documents? Name them by a pattern, "
            f"such as 'FOLDER/**/*.jsonl.gz', or say what all of them are by --format."
        )


# What the content says.

_NOT_READ = (
    (rb"ARROW1\0\0", "an Arrow file"), (rb"Obj\x01", "an Avro file"), (rb"ORC[\x00-\x1f]", "an ORC file"),
    (rb"%PDF-", "a PDF"), (rb"\{\\rtf", "a rich-text document"), (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"Rar!\x1a\x07", "a rar archive"), (rb"\x04\x22\x4d\x18", "compressed by lz4"),
    (rb"\xff\x06\0\0sNaPpY", "compressed by snappy"), (rb"\x93NUMPY", "an array of numpy"),
    (rb"SQLite format 3\0", "an SQLite database"), (rb"\x89HDF\r\n", "an HDF5 file"), (rb"WARC/\d", "a web archive"),
    (rb"(?s).{257}ustar", "a tar archive"), (rb"[0-9a-f]{32,128} [ *]\S+\r?\n", "a list of checksums"),
    (rb"(?s).*?\x1b\$[@AB]", "text in ISO-2022, a Japanese or Chinese encoding (iconv -f ISO-2022-JP -t UTF-8)"),
    (rb"(?i)\s*<(\?xml|!doctype|html|mediawiki)\b", "markup (XML or HTML)"),
)  # fmt: skip
_NOT_UNPACKED = re.compile(r"(?i)\.(br|lz4|lzo|lz|snappy|sz)$")
_JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*([{"\]]|\[\s*[\[{"\d-]|-?\d[\d.]*\s*,\s*-?\d|$))')
"""The beginning of an object or an array. Not {{Infobox, [[File:, [1] or [Illustration], with which texts begin."""


def _form(head: bytes, name: str) -> str:
    """What the content is; DataError if it is nothing that is read."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{name} is a pointer of git-lfs, not the file itself. Get that: git lfs pull.")
    if (compressed := _NOT_UNPACKED.search(name)) is not None:
        raise DataError(f"{name} is compressed ({compressed[0]}), which is not read. Unpack it, or use gzip.")
    for magic, what in _NOT_READ:
        if re.match(magic, head):
            raise DataError(
                f"{name} is {what}, which is not read. Convert it to plain text, JSON lines or Parquet"
                + (", or give --format text to take it as it is." if what.startswith(("markup", "a list")) else ".")
            )
    named = _KINDS.get(_inner_ending(name), "")
    if named == "parquet":
        raise DataError(f"{name}: cannot be read as parquet: it begins with {head[:4]!r}, not b'PAR1'. Fetch it again.")
    if named in ("csv", "tsv", "jsonl"):
        return named
    return "jsonl" if _JSON.match(decoded(head, encoding_of(head, name))) else "text"


def decoded(head: bytes, encoding: str) -> str:
    return head[: len(head) // 4 * 4].decode(encoding, errors="ignore").removeprefix("\ufeff")


def encoding_of(head: bytes, name: str) -> str:
    """UTF-8, or what the byte-order mark says; DataError for what is no text."""
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
    ):  # fmt: skip
        if head.startswith(mark):
            return encoding
    if head.count(0) * 16 > len(head):  # of a few it is said where they are
        order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"  # of letters of Latin the first byte is zero
        raise DataError(
            f"{name} is not text in UTF-8: byte {head.index(0):,} is zero. If it is UTF-16 without a byte-order mark, "
            f"convert it: iconv -f UTF-16{order} -t UTF-8."
        )
    return "utf-8"
