"""From text to token ids: control tokens, begin tokens, what a tokenizer loses. Real tokenizers of several kinds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from relora_ray.commands.export import export
from relora_ray.data.prepare import Request, prepare_with_notes
from relora_ray.data.tokenizer import (
    begin_token_ids,
    control_tokens,
    load_tokenizer,
    plain_backend,
    template_begin_ids,
    unknown_id,
)
from relora_ray.data.tokens import DataIndex
from relora_ray.errors import ConfigError, DataError
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.conftest import TOKENIZER
from tests.tiny import run, tiny_config

TEXTS = [f"Was </s>{i}<s> 15 pounds. <|endoftext|> And <pad> on, <unk> it went. [PAD]" for i in range(20)]
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "<|endoftext|>", "[PAD]"]


def make(kind: str, folder: Path, *, template: str = "", end: str = "</s>", texts: list[str] = TEXTS) -> str:
    """A tokenizer that knows the control tokens SPECIAL, trained on `texts`. `template`: what it does by itself."""
    alphabet = sorted(set("".join(texts)))
    if kind == "unigram":  # as T5's
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    elif kind == "llama":  # BPE of characters without a pre-tokenizer, with bytes for what it does not know
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    if template:
        special = [(name, tokenizer.token_to_id(name)) for name in SPECIAL if name in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if kind == "llama":  # bytes are no control tokens, and published tokenizers do not mark them as such
        saved = json.loads((folder / "tokenizer.json").read_text())
        saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
        (folder / "tokenizer.json").write_text(json.dumps(saved))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("kind", ["bytes", "unigram", "llama", "words"])
def test_control_tokens_written_out_are_text(kind: str, tmp_path: Path) -> None:
    """Also where the model's own vocabulary has them as pieces, or a word is one."""
    tokenizer = load_tokenizer(make(kind, tmp_path / "tokenizer"))
    control = control_tokens(tokenizer, tokenizer.eos_token_id)
    assert control.keys() == set(SPECIAL)
    json_before = tokenizer.backend_tokenizer.to_str()
    backend = Tokenizer.from_str(plain_backend(json_before, control))
    unknown = unknown_id(json_before)
    for text in ("</s>", " </s> ", "a</s>t", *TEXTS[:3]):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert not set(control.values()) - {unknown} & set(ids), (text, backend.encode(text).tokens)
        if kind != "words":
            assert backend.decode(ids, skip_special_tokens=False).strip() == text.strip()
    for text in ("It was 15 pounds.", "On, it went: \u00e9", " And  on\n"):  # nothing else is changed
        assert backend.encode(text, add_special_tokens=False).ids == (
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        )


def prepared(
    folder: Path, tokenizer: str, texts: list[str], **settings: object
) -> tuple[list[int], list[str], DataIndex]:
    """The ids of training and validation, the notes, and the index."""
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    number = len(list(folder.glob("out*")))
    wanted = {"validation_fraction": 0.3} | settings
    done = prepare_with_notes(
        Request(sources=(str(source),), out=str(folder / f"out{number}"), tokenizer=tokenizer, num_workers=1, **wanted),
        quiet=True,
    )
    files = sorted((folder / f"out{number}").glob("*.npy"))
    return np.concatenate([np.load(file) for file in files]).tolist(), done.notes, done.index


def cut(ids: list[int], end: int) -> list[list[int]]:
    """Between the end tokens."""
    documents: list[list[int]] = [[]]
    for number in ids:
        documents[-1].append(number)
        if number == end:
            documents[-1].pop()
            documents.append([])
    return documents[:-1]


def test_as_many_end_tokens_as_documents(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    ids, notes, index = prepared(tmp_path, str(TOKENIZER), TEXTS)
    assert ids.count(tokenizer.eos_token_id) == len(TEXTS)
    assert "20 documents have control tokens written out, which are text there (--control-tokens)" in notes
    assert sorted(tokenizer.decode(document) for document in cut(ids, tokenizer.eos_token_id)) == sorted(TEXTS)
    old_ids, old_notes, old_index = prepared(tmp_path, str(TOKENIZER), TEXTS, control_tokens="tokens")
    assert old_ids.count(tokenizer.eos_token_id) == 2 * len(TEXTS)
    assert "20 documents have control tokens written out, which became those tokens (--control-tokens)" in old_notes
    assert index.fingerprint != old_index.fingerprint
    assert (index.control_tokens, old_index.control_tokens) == ("text", None)


def test_begin_token_follows_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = make("bytes", tmp_path / "tokenizer", template="<s> $A")
    begin, end = (load_tokenizer(tokenizer).get_vocab()[name] for name in ("<s>", "</s>"))
    ids, notes, index = prepared(tmp_path, tokenizer, TEXTS)
    assert ids.count(begin) == ids.count(end) == len(TEXTS)
    assert ids[0] == begin
    assert all(after == begin for before, after in itertools.pairwise(ids) if before == end)
    assert index.begin_token_ids == (begin,)
    assert "begin token: <s>, as the tokenizer has it" in notes
    bare, notes, without = prepared(tmp_path, tokenizer, TEXTS, begin_token="none")
    assert bare == [number for number in ids if number != begin]
    assert without.begin_token_ids is None
    assert without.fingerprint != index.fingerprint
    assert any(note.startswith("begin token: none, but the tokenizer puts <s> in front") for note in notes)
    other, _, chosen = prepared(tmp_path, tokenizer, TEXTS, begin_token="<pad>")
    assert other[0] == load_tokenizer(tokenizer).get_vocab()["<pad>"]
    assert chosen.fingerprint not in (index.fingerprint, without.fingerprint)
    with pytest.raises(DataError, match=r"no token '<bos>'\. Give --begin-token one of its tokens, or none"):
        prepared(tmp_path, tokenizer, TEXTS, begin_token="<bos>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [("", []), ("$A </s>", []), ("<s> $A </s>", ["<s>"]), ("<pad> <s> $A", ["<pad>", "<s>"]), ("</s> $A", [])],
)
def test_what_a_template_puts_in_front(template: str, expected: list[str], tmp_path: Path) -> None:
    """The end token in front (OPT) is the end token of the document before."""
    tokenizer = load_tokenizer(make("bytes", tmp_path / "tokenizer", template=template))
    ids = begin_token_ids(tokenizer, "", tokenizer.eos_token_id)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == expected
    assert template.startswith("</s>") or ids == template_begin_ids(tokenizer)


@pytest.mark.parametrize("kind", ["unigram", "words", "dropping"])
def test_a_tokenizer_that_loses_much_is_refused(kind: str, tmp_path: Path) -> None:
    """Unknown tokens, and characters that leave no trace: BPE without a token for them."""
    known = ["A plain text of letters. " * 3] * 20
    tokenizer = make("llama" if kind == "dropping" else kind, tmp_path / "tokenizer", texts=known)
    if kind == "dropping":
        saved = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
        saved["model"] |= {"unk_token": None, "byte_fallback": False}
        (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(saved))
    foreign = [f"{text}\u0416\u0416\u0416 {i}" for i, text in enumerate(known)]
    with pytest.raises(
        DataError, match=r"the tokenizer loses \d+\.\d% of the text: .* and --max-lost=0\.01 allows less"
    ):
        prepared(tmp_path, tokenizer, foreign)
    _, notes, _ = prepared(tmp_path, tokenizer, foreign, max_lost=0.5)
    note = next(note for note in notes if "unknown to the tokenizer or dropped" in note)
    letters_and_numbers = 20 * 3 + sum(len(str(i)) for i in range(20))
    assert int(note.split()[0]) == letters_and_numbers
    assert "20 documents do not decode to themselves, 20 of them in more than spaces" in note
    with pytest.raises(ConfigError, match=r"--max-lost=2 is not a share"):
        prepared(tmp_path, tokenizer, foreign, max_lost=2)


def test_a_byte_tokenizer_loses_nothing(tmp_path: Path) -> None:
    texts = [f"caf\u00e9 \U0001f600 \u0416 \u0000 e\u0301 {i}" for i in range(20)]
    _, notes, _ = prepared(tmp_path, str(TOKENIZER), texts)
    assert notes[-1].startswith("0 of 2")
    assert notes[-1].endswith("0 documents do not decode to themselves, 0 of them in more than spaces")


@pytest.mark.parametrize("begin_token", ["", "none"])
def test_an_export_begins_texts_as_the_data_does(begin_token: str, tmp_path: Path) -> None:
    tokenizer = make("bytes", tmp_path / "tokenizer", template="<s> $A")
    prepared(tmp_path, tokenizer, TEXTS * 2, begin_token=begin_token)
    cfg = tiny_config(tmp_path / "out0", tmp_path / "runs", "train.eval_rows=1")
    run(cfg)
    export(run_storage(cfg), Storage(str(tmp_path / "model")))
    vocab = load_tokenizer(str(tmp_path / "model")).get_vocab()
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (settings.bos_token_id, settings.eos_token_id) == (vocab["<s>"], vocab["</s>"])
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    begin = "</s>" if begin_token == "none" else "<s>"  # a text begins behind the end of the one before
    assert (settings.bos_token_id, settings.eos_token_id) == (vocab[begin], vocab["</s>"])


def test_an_end_token_that_texts_contain_is_refused(tmp_path: Path) -> None:
    """One of a single character cannot be told from text."""
    tokenizer = make("bytes", tmp_path / "tokenizer", end="~")
    texts = [*TEXTS, "A tilde ~ in it."]
    with pytest.raises(DataError, match=r"control token '~' out of plain text: 'A tilde ~ in it.*--end-token"):
        prepared(tmp_path, tokenizer, texts)
    ids, _, index = prepared(tmp_path, tokenizer, texts, control_tokens="tokens")
    assert ids.count(index.end_token_id) == len(texts) + 1


def test_validation_documents_in_training_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("New.", f" {TEXTS[3]}\n", TEXTS[5], TEXTS[5])))
    settings = {"validation_sources": (str(held_out),), "validation_fraction": None, "batch_mb": 1e-4}
    for at_once in (2**24, 1):  # also with less than all hashes in memory
        monkeypatch.setattr("relora_ray.data.pack._HASHES_AT_ONCE", at_once)
        _, notes, _ = prepared(tmp_path, str(TOKENIZER), TEXTS, **settings)
        assert "3 of 4 validation documents are in the training text, too" in notes
    _, notes, _ = prepared(tmp_path, str(TOKENIZER), TEXTS[6:], **settings)
    assert not any("validation documents" in note for note in notes)
