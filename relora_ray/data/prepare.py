"""Turn text into fixed-length token shards.

    python -m relora_ray.data.prepare TEXT... --out FOLDER_OR_URL --tokenizer TOKENIZER

Documents are read in order and cut into batches of about `--batch-mb`; worker processes tokenize the batches
and store each result under .prepare/, which makes a killed run resumable: a finished batch of the same text,
tokenizer and split is not tokenized again. The parts are then packed into shards of exactly `--shard-tokens`
tokens (the last of a split is shorter), the index is written last, and the parts are removed.

A document goes to validation by a hash of its text, so equal documents never fall on both sides (documents of
--validation sources are held out as they are).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tqdm import tqdm

from relora_ray.data.documents import FORMATS, read_documents
from relora_ray.data.tokenizer import end_token_id, load_tokenizer, num_token_ids, tokenizer_sha256
from relora_ray.data.tokens import DataIndex, Shard, Split, SplitIndex, shard_bytes, write_index
from relora_ray.errors import ConfigError, DataError, ReloraError, StorageError
from relora_ray.storage import Storage, add_options_argument, parse_options

SPLITS: tuple[Split, ...] = ("train", "validation")
WORK = ".prepare"
"""Folder of unfinished work below --out."""
DEFAULT_FRACTION = 0.005


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to prepare. See the command's options."""

    sources: tuple[str, ...]
    out: str
    tokenizer: str
    storage_option: tuple[str, ...] = ()
    """key=value, for `out`."""
    validation_sources: tuple[str, ...] = ()
    validation_fraction: float | None = None
    """Share of documents held out by their hash; default 0.005, and none with validation_sources."""
    document_separator: str = r"<\|endoftext\|>"
    form: str = ""
    text_field: str = "text"
    split: str = "train"
    end_token: str = ""
    shard_tokens: int = 2**24
    batch_mb: float = 4.0
    num_workers: int = os.cpu_count() or 1


@dataclass(frozen=True)
class _Batch:
    number: int
    split: Split | None
    """None: each document by its hash."""
    documents: list[str]

    @property
    def num_characters(self) -> int:
        return sum(len(d) for d in self.documents)


@dataclass(frozen=True)
class _Encoding:
    """What a worker process needs; equal settings give equal parts."""

    tokenizer: str
    tokenizer_sha256: str
    end_token_id: int
    dtype: str
    validation_fraction: float

    def part_key(self, batch: _Batch) -> str:
        settings = [
            self.tokenizer_sha256,
            self.end_token_id,
            self.dtype,
            self.validation_fraction,
            batch.split,
        ]
        return hashlib.sha256(json.dumps([settings, batch.documents]).encode()).hexdigest()


@dataclass(frozen=True)
class _Part:
    """Result of one batch: documents and tokens per split."""

    key: str
    num_documents: dict[str, int]
    num_tokens: dict[str, int]


def prepare(request: Request, *, quiet: bool = False) -> DataIndex:
    """Write the dataset and return its index. DataError or StorageError; nothing existing is overwritten."""
    _check(request)
    storage = Storage(request.out, parse_options(request.storage_option))
    _claim(storage)
    tokenizer = load_tokenizer(request.tokenizer)
    vocab_size = num_token_ids(tokenizer)
    encoding = _Encoding(
        tokenizer=request.tokenizer,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        end_token_id=end_token_id(tokenizer, request.end_token),
        dtype="uint16" if vocab_size <= 2**16 else "uint32",
        validation_fraction=0.0 if request.validation_sources else request.validation_fraction or DEFAULT_FRACTION,
    )
    parts = _tokenize_all(request, storage, encoding, quiet)
    _check_splits(request, parts)
    index = DataIndex(
        vocab_size=vocab_size,
        end_token_id=encoding.end_token_id,
        tokenizer_sha256=encoding.tokenizer_sha256,
        dtype="uint16" if encoding.dtype == "uint16" else "uint32",
        splits={split: _pack(storage, split, parts, request.shard_tokens) for split in SPLITS},
    )
    _store_tokenizer(storage, tokenizer)
    write_index(storage, index)
    storage.delete_below(WORK)
    return index


def _claim(storage: Storage) -> None:
    """See that the folder is empty or holds our own unfinished work: nothing of anybody else's is overwritten."""
    there = storage.list()
    if "index.json" in there:
        raise DataError(f"{storage.url} already holds a dataset. Choose another --out, or delete it first.")
    if there and not any(path.startswith(f"{WORK}/") for path in there):
        raise DataError(f"{storage.url} is not empty: it holds {there[0]}. Choose an --out of its own.")
    storage.put(f"{WORK}/started", b"")


def _check(request: Request) -> None:
    if not request.out.strip():
        raise ConfigError("--out is empty. Name a folder or a URL.")
    if request.validation_fraction is not None and request.validation_sources:
        raise ConfigError(
            f"--validation-fraction={request.validation_fraction} has no effect with --validation. Give one of them."
        )
    if both := sorted(set(request.sources) & set(request.validation_sources)):
        raise ConfigError(f"--validation {both[0]} is a training source, too: held-out text must not be trained on.")
    if request.validation_fraction is not None and not 0 < request.validation_fraction < 1:
        raise ConfigError(f"--validation-fraction={request.validation_fraction} is not between 0 and 1.")
    for name in ("shard_tokens", "batch_mb", "num_workers"):
        if getattr(request, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(request, name)} is not positive.")
    try:
        re.compile(request.document_separator)
    except re.error as error:
        raise ConfigError(
            f"--document-separator={request.document_separator!r} is no regular expression: {error}."
        ) from error


def _check_splits(request: Request, parts: list[_Part]) -> None:
    documents = {split: sum(p.num_documents[split] for p in parts) for split in SPLITS}
    if not documents["train"]:
        raise DataError(f"{', '.join(request.sources)}: no training documents. Check the sources and the text field.")
    if not documents["validation"]:
        raise DataError(
            f"none of {documents['train']:,} documents fell to validation at --validation-fraction="
            f"{request.validation_fraction or DEFAULT_FRACTION}. Raise it, name --validation files, or split the text "
            f"into more documents with --document-separator."
        )


def _batches(request: Request) -> Iterator[_Batch]:
    def read(sources: Iterable[str]) -> Iterator[str]:
        return chain.from_iterable(
            read_documents(
                source,
                form=request.form,
                text_field=request.text_field,
                separator=request.document_separator,
                split=request.split,
            )
            for source in sources
        )

    number = 0
    groups: tuple[tuple[Split | None, tuple[str, ...]], ...] = (
        (None, request.sources),
        ("validation", request.validation_sources),
    )
    for split, sources in groups:
        documents: list[str] = []
        size = 0
        for document in read(sources):
            documents.append(document)
            size += len(document)
            if size >= request.batch_mb * 1e6:
                yield _Batch(number, split, documents)
                number, documents, size = number + 1, [], 0
        if documents:
            yield _Batch(number, split, documents)
            number += 1


def _tokenize_all(request: Request, storage: Storage, encoding: _Encoding, quiet: bool) -> list[_Part]:
    """Tokenize every batch that is not stored yet, at most two per worker in flight; parts in batch order."""
    parts: list[_Part] = []
    num_tokens = 0
    in_flight: deque[tuple[Future[_Part] | _Part, int]] = deque()
    spawn = multiprocessing.get_context("spawn")  # s3fs does not survive a fork
    bar = tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=quiet, file=sys.stderr)

    def finish_one() -> None:
        nonlocal num_tokens
        result, size = in_flight.popleft()
        parts.append(result.result() if isinstance(result, Future) else result)
        num_tokens += sum(parts[-1].num_tokens.values())
        bar.update(size)
        bar.set_postfix(tokens=f"{num_tokens:,}", refresh=False)

    with bar, ProcessPoolExecutor(request.num_workers, spawn, _start_worker, (encoding,)) as pool:
        for batch in _batches(request):
            done = _stored_part(storage, batch.number, encoding.part_key(batch))
            in_flight.append((done or pool.submit(_encode_batch, storage, batch), batch.num_characters))
            if len(in_flight) > 2 * request.num_workers:
                finish_one()
        while in_flight:
            finish_one()
    return parts


def _part_path(number: int, ending: str) -> str:
    return f"{WORK}/{number:07d}{ending}"


def _stored_part(storage: Storage, number: int, key: str) -> _Part | None:
    try:
        part = _Part(**json.loads(storage.get(_part_path(number, ".json"))))
    except (StorageError, json.JSONDecodeError, TypeError):
        return None
    return part if part.key == key else None


_worker: tuple[Any, _Encoding] | None = None


def _start_worker(encoding: _Encoding) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one batch per process already fills the cores
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _worker = (load_tokenizer(encoding.tokenizer).backend_tokenizer, encoding)


def _encode_batch(storage: Storage, batch: _Batch) -> _Part:
    """In a worker process: tokenize, store the tokens, then the record that commits them."""
    assert _worker is not None
    backend, encoding = _worker
    streams: dict[str, list[int]] = {split: [] for split in SPLITS}
    num_documents = dict.fromkeys(SPLITS, 0)
    for document, encoded in zip(
        batch.documents, backend.encode_batch(batch.documents, add_special_tokens=False), strict=True
    ):
        split = batch.split or ("validation" if _hash_share(document) < encoding.validation_fraction else "train")
        streams[split] += [*encoded.ids, encoding.end_token_id]
        num_documents[split] += 1
    for split in SPLITS:
        storage.put(_part_path(batch.number, f"-{split}.npy"), shard_bytes(np.array(streams[split], encoding.dtype)))
    part = _Part(
        encoding.part_key(batch),
        {str(split): count for split, count in num_documents.items()},
        {split: len(stream) for split, stream in streams.items()},
    )
    storage.put(_part_path(batch.number, ".json"), json.dumps(part.__dict__).encode())
    return part


def _hash_share(document: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(document.strip().encode(), digest_size=8).digest(), "little") / 2**64


def _pack(storage: Storage, split: Split, parts: list[_Part], shard_tokens: int) -> SplitIndex:
    """Concatenate the parts of one split and write shards of exactly `shard_tokens`, the last one shorter."""
    shards: list[Shard] = []
    waiting: list[Any] = []

    def write(tokens: Any) -> None:
        data = shard_bytes(tokens)
        file = f"{split}-{len(shards):05d}.npy"
        storage.put(file, data)
        shards.append(Shard(file=file, num_tokens=len(tokens), sha256=hashlib.sha256(data).hexdigest()))

    for number in range(len(parts)):
        waiting.append(np.load(io.BytesIO(storage.get(_part_path(number, f"-{split}.npy"))), allow_pickle=False))
        if sum(map(len, waiting)) >= shard_tokens:
            tokens = np.concatenate(waiting)
            whole = len(tokens) // shard_tokens * shard_tokens
            for start in range(0, whole, shard_tokens):
                write(tokens[start : start + shard_tokens])
            waiting = [tokens[whole:]]
    if (tokens := np.concatenate(waiting)).size:
        write(tokens)
    return SplitIndex(
        num_documents=sum(p.num_documents[split] for p in parts),
        num_tokens=sum(s.num_tokens for s in shards),
        shard_tokens=shard_tokens,
        shards=tuple(shards),
    )


def _store_tokenizer(storage: Storage, tokenizer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        local = Storage(folder)
        for path in local.list():
            storage.put(f"tokenizer/{path}", local.get(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.data.prepare", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    default = Request(sources=(), out="", tokenizer="")
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        help="plain text, JSON lines, Parquet, a saved dataset's folder, or a hub name[:config]",
    )
    add("--out", required=True, help="folder or URL to write")
    add("--tokenizer", required=True, help="Hugging Face folder, tokenizer.json or hub name")
    add(
        "--validation",
        dest="validation_sources",
        nargs="+",
        default=(),
        help="sources that are validation as a whole",
    )
    add(
        "--validation-fraction",
        type=float,
        default=default.validation_fraction,
        help="share of documents held out",
    )
    add(
        "--document-separator",
        default=default.document_separator,
        help="regular expression for a line of plain text",
    )
    add("--format", dest="form", choices=FORMATS, default="", help="instead of guessing from the name")
    add("--text-field", default=default.text_field)
    add("--split", default=default.split, help="split of a saved or hub dataset to read")
    add("--end-token", default="", help="token after each document; default: the tokenizer's own")
    add("--shard-tokens", type=int, default=default.shard_tokens)
    add("--batch-mb", type=float, default=default.batch_mb, help="millions of characters per unit of work")
    add("--num-workers", type=int, default=default.num_workers)
    add_options_argument(parser)
    args = vars(parser.parse_args())
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    try:
        index = prepare(Request(**args))
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    for split, held in index.splits.items():
        print(
            f"{split:11s}{held.num_documents:>12,} documents {held.num_tokens:>15,} tokens {len(held.shards):>5} shards"
        )
    print(f"vocabulary {index.vocab_size:,}, fingerprint {index.fingerprint}, in {args['out']}")


if __name__ == "__main__":
    main()
