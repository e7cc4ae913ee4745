"""A run's place in storage: what it is, and the data it reads.

    <storage>/<name>/setup/<term>/   written by the owner of a term as long as there is no checkpoint; the first one
                                     names it, and it stays
        config.yaml                  compared at every start
        architecture.json            the content of the config.json that `model.huggingface` named, if it did
        data.json, tokenizer/        the index of the data it reads, and its tokenizer
    <storage>/<name>/model/          the finished model as a plain Hugging Face folder

Torch is not imported here: commands that only look at runs, and a driver, need not wait for it. An architecture of
transformers' is another matter.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import yaml

from relora_ray.checkpoint import History, Setup, list_manifests, read_history
from relora_ray.checkpoint.manifest import SetupObject
from relora_ray.checkpoint.ownership import Term
from relora_ray.config import STRUCTURAL, RunConfig, flatten, split_step
from relora_ray.config.file import parse_config, to_yaml
from relora_ray.config.section import Mapping_
from relora_ray.data.tokens import DataIndex, read_index
from relora_ray.errors import CheckpointError, ConfigError, DataError
from relora_ray.runs.metrics import METRICS
from relora_ray.runs.places import data_storage, options_for, run_storage, validation_storage
from relora_ray.storage import Storage

if TYPE_CHECKING:
    from relora_ray.modeling.architecture import Architecture

SETUP = "setup"
CONFIG = "config.yaml"
ARCHITECTURE = "architecture.json"
DATA = "data.json"
MODEL = "model"
BASE = "base"
ADAPTER = "adapter"
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


def open_validation(cfg: RunConfig) -> dict[str, DataIndex]:
    """The indexes of the sets of `data.validation`, by name. DataError if one is not there, is not what it was under
    this name, or has other tokens than the run's data."""
    sets = {name: read_index(validation_storage(cfg, name)) for name in cfg.data.validation}
    tokenizer = open_data(cfg).tokenizer_sha256 if sets else ""
    for name, index in sets.items():
        what = f"data.validation.{name}={cfg.data.validation[name]!r}"
        expected = cfg.data.validation_fingerprints.get(name)
        if expected and index.fingerprint != expected:
            raise DataError(
                f"{what} has fingerprint {index.fingerprint}, but the run knows {expected} by this name: its losses "
                f"would be of two texts. Give the text of today another name, or point the name at the text of before."
            )
        if index.tokenizer_sha256 != tokenizer:
            raise DataError(
                f"{what} was prepared with another tokenizer than data.path={cfg.data.path!r}: its ids stand for other "
                f"tokens. Prepare it with {cfg.data.path}/tokenizer."
            )
    return sets


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
        _refuse_remains(storage)
        refuse_inside_run(storage)
        cfg = _with_validation(_with_fingerprint(cfg, open_data(cfg).fingerprint), {})
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
            + (_how_to_go_on_longer(known, cfg, storage) if "steps" in differing else "")
        )
    open_data(cfg)
    return _with_validation(cfg, known.data.validation_fingerprints)


def _how_to_go_on_longer(known: RunConfig, cfg: RunConfig, storage: Storage) -> str:
    if cfg.steps < known.steps:
        return f" To end it early, keep steps={known.steps} and set train.stop_after_steps={cfg.steps}."
    return (
        f"\nTo train longer than the {known.steps} updates that were planned: the schedule of the learning rate is "
        f"planned over all of them, so that a longer run is another one. Either train on from the weights that this "
        f"one comes to, with a warm-up and a decay of their own: name={cfg.name}-2 model.init_from={storage.url} "
        f"steps={cfg.steps - known.steps}. Or begin anew with steps={cfg.steps}; with train.stop_after_steps="
        f"{known.steps} besides, it ends there and can go on."
    )


def _refuse_remains(storage: Storage) -> None:
    """A driver whose folder is moved away goes on to write where it was: what is there then looks like a new run's."""
    if storage.list(METRICS) and not is_run(storage):
        raise ConfigError(
            f"{storage.url} holds metrics of a run, but neither what the run is nor a checkpoint. If its folder was "
            f"moved or removed while it trained, put that back here; the checkpoints are in it. To begin anew, remove "
            f"{storage.url}, or set another name."
        )


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
    from relora_ray.modeling.architecture import is_same_place, is_there, read_architecture

    stored = known.architecture() if known is not None else None
    if known is not None and stored is None:  # of a version that went by the place
        return _with_model(cfg, fingerprint="")
    if known is None or stored is None:
        if place == cfg.model.init_from and _is_run_folder(cfg, place):
            raise ConfigError(
                f"model.init_from={place!r} is a run's folder, which says no architecture as a Hugging Face folder "
                f"does. Repeat its section model beside it, or give its export, {split_step(place)[0]}/{MODEL}."
            )
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


def _is_run_folder(cfg: RunConfig, place: str) -> bool:
    if os.path.exists(os.path.join(place, "config.json")):
        return False
    folders = [place] if "://" in place or os.path.isdir(place) else []
    folders += [split_step(place)[0]] if split_step(place)[1] is not None else []
    return any(is_run(Storage(folder, options_for(folder, cfg))) for folder in folders)


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
    from relora_ray.modeling.architecture import read_architecture

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

    def data_index(self) -> DataIndex:
        """Of the data as it was when the run began. CheckpointError if it is none."""
        try:
            raw = json.loads(self.get(DATA))
            return DataIndex.model_validate({key: raw[key] for key in raw if key != "fingerprint"})
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.place.url}/{DATA} is no index of data: somebody has changed it. Restore it."
            ) from error

    def keys(self) -> set[str]:
        """Dotted, of all settings that are written down: all that its version had."""
        return set(flatten(yaml.safe_load(self.get(CONFIG).decode())))

    def architecture(self) -> Architecture | None:
        """None for LLaMA sizes, and for runs of versions that went by the place of `model.huggingface`."""
        fingerprint, source = self.config().model.fingerprint, f"{self.place.url}/{ARCHITECTURE}"
        if not fingerprint:
            return None
        from relora_ray.modeling.architecture import Architecture

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
    if storage.is_local and not os.path.isdir(storage.url):  # nothing there, or a file beside runs
        return False
    try:
        find_setting(storage)
    except ConfigError:
        return False
    return True


def is_finished(cfg: RunConfig, storage: Storage) -> bool:
    """Whether all that a start with this config has to do is done and stored."""
    stored = max(list_manifests(storage), default=-1)
    return stored >= cfg.last_step and (
        stored < cfg.steps or not cfg.method.exports or storage.exists(f"{MODEL}/config.json")
    )


def read_config(storage: Storage) -> RunConfig:
    """Of the run in this folder. ConfigError if there is none."""
    return find_setting(storage).config()


def as_begun(cfg: RunConfig, setting: Setting) -> RunConfig:
    """With the architecture that the run began with."""
    return _with_model(cfg, fingerprint=setting.config().model.fingerprint)


def _with_fingerprint(cfg: RunConfig, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"fingerprint": fingerprint})})


def _with_validation(cfg: RunConfig, known: Mapping[str, str]) -> RunConfig:
    """With the fingerprints of all its sets. `known`: of those that the run began with."""
    expected = {name: print_ for name, print_ in known.items() if name in cfg.data.validation}
    expected |= cfg.data.validation_fingerprints

    def having(prints: dict[str, str]) -> RunConfig:
        data = cfg.data.model_copy(update={"validation_fingerprints": Mapping_(prints)})
        return cfg.model_copy(update={"data": data})

    return having({name: index.fingerprint for name, index in open_validation(having(expected)).items()})


def _with_model(cfg: RunConfig, *, fingerprint: str) -> RunConfig:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"fingerprint": fingerprint})})
