"""Loss per token on prepared data, row by row, so that a difference between two models has an error."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from relora_ray.data.tokens import DataIndex, Split, TokenRows, read_index
from relora_ray.errors import ConfigError, DataError
from relora_ray.evaluation.subject import Subject, read_tokenizer
from relora_ray.runs.evaluations import Evaluation, find_evaluation, new_record, path_of, put_evaluation
from relora_ray.runs.metrics import perplexity
from relora_ray.storage import Storage

LOGIT_BYTES = 2**28
"""The logits of a forward pass, in fp32."""
KEPT_ROWS = 4096
"""Up to so many rows the loss of each is stored: two models on the same rows are compared by the difference of each."""


@dataclass(frozen=True)
class Rows:
    """What is evaluated on."""

    name: str
    storage: Storage
    split: Split
    num_rows: int
    """The first so many; 0: all."""
    seq_len: int


def evaluate_rows(
    subject: Subject, rows: Rows, *, device: torch.device, precision: str, out: Storage | None
) -> tuple[Evaluation, str]:
    """The record, stored in `out` or found there, and why it could not be stored, or "". DataError if the data are of
    other tokens than the model's."""
    index = read_index(rows.storage)
    _check_tokens(subject, rows, index)
    if subject.positions is not None and rows.seq_len > subject.positions:
        raise ConfigError(
            f"--seq-len={rows.seq_len} is more than the {subject.positions} positions of {subject.name}. Give less."
        )
    tokens = TokenRows(rows.storage, index, rows.split, rows.seq_len)
    number = min(rows.num_rows or tokens.num_rows, tokens.num_rows)
    settings = {
        **subject.identity,
        "data_fingerprint": index.fingerprint,
        "split": rows.split,
        "rows": number,
        "seq_len": rows.seq_len,
        "precision": precision,
    }
    path, began = path_of("perplexity", rows.name, subject.step, settings), time.time()
    if (known := find_evaluation(out, path)) is not None:
        return known, ""
    model = subject.causal_model(device)
    losses = list(row_losses(model, tokens, number, device, bf16=precision == "bf16"))
    num_bytes, why = _num_bytes(rows, tokens, number, subject.scratch)
    result = summary(losses, rows.seq_len) | {"bits_per_byte": None, "bytes": num_bytes, "no_bytes_because": why}
    if num_bytes:
        result["bits_per_byte"] = sum(losses) * rows.seq_len / math.log(2) / num_bytes
    if number <= KEPT_ROWS:
        result["row_losses"] = [round(loss, 7) for loss in losses]
    record = new_record("perplexity", rows.name, subject.name, subject.step, settings, result, began)
    return record, put_evaluation(out, path, record) if out is not None else ""


def summary(losses: Sequence[float], seq_len: int) -> dict[str, Any]:
    """`losses`: per token, one for each row. All rows are equally long, so that their mean is that of the tokens."""
    loss = fmean(losses)
    se = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return {
        "loss": loss,
        "loss_se": se,
        "perplexity": perplexity(loss),
        "perplexity_se": None if se is None else perplexity(loss) * se,
        "rows": len(losses),
        "tokens": len(losses) * seq_len,
    }


def difference(first: Evaluation, other: Evaluation) -> tuple[float, float] | None:
    """How much more `other` loses per token than `first`, and the standard error of that, from the differences of the
    same rows; None if `why_apart` says why not, or they were not stored."""
    if why_apart(first, other):
        return None
    ours, theirs = (r["result"].get("row_losses") for r in (first, other))
    if not ours or not theirs or len(ours) != len(theirs) or len(ours) < 2 or None in (*ours, *theirs):
        return None
    each = [theirs - ours for ours, theirs in zip(ours, theirs, strict=True)]
    return fmean(each), stdev(each) / math.sqrt(len(each))


def why_apart(first: Evaluation, other: Evaluation) -> str:
    """In what two evaluations differ, so that their losses are not of the same rows in the same arithmetic; or ""."""
    keys = ("data_fingerprint", "split", "rows", "seq_len", "precision")
    pairs = ((key, first["settings"].get(key), other["settings"].get(key)) for key in keys)
    return ", ".join(f"{key}={theirs} and not {ours}" for key, ours, theirs in pairs if ours != theirs)


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: TokenRows, num_rows: int, device: torch.device, *, bf16: bool
) -> Iterator[float]:
    """Cross-entropy per token of each of the first rows, in nats, added up in fp64."""
    model.eval()
    ids = torch.from_numpy(rows.read(np.arange(1)))
    text: Any = model.config
    width = int(text.get_text_config(decoder=True).vocab_size)
    at_once = max(1, min(32, LOGIT_BYTES // (4 * width * (ids.shape[1] - 1))))
    for begin in range(0, num_rows, at_once):
        some = np.arange(begin, min(begin + at_once, num_rows), dtype=np.int64)
        ids = torch.from_numpy(rows.read(some)).to(device)
        with parametrize.cached(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids[:, :-1]).logits
        for row, targets in zip(logits, ids[:, 1:], strict=True):
            losses = F.cross_entropy(row.float(), targets, reduction="none")
            yield float(losses.double().mean())


def _check_tokens(subject: Subject, rows: Rows, index: DataIndex) -> None:
    """DataError if the ids of the data stand for other tokens than the model's, as far as that can be known."""
    what = f"{rows.name} ({rows.storage.url})"
    if subject.embedding_rows < index.vocab_size:
        raise DataError(
            f"{what} has {index.vocab_size} token ids, and the model of {subject.name} has {subject.embedding_rows}: "
            f"it was prepared with another tokenizer. Prepare it with the model's own."
        )
    if subject.tokenizer_sha256 is not None:
        same = subject.tokenizer_sha256 == index.tokenizer_sha256
    elif subject.tokens is not None:
        theirs = data_tokenizer(rows.storage, subject.scratch)
        same = theirs is None or _rules(theirs) == _rules(subject.tokens.tokenizer)
    else:
        return  # said by the command: the model has no tokenizer, and its ids are taken on trust
    if not same:
        raise DataError(
            f"{what} was prepared with another tokenizer than that of {subject.name}: its ids stand for other tokens. "
            f"Prepare it with the model's own."
        )


def _rules(tokenizer: Any) -> str:
    """What decides its ids, for a comparison: two files of the same tokenizer may differ in templates and padding."""
    backend = tokenizer.backend_tokenizer
    plain = type(backend).from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    sample = plain.encode(
        "It was a truth, universally acknowledged:\n 1 + 1 = 2. \u00e9\u4e86", add_special_tokens=False
    )
    vocabulary = sorted(plain.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return f"{sample.ids} {vocabulary}"


def data_tokenizer(storage: Storage, scratch: Path) -> Any:
    """The tokenizer that prepared data were made with; None if it does not lie with them."""
    local = Storage(str(scratch / "data-tokenizer" / tokenizer_folder(storage)))
    for path in storage.list("tokenizer"):
        if not local.exists(name := path.removeprefix("tokenizer/")):
            local.put(name, storage.get(path))
    return read_tokenizer(Path(local.url))


def tokenizer_folder(storage: Storage) -> str:
    """Another one for each place."""
    return sha256(storage.url.encode()).hexdigest()[:12]


def _num_bytes(rows: Rows, tokens: TokenRows, number: int, scratch: Path) -> tuple[int | None, str]:
    """UTF-8 bytes of the text that the targets stand for, and why they are not known. Control tokens have none."""
    try:
        tokenizer = data_tokenizer(rows.storage, scratch)
    except DataError as error:
        return None, str(error)
    if tokenizer is None:
        return None, "the data have no tokenizer beside them"
    # Rows follow each other in the text, so their targets are one piece of it, from the second token on.
    stream = tokens.read(np.arange(number, dtype=np.int64))[:, 1:].reshape(-1)
    text = tokenizer.decode(stream.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode(errors="replace")), ""
