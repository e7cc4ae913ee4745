"""Tokenizers: load any Hugging Face one; train a small byte-level BPE on one's own text.

python -m relora_ray.data.tokenizer TEXT... --out FOLDER --vocab-size 2048
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from typing import Any

from relora_ray.errors import DataError, ReloraError
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
            f"tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]} Give a Hugging Face folder, a "
            f"tokenizer.json, or a hub name."
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {name!r} has no fast version. Convert it to a tokenizer.json first.")
    # Some are published with truncation to their model's length: documents here are taken whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not tokenizer.backend_tokenizer.encode("It was a truth.", add_special_tokens=False).ids:
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


def main() -> None:
    from relora_ray.data.documents import read_documents

    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.data.tokenizer", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("text", nargs="+", help="plain text, JSON lines, Parquet, a saved dataset or a hub name")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--text-field", default="text")
    args = parser.parse_args()
    try:
        texts = [
            doc
            for source in args.text
            for doc in read_documents(source, text_field=args.text_field, separator=r"<\|endoftext\|>", split="train")
        ]
        train_tokenizer(texts, vocab_size=args.vocab_size, out=args.out)
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    print(
        f"wrote {args.out}: {num_token_ids(load_tokenizer(args.out)):,} tokens from {sum(map(len, texts)):,} characters"
    )


if __name__ == "__main__":
    main()
