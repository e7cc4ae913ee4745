"""Turn text into fixed-length token shards.

    python -m relora_ray.data.prepare TEXT... --out FOLDER_OR_URL --tokenizer TOKENIZER

Documents are read in order (documents.py) and cut into batches of about `--batch-mb`; worker processes tokenize the
batches and store each result under .prepare/ (encode.py), which makes a killed run resumable: a finished batch of the
same text, tokenizer and split is not tokenized again. The parts are then packed into shards of exactly
`--shard-tokens` tokens (pack.py; the last of a split is shorter), the index is written last, and the parts are removed.

A document goes to validation by a hash of its text, so equal documents never fall on both sides (documents of
--validation sources are held out as they are, and those that are in the training text, too, are counted).

One process owns --out, as a driver owns a run (checkpoint/ownership.py): another is refused while it lives.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from relora_ray import cli
from relora_ray.cli import command
from relora_ray.data.documents import FORMATS, Reading, read_documents
from relora_ray.data.encode import (
    SPLITS,
    WORK,
    Batch,
    ControlTokens,
    Encoding,
    Part,
    Workers,
    encode_batch,
    stored_part,
    total,
)
from relora_ray.data.formats import Rules, check_file
from relora_ray.data.notes import overlap_notes, reading_notes, token_notes
from relora_ray.data.pack import num_in_both, pack, remove_leftovers, store_tokenizer
from relora_ray.data.sources import Source, find_sources, refuse_out_within
from relora_ray.data.tokenizer import (
    TEMPLATE,
    begin_token_ids,
    control_tokens,
    end_token_id,
    load_tokenizer,
    num_token_ids,
    plain_backend,
    tokenizer_sha256,
    unknown_id,
)
from relora_ray.data.tokens import DataIndex, Split, write_index
from relora_ray.errors import ConfigError, DataError
from relora_ray.location import location_problem, shown
from relora_ray.storage import Storage, add_options_argument, parse_options

DEFAULT_FRACTION = 0.005
_ENOUGH_CHARACTERS = 1_000_000
"""From so many on, the share of lost ones says something."""

if TYPE_CHECKING:
    from relora_ray.data.claim import Claim


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to prepare. See the command's options."""

    sources: tuple[str, ...]
    out: str
    tokenizer: str
    storage_option: tuple[str, ...] = ()
    """key=value, for `out` and for sources of its kind; where `out` is a folder, for all URLs."""
    source_option: tuple[str, ...] = ()
    """key=value, for sources that need others."""
    validation_sources: tuple[str, ...] = ()
    validation_fraction: float | None = None
    """Share of documents held out by their hash; default 0.005, and none with validation_sources."""
    document_separator: str = r"<\|endoftext\|>"
    form: str = ""
    text_field: str = "text"
    split: str = "train"
    skip_bad: int = 0
    """Records that may be passed over because they are no documents."""
    begin_token: str = TEMPLATE
    """In front of each document; default: what the tokenizer itself puts there. `none`: nothing."""
    end_token: str = ""
    control_tokens: ControlTokens = "text"
    """What a control token that is written out in a text becomes: text, as it stands there, or the token."""
    max_lost: float = 0.01
    """Share of characters, without spaces, that may be unknown to the tokenizer or dropped by it."""
    shard_tokens: int = 2**24
    batch_mb: float = 4.0
    num_workers: int = os.cpu_count() or 1


@dataclass
class Prepared:
    """What came of it: the index, and what a reader of it should know."""

    index: DataIndex
    notes: list[str] = field(default_factory=list)
    """Sentences, the more important first."""


def prepare(request: Request, *, quiet: bool = False) -> DataIndex:
    """Write the dataset and return its index; nothing existing is overwritten. ConfigError, DataError, StorageError."""
    return prepare_with_notes(request, quiet=quiet).index


def prepare_with_notes(request: Request, *, quiet: bool = False) -> Prepared:
    """As `prepare`, with what the command prints."""
    _check(request)
    request = replace(request, out=os.path.expanduser(request.out))
    storage = Storage(request.out, parse_options(request.storage_option))
    from relora_ray.data.claim import claiming, refuse_if_used  # --help must not wait for it

    refuse_if_used(storage)
    sources = _sources(request)
    tokenizer = load_tokenizer(request.tokenizer)
    encoding = _encoding(request, tokenizer)
    reading = Reading(request.skip_bad)
    with claiming(storage) as claim:
        parts = _tokenize_all(request, _batches(request, sources, reading), storage, encoding, claim, quiet)
        _check_lost(request, parts)
        _check_splits(request, parts)
        index = DataIndex(
            vocab_size=num_token_ids(tokenizer),
            end_token_id=encoding.end_token_id,
            tokenizer_sha256=encoding.tokenizer_sha256,
            dtype="uint16" if encoding.dtype == "uint16" else "uint32",
            splits={split: pack(storage, split, parts, request.shard_tokens, claim.check) for split in SPLITS},
            begin_token_ids=encoding.begin_token_ids or None,
            control_tokens="text" if encoding.control_tokens == "text" and total(parts, "with_control") else None,
        )
        remove_leftovers(storage, index.splits, store_tokenizer(storage, tokenizer, claim.check))
        in_both = num_in_both(storage, parts) if encoding.with_hashes else 0
        claim.check()
        try:
            write_index(storage, index, new=True)
        except FileExistsError:
            raise DataError(f"{storage.url} holds a dataset by now, which another process wrote.") from None
    storage.delete_below(WORK)
    return Prepared(
        index,
        [
            *reading_notes(reading, sources.left_out, _own_separator(request)),
            *overlap_notes(in_both, index),
            *token_notes(tokenizer, encoding, parts, follows_template=request.begin_token == TEMPLATE),
        ],
    )


def _check(request: Request) -> None:
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", request.out) or not request.out.strip()
    if is_url and (problem := location_problem(request.out)):
        raise ConfigError(f"--out={shown(request.out)} {problem}")
    if request.validation_fraction is not None and request.validation_sources:
        raise ConfigError(
            f"--validation-fraction={request.validation_fraction} has no effect with --validation. Give one of them."
        )
    if request.validation_fraction is not None and not 0 < request.validation_fraction < 1:
        raise ConfigError(f"--validation-fraction={request.validation_fraction} is not between 0 and 1.")
    if not 0 <= request.max_lost <= 1:
        raise ConfigError(f"--max-lost={request.max_lost} is not a share, from 0 to 1.")
    if request.skip_bad < 0:
        raise ConfigError(f"--skip-bad={request.skip_bad} is negative. Give how many records may be passed over.")
    for name in ("shard_tokens", "batch_mb", "num_workers"):
        if getattr(request, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(request, name)} is not positive.")
    if re.search(r"[\r\n]|\\[rn]", request.document_separator):
        raise ConfigError(
            f"--document-separator={request.document_separator!r} has a line break, and lines are matched one by one: "
            f"it would match none. For blank lines give '\\s*'."
        )
    try:
        re.compile(request.document_separator)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"--document-separator={request.document_separator!r} is no regular expression: {error}."
        ) from error


def _own_separator(request: Request) -> str:
    default = Request.__dataclass_fields__["document_separator"].default
    return "" if request.document_separator == default else request.document_separator


@dataclass(frozen=True)
class _Sources:
    train: Sequence[Source]
    validation: Sequence[Source]
    left_out: Sequence[str]


def _sources(request: Request) -> _Sources:
    """What is read, all of it found and looked into as far as that costs little."""
    given, others = parse_options(request.storage_option), parse_options(request.source_option)
    out = _scheme(request.out)

    def options(name: str) -> dict[str, Any]:
        return others or (given if out in ("", _scheme(name)) else {})

    train, validation = (
        find_sources(names, form=request.form, options=options)
        for names in (request.sources, request.validation_sources)
    )
    if both := {source.key for source in train.sources} & {source.key for source in validation.sources}:
        raise ConfigError(f"--validation {min(both)} is a training source, too: held-out text must not be trained on.")
    every = (*train.sources, *validation.sources)
    refuse_out_within(request.out, (*request.sources, *request.validation_sources), every)
    for source in every:
        if source.is_plain_file:
            with source.open() as stream:
                check_file(stream, source.label, _rules(request))
    return _Sources(train.sources, validation.sources, (*train.left_out, *validation.left_out))


def _scheme(url: str) -> str:
    scheme = url.partition("://")[0] if "://" in url else ""
    return {"file": "", "s3a": "s3"}.get(scheme, scheme)


def _rules(request: Request) -> Rules:
    return Rules(form=request.form, text_field=request.text_field, separator=request.document_separator)


def _encoding(request: Request, tokenizer: Any) -> Encoding:
    backend = tokenizer.backend_tokenizer.to_str()
    end_id = end_token_id(tokenizer, request.end_token)
    begin_ids = begin_token_ids(tokenizer, request.begin_token, end_id)
    control = control_tokens(tokenizer, end_id, *begin_ids)
    return Encoding(
        backend=plain_backend(backend, control) if request.control_tokens == "text" else backend,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        begin_token_ids=begin_ids,
        end_token_id=end_id,
        unknown_id=unknown_id(backend),
        control_tokens=request.control_tokens,
        control=control,
        dtype="uint16" if num_token_ids(tokenizer) <= 2**16 else "uint32",
        validation_fraction=0.0 if request.validation_sources else request.validation_fraction or DEFAULT_FRACTION,
        with_hashes=bool(request.validation_sources),
    )


def _batches(request: Request, sources: _Sources, reading: Reading) -> Iterator[Batch]:
    groups: tuple[tuple[Split | None, Sequence[Source]], ...] = (
        (None, sources.train),
        ("validation", sources.validation),
    )
    for split, named in groups:
        documents: list[str] = []
        size = 0
        for document in read_documents(named, _rules(request), reading, split=request.split):
            documents.append(document)
            size += len(document)
            if size >= request.batch_mb * 1e6:
                yield Batch(split, documents)
                documents, size = [], 0
        if documents:
            yield Batch(split, documents)


def _tokenize_all(
    request: Request, batches: Iterator[Batch], storage: Storage, encoding: Encoding, claim: Claim, quiet: bool
) -> list[Part]:
    """Tokenize every batch that is not stored yet, at most two per worker in flight; parts in batch order."""
    parts: list[Part] = []
    num_tokens = 0
    in_flight: deque[tuple[Future[Part] | Part, int]] = deque()
    bar = tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=quiet, file=sys.stderr)

    def finish_one() -> None:
        nonlocal num_tokens
        result, size = in_flight.popleft()
        parts.append(result.result() if isinstance(result, Future) else result)
        num_tokens += sum(parts[-1].num_tokens.values())
        bar.update(size)
        bar.set_postfix(tokens=f"{num_tokens:,}", refresh=False)
        if total(parts, "characters") >= _ENOUGH_CHARACTERS:
            _check_lost(request, parts)

    try:
        with bar, Workers(request.num_workers, encoding) as pool:
            for batch in batches:
                claim.heard()
                done = stored_part(storage, encoding.part_key(batch))
                in_flight.append((done or pool.submit(encode_batch, storage, batch), batch.num_characters))
                if len(in_flight) > 2 * request.num_workers:
                    finish_one()
            while in_flight:
                finish_one()
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that tokenizes was killed, most likely because memory ran out. Use fewer than --num-workers="
            f"{request.num_workers}, or less than --batch-mb={request.batch_mb}; what is done is kept."
        ) from error
    return parts


def _check_splits(request: Request, parts: Sequence[Part]) -> None:
    documents = {split: sum(p.num_documents[split] for p in parts) for split in SPLITS}
    if not documents["train"] and documents["validation"] and not request.validation_sources:
        raise DataError(
            f"all of {documents['validation']:,} documents fell to validation. Give more text, or split it into more "
            f"documents with --document-separator."
        )
    if not documents["train"]:
        raise DataError(f"{', '.join(request.sources)}: no training documents. Check the sources and the text field.")
    if not documents["validation"] and request.validation_sources:
        raise DataError(f"--validation {' '.join(request.validation_sources)}: no documents. Check what is in there.")
    if not documents["validation"]:
        raise DataError(
            f"none of {documents['train']:,} documents fell to validation at --validation-fraction="
            f"{request.validation_fraction or DEFAULT_FRACTION}. Raise it, name --validation files, or split the text "
            f"into more documents with --document-separator."
        )


def _check_lost(request: Request, parts: Sequence[Part]) -> None:
    lost, characters = total(parts, "lost"), total(parts, "characters")
    if lost > request.max_lost * characters:
        raise DataError(
            f"the tokenizer loses {lost / characters:.1%} of the text: {lost:,} of {characters:,} characters are "
            f"unknown to it or dropped, and --max-lost={request.max_lost} allows less. Take a tokenizer that was made "
            f"for such text or falls back to bytes, or allow it, such as by --max-lost "
            f"{min(1.0, 1.5 * lost / characters):.2g}."
        )


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        "prepare",
        (__doc__ or "").splitlines()[0],
        "books/*.txt --out data/books --tokenizer tokenizer",
        "'s3://bucket/c4/*.json.gz' --out s3://bucket/data/c4 --tokenizer t5-base",
    )
    default = Request(sources=(), out="", tokenizer="")
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        help="files or URLs of plain text, JSON lines, CSV, TSV or Parquet, also compressed; folders of them; patterns "
        "such as 's3://b/c4/*.json.gz' or 'dir/**/*.parquet'; - for standard input; a saved dataset's folder; a hub "
        "name:config",
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
    add("--format", dest="form", choices=FORMATS, default="", help="instead of looking at the content")
    add("--text-field", default=default.text_field, help="field or column of the text; data.text: within another")
    add("--split", default=default.split, help="split of a saved or hub dataset to read")
    add("--skip-bad", type=int, default=0, metavar="N", help="pass over up to N records that are no documents")
    add(
        "--begin-token",
        default=default.begin_token,
        help="token in front of each document, or none; default: what the tokenizer itself puts there",
    )
    add("--end-token", default="", help="token after each document; default: the tokenizer's own")
    add(
        "--control-tokens",
        choices=("text", "tokens"),
        default=default.control_tokens,
        help="what </s> and the like become where a text has them written out; default: text",
    )
    add(
        "--max-lost",
        type=float,
        default=default.max_lost,
        metavar="SHARE",
        help="of characters that may be unknown to the tokenizer or dropped by it; default: 0.01",
    )
    add("--shard-tokens", type=int, default=default.shard_tokens, help="tokens of each shard but the last")
    add("--batch-mb", type=float, default=default.batch_mb, help="millions of characters per unit of work")
    add("--num-workers", type=int, default=default.num_workers, help="processes that tokenize")
    add_options_argument(parser)
    add(
        "--source-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as --storage-option, for sources where they need others than --out",
    )
    args = vars(parser.parse_args(argv))
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    prepared = prepare_with_notes(Request(**args))
    index = prepared.index
    for split, held in index.splits.items():
        print(
            f"{split:11s}{held.num_documents:>12,} documents {held.num_tokens:>15,} tokens {len(held.shards):>5} shards"
        )
    for note in prepared.notes:
        print(note)
    print(f"vocabulary {index.vocab_size:,}, fingerprint {index.fingerprint}, in {args['out']}")


if __name__ == "__main__":
    sys.exit(main())
