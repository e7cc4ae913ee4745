"""A run's place in storage: what it is, the data it reads, and the model its checkpoints hold.

    <storage>/<name>/setup/<term>/   written by the owner of a term as long as there is no checkpoint; the first one
                                     names it, and it stays
        config.yaml                  compared at every start
        data.json, tokenizer/        the index of the data it reads, and its tokenizer
    <storage>/<name>/model/          the finished model as a plain Hugging Face folder

The driver uses this before anything is spent, the loop at the start of an attempt, and export and
`model.init_from` afterwards, when the data may be gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
import yaml
from torch import nn

from relora_ray.checkpoint import (
    History,
    Manifest,
    Setup,
    existing_step,
    list_manifests,
    read_history,
    read_manifest,
    restore_model,
)
from relora_ray.checkpoint.manifest import SetupObject
from relora_ray.checkpoint.ownership import Term
from relora_ray.config import STRUCTURAL, RunConfig, flatten
from relora_ray.config_file import parse_config, to_yaml
from relora_ray.data.tokens import DataIndex, read_index
from relora_ray.errors import CheckpointError, ConfigError, DamagedError, DataError, ReloraError
from relora_ray.methods import Method, build_method
from relora_ray.model import (
    build_model,
    check_causal,
    copy_weights,
    embedding_rows,
    is_hf_folder,
    load_hf_weights,
    save_hf_folder,
)
from relora_ray.reference import is_reference_folder, read_reference
from relora_ray.storage import Options, Storage, add_options_argument, parse_options

logger = logging.getLogger(__name__)

SETUP = "setup"
CONFIG = "config.yaml"
DATA = "data.json"
MODEL = "model"
MAX_SETTING_BYTES = 2**28


def run_storage(cfg: RunConfig) -> Storage:
    return Storage(cfg.storage, cfg.storage_options, retry_s=cfg.storage_retry_s).child(cfg.name)


def data_storage(cfg: RunConfig) -> Storage:
    return Storage(
        cfg.data.path, _options_for(cfg.data.path, cfg, cfg.data.storage_options), retry_s=cfg.storage_retry_s
    )


def _options_for(url: str, cfg: RunConfig, own: Options | None = None) -> Options:
    """`own` options, or else the run's if the URL is of the same kind as its storage."""
    if own is not None:
        return own
    return cfg.storage_options if url.partition("://")[0] == cfg.storage.partition("://")[0] else {}


def open_data(cfg: RunConfig) -> DataIndex:
    """The index of the run's data. DataError if there is none, or not the data that the run began with."""
    index = read_index(data_storage(cfg), expected=bool(cfg.data.fingerprint))
    if cfg.data.fingerprint and index.fingerprint != cfg.data.fingerprint:
        raise DataError(
            f"data.path={cfg.data.path!r} has fingerprint {index.fingerprint}, but the run needs "
            f"{cfg.data.fingerprint}: other text, another tokenizer or another split. Point data.path at the data the "
            f"run began with, or start a run of another name."
        )
    if cfg.model.llama is not None:
        check_vocabulary(cfg.model.llama_vocab_size, index)
    return index


def check_vocabulary(rows: int, index: DataIndex) -> None:
    """DataError if a model with `rows` embedding rows cannot read the data's token ids."""
    if rows < index.vocab_size:
        raise DataError(
            f"model.vocab_size={rows} is less than the {index.vocab_size} token ids of the data's tokenizer. Set "
            f"model.vocab_size={index.vocab_size} or more, or prepare the data with the model's own tokenizer."
        )


def check_run(cfg: RunConfig) -> RunConfig:
    """See that the run's folder is this config's, and return it with the data's fingerprint filled in. Writes nothing.

    Until there is a checkpoint nothing is lost, and a corrected config takes the place of the one before. From
    then on the config must agree in every key that decides the result; ConfigError lists those that differ.
    Operational keys may change.
    """
    storage = run_storage(cfg)
    history = read_history(storage)
    if not history.paths:
        return _with_fingerprint(cfg, open_data(cfg).fingerprint)
    setting = find_setting(storage, history)
    known = setting.config()
    if not cfg.data.fingerprint:
        cfg = _with_fingerprint(cfg, known.data.fingerprint)
    before, now = known.identity(), cfg.identity()
    # Its version trained what these leave out, without a word or in another way: what it did is for its user to say.
    open_to_choice = set(STRUCTURAL) - setting.keys()
    differing = [k for k in sorted((before.keys() | now.keys()) - open_to_choice) if before.get(k) != now.get(k)]
    if differing:
        lines = [f"  {k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differing]
        raise ConfigError(
            f"{storage.url} holds a run of another config. These keys decide the result and must stay as they are:\n"
            + "\n".join(lines)
            + "\nUse the run's own values to continue it, or set another name to start a new run."
        )
    open_data(cfg)
    return cfg


def begin(cfg: RunConfig, term: Term) -> RunConfig:
    """What `check_run` does, by the run's owner; if there is no checkpoint yet, what the run is is written down, in a
    folder of the term, so that nobody writes into another's. The first checkpoint fixes it."""
    cfg, storage = check_run(cfg), run_storage(cfg)
    if not read_history(storage).paths:
        data = data_storage(cfg)  # what an export needs of it is copied, so that a run is whole without it
        write_setting(storage, term, cfg, data.get_expected("index.json"), _all_of(data, "tokenizer"))
    return cfg


def _all_of(storage: Storage, folder: str) -> dict[str, bytes]:
    return {path: storage.get_expected(path) for path in storage.list_surely(folder)}


def write_setting(run: Storage, term: Term, cfg: RunConfig, data_index: bytes, tokenizer: Mapping[str, bytes]) -> None:
    out = run.child(f"{SETUP}/{term.number:04d}-{term.driver}")
    for path, content in {**tokenizer, DATA: data_index, CONFIG: to_yaml(cfg).encode()}.items():
        out.put(path, content)  # the config last: it says that all is there


@dataclass(frozen=True)
class Setting:
    """Where a run says what it is."""

    run: Storage
    folder: str
    """Below the run's; empty for runs of versions that had it at the top."""
    recorded: Setup | None
    """What the newest checkpoint says must be there."""

    def get(self, name: str) -> bytes:
        """CheckpointError if it is not what the checkpoints were made with."""
        data = self.place.get_expected(name, at_most=MAX_SETTING_BYTES)
        for known in self.recorded.objects if self.recorded else ():
            if known.path == name and sha256(data).hexdigest() != known.sha256:
                raise CheckpointError(
                    f"{self.place.url}/{name} is not the one that the run's checkpoints were made with: somebody has "
                    f"changed it. Restore it."
                )
        return data

    def config(self) -> RunConfig:
        return parse_config(self.get(CONFIG).decode(), source=f"{self.place.url}/{CONFIG}")

    def keys(self) -> set[str]:
        """Dotted, of all settings that are written down: all that its version had."""
        return set(flatten(yaml.safe_load(self.get(CONFIG).decode())))

    def names(self) -> list[str]:
        """All that belongs to it."""
        if self.recorded is not None:
            return [known.path for known in self.recorded.objects]
        return [name for name in (CONFIG, DATA) if self.place.exists(name)] + self.place.list_surely("tokenizer")

    def record(self) -> Setup | None:
        """For the first checkpoint to name."""
        if self.recorded is not None or not self.folder:
            return self.recorded
        objects = []
        for name in self.names():
            data = self.get(name)
            objects.append(SetupObject(path=name, size_bytes=len(data), sha256=sha256(data).hexdigest()))
        return Setup(folder=self.folder, objects=tuple(objects))

    @property
    def place(self) -> Storage:
        return self.run.child(self.folder) if self.folder else self.run


def find_setting(storage: Storage, history: History | None = None) -> Setting:
    """What the run's newest checkpoint names, or else what its latest owner wrote down. ConfigError if there is none.

    A path that is local to each machine would give every rank a storage of its own, and a restart on another machine an
    empty one: this finds nothing there.
    """
    head = (history or read_history(storage)).head
    if head is not None and head.setup is not None:
        return Setting(storage, head.setup.folder, head.setup)
    if head is None:
        configs = [path for path in storage.list_surely(SETUP) if path.endswith(f"/{CONFIG}")]
        if configs:
            return Setting(storage, max(configs, key=_term_number).rpartition("/")[0], None)
    if storage.exists(CONFIG):
        return Setting(storage, "", None)
    what = f"holds checkpoints but no {CONFIG}" if head is not None else f"is not a run: it has no {CONFIG}"
    raise ConfigError(
        f"{storage.url}, as seen from {platform.node()}, {what}. Give a run's folder; if this is one on other "
        f"machines, its storage is not the same place on all of them: use a shared file system or object storage."
    )


def _term_number(path: str) -> int:
    number = path.removeprefix(f"{SETUP}/").partition("-")[0]
    return int(number) if number.isdigit() else -1


def is_run(storage: Storage) -> bool:
    try:
        find_setting(storage)
    except ConfigError:
        return False
    return True


def is_finished(cfg: RunConfig, storage: Storage) -> bool:
    """Whether all that a start with this config has to do is done and stored."""
    stored = max(list_manifests(storage), default=-1)
    return stored >= cfg.last_step and (stored < cfg.steps or storage.exists(f"{MODEL}/config.json"))


def read_config(storage: Storage) -> RunConfig:
    """Of the run in this folder. ConfigError if there is none."""
    return find_setting(storage).config()


def new_model(cfg: RunConfig) -> nn.Module:
    """The model a run starts from: a keyed random one, or the weights of `model.init_from`. fp32, on the CPU."""
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed)
    check_vocabulary(embedding_rows(model), open_data(cfg))
    if cfg.model.huggingface:
        check_causal(model)
    source = cfg.model.init_from
    if not source:
        return model
    reference, _, step = source.partition("@")
    if is_reference_folder(reference):
        copy_weights(model, read_reference(reference), f"model.init_from={source!r}")
    elif "://" not in reference and is_hf_folder(reference):
        load_hf_weights(model, reference)
    elif is_run(run := Storage(reference, _options_for(reference, cfg))):
        trained = load_trained(run, int(step) if step else None)
        copy_weights(model, trained.method.dense_state_dict(trained.model), f"model.init_from={source!r}")
    else:
        load_hf_weights(model, source)
    return model


@dataclass(frozen=True)
class Trained:
    storage: Storage
    cfg: RunConfig
    method: Method
    model: nn.Module
    """With the method's structure, such as adapters."""
    manifest: Manifest


def print_about(command: str, summary: str, text: Callable[[Storage], str]) -> None:
    """The main function of a command that is given a run and prints `text` of it."""
    parser = argparse.ArgumentParser(prog=f"python -m relora_ray.{command}", description=summary, allow_abbrev=False)
    parser.add_argument("run", help="the run's folder or URL")
    add_options_argument(parser)
    args = parser.parse_args()
    try:
        print(text(Storage(args.run, parse_options(args.storage_option))))
    except ReloraError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def load_trained(storage: Storage, step: int | None = None) -> Trained:
    """The model of a run's newest checkpoint, or of the one at `step`. CheckpointError if it is not there.

    The run may be training: if it removes the checkpoint meanwhile, the next newest is taken.
    """
    cfg = read_config(storage)
    while True:
        manifest = read_manifest(storage, existing_step(storage, step))
        try:
            return _load(storage, cfg, manifest)
        except DamagedError:
            if manifest.path in read_history(storage).standing:
                raise
            logger.warning("%s was removed by the run's own retention while it was read", manifest.path)


def _load(storage: Storage, cfg: RunConfig, manifest: Manifest) -> Trained:
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed)
    method.adapt(model, manifest.step)
    restore_model(storage, manifest, model, method.frozen_names(model))
    return Trained(storage, cfg, method, model.eval(), manifest)


def export_model(
    setting: Setting,
    cfg: RunConfig,
    dense: dict[str, torch.Tensor],
    out: Storage,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a plain Hugging Face folder: merged weights, config, tokenizer. Needs the run only, not its data."""
    data = json.loads(setting.get(DATA))
    begin = data.get("begin_token_ids") or [None]  # several, such as GLM's two: the last stands before the text
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        save_hf_folder(
            cfg.model,
            {name: t.to(dtype) for name, t in dense.items()},
            folder,
            seq_len=cfg.data.seq_len,
            end_token_id=data["end_token_id"],
            begin_token_id=begin[-1],
        )
        for path in setting.names():
            if path.startswith("tokenizer/"):
                out.put(path.removeprefix("tokenizer/"), setting.get(path))
        local = Storage(folder)
        for path in sorted(local.list(), key=lambda path: path == "config.json"):  # last: it says that all is there
            out.put(path, local.get(path))


def _with_fingerprint(cfg: RunConfig, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"fingerprint": fingerprint})})
