"""Parts to shards of equal length, and what they have in common."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from relora_ray.data.encode import SPLITS, Part, read_hashes, read_tokens
from relora_ray.data.tokens import Shard, Split, SplitIndex, shard_bytes
from relora_ray.storage import Storage

TOKENIZER = "tokenizer"
_OURS = re.compile(rf"(train|validation)-\d{{5,}}\.npy|{TOKENIZER}/.*")
_HASHES_AT_ONCE = 2**24
"""128 MiB of them."""


def pack(
    storage: Storage, split: Split, parts: Sequence[Part], shard_tokens: int, check: Callable[[], None]
) -> SplitIndex:
    """Concatenate the parts of one split and write shards of exactly `shard_tokens`, the last one shorter. `check`:
    called before each is written; raises if --out is no longer this process's."""
    shards: list[Shard] = []
    waiting: list[Any] = []

    def write(tokens: Any) -> None:
        data = shard_bytes(tokens)
        file = f"{split}-{len(shards):05d}.npy"
        _put_own(storage, file, data, check)
        shards.append(Shard(file=file, num_tokens=len(tokens), sha256=hashlib.sha256(data).hexdigest()))

    for part in parts:
        waiting.append(read_tokens(storage, part, split))
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


def _put_own(storage: Storage, path: str, data: bytes, check: Callable[[], None]) -> None:
    """Write an object, in place of what an unfinished preparation left, but not over that of a process which has taken
    over from this one while it stood still: what exists is replaced only after another look."""
    check()
    try:
        storage.put_new(path, data)
    except FileExistsError:
        if storage.get(path) == data:
            return
        check()
        storage.delete(path)
        storage.put_new(path, data)


def store_tokenizer(storage: Storage, tokenizer: Any, check: Callable[[], None]) -> list[str]:
    """The paths that were written."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        local = Storage(folder)
        for path in local.list():
            _put_own(storage, f"{TOKENIZER}/{path}", local.get(path), check)
        return [f"{TOKENIZER}/{path}" for path in local.list()]


def remove_leftovers(storage: Storage, splits: dict[Split, SplitIndex], tokenizer_files: Sequence[str]) -> None:
    """Shards and tokenizer files of an earlier preparation that was not finished and had more of them."""
    kept = {shard.file for split in splits.values() for shard in split.shards} | set(tokenizer_files)
    for path in storage.list():
        if _OURS.fullmatch(path) and path not in kept:
            storage.delete(path)


def num_in_both(storage: Storage, parts: Sequence[Part]) -> int:
    """How many documents of named validation sources are in the training text, too; by 64-bit hashes, of which at most
    128 MiB of the validation's and one part of the training's are held at a time."""
    train, validation = ([part for part in parts if part.num_documents[split]] for split in SPLITS)
    found, waiting, size = 0, [], 0
    for number, part in enumerate(validation, 1):
        waiting.append(read_hashes(storage, part))
        size += len(waiting[-1])
        if size < _HASHES_AT_ONCE and number < len(validation):
            continue
        held = np.concatenate(waiting)
        both = np.zeros(len(held), bool)
        for other in train:
            both |= np.isin(held, read_hashes(storage, other))
        found, waiting, size = found + int(both.sum()), [], 0
    return found
