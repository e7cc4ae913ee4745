"""Batches of documents to parts: tokens stored under .prepare/parts by the key of what they were made of.

A part's key is a hash of its documents and of all settings that decide its tokens, so that whoever finds one, after a
crash or in another process, can take it as it is, and nobody can take another's for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from relora_ray.data.tokens import Split, shard_bytes
from relora_ray.errors import DataError, StorageError
from relora_ray.storage import Storage

SPLITS: tuple[Split, ...] = ("train", "validation")
WORK = ".prepare"
"""Folder of unfinished work below --out."""
FORMAT = 2
"""Of parts; in their keys."""

_SPACES = " \n\t\r"
ControlTokens = Literal["text", "tokens"]


@dataclass(frozen=True)
class Batch:
    split: Split | None
    """None: each document by its hash."""
    documents: list[str]

    @property
    def num_characters(self) -> int:
        return sum(len(d) for d in self.documents)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a worker process needs; equal settings give equal parts."""

    backend: str = field(repr=False)
    """The JSON of the tokenizer to encode with."""
    tokenizer_sha256: str
    begin_token_ids: tuple[int, ...]
    end_token_id: int
    unknown_id: int | None
    control_tokens: ControlTokens
    """What becomes of a control token that is written out in a text."""
    control: dict[str, int]
    dtype: str
    validation_fraction: float
    with_hashes: bool
    """Whether hashes of the documents are stored, to find equal ones in both splits."""

    @cached_property
    def settings(self) -> list[Any]:
        return [
            FORMAT,
            self.tokenizer_sha256,
            self.begin_token_ids,
            self.end_token_id,
            self.control_tokens,
            self.dtype,
            self.validation_fraction,
            self.with_hashes,
        ]

    def part_key(self, batch: Batch) -> str:
        return hashlib.sha256(json.dumps([*self.settings, batch.split, batch.documents]).encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """Result of one batch."""

    key: str
    num_documents: dict[str, int]
    """By split, as num_tokens."""
    num_tokens: dict[str, int]
    num_characters: int
    """Without spaces and line breaks."""
    num_lost: int
    """Characters of those that the tokens do not stand for: unknown to the tokenizer, or dropped."""
    num_unknown_tokens: int
    num_changed: int
    """Documents that the tokens do not decode to."""
    num_changed_visibly: int
    """Those of them in which more than spaces is different."""
    num_with_control: int
    """Documents that have a control token written out."""


class Workers(ProcessPoolExecutor):
    """Processes that encode; they end when this one does, however it ends."""

    def __init__(self, num_workers: int, encoding: Encoding) -> None:
        spawn = multiprocessing.get_context("spawn")  # s3fs does not survive a fork
        super().__init__(num_workers, spawn, _start_worker, (encoding,))

    def __exit__(self, *error: Any) -> None:
        self.shutdown(wait=True, cancel_futures=error[0] is not None)


_worker: tuple[Any, Encoding] | None = None


def _start_worker(encoding: Encoding) -> None:
    global _worker
    from tokenizers import Tokenizer

    threading.Thread(target=_end_with_parent, name="relora-ray-parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which then ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one batch per process already fills the cores
    _dropped.clear()
    _worker = (Tokenizer.from_str(encoding.backend), encoding)


def _end_with_parent() -> None:
    """One that is killed says nothing, and its workers would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_batch(storage: Storage, batch: Batch) -> Part:
    """In a worker process: tokenize, store the tokens, then the record that commits them."""
    assert _worker is not None
    backend, encoding = _worker
    streams: dict[str, list[int]] = {split: [] for split in SPLITS}
    num_documents: dict[str, int] = dict.fromkeys(map(str, SPLITS), 0)
    counts = dict.fromkeys(("characters", "lost", "unknown_tokens", "changed", "changed_visibly", "with_control"), 0)
    control_ids = {*encoding.control.values(), *encoding.begin_token_ids, encoding.end_token_id} - {encoding.unknown_id}
    for document, encoded in zip(
        batch.documents, backend.encode_batch(batch.documents, add_special_tokens=False), strict=True
    ):
        ids = encoded.ids
        split = batch.split or ("validation" if _hash_share(document) < encoding.validation_fraction else "train")
        if encoding.control_tokens == "text" and (found := control_ids.intersection(ids)):
            raise DataError(
                f"the tokenizer makes its control token {backend.id_to_token(min(found))!r} out of plain text: "
                f"{document[:60]!r}... Name another token (--end-token), or give --control-tokens tokens if that is "
                f"meant."
            )
        streams[split] += [*encoding.begin_token_ids, *ids, encoding.end_token_id]
        num_documents[split] += 1
        _count(counts, document, encoded, backend, encoding)
    key = encoding.part_key(batch)
    for split in SPLITS:
        storage.put(tokens_path(key, split), shard_bytes(np.array(streams[split], encoding.dtype)))
    if encoding.with_hashes:
        hashes = np.array([document_hash(document) for document in batch.documents], np.uint64)
        storage.put(_path(key, "-hashes.npy"), shard_bytes(hashes))
    part = Part(
        key,
        num_documents,
        {split: len(stream) for split, stream in streams.items()},
        **{f"num_{name}": count for name, count in counts.items()},
    )
    storage.put(_path(key, ".json"), json.dumps(asdict(part)).encode())
    return part


def _count(counts: dict[str, int], document: str, encoded: Any, backend: Any, encoding: Encoding) -> None:
    num_unknown = 0 if encoding.unknown_id is None else encoded.ids.count(encoding.unknown_id)
    counts["characters"] += len(document) - sum(map(document.count, _SPACES))
    counts["lost"] += _num_lost(document, encoded if num_unknown else None, backend, encoding.unknown_id)
    counts["unknown_tokens"] += num_unknown
    counts["with_control"] += any(name in document for name in encoding.control)
    back = backend.decode(encoded.ids, skip_special_tokens=False)
    if back != document:
        counts["changed"] += 1
        counts["changed_visibly"] += "".join(back.split()) != "".join(document.split())


def _num_lost(document: str, encoded: Any | None, backend: Any, unknown_id: int | None) -> int:
    """How many characters, without spaces, unknown tokens stand for, or none. `encoded`: None if none is unknown."""
    dropped = [c for c in set(document).difference(_SPACES) if _is_dropped(c, backend, unknown_id)]
    num_lost = sum(map(document.count, dropped))
    if encoded is not None:
        for number, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if number == unknown_id:
                num_lost += sum(c not in _SPACES and c not in dropped for c in document[start:end])
    return num_lost


_dropped: dict[str, bool] = {}


def _is_dropped(character: str, backend: Any, unknown_id: int | None) -> bool:
    """Whether a tokenizer passes over a character without a word: one of it and two of it are the same to it. (Offsets
    do not tell: behind a character that BPE drops, they are those of the text without it.)"""
    if character not in _dropped:
        one, two = (backend.encode(character * n, add_special_tokens=False).ids for n in (1, 2))
        _dropped[character] = one == two and unknown_id not in one and character not in backend.decode(one)
    return _dropped[character]


def total(parts: Sequence[Part], what: str) -> int:
    """Of a count over all parts: `total(parts, "lost")`."""
    return sum(getattr(part, f"num_{what}") for part in parts)


def _path(key: str, ending: str) -> str:
    return f"{WORK}/parts/{key}{ending}"


def tokens_path(key: str, split: Split) -> str:
    return _path(key, f"-{split}.npy")


def stored_part(storage: Storage, key: str) -> Part | None:
    """The part of that key, if it is stored whole."""
    try:
        part = Part(**json.loads(storage.get(_path(key, ".json"))))
    except (StorageError, json.JSONDecodeError, TypeError):
        return None
    return part if part.key == key else None


def read_tokens(storage: Storage, part: Part, split: Split) -> npt.NDArray[Any]:
    """DataError if they are not as many as were stored."""
    tokens = _read(storage, tokens_path(part.key, split))
    if len(tokens) != part.num_tokens[split]:
        raise DataError(
            f"{storage.url}/{tokens_path(part.key, split)} has {len(tokens):,} tokens, not "
            f"{part.num_tokens[split]:,}: it was changed. Delete {storage.url}/{WORK} and begin anew."
        )
    return tokens


def read_hashes(storage: Storage, part: Part) -> npt.NDArray[np.uint64]:
    return _read(storage, _path(part.key, "-hashes.npy"))


def _read(storage: Storage, path: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(storage.get(path)), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{storage.url}/{path} is damaged. Delete {storage.url}/{WORK} and begin anew.") from error
    return array


def document_hash(document: str) -> int:
    """64 bits that depend on the text alone, without spaces around it."""
    return int.from_bytes(hashlib.blake2b(document.strip().encode(), digest_size=8).digest(), "little")


def _hash_share(document: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return document_hash(document) / 2**64
