"""What the command says about the data it has written, besides the counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from relora_ray.data.documents import Reading
from relora_ray.data.encode import Encoding, Part, total
from relora_ray.data.tokenizer import NO_TOKEN, template_begin_ids
from relora_ray.data.tokens import DataIndex


def reading_notes(reading: Reading, left_out: Sequence[str], separator: str) -> Iterator[str]:
    """`separator`: as it was asked for; empty if it was not."""
    if separator and reading.num_texts and not reading.num_separators:
        yield (
            f"no line of {reading.num_texts:,} text files matches --document-separator={separator!r}: each is one "
            f"document. It is a regular expression for whole lines, so | and other signs need a backslash"
        )
    left_out = [*left_out, *reading.left_out]
    if reading.num_bad:
        first = " ".join(f"{problem.where} {problem.reason}" for problem in reading.first_bad)
        yield f"{reading.num_bad:,} bad records passed over, the first: {first}"
    if reading.num_empty:
        yield f"{reading.num_empty:,} records without text left out"
    if names := reading.without_documents:
        yield f"{len(names):,} sources without documents, the first: {', '.join(names[:5])}"
    if left_out:
        yield f"{len(left_out):,} hidden files and checksums not read, the first: {', '.join(left_out[:5])}"


def overlap_notes(num_in_both: int, index: DataIndex) -> Iterator[str]:
    if num_in_both:
        held_out = index.splits["validation"].num_documents
        yield f"{num_in_both:,} of {held_out:,} validation documents are in the training text, too"


def token_notes(tokenizer: Any, encoding: Encoding, parts: Sequence[Part], *, follows_template: bool) -> Iterator[str]:
    yield f"begin token: {_begin_note(tokenizer, encoding, follows_template)}"
    if written := total(parts, "with_control"):
        became = "are text there" if encoding.control_tokens == "text" else "became those tokens"
        yield f"{written:,} documents have control tokens written out, which {became} (--control-tokens)"
    lost, characters = total(parts, "lost"), total(parts, "characters")
    yield (
        f"{lost:,} of {characters:,} characters ({lost / max(1, characters):.2%}) unknown to the tokenizer or dropped, "
        f"{total(parts, 'unknown_tokens'):,} unknown tokens; {total(parts, 'changed'):,} documents do not decode to "
        f"themselves, {total(parts, 'changed_visibly'):,} of them in more than spaces"
    )


def _begin_note(tokenizer: Any, encoding: Encoding, follows_template: bool) -> str:
    own, begin = template_begin_ids(tokenizer), encoding.begin_token_ids
    names, own_names = (" ".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (begin, own))
    if begin == own:
        return f"{names or NO_TOKEN}, as the tokenizer has it"
    if follows_template:
        return f"the tokenizer's own is the end token, {own_names}: that of the document before stands there"
    return (
        f"{names or NO_TOKEN}, but the tokenizer puts {own_names or 'nothing'} in front of a text: do as the data "
        f"has it when the model is used (add_special_tokens=False)"
    )
