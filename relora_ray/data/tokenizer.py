"""Tokenizers: load any Hugging Face one; train a small byte-level BPE on one's own text.

python -m relora_ray.data.tokenizer TEXT... --out FOLDER --vocab-size 2048
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from relora_ray import cli
from relora_ray.cli import command
from relora_ray.errors import DataError, first_words
from relora_ray.hub import missing

END_TOKEN = "<|endoftext|>"


def load_tokenizer(name: str) -> Any:
    """A fast Hugging Face tokenizer from a folder, a `tokenizer.json` file or a hub name. DataError if none."""
    if problem := missing(name):
        raise DataError(
            f"tokenizer {name!r} {problem} Give a Hugging Face folder, a tokenizer.json, or a name of the hub."
        )
    import transformers

    try:
        if name.endswith(".json"):
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, and bare Exception from the Rust side
        raise DataError(
            f"tokenizer {name!r} cannot be loaded: {first_words(error)} Give a Hugging Face folder, a "
            f"tokenizer.json, or a hub name."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name!r} has no fast version. Convert it to a tokenizer.json first.")
    # Some are published with truncation to their model's length: documents here are taken whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        found = tokenizer.backend_tokenizer.encode("It was a truth. \u4e86\U0001f600", add_special_tokens=False).ids
    except Exception as error:  # a bare one from the Rust side
        raise DataError(
            f"tokenizer {name!r} cannot encode text: {error}. Is its unknown token in its vocabulary?"
        ) from error
    if not found:
        raise DataError(
            f"tokenizer {name!r} turns text into nothing: there is no tokenizer in that folder. Give one that has a "
            f"tokenizer.json."
        )
    return tokenizer


def end_token_id(tokenizer: Any, token: str = "") -> int:
    """Id of the token that ends a document: `token`, or the tokenizer's own. DataError if there is none."""
    token = token or tokenizer.eos_token or ""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise DataError(
            f"the tokenizer has no end token {token!r}. Name one of its tokens with --end-token, such as </s>."
        )
    return int(found)


TEMPLATE, NO_TOKEN = "", "none"


def template_begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts in front of a text, at inference: often nothing, or one token."""
    encoded = tokenizer.backend_tokenizer.encode("It was a truth.", add_special_tokens=True)
    mask = encoded.special_tokens_mask
    length = mask.index(0) if 0 in mask else 0
    return tuple(encoded.ids[:length])


def begin_token_ids(tokenizer: Any, token: str, end_id: int) -> tuple[int, ...]:
    """What to put in front of every document: `token`, nothing for `none`, by default what the tokenizer itself does.

    Not so if that is the end token, as OPT's: that of the document before stands in front already. DataError if there
    is no such token."""
    if token == NO_TOKEN:
        return ()
    if token == TEMPLATE:
        own = template_begin_ids(tokenizer)
        return () if own == (end_id,) else own
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise DataError(f"the tokenizer has no token {token!r}. Give --begin-token one of its tokens, or none.")
    return (int(found),)


def control_tokens(tokenizer: Any, *more: int) -> dict[str, int]:
    """The tokens that steer a model instead of standing for text, and their ids: those that are marked as special, and
    `more`. Not those of a single character, which text may need."""
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    found = {token["content"]: int(token["id"]) for token in added if token["special"] or token["id"] in more}
    found |= {tokenizer.convert_ids_to_tokens(number): number for number in more}
    return {
        content: number
        for content, number in found.items()
        if len(content) > 1 and not re.fullmatch(r"<0x[0-9A-F]{2}>", content)  # bytes of what has no token of its own
    }


def plain_backend(backend: str, control: dict[str, int]) -> str:
    """The JSON of a tokenizer like that of JSON `backend`, but for which `control` written out in a text is text.

    They get names that no text has, in the list of added tokens and in the model's own vocabulary, in which models such
    as T5's find them even when tokenizers is told not to look for special tokens. No id changes.
    """
    content = json.loads(backend)
    model = content["model"]
    hidden = {name: f"\ufdd0{name}\ufdd1" for name in control}
    for token in content["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden.get(piece, piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not hidden.keys() & {*pair, "".join(pair)}]
    content["post_processor"] = None  # it names them, and is not used
    return json.dumps(content, ensure_ascii=False)


def unknown_id(backend: str) -> int | None:
    """The token for what the tokenizer does not know, or None if it has none."""
    content = json.loads(backend)
    model = content["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name, vocab = model.get("unk_token"), model["vocab"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    found = vocab.get(name, added.get(name)) if isinstance(vocab, dict) else None
    return None if found is None else int(found)


def num_token_ids(tokenizer: Any) -> int:
    """Embedding rows that its ids need: the largest id plus one. (Some tokenizers' vocab_size leaves out added
    tokens.)"""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_sha256(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def train_tokenizer(texts: list[str], *, vocab_size: int, out: str) -> None:
    """Train a byte-level BPE (any text can be encoded) and save it as a local Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size <= 256 or not any(texts) or "://" in out:
        raise DataError(
            f"no tokenizer of {vocab_size} tokens can be made from {sum(map(len, texts)):,} characters and written to "
            f"{out!r}: it needs more than 256 tokens (one for every byte), some text, and a local folder."
        )
    if os.path.isdir(out) and os.listdir(out):
        raise DataError(f"{out} is not empty: what is there would be another tokenizer's. Give a new folder.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    os.makedirs(out, exist_ok=True)
    tokenizer.save(os.path.join(out, "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN, "bos_token": END_TOKEN}
    with open(os.path.join(out, "tokenizer_config.json"), "w") as file:
        json.dump(settings, file, indent=1)


@command
def main(argv: Sequence[str] | None = None) -> None:
    from relora_ray.data.documents import FORMATS, Reading, read_documents
    from relora_ray.data.formats import Rules
    from relora_ray.data.sources import find_sources
    from relora_ray.storage import add_options_argument, parse_options

    parser = cli.parser("tokenizer", (__doc__ or "").splitlines()[0], "books/*.txt --out tokenizer --vocab-size 8192")
    parser.add_argument("text", nargs="+", help="sources as those of python -m relora_ray.data.prepare")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, the special ones included")
    parser.add_argument("--text-field", default="text", help="field or column of the text")
    parser.add_argument("--format", dest="form", choices=FORMATS, default="", help="instead of looking at the content")
    add_options_argument(parser)
    args = parser.parse_args(argv)
    options = parse_options(args.storage_option)
    found = find_sources(args.text, form=args.form, options=lambda name: options)
    rules = Rules(form=args.form, text_field=args.text_field)
    texts = list(read_documents(found.sources, rules, Reading()))
    train_tokenizer(texts, vocab_size=args.vocab_size, out=args.out)
    num_tokens = num_token_ids(load_tokenizer(args.out))
    fewer = "" if num_tokens >= args.vocab_size else f", not {args.vocab_size:,}: the text has no more"
    print(f"wrote {args.out}: {num_tokens:,} tokens{fewer}, from {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    sys.exit(main())
