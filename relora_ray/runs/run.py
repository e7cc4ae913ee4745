"""The model of a run: as it is built, as its checkpoints hold it, and as it is exported.

The driver uses this before anything is spent, the loop at the start of an attempt, and export and
`model.init_from` afterwards, when the data may be gone.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from relora_ray.checkpoint import (
    Manifest,
    read_history,
    read_manifest,
)
from relora_ray.config import RunConfig, split_step
from relora_ray.data.tokens import DataIndex
from relora_ray.errors import ConfigError, DamagedError
from relora_ray.methods.base import Method, build_method
from relora_ray.modeling.architecture import (
    Architecture,
    hf_config,
    is_there,
    position_limit,
    read_hf_config,
)
from relora_ray.modeling.hf_export import (
    check_exported_tokenizer,
    export_config,
    load_exported_tokenizer,
    write_hf_folder,
)
from relora_ray.modeling.model import build_model, check_causal, embedding_rows
from relora_ray.modeling.reference import is_reference_folder, read_reference
from relora_ray.modeling.small import pad_moves_others
from relora_ray.modeling.weights import (
    check_function,
    check_shapes,
    check_tied_values,
    check_ties,
    check_weights,
    copy_weights,
    is_hf_folder,
    load_weights,
    tied_names,
)
from relora_ray.runs.places import data_storage, options_for
from relora_ray.runs.rollback import checkpoint_step
from relora_ray.runs.setting import (
    DATA,
    Setting,
    check_vocabulary,
    find_architecture,
    find_setting,
    is_run,
    open_data,
)
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

CARD = "README.md"


def bare_model(cfg: RunConfig, *, device: str = "cpu") -> nn.Module:
    """The run's model without what its method adds, as drawn from the seed."""
    return build_model(
        cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed, device=device, architecture=find_architecture(cfg)
    )


def new_model(cfg: RunConfig) -> nn.Module:
    """The model a run starts from: a keyed random one, or the weights of `model.init_from`. fp32, on the CPU."""
    model = bare_model(cfg)
    check_embedding(cfg, model)
    if cfg.model.huggingface:
        check_causal(model)
    if source := cfg.model.init_from:
        place, step, kind = _init_from(cfg)
        what = f"model.init_from={source!r}"
        if kind == "reference":
            copy_weights(model, read_reference(place), what)
        elif kind == "run":
            trained = load_trained(Storage(place, options_for(place, cfg)), step)
            copy_weights(model, trained.method.dense_state_dict(trained.model), what)
        else:
            load_weights(model, place)
        _check_function(cfg, model)
    return model


def check_init_from(cfg: RunConfig, shell: nn.Module) -> None:
    """See that the weights of `model.init_from` are those of `shell`, the run's model on the meta device, as far as
    names, shapes, settings and the headers of files tell. ConfigError if not, CheckpointError if a run has none."""
    if not cfg.model.init_from:
        return
    (place, step, kind), what = _init_from(cfg), f"model.init_from={cfg.model.init_from!r}"
    if kind == "reference":
        check_shapes(shell.state_dict(), read_reference(place, device="meta"), what)
        if tied_names(shell):
            check_tied_values(shell, read_reference(place), what)
    elif kind == "run":
        setting = find_setting(Storage(place, options_for(place, cfg)))
        checkpoint_step(setting.run, step)
        theirs = setting.config()
        if not theirs.method.exports:
            raise ConfigError(
                f"{what} is a run of method.kind={theirs.method.kind}, whose model has no dense weights: nothing can "
                f"be taken over. Give a run of another method, or a Hugging Face folder."
            )
        other = build_model(
            theirs.model, seq_len=theirs.data.seq_len, seed=0, device="meta", architecture=setting.architecture()
        )
        check_shapes(shell.state_dict(), other.state_dict(), what)
        check_ties(shell, other, what)
    else:
        check_weights(shell, place)
    _check_function(cfg, shell)


def _check_function(cfg: RunConfig, model: nn.Module) -> None:
    """Of a run and a published checkpoint, what `weights.py` does for other folders: see `weights.check_function`."""
    (place, _, kind), what = _init_from(cfg), f"model.init_from={cfg.model.init_from!r}"
    if kind == "run":
        setting = find_setting(Storage(place, options_for(place, cfg)))
        theirs = setting.config()
        check_function(hf_config(theirs.model, theirs.data.seq_len, setting.architecture()), model.config, what)
    elif kind == "reference" and is_hf_folder(place):
        check_function(read_hf_config(place, what), model.config, what)


def _init_from(cfg: RunConfig) -> tuple[str, int | None, Literal["reference", "run", "folder"]]:
    """Place, step and kind of `model.init_from`. A place that is called like RUN@STEP is itself."""
    source = cfg.model.init_from
    place, step = split_step(source)
    if step is not None and _is_place(cfg, source):
        place, step = source, None
    local = "://" not in place
    if local and is_reference_folder(place):
        return place, None, "reference"
    if not (local and is_hf_folder(place)) and is_run(Storage(place, options_for(place, cfg))):
        return place, step, "run"
    return (source if step is not None else place), None, "folder"


def _is_place(cfg: RunConfig, place: str) -> bool:
    return is_there(place) if "://" not in place else is_run(Storage(place, options_for(place, cfg)))


def check_embedding(cfg: RunConfig, model: nn.Module) -> None:
    """DataError if the model cannot read the data's token ids, ConfigError if it has not the rows asked for."""
    rows = embedding_rows(model)
    if cfg.model.vocab_size not in (None, rows):
        raise ConfigError(
            f"model.vocab_size={cfg.model.vocab_size} has no effect on {type(model).__name__}, whose embedding has "
            f"{rows} rows. Leave it out, or change the vocabulary in the config.json itself."
        )
    check_vocabulary(rows, open_data(cfg))
    _check_positions(cfg, model)


def _check_positions(cfg: RunConfig, model: nn.Module) -> None:
    """ConfigError if rows are longer than a table of positions that begin behind pad_token_id, as RoBERTa's do."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():  # type: ignore[operator]
            pad = module.padding_idx
            if pad is not None and module.num_embeddings == position_limit(model.config):
                usable = module.num_embeddings - pad - 1
                if cfg.data.seq_len > usable:
                    raise ConfigError(
                        f"data.seq_len={cfg.data.seq_len} is more than the {usable} positions that "
                        f"{type(model).__name__} has behind pad_token_id={pad}. Use data.seq_len={usable} or less."
                    )


@dataclass(frozen=True)
class Trained:
    storage: Storage
    cfg: RunConfig
    method: Method
    model: nn.Module
    """With the method's structure, such as adapters."""
    manifest: Manifest
    architecture: Architecture | None
    """As the run has stored it, see `find_architecture`."""


def load_trained(storage: Storage, step: int | None = None) -> Trained:
    """The model of a run's newest checkpoint, or of the one at `step`. CheckpointError if it is not there.

    The run may be training: if it removes the checkpoint meanwhile, the next newest is taken.
    """
    setting = find_setting(storage)
    while True:
        manifest = read_manifest(storage, checkpoint_step(storage, step))
        try:
            return _load(setting, manifest)
        except DamagedError:
            if manifest.path in read_history(storage).standing:
                raise
            logger.warning("%s was removed by the run's own retention while it was read", manifest.path)


def _load(setting: Setting, manifest: Manifest) -> Trained:
    from relora_ray.checkpoint import restore_model  # a second of imports, and a driver restores nothing

    cfg, architecture = setting.config(), setting.architecture()
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed, architecture=architecture)
    method.adapt(model, manifest.step)
    restore_model(setting.run, manifest, model, method.frozen_names(model))
    method.refresh(model)
    return Trained(setting.run, cfg, method, model.eval(), manifest, architecture)


def export_model(
    setting: Setting,
    cfg: RunConfig,
    model: nn.Module,
    dense: dict[str, torch.Tensor],
    out: Storage,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    card: str = "",
) -> None:
    """Write a plain Hugging Face folder: merged weights, config, tokenizer. Needs the run only, not its data.
    `model`: what was trained, with its method's structure, whose dense weights are `dense`. `card`: of the model.
    ExportError if the folder does not load as that; then nothing is written to `out`."""
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        write_model(setting, cfg, model, dense, folder, dtype=dtype, max_shard_size=max_shard_size, card=card)
        store_folder(folder, out, last=("config.json",))


def write_model(
    setting: Setting,
    cfg: RunConfig,
    model: nn.Module,
    dense: dict[str, torch.Tensor],
    folder: str,
    *,
    dtype: torch.dtype,
    max_shard_size: str | None,
    card: str,
) -> None:
    """What `export_model` writes, into a folder on this machine."""
    local = Storage(folder)
    for path in setting.names():
        if path.startswith("tokenizer/"):
            local.put(path.removeprefix("tokenizer/"), setting.get(path))
    data = json.loads(setting.get(DATA))
    end, begin = data["end_token_id"], data.get("begin_token_ids")
    config = _export_config(cfg, setting.architecture(), folder, end, begin)
    # A text with nothing in front begins behind the end of the one before, as it did in training.
    generation_begins = begin[-1] if begin else end
    write_hf_folder(
        model, dense, config, folder, dtype=dtype, begin_token_id=generation_begins, max_shard_size=max_shard_size
    )
    if card:
        local.put(CARD, card.encode())


def store_folder(folder: str, out: Storage, *, last: Sequence[str]) -> None:
    """Put all files of a folder. `last`: those that say that all is there."""
    for path in sorted(Storage(folder).list(), key=lambda path: last.index(path) if path in last else -1):
        out.put_file(path, os.path.join(folder, path))


def check_export(cfg: RunConfig) -> None:
    """See, before anything is trained, that config and tokenizer can be exported as `export_model` will."""
    data, index = data_storage(cfg), open_data(cfg)
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        local = Storage(folder)
        for path in data.list("tokenizer"):
            local.put(path.removeprefix("tokenizer/"), data.get(path))
        tokenizer = load_exported_tokenizer(folder)
        architecture = find_architecture(cfg)
        _check_padding(hf_config(cfg.model, cfg.data.seq_len, architecture), index, tokenizer)
        config = _export_config(cfg, architecture, folder, index.end_token_id, index.begin_token_ids)
        config.save_pretrained(folder)
        check_exported_tokenizer(folder, tokenizer)


def _check_padding(config: Any, index: DataIndex, tokenizer: Any) -> None:
    """ConfigError if a token of the data is what the architecture counts positions past, as RoBERTa does: wherever it
    stands, all that follow would have other positions."""
    pad = getattr(config.get_text_config(decoder=True), "pad_token_id", None)
    if pad is None or pad >= index.vocab_size or getattr(tokenizer, "pad_token_id", None) == pad:
        return
    if pad_moves_others(config):
        what = "" if tokenizer is None else f" ({tokenizer.decode([pad])!r})"
        raise ConfigError(
            f"the architecture counts positions past its pad_token_id, {pad}, which is a token of the data{what}: "
            f"wherever it stands, the positions of all others move. Prepare the data with a tokenizer whose padding "
            f"has that id, as the architecture's own, or take another architecture."
        )


def _export_config(
    cfg: RunConfig, architecture: Architecture | None, folder: str, end_token_id: int, begin: Sequence[int] | None
) -> Any:
    """`begin`: ids in front of every document of the data; of several, such as GLM's two, the last counts."""
    return export_config(
        hf_config(cfg.model, cfg.data.seq_len, architecture),
        load_exported_tokenizer(folder),
        end_token_id=end_token_id,
        begin_token_id=begin[-1] if begin else None,
        own_ids=cfg.model.llama is None,
    )
