"""A run's place in storage: what it is, the data it reads, and the model its checkpoints hold.

    <storage>/<name>/config.yaml     fixed by the first checkpoint, compared at every start
    <storage>/<name>/data.json       the index of the data it reads, and beside it the tokenizer
    <storage>/<name>/model/          the finished model as a plain Hugging Face folder

The driver uses this before anything is spent, the loop at the start of an attempt, and export and
`model.init_from` afterwards, when the data may be gone.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from relora_ray.checkpoint import Manifest, existing_step, list_manifests, read_manifest, restore_model
from relora_ray.config import RunConfig
from relora_ray.config_file import parse_config, to_yaml
from relora_ray.data.tokens import DataIndex, read_index
from relora_ray.errors import ConfigError, DataError, ReloraError, StorageError
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

CONFIG = "config.yaml"
DATA = "data.json"
MODEL = "model"
FORK = "fork.json"
"""Of a fork: from which run, and after which step."""


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
    index = read_index(data_storage(cfg))
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


def claim(cfg: RunConfig, *, dry_run: bool = False) -> RunConfig:
    """Tie the run's folder to this config, and return it with the data's fingerprint filled in.

    Until there is a checkpoint nothing is lost, and a corrected config takes the place of the one before. From
    then on the config must agree in every key that decides the result; ConfigError lists those that differ.
    Operational keys may change. `dry_run`: compare, and write nothing.
    """
    storage = run_storage(cfg)
    if not list_manifests(storage):
        cfg = _with_fingerprint(cfg, open_data(cfg).fingerprint)
        if not dry_run:
            _copy_tokenizer(cfg, storage)
            storage.put(CONFIG, to_yaml(cfg).encode())
        return cfg
    if not storage.exists(CONFIG):
        raise ConfigError(
            f"{storage.url} holds checkpoints but no {CONFIG}: it is not clear what they are. Restore it."
        )
    known = read_config(storage)
    if not cfg.data.fingerprint:
        cfg = _with_fingerprint(cfg, known.data.fingerprint)
    before, now = known.identity(), cfg.identity()
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if differing:
        lines = [f"  {k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differing]
        raise ConfigError(
            f"{storage.url} holds a run of another config. These keys decide the result and must stay as they are:\n"
            + "\n".join(lines)
            + "\nUse the run's own values to continue it, or set another name to start a new run."
        )
    open_data(cfg)
    return cfg


def _copy_tokenizer(cfg: RunConfig, run: Storage) -> None:
    """What an export needs of the data, so that a run is whole without it."""
    data = data_storage(cfg)
    files = data.list("tokenizer")
    for path in set(run.list("tokenizer")) - set(files):  # of a first config that was corrected
        run.delete(path)
    for path in files:  # put over what is there: others may claim the same run at this moment
        run.put(path, data.get(path))
    run.put(DATA, data.get("index.json"))


def is_finished(cfg: RunConfig, storage: Storage) -> bool:
    """Whether all that a start with this config has to do is done and stored."""
    stored = max(list_manifests(storage), default=-1)
    return stored >= cfg.last_step and (stored < cfg.steps or storage.exists(f"{MODEL}/config.json"))


def check_visible(cfg: RunConfig) -> None:
    """See that this process finds the run in storage (every rank, at the start of an attempt).

    A path that is local to each machine would give every rank a storage of its own, and a restart on another
    machine an empty one. ConfigError then.
    """
    storage = run_storage(cfg)
    if not storage.exists(CONFIG):
        raise ConfigError(
            f"{storage.url} has no {CONFIG} as seen from {platform.node()}: storage={cfg.storage!r} is not the same "
            f"place on all machines. Use a shared file system or object storage."
        )


def read_config(storage: Storage) -> RunConfig:
    try:
        text = storage.get(CONFIG).decode()
    except StorageError as error:
        raise ConfigError(f"{storage.url} is not a run: {error} Give the folder that holds {CONFIG}.") from error
    return parse_config(text, source=f"{storage.url}/{CONFIG}")


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
    elif (run := Storage(reference, _options_for(reference, cfg))).exists(CONFIG):
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
    """The model of a run's newest checkpoint, or of the one at `step`. CheckpointError if it is not there."""
    cfg = read_config(storage)
    manifest = read_manifest(storage, existing_step(storage, step))
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed)
    method.adapt(model, manifest.step)
    restore_model(storage, manifest, model, method.frozen_names(model))
    return Trained(storage, cfg, method, model.eval(), manifest)


def export_model(
    run: Storage, cfg: RunConfig, dense: dict[str, torch.Tensor], out: Storage, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a plain Hugging Face folder: merged weights, config, tokenizer. Needs the run only, not its data."""
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        save_hf_folder(
            cfg.model,
            {name: t.to(dtype) for name, t in dense.items()},
            folder,
            seq_len=cfg.data.seq_len,
            end_token_id=json.loads(run.get(DATA))["end_token_id"],
        )
        for path in run.list("tokenizer"):
            out.put(path.removeprefix("tokenizer/"), run.get(path))
        local = Storage(folder)
        for path in sorted(local.list(), key=lambda path: path == "config.json"):  # last: it says that all is there
            out.put(path, local.get(path))


def _with_fingerprint(cfg: RunConfig, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"fingerprint": fingerprint})})
