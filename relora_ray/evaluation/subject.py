"""The model that is evaluated: a run's checkpoint, or any Hugging Face folder."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from relora_ray.checkpoint import Manifest, read_manifest
from relora_ray.config import RunConfig
from relora_ray.data.tokenizer import template_begin_ids
from relora_ray.errors import ConfigError, DataError, first_words
from relora_ray.modeling.architecture import in_training, position_limit
from relora_ray.modeling.model import embedding_rows
from relora_ray.runs.evaluations import FOLDER
from relora_ray.runs.rollback import best_checkpoint_step, checkpoint_step
from relora_ray.runs.run import Trained, export_model, load_trained
from relora_ray.runs.setting import DATA, Setting, find_setting, is_run
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

READ = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of a folder's files that say what its model, its tokenizer and its texts' begin and end are."""


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of these files of a folder, by their names in it and what they hold."""
    digest = sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, and how a text begins and ends for the model."""

    tokenizer: Any
    begin_ids: tuple[int, ...]
    """What stands in front of a text: what the data put there, or the end of the text before."""
    end_id: int | None


class Subject:
    """Its parts are made when they are first asked for, and lie in `scratch`."""

    def __init__(self, place: Storage, scratch: Path, step: int | None, setting: Setting | None) -> None:
        self.place, self.scratch, self.setting = place, scratch, setting
        self._step = step
        self._ready: Path | None = None

    @property
    def name(self) -> str:
        return self.place.url

    @cached_property
    def cfg(self) -> RunConfig | None:
        return self.setting.config() if self.setting is not None else None

    @cached_property
    def manifest(self) -> Manifest | None:
        if self.setting is None:
            return None
        return read_manifest(self.place, checkpoint_step(self.place, self._step))

    @property
    def step(self) -> int | None:
        return self.manifest.step if self.manifest is not None else None

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells this model from all others: the checkpoint's record, or the SHA-256 of the folder's files."""
        if self.manifest is not None:
            return {"checkpoint": self.manifest.path}
        files = (path for path in self.folder.iterdir() if path.suffix in READ)
        return {"folder": digest_of(self.folder, files)[:32]}

    @cached_property
    def trained(self) -> Trained:
        """Of a run. With the structure of its method, as the loop evaluates it."""
        assert self.manifest is not None
        return load_trained(self.place, self.step)

    def causal_model(self, device: torch.device) -> nn.Module:
        """In fp32, for evaluation."""
        if self.setting is not None:
            return self.trained.model.to(device).eval()
        return load_causal(self.folder).to(device)

    @cached_property
    def folder(self) -> Path:
        """A local Hugging Face folder: the run's export, or the folder itself. NotMergeableError, or ConfigError, where
        a method's model has no dense weights."""
        if self.setting is None:
            return self._local_folder()
        trained, out = self.trained, self.scratch / "exported"
        if not trained.cfg.method.exports:
            raise ConfigError(
                f"{self.name} is a run of method.kind={trained.cfg.method.kind}, whose model has no dense weights and "
                f"so no Hugging Face folder: only its loss can be evaluated, by --data."
            )
        dense = trained.method.dense_state_dict(trained.model)
        export_model(self.setting, trained.cfg, trained.model, dense, Storage(str(out)))
        return out

    def _local_folder(self) -> Path:
        if self.place.is_local:
            return Path(self.place.url)
        local = Storage(str(self.scratch / "fetched"))
        for path in self.place.list():
            if "/" not in path and path.endswith((".json", ".safetensors", ".model", ".txt")):
                self.place.copy(path, local, path)
        return Path(local.url)

    @cached_property
    def tokens(self) -> Tokens | None:
        """Of a run, as its data were prepared; of a folder, what lies there, or None."""
        if self.setting is None:
            return _tokens_of_folder(self.folder)
        local = Storage(str(self.scratch / "tokenizer"))
        for path in self.setting.names():
            if path.startswith("tokenizer/"):
                local.put(path.removeprefix("tokenizer/"), self.setting.get(path))
        data = json.loads(self.setting.get(DATA))
        begin = tuple(data.get("begin_token_ids") or (data["end_token_id"],))
        tokenizer = read_tokenizer(Path(local.url))
        return None if tokenizer is None else Tokens(tokenizer, begin, int(data["end_token_id"]))

    @cached_property
    def tokenizer_sha256(self) -> str | None:
        """As the index of a run's data has it; None for a folder."""
        return str(json.loads(self.setting.get(DATA))["tokenizer_sha256"]) if self.setting is not None else None

    def need_tokens(self, what: str) -> Tokens:
        if self.tokens is None:
            raise DataError(
                f"{self.name} has no tokenizer (no tokenizer.json), and {what} needs the one that it was trained with. "
                f"Put its files into the folder."
            )
        rows = self.embedding_rows
        largest = max(self.tokens.tokenizer.get_vocab().values())
        if largest >= rows:
            raise DataError(
                f"the tokenizer of {self.name} has ids up to {largest}, and the model's embedding has {rows} rows: it "
                f"is another model's. Put the right one into the folder."
            )
        return self.tokens

    @cached_property
    def config(self) -> Any:
        """Of transformers."""
        if self.setting is not None:
            return self.trained.model.config
        return _read_config(self.folder)

    @property
    def positions(self) -> int | None:
        return position_limit(self.config.get_text_config(decoder=True))

    @property
    def embedding_rows(self) -> int:
        if self.setting is not None:
            return embedding_rows(self.trained.model)
        return int(self.config.get_text_config(decoder=True).vocab_size)

    def results(self) -> Storage | None:
        """Where what is found out about it is kept; None for a folder, in which nothing of ours belongs."""
        return self.place.child(FOLDER) if self.setting is not None else None


@contextmanager
def open_subject(place: Storage, step: int | None = None, *, best: bool = False) -> Iterator[Subject]:
    """`step`, or the `best`: of a run's checkpoints, by held-out loss; the newest if neither is given. ConfigError if
    it is neither a run nor a Hugging Face folder, CheckpointError if there is no such checkpoint."""
    with tempfile.TemporaryDirectory(prefix="relora-ray-evaluate-") as scratch:
        if is_run(place):
            step = best_checkpoint_step(place) if best else step
            subject = Subject(place, Path(scratch), step, find_setting(place))
            assert subject.manifest is not None  # CheckpointError if there is none
        elif place.exists("config.json"):
            if best or step is not None:
                given = "--best" if best else f"--step={step}"
                raise ConfigError(f"{given} has no effect: {place.url} is a model, not a run. Remove it.")
            subject = Subject(place, Path(scratch), None, None)
            _read_config(subject.folder)
        else:
            raise ConfigError(
                f"{place.url} is neither a run nor a Hugging Face folder: it has no config.json. Give a run's folder "
                f"or URL, or a folder that relora-ray export has written."
            )
        yield subject


def _read_config(folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError and others of transformers
        raise ConfigError(f"{folder}/config.json is not readable: {first_words(error)}") from error


def load_causal(folder: Path) -> Any:
    """The causal language model in a folder, in fp32, for evaluation. ConfigError if there is none, or not all of "
    "it."""
    return _loaded(transformers.AutoModelForCausalLM, folder, new=())


def _loaded(kind: Any, folder: Path, *, new: tuple[str, ...], **settings: Any) -> Any:
    """`new`: beginnings of names of what may be missing there, and is drawn."""
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it tells of what is drawn, which is looked at here
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # a class of transformers raises what it likes
        raise ConfigError(f"{folder} does not load as {kind.__name__}: {first_words(error)}") from error
    finally:
        transformers.utils.logging.set_verbosity(before)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(new or ("\0",))):
        raise ConfigError(
            f"{folder} has no tensor for {missing[0]} ({len(missing)} missing): it would be drawn at random. Give a "
            f"whole checkpoint."
        )
    in_training(model.config)
    return model.eval()


def load_classifier(folder: Path, num_labels: int, pad_id: int) -> Any:
    """The model in a folder under a new head on its last token; `num_labels` of 1 is a regression. ConfigError if its
    architecture has no such class in transformers."""
    config = _read_config(folder)
    config.num_labels = num_labels
    config.get_text_config(decoder=True).pad_token_id = pad_id
    config.pad_token_id = pad_id
    return _loaded(
        transformers.AutoModelForSequenceClassification,
        folder,
        new=("score", "classifier", "classification_head"),
        config=config,
    )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, by its own rules; None if there is none. DataError if it cannot be loaded.

    Not by AutoTokenizer where there is a tokenizer.json: beside the config.json of some architectures that puts rules
    of its own in the place of the file's (see `check_exported_tokenizer`)."""
    has = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    if not has:
        return None
    kind = transformers.PreTrainedTokenizerFast if has[0] == "tokenizer.json" else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    except Exception as error:  # OSError, ValueError, and bare Exception from the Rust side
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {first_words(error)}") from error
    return tokenizer


def _tokens_of_folder(folder: Path) -> Tokens | None:
    """A text begins as the tokenizer itself has it, or else behind what generation_config.json or config.json say."""
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        return None
    text = _read_config(folder).get_text_config(decoder=True)
    end = tokenizer.eos_token_id
    if end is None:
        said = getattr(text, "eos_token_id", None)
        end = said[0] if isinstance(said, list) else said
    begin = template_begin_ids(tokenizer)
    if not begin:
        generation = folder / "generation_config.json"
        said = json.loads(generation.read_text()).get("bos_token_id") if generation.is_file() else None
        said = getattr(text, "bos_token_id", None) if said is None else said
        begin = (int(said),) if isinstance(said, int) else ()
    return Tokens(tokenizer, begin, end)
