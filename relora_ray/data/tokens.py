"""A prepared dataset: fixed-length token shards, an index and a fingerprint.

    index.json                 tokenizer, splits, shards with sizes and checksums; the fingerprint of all that
    tokenizer/                 the tokenizer, as a Hugging Face folder
    train-00000.npy ...        one-dimensional uint16 or uint32; every shard but the last of a split is equally long
    validation-00000.npy ...

A split is one stream of packed documents, each followed by the end token, and after the begin tokens if there are any.
Row i of length L reads stream positions i*L .. i*L + L (L + 1 tokens): L inputs, each followed by its target, no token
wasted or repeated.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from relora_ray.errors import DataError, StorageError
from relora_ray.storage import Storage

FORMAT = 1
Split = Literal["train", "validation"]
Tokens = npt.NDArray[Any]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    file: str
    num_tokens: int
    sha256: str


class SplitIndex(_Record):
    num_documents: int
    num_tokens: int
    shard_tokens: int
    """Length of every shard but the last."""
    shards: tuple[Shard, ...]


class DataIndex(_Record):
    format: int = FORMAT
    vocab_size: int
    """Number of token ids of the tokenizer: a model needs at least as many embedding rows."""
    end_token_id: int
    tokenizer_sha256: str
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, SplitIndex]
    begin_token_ids: tuple[int, ...] | None = None
    """What stands in front of every document; None: nothing."""
    control_tokens: Literal["text"] | None = None
    """`text`: documents have control tokens written out, such as </s>, and there they are plain text. None: they have
    none, or those became the tokens."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, with the tokenizer and with the split."""
        # What is None was unknown to earlier versions: their data keep their fingerprints.
        return hashlib.sha256(self.model_dump_json(exclude_none=True).encode()).hexdigest()[:16]


def read_index(storage: Storage, *, expected: bool = False) -> DataIndex:
    """DataError if there is no dataset, or none that this version reads; StorageError if that cannot be seen now.
    `expected`: one was there before, so that a storage that denies it is asked again."""
    found, reason = None, "has no index.json"
    try:
        found = storage.get_expected("index.json") if expected else storage.find("index.json")
    except StorageError as error:
        if not storage.is_local:
            raise
        reason = f"has no index.json that can be read ({error})"
    if found is None:
        raise DataError(
            f"data.path={storage.url!r} {reason}. Write the data there first: "
            f"python -m relora_ray.data.prepare TEXT --out {storage.url} --tokenizer TOKENIZER."
        )
    try:
        raw = json.loads(found)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{storage.url}/index.json is not JSON ({error}). Prepare the data again.") from error
    recorded = raw.pop("fingerprint", None) if isinstance(raw, dict) else None
    try:
        index = DataIndex.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(
            f"{storage.url}/index.json: {problem['loc']}: {problem['msg']}. Prepare the data again."
        ) from error
    if index.fingerprint != recorded:
        raise DataError(f"{storage.url}/index.json was changed: its fingerprint is not {recorded}. Prepare again.")
    return index


def write_index(storage: Storage, index: DataIndex, *, new: bool = False) -> None:
    """`new`: FileExistsError if there is one."""
    record = {**index.model_dump(exclude_none=True), "fingerprint": index.fingerprint}
    (storage.put_new if new else storage.put)("index.json", json.dumps(record, indent=1).encode())


class TokenRows:
    """Rows of one split. Shards are memory-mapped; remote ones are first copied to this machine's cache (see
    `cache_folder`), each when it is first touched."""

    def __init__(self, storage: Storage, index: DataIndex, split: Split, seq_len: int) -> None:
        self._storage, self._split, self._seq_len = storage, index.splits[split], seq_len
        self._arrays: dict[int, Tokens] = {}
        self.num_rows = max(0, (self._split.num_tokens - 1) // seq_len)
        if not self.num_rows:
            raise DataError(
                f"the {split} split of {storage.url} has {self._split.num_tokens:,} tokens, not enough for one row of "
                f"data.seq_len={seq_len}. Use more text or a shorter row."
            )

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the given rows, shape (len(rows), seq_len + 1)."""
        return np.stack([self._slice(int(row) * self._seq_len, self._seq_len + 1) for row in rows]).astype(np.int64)

    def _slice(self, start: int, length: int) -> Tokens:
        pieces = []
        while length > 0:
            shard, offset = divmod(start, self._split.shard_tokens)
            piece = self._array(shard)[offset : offset + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _array(self, number: int) -> Tokens:
        if number not in self._arrays:
            shard = self._split.shards[number]
            array = self._open(shard)
            if array.shape != (shard.num_tokens,):
                raise DataError(
                    f"{self._storage.url}/{shard.file} holds {array.shape} tokens; the index says "
                    f"{shard.num_tokens:,}. Prepare the data again."
                )
            self._arrays[number] = array
        return self._arrays[number]

    def _open(self, shard: Shard) -> Tokens:
        path = f"{self._storage.url}/{shard.file}" if self._storage.is_local else _cached(self._storage, shard)
        try:
            array: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Prepare the data again.") from error
        return array


def cache_folder() -> str:
    """Where copies of remote shards lie, by their SHA-256: shared by all processes and runs of this machine, and kept.
    `RELORA_RAY_CACHE` chooses another folder; it needs room for the shards that are read."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("RELORA_RAY_CACHE") or os.path.join(home, "relora_ray")


def _cached(storage: Storage, shard: Shard) -> str:
    """The path of a local copy, which is made if it is not there yet."""
    cache = Storage(cache_folder())
    name = f"shards/{shard.sha256}.npy"
    if not cache.exists(name):  # put is atomic: what is there is whole
        cache.put(name, read_shard(storage, shard))
    return f"{cache.url}/{name}"


def read_shard(storage: Storage, shard: Shard) -> bytes:
    """A shard's bytes, checked against the index."""
    data = storage.get_expected(shard.file)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise DataError(f"{storage.url}/{shard.file} is damaged: its SHA-256 is not the index's. Prepare again.")
    return data


def shard_bytes(tokens: Tokens) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens, allow_pickle=False)
    return buffer.getvalue()
