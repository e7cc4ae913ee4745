"""A run's place in storage: what it is, the data it reads, and the model its checkpoints hold.

    <storage>/<name>/setup/<term>/   written by the owner of a term as long as there is no checkpoint; the first one
                                     names it, and it stays
        config.yaml                  compared at every start
        architecture.json            the content of the config.json that `model.huggingface` named, if it did
        data.json, tokenizer/        the index of the data it reads, and its tokenizer
    <storage>/<name>/model/          the finished model as a plain Hugging Face folder

The driver uses this before anything is spent, the loop at the start of an attempt, and export and
`model.init_from` afterwards, when the data may be gone.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import torch
import yaml
from torch import nn

from relora_ray.architecture import (
    Architecture,
    hf_config,
    is_same_place,
    is_there,
    position_limit,
    read_architecture,
    read_hf_config,
)
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
from relora_ray.config import STRUCTURAL, RunConfig, flatten, split_step
from relora_ray.config_file import parse_config, to_yaml
from relora_ray.data.tokens import DataIndex, read_index
from relora_ray.errors import CheckpointError, ConfigError, DamagedError, DataError
from relora_ray.hf_export import check_exported_tokenizer, export_config, load_exported_tokenizer, write_hf_folder
from relora_ray.methods import Method, build_method
from relora_ray.model import build_model, check_causal, embedding_rows
from relora_ray.places import data_storage, options_for, run_storage
from relora_ray.reference import is_reference_folder, read_reference
from relora_ray.storage import Storage
from relora_ray.weights import (
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

logger = logging.getLogger(__name__)

SETUP = "setup"
CONFIG = "config.yaml"
ARCHITECTURE = "architecture.json"
DATA = "data.json"
MODEL = "model"
COPYING = "copying.json"
"""In a folder to which `checkpoints copy` is yet to copy the rest. It is no run."""
MAX_SETTING_BYTES = 2**28


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


def check_run(cfg: RunConfig, *, parent: Setting | None = None) -> RunConfig:
    """See that the run's folder is this config's, and return it with the fingerprints of data and architecture filled
    in. Writes nothing.

    Until there is a checkpoint nothing is lost, and a corrected config takes the place of the one before. From
    then on the config must agree in every key that decides the result; ConfigError lists those that differ.
    Operational keys may change. `parent`: of a run that is yet to begin as a fork.
    """
    storage = run_storage(cfg)
    history = read_history(storage)
    if not history.paths:
        if storage.exists(COPYING):
            raise ConfigError(
                f"{storage.url} is a copy that was not finished. Copy again, to the same place, or remove it with "
                f"python -m relora_ray.checkpoints delete."
            )
        refuse_inside_run(storage)
        cfg = _with_fingerprint(cfg, open_data(cfg).fingerprint)
        return _with_architecture(cfg, parent)
    setting = find_setting(storage, history)
    known = setting.config()
    if not cfg.data.fingerprint:
        cfg = _with_fingerprint(cfg, known.data.fingerprint)
    if cfg.model.huggingface and known.model.huggingface:
        cfg = _with_architecture(cfg, setting)
    before, now = ({key: [] for key in STRUCTURAL} | c.identity() for c in (known, cfg))
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


def refuse_inside_run(storage: Storage) -> None:
    """ConfigError if the folder lies in a run's: it would go with it."""
    outer, _, name = storage.url.rpartition("/")
    if outer and not outer.endswith("/") and is_run(storage.parent()):
        raise ConfigError(
            f"{storage.url} would lie inside a run, {outer}, and be deleted with it. Give a folder beside it, such as "
            f"{outer.rpartition('/')[0]}/{name}."
        )


def _with_architecture(cfg: RunConfig, known: Setting | None) -> RunConfig:
    """With the fingerprint of what `model.huggingface` names; of a run that has begun, or the parent of a fork, `known`
    says it. ConfigError if what is there now is something else."""
    place, given = cfg.model.huggingface, cfg.model.fingerprint
    if not place:
        return cfg
    stored = known.architecture() if known is not None else None
    if known is not None and stored is None:  # of a version that went by the place
        return _with_model(cfg, fingerprint="")
    if known is None or stored is None:
        found = read_architecture(place).fingerprint
        if given and given != found:
            raise ConfigError(
                f"model.huggingface={place!r} has fingerprint {found}, but the run needs {given}: another "
                f"architecture, or an edited config.json. Give the one that it began with, or remove "
                f"model.fingerprint for this one."
            )
        return _with_model(cfg, fingerprint=found)
    theirs = known.config().model
    if not is_same_place(place, theirs.huggingface) or is_there(place):
        differing = stored.differences(read_architecture(place))
        if differing:
            raise ConfigError(
                f"model.huggingface={place!r} is not the architecture that {known.run.url} began with:\n"
                + "".join(f"  {line}\n" for line in differing)
                + f"Restore its config.json (the run's own is {known.place.url}/{ARCHITECTURE}), or set another name "
                f"to start a new run."
            )
    return _with_model(cfg, fingerprint=theirs.fingerprint)


def find_architecture(cfg: RunConfig) -> Architecture | None:
    """What the run is to be built by: as it has stored it, or, before it begins, as `model.huggingface` has it. None
    for LLaMA sizes, and for runs of versions that went by the place. ConfigError if it is not what `cfg` expects."""
    wanted = cfg.model.fingerprint
    if not wanted:
        return None
    storage = run_storage(cfg)
    if is_run(storage):
        setting = find_setting(storage)
        if setting.config().model.fingerprint == wanted and (stored := setting.architecture()) is not None:
            return stored
    found = read_architecture(cfg.model.huggingface)
    if found.fingerprint != wanted:
        raise ConfigError(
            f"model.huggingface={cfg.model.huggingface!r} has fingerprint {found.fingerprint}, but the run needs "
            f"{wanted}: its config.json was edited meanwhile. Start again."
        )
    return found


def begin(cfg: RunConfig, term: Term, *, parent: Setting | None = None) -> RunConfig:
    """What `check_run` does, by the run's owner; if there is no checkpoint yet, what the run is is written down, in a
    folder of the term, so that nobody writes into another's. The first checkpoint fixes it."""
    cfg, storage = check_run(cfg, parent=parent), run_storage(cfg)
    if not read_history(storage).paths:
        forked = parent is not None and cfg.model.fingerprint
        architecture = parent.architecture() if parent is not None and forked else find_architecture(cfg)
        data = data_storage(cfg)  # what an export needs of it is copied, so that a run is whole without it
        write_setting(storage, term, cfg, data.get_expected("index.json"), _all_of(data, "tokenizer"), architecture)
    return cfg


def _all_of(storage: Storage, folder: str) -> dict[str, bytes]:
    return {path: storage.get_expected(path) for path in storage.list_surely(folder)}


def write_setting(
    run: Storage,
    term: Term,
    cfg: RunConfig,
    data_index: bytes,
    tokenizer: Mapping[str, bytes],
    architecture: Architecture | None,
) -> None:
    out = run.child(f"{SETUP}/{term.number:04d}-{term.driver}")
    own = {} if architecture is None else {ARCHITECTURE: architecture.to_json()}
    for path, content in {**tokenizer, **own, DATA: data_index, CONFIG: to_yaml(cfg).encode()}.items():
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

    def architecture(self) -> Architecture | None:
        """None for LLaMA sizes, and for runs of versions that went by the place of `model.huggingface`."""
        fingerprint, source = self.config().model.fingerprint, f"{self.place.url}/{ARCHITECTURE}"
        if not fingerprint:
            return None
        stored = Architecture.from_json(self.get(ARCHITECTURE), source)
        if stored.fingerprint != fingerprint:
            raise CheckpointError(f"{source} is not what {CONFIG} beside it says: somebody has changed it. Restore it.")
        return stored

    def names(self) -> list[str]:
        """All that belongs to it."""
        if self.recorded is not None:
            return [known.path for known in self.recorded.objects]
        there = [name for name in (CONFIG, ARCHITECTURE, DATA) if self.place.exists(name)]
        return there + self.place.list_surely("tokenizer")

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


def as_begun(cfg: RunConfig, setting: Setting) -> RunConfig:
    """With the architecture that the run began with."""
    return _with_model(cfg, fingerprint=setting.config().model.fingerprint)


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
        existing_step(setting.run, step)
        theirs = setting.config()
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
        manifest = read_manifest(storage, existing_step(storage, step))
        try:
            return _load(setting, manifest)
        except DamagedError:
            if manifest.path in read_history(storage).standing:
                raise
            logger.warning("%s was removed by the run's own retention while it was read", manifest.path)


def _load(setting: Setting, manifest: Manifest) -> Trained:
    cfg, architecture = setting.config(), setting.architecture()
    method = build_method(cfg)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, seed=cfg.seed, architecture=architecture)
    method.adapt(model, manifest.step)
    restore_model(setting.run, manifest, model, method.frozen_names(model))
    return Trained(setting.run, cfg, method, model.eval(), manifest, architecture)


def export_model(
    setting: Setting,
    cfg: RunConfig,
    model: nn.Module,
    dense: dict[str, torch.Tensor],
    out: Storage,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a plain Hugging Face folder: merged weights, config, tokenizer. Needs the run only, not its data.
    `model`: what was trained, with its method's structure, whose dense weights are `dense`. ExportError if the folder
    does not load as that; then nothing is written to `out`."""
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        local = Storage(folder)
        for path in setting.names():
            if path.startswith("tokenizer/"):
                local.put(path.removeprefix("tokenizer/"), setting.get(path))
        data = json.loads(setting.get(DATA))
        end, begin = data["end_token_id"], data.get("begin_token_ids")
        config = _export_config(cfg, setting.architecture(), folder, end, begin)
        # A text with nothing in front begins behind the end of the one before, as it did in training.
        write_hf_folder(model, dense, config, folder, dtype=dtype, begin_token_id=begin[-1] if begin else end)
        for path in sorted(local.list(), key=lambda path: path == "config.json"):  # last: it says that all is there
            out.put(path, local.get(path))


def check_export(cfg: RunConfig) -> None:
    """See, before anything is trained, that config and tokenizer can be exported as `export_model` will."""
    data, index = data_storage(cfg), open_data(cfg)
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        local = Storage(folder)
        for path in data.list("tokenizer"):
            local.put(path.removeprefix("tokenizer/"), data.get(path))
        tokenizer = load_exported_tokenizer(folder)
        config = _export_config(cfg, find_architecture(cfg), folder, index.end_token_id, index.begin_token_ids)
        config.save_pretrained(folder)
        check_exported_tokenizer(folder, tokenizer)


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


def _with_fingerprint(cfg: RunConfig, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"fingerprint": fingerprint})})


def _with_model(cfg: RunConfig, *, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"fingerprint": fingerprint})})
