"""Documents from plain text, JSON lines, Parquet, a saved Hugging Face dataset or a hub name."""

from __future__ import annotations

import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec

from relora_ray.errors import DataError

FORMATS = ("text", "jsonl", "parquet", "saved", "hub")


def read_documents(
    source: str, *, form: str = "", text_field: str = "text", separator: str, split: str
) -> Iterator[str]:
    """The documents of one source, in its order; empty ones are left out.

    `form` is one of FORMATS; empty: by the name's ending, a saved dataset's folder, or else a hub name.
    `separator` is a regular expression for whole lines that stand between documents of plain text.
    DataError for a source that cannot be read or has no such field.
    """
    form = form or _guess_format(source)
    try:
        if form == "text":
            documents = _text(source, separator)
        elif form == "jsonl":
            documents = _jsonl(source, text_field)
        elif form == "parquet":
            documents = _parquet(source, text_field)
        else:
            documents = _datasets(source, form, text_field, split)
        for document in documents:
            if document.strip():
                yield document
    except (OSError, EOFError, ValueError, ImportError, zlib.error, lzma.LZMAError) as error:
        # ValueError: text that is not UTF-8, Parquet that is none, a protocol that fsspec does not know
        raise DataError(
            f"{source}: cannot be read as {form}: {error}. Check the path, or name its --format."
        ) from error


def _guess_format(source: str) -> str:
    stem = re.sub(r"\.(gz|bz2|xz)$", "", source)
    if stem.endswith((".jsonl", ".json", ".ndjson")):
        return "jsonl"
    if source.endswith(".parquet"):
        return "parquet"
    if os.path.isdir(source):
        if os.path.exists(os.path.join(source, "state.json")) or os.path.exists(
            os.path.join(source, "dataset_dict.json")
        ):
            return "saved"
        raise DataError(f"{source} is a folder, but not a saved Hugging Face dataset. Name the files in it instead.")
    if stem.endswith((".txt", ".text", ".md")) or os.path.exists(source) or "://" in source:
        return "text"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        return "hub"
    raise DataError(f"{source} does not exist, and is not of the form of a hub name.")


def _open(source: str) -> Any:
    return fsspec.open(source, "rt", encoding="utf-8", compression="infer")


def _text(source: str, separator: str) -> Iterator[str]:
    between = re.compile(separator)
    lines: list[str] = []
    with _open(source) as file:
        for line in file:
            if between.fullmatch(line.rstrip("\r\n")):
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _jsonl(source: str, text_field: str) -> Iterator[str]:
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}:{number} is not JSON: {error}. Each line must be one object.") from error
            yield _field(record, text_field, f"{source}:{number}")


def _parquet(source: str, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    with fsspec.open(source, "rb") as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        if text_field not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise DataError(f"{source} has no column {text_field!r}, only {columns}. Set --text-field.")
        for batch in parquet.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield _field({text_field: value}, text_field, source)


def _datasets(source: str, form: str, text_field: str, split: str) -> Iterator[str]:
    import datasets

    if form == "saved":
        data = datasets.load_from_disk(source)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(f"{source} has no split {split!r}, only {', '.join(data)}. Set --split.")
            data = data[split]
    else:
        name, _, config = source.partition(":")
        try:
            data = datasets.load_dataset(name, config or None, split=split, streaming=True)
        except Exception as error:  # the library raises many kinds, from offline to no such split
            raise DataError(f"hub dataset {source!r}, split {split!r}: {error}") from error
    for number, record in enumerate(data):
        yield _field(record, text_field, f"{source}, record {number}")


def _field(record: Any, name: str, where: str) -> str:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} has no text in field {name!r} (it has {has}). Set --text-field.")
    return value
