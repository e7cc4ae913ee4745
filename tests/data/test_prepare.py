"""Preparing data: every input format, splits by document, resuming, refusals. Real processes, real tokenizers."""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import Future
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from relora_ray.data import prepare as prepare_module
from relora_ray.data.encode import Workers
from relora_ray.data.prepare import Request, prepare, prepare_with_notes
from relora_ray.data.tokenizer import load_tokenizer, train_tokenizer
from relora_ray.data.tokens import read_index
from relora_ray.errors import ConfigError, DataError
from relora_ray.storage import Storage
from tests.conftest import TOKENIZER

DOCUMENTS = [f"Document {i}. It was a truth universally acknowledged, {i} times.\n" * (1 + i % 4) for i in range(40)]


def request(out: Path, *sources: Path | str, **settings: object) -> Request:
    base = Request(
        sources=tuple(map(str, sources)), out=str(out), tokenizer=str(TOKENIZER), validation_fraction=0.2, num_workers=1
    )
    return dataclasses.replace(base, **settings)


def stream(out: Path, split: str) -> list[int]:
    return np.concatenate([np.load(p) for p in sorted(out.glob(f"{split}-*.npy"))]).tolist()


def decoded(out: Path, split: str) -> list[str]:
    """The documents of a split, cut at the end token."""
    tokenizer = load_tokenizer(str(out / "tokenizer"))
    text = tokenizer.decode(stream(out, split))
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "docs.txt"
    path.write_text("<|endoftext|>\n".join(DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(request(out, text_file, shard_tokens=500), quiet=True)
    return out


def test_documents_survive_whole_and_once(prepared: Path) -> None:
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [d for d in DOCUMENTS if d in train], "order is kept"
    index = read_index(Storage(str(prepared)))
    assert (index.splits["train"].num_documents, index.splits["validation"].num_documents) == (
        len(train),
        len(validation),
    )
    assert 2 <= len(validation) <= 16


def test_shards_have_the_asked_length(prepared: Path) -> None:
    lengths = [s.num_tokens for s in read_index(Storage(str(prepared))).splits["train"].shards]
    assert len(lengths) > 2
    assert set(lengths[:-1]) == {500}
    assert 0 < lengths[-1] <= 500
    assert not (prepared / ".prepare").exists()


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "batches"])
def test_every_format_gives_the_same_tokens(form: str, prepared: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"shard_tokens": 500}
    source: Path | str = text_file
    if form == "jsonl":
        source = tmp_path / "docs.jsonl"
        source.write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    elif form == "parquet":
        source = tmp_path / "docs.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "other": list(range(40))}), source)
    elif form == "saved":
        source = tmp_path / "saved"
        datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(source))
    else:  # many small batches over several processes must come out as one
        settings |= {"batch_mb": 0.0005, "num_workers": 2}
    index = prepare(request(tmp_path / "out", source, **settings), quiet=True)
    assert index == read_index(Storage(str(prepared)))
    assert stream(tmp_path / "out", "train") == stream(prepared, "train")


def test_killed_run_resumes_without_tokenizing_again(
    text_file: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run dies before it packs; the second must take its parts as they are."""
    wanted = request(tmp_path / "out", text_file, shard_tokens=500, batch_mb=0.0005)

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "pack", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted, quiet=True)
    records = sorted((tmp_path / "out/.prepare/parts").glob("*.json"))
    assert len(records) > 4
    records[1].unlink()  # one batch was under way
    before = {p: p.stat().st_mtime_ns for p in records if p.exists()}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.Storage, "delete_below", lambda self, prefix: None)  # the parts are looked at
        prepare(wanted, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert records[1].exists()
    assert stream(tmp_path / "out", "train") == stream(prepared, "train")


def test_parts_of_other_text_are_not_taken(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "pack", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(request(out, text_file), quiet=True)
    changed = tmp_path / "changed.txt"
    changed.write_text(text_file.read_text().replace("truth", "lie"))
    prepare(request(out, changed), quiet=True)
    assert all("lie" in d for d in decoded(out, "train"))


def test_equal_documents_never_fall_on_both_sides(tmp_path: Path) -> None:
    source = tmp_path / "twice.txt"
    source.write_text("<|endoftext|>\n".join(DOCUMENTS * 2))
    prepare(request(tmp_path / "out", source), quiet=True)
    assert not set(decoded(tmp_path / "out", "train")) & set(decoded(tmp_path / "out", "validation"))


def test_named_validation_sources_are_held_out_whole(text_file: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("Held out.\n")
    prepare(request(tmp_path / "out", text_file, validation_sources=(str(held),), validation_fraction=None), quiet=True)
    assert decoded(tmp_path / "out", "validation") == ["Held out.\n"]
    assert len(decoded(tmp_path / "out", "train")) == 40


def test_fingerprint_changes_with_text_and_tokenizer(prepared: Path, text_file: Path, tmp_path: Path) -> None:
    same = read_index(Storage(str(prepared))).fingerprint
    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text().replace("7", "8"))
    assert prepare(request(tmp_path / "a", other_text, shard_tokens=500), quiet=True).fingerprint != same
    train_tokenizer(DOCUMENTS, vocab_size=300, out=str(tmp_path / "tokenizer"))
    other = request(tmp_path / "b", text_file, shard_tokens=500, tokenizer=str(tmp_path / "tokenizer"))
    assert prepare(other, quiet=True).fingerprint != same


def test_tokenizer_json_needs_its_end_token_named(text_file: Path, tmp_path: Path) -> None:
    plain = str(TOKENIZER / "tokenizer.json")
    with pytest.raises(DataError, match=r"no end token.*--end-token"):
        prepare(request(tmp_path / "a", text_file, tokenizer=plain), quiet=True)
    prepare(request(tmp_path / "a", text_file, tokenizer=plain, end_token="<|endoftext|>"), quiet=True)


def test_large_vocabularies_use_uint32(text_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.add_tokens([f"<extra{i}>" for i in range(70_000)])
    tokenizer.save_pretrained(tmp_path / "large")
    index = prepare(request(tmp_path / "out", text_file, tokenizer=str(tmp_path / "large")), quiet=True)
    assert (index.dtype, index.vocab_size) == ("uint32", 72_048)
    assert np.load(tmp_path / "out/train-00000.npy").dtype == np.uint32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ("/nowhere.txt",)}, "/nowhere.txt: no such file or folder"),
        ({"sources": ("/nowhere/at/all",)}, "/nowhere/at/all: no such file or folder"),
        ({"tokenizer": "/nowhere"}, "tokenizer '/nowhere' does not exist: there is no such file or folder"),
        ({"validation_fraction": 1e-9}, "none of 40 documents fell to validation"),
        ({"text_field": "txt", "form": "jsonl"}, "is not JSON"),
    ],
)
def test_bad_sources_are_named(settings: dict[str, object], message: str, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path / "out", text_file, **settings), quiet=True)
    assert not (tmp_path / "out/index.json").exists()


def test_wrong_field_is_named(tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text('{"content": "x"}\n')
    with pytest.raises(
        DataError, match=r"docs.jsonl:1 has no text in field 'text' \(it has content\). Set --text-field"
    ):
        prepare(request(tmp_path / "out", source), quiet=True)


def test_bad_settings_are_refused(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--validation-fraction=2"):
        prepare(request(tmp_path / "out", text_file, validation_fraction=2.0), quiet=True)
    with pytest.raises(ConfigError, match="no regular expression"):
        prepare(request(tmp_path / "out", text_file, document_separator="("), quiet=True)


def test_truncation_stored_in_a_tokenizer_is_not_applied(text_file: Path, prepared: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(TOKENIZER))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    cut = request(tmp_path / "out", text_file, tokenizer=str(tmp_path / "tokenizer.json"), end_token="<|endoftext|>")
    prepare(cut, quiet=True)
    assert stream(tmp_path / "out", "train") == stream(prepared, "train")


def test_model_folder_without_a_tokenizer_is_refused(text_file: Path, tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"tokenizer .*(turns text into nothing|cannot be loaded|no fast version)"):
        prepare(request(tmp_path / "out", text_file, tokenizer=str(tmp_path / "model")), quiet=True)


def test_folder_with_other_files_is_left_alone(text_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train-00000.npy").write_text("thesis")
    with pytest.raises(DataError, match=r"is not empty: it holds train-00000\.npy"):
        prepare(request(mine, text_file), quiet=True)
    assert (mine / "train-00000.npy").read_text() == "thesis"
    with pytest.raises(ConfigError, match="--out='' is blank"):
        prepare(dataclasses.replace(request(mine, text_file), out=""), quiet=True)


def test_validation_source_must_not_be_trained_on(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a training source, too"):
        prepare(
            request(tmp_path / "a", text_file, validation_sources=(str(text_file),), validation_fraction=None),
            quiet=True,
        )


@pytest.mark.parametrize("name", ["cut.txt.gz", "bad.parquet", "latin.txt"])
def test_damaged_sources_are_named(name: str, text_file: Path, tmp_path: Path) -> None:
    import gzip

    content = {
        "cut.txt.gz": gzip.compress(text_file.read_bytes())[:-30],
        "bad.parquet": b"no parquet",
        "latin.txt": "caf\u00e9\n".encode("latin-1"),
    }[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}(: cannot be read as|:1 is not UTF-8)"):
        prepare(request(tmp_path / "out", tmp_path / name), quiet=True)


def test_existing_data_is_not_overwritten(prepared: Path, text_file: Path) -> None:
    with pytest.raises(DataError, match="already holds a dataset"):
        prepare(request(prepared, text_file), quiet=True)


def test_compressed_text_reads_the_same(text_file: Path, prepared: Path, tmp_path: Path) -> None:
    import gzip

    packed = tmp_path / "docs.txt.gz"
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    assert (
        prepare(request(tmp_path / "out", packed, shard_tokens=500), quiet=True).splits
        == read_index(Storage(str(prepared))).splits
    )


def test_data_of_earlier_versions_keep_their_fingerprint(data: Path, prepared: Path, text_file: Path) -> None:
    """The number is from the version before there were begin tokens, and control tokens as text."""
    raw = json.loads((data / "index.json").read_text())
    assert raw["fingerprint"] == "75ce7bc1d28acfdf"
    assert raw.keys() == {"format", "vocab_size", "end_token_id", "tokenizer_sha256", "dtype", "splits", "fingerprint"}


def test_unfinished_work_of_an_earlier_version_is_gone_on_from(prepared: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.prepare").mkdir(parents=True)
    for name in ("started", "0000000.json", "0000000-train.npy"):
        (tmp_path / "out/.prepare" / name).write_bytes(b"")
    assert prepare(request(tmp_path / "out", text_file, shard_tokens=500), quiet=True) == read_index(
        Storage(str(prepared))
    )
    assert not (tmp_path / "out/.prepare").exists()


def test_a_document_longer_than_a_shard_and_a_batch(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": f"{i} birds " * 3_000}) + "\n" for i in range(6)))
    index = prepare(request(tmp_path / "out", tmp_path / "docs.jsonl", shard_tokens=700, batch_mb=0.001), quiet=True)
    assert len(index.splits["train"].shards) > 6
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "validation")) == sorted(
        f"{i} birds " * 3_000 for i in range(6)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no training documents"),
        (" \n\n", "no training documents"),
        ("One.", "none of 1 documents fell to validation"),
        ("Two.", "all of 1 documents fell to validation"),
    ],
)
def test_text_without_documents_for_both_splits_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path / "out", tmp_path / "docs.txt", validation_fraction=0.5), quiet=True)


def test_validation_files_without_documents_are_refused(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\n")
    wanted = request(tmp_path / "out", text_file, validation_sources=(str(tmp_path / "held.txt"),))
    with pytest.raises(DataError, match=r"--validation .*held\.txt: no documents"):
        prepare(dataclasses.replace(wanted, validation_fraction=None), quiet=True)


@pytest.mark.parametrize("last", ["docs.jsonl.gz", "utf16.txt", "page.txt", "nowhere.txt"])
def test_a_bad_file_is_found_before_the_first_is_tokenized(last: str, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "utf16.txt").write_bytes("One.".encode("utf-16-le"))
    (tmp_path / "page.txt").write_text("<html></html>")
    with pytest.raises(DataError, match=last):
        prepare(request(tmp_path / "out", text_file, tmp_path / last), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_bad_record_ends_the_work_by_its_name_and_is_passed_over_on_request(tmp_path: Path) -> None:
    records = [json.dumps({"text": d}) for d in DOCUMENTS] + ['{"text": "half \\ud83d of it"}', '{"text": null}']
    (tmp_path / "docs.jsonl").write_text("\n".join(records))
    with pytest.raises(DataError, match=r"docs\.jsonl:41 has half a character, the lone surrogate .* --skip-bad N"):
        prepare(request(tmp_path / "out", tmp_path / "docs.jsonl"), quiet=True)
    with pytest.raises(DataError, match=r"docs\.jsonl:42 has null in field 'text'.*--skip-bad=1 lets fewer pass"):
        prepare(request(tmp_path / "out", tmp_path / "docs.jsonl", skip_bad=1), quiet=True)
    done = prepare_module.prepare_with_notes(request(tmp_path / "out", tmp_path / "docs.jsonl", skip_bad=2), quiet=True)
    assert done.notes[0].startswith("2 bad records passed over, the first: ")
    assert sum(split.num_documents for split in done.index.splits.values()) == len(DOCUMENTS)


def test_a_worker_that_is_killed_is_named(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(Workers):
        def submit(self, *call: object, **named: object) -> Future:
            return super().submit(os._exit, 137)

    monkeypatch.setattr(prepare_module, "Workers", Dying)
    with pytest.raises(DataError, match=r"a process that tokenizes was killed.*--num-workers=1"):
        prepare(request(tmp_path / "out", text_file), quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document_separator": r"\n\n"}, r"has a line break, and lines are matched one by one"),
        ({"document_separator": "a{99999999999}"}, "is no regular expression"),
        ({"document_separator": "(" * 5000}, "is no regular expression"),
        ({"out": "http://host/x"}, "is of scheme http:, where objects cannot be kept"),
        ({"out": "s3://"}, "is half a URL"),
    ],
)  # fmt: skip
def test_settings_that_can_only_disappoint_are_refused(
    settings: dict[str, str], message: str, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(request(tmp_path / "out", text_file), **settings), quiet=True)


def test_separator_that_matches_nothing_is_said(text_file: Path, tmp_path: Path) -> None:
    """Not escaped, it is three other ones."""
    (tmp_path / "held-out.txt").write_text("Held out.")
    made = request(
        tmp_path / "out", text_file, document_separator="<|endoftext|>", validation_fraction=None,
        validation_sources=(str(tmp_path / "held-out.txt"),),
    )  # fmt: skip
    assert any("no line of 2 text files matches" in note for note in prepare_with_notes(made, quiet=True).notes)


def test_home_is_expanded(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepare(dataclasses.replace(request(tmp_path, text_file), out="~/out"), quiet=True)
    assert (tmp_path / "out/index.json").exists()
    assert not (tmp_path / "~").exists()
