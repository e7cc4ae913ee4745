"""Where a model's weights come from: Hugging Face folders and hub names, and dense state dicts.

`check_weights` sees from names, shapes and the headers of safetensors files whether weights fit a model, before
anything is spent; `load_weights` reads them. Both let transformers map the names of old and of base-model checkpoints,
by the same call, so that they agree; and both refuse what it would only warn of: tensors that are missing would be
drawn at random. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from relora_ray.errors import ConfigError, first_words
from relora_ray.hub import missing
from relora_ray.modeling.architecture import function_differences, read_hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = ["config.json", SINGLE, INDEX, "model-*-of-*.safetensors"]
"""What is taken from the hub."""
_AGAIN = "Download or copy it again."
_GIVE = (
    "Give a folder, a hub name, a run's folder or URL (RUN), or one of its checkpoints (RUN@STEP, such as runs/a@5000)."
)
_FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights are stored as if they are not quantised, in the words of safetensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which transformers reads by `stored[...].to(device, dtype)`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors, such as BF16."""
    where: str
    """File or hub name, for messages."""
    slice: Any = None
    """Of the open file; None: only the header is known."""

    def __getitem__(self, _: Any) -> Stored:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        if dtype is not None and dtype.is_floating_point and self.dtype not in _FLOATS:
            raise ConfigError(
                f"{self.where} has {self.name} as {self.dtype}, which is quantised. Training needs the weights "
                f"themselves: give the checkpoint it was made from, or load it, dequantise it and save it again."
            )
        if torch.device(device or "cpu").type == "meta":
            return torch.empty(self.shape, dtype=dtype, device="meta")
        tensor: torch.Tensor = self.slice[...]
        return tensor.to(device=device, dtype=dtype, copy=True)  # not a window on a file that may change


def is_hf_folder(path: str) -> bool:
    return Path(path, "config.json").is_file()


def check_weights(shell: Any, place: str) -> None:
    """See that the weights of a folder or hub name are those of `shell`, a model on the meta device.

    ConfigError that names the file or the tensor if not. No weights are read, but for tied ones that are stored twice.
    """
    config = _config(place)
    with ExitStack() as opened:
        folder = _local(place)
        tensors = _hub_headers(place) if folder is None else _open(folder, place, opened)
        twice = _fill(copy.deepcopy(shell), tensors, place, {"": "meta"})
        if twice and folder is not None:
            _fill(copy.deepcopy(shell), tensors, place, {"": "meta"} | dict.fromkeys(twice, "cpu"))
    check_function(config, shell.config, f"model.init_from={place!r}")


def load_weights(model: Any, place: str) -> None:
    """Put the weights of a folder or hub name in the place of the model's own, as fp32 on the CPU. ConfigError as
    `check_weights`, and if a weight is not finite."""
    config = _config(place)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    with ExitStack() as opened:
        _fill(model, _open(_local(place) or _download(place), place, opened), place, {"": "cpu"})
    for name in frozen:  # it has new parameters
        model.get_parameter(name).requires_grad_(False)
    check_function(config, model.config, f"model.init_from={place!r}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ConfigError(
                f"model.init_from={place!r}: {name} has values that are not finite. Nothing can be trained from there: "
                f"take an earlier checkpoint."
            )


def read_headers(file: Path, opened: ExitStack) -> dict[str, Stored]:
    """The tensors of a safetensors file, which stays open with `opened`. It is as long as its header says. ConfigError
    that names it if not, or if it is no such file."""
    try:
        with file.open("rb") as raw:
            if raw.read(40).startswith(b"version https://git-lfs"):
                raise ConfigError(f"{file} is a pointer of Git LFS, not weights. Get them: git lfs pull.")
        handle = opened.enter_context(safe_open(file, framework="pt"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} is damaged or cut short, or no safetensors file: {error}. {_AGAIN}") from error
    return {n: Stored(n, tuple(s.get_shape()), s.get_dtype(), str(file), s) for n, s in slices.items()}


def copy_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a dense state dict into `model` in place; every name and shape must match, else ConfigError."""
    own = model.state_dict()
    check_shapes(own, weights, source)
    check_tied_values(model, weights, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def check_shapes(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], source: str) -> None:
    """ConfigError if two state dicts differ in a name or shape. Values may be on the meta device."""
    if missing := sorted(own.keys() - weights.keys()):
        raise ConfigError(f"{source} has no tensor {missing[0]!r} ({len(missing)} missing). Same architecture needed.")
    if unexpected := sorted(weights.keys() - own.keys()):
        raise ConfigError(f"{source} has {unexpected[0]!r}, which the model lacks ({len(unexpected)} unexpected).")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ConfigError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, the model {tuple(tensor.shape)}. "
                f"Set the model section to the architecture of the source."
            )


def check_function(there: Any, here: Any, source: str) -> None:
    """ConfigError if weights made for the configuration `there` compute another function in a model of `here`, though
    they fit by name and shape: with other heads, another rotary base, another activation."""
    if differing := function_differences(there, here):
        raise ConfigError(
            f"{source} fits by names and shapes, but its weights are for another function than the run's model:\n"
            + "".join(f"  {line}\n" for line in differing)
            + "Give the run the architecture of its weights (model.huggingface, instead of a size). If the change is "
            "meant, make it in a copy of the folder, for both."
        )


def check_ties(here: nn.Module, there: nn.Module, source: str) -> None:
    """ConfigError if one weight of the model `here` is two in the model `there`: one of the two would be lost."""
    theirs = {name: id(p) for name, p in there.named_parameters(remove_duplicate=False)}
    for tied in tied_names(here):
        if len({theirs[name] for name in tied if name in theirs}) > 1:
            raise _apart(tied, source)


def check_tied_values(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """ConfigError if a weight that is one in `model` has two values in a dense state dict."""
    for tied in tied_names(model):
        first, *others = (name for name in tied if name in weights)
        if not all(torch.equal(weights[first], weights[name]) for name in others):
            raise _apart(tied, source)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one, and of no others."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _apart(tied: list[str], source: str) -> ConfigError:
    return ConfigError(
        f"{source} has {' and '.join(tied)} apart, and they are one weight in the run's model. Untie them here, too: "
        f"model.tie_embeddings=false, or tie_word_embeddings in the config.json."
    )


def _fill(model: Any, tensors: dict[str, Stored], place: str, device_map: dict[str, str]) -> list[str]:
    """Have transformers find each tensor's place by its rules for names, and put it there in fp32. Returns the tied
    parameters that are stored more than once; where they are read, they must be equal."""
    # Here, as they take a second and a half, and a driver of a known architecture reads no weights.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    transformers.utils.logging.disable_progress_bar()
    tied = dict(model.all_tied_weights_keys)
    _refuse_doubled(model, tensors, place)
    found, _ = convert_and_load_state_dict_in_model(
        model=model,
        state_dict=tensors,
        load_config=LoadStateDictConfig(
            ignore_mismatched_sizes=True,  # they are refused below, by name
            device_map=device_map,
            dtype=torch.float32,
            weight_mapping=get_model_conversion_mapping(model),
        ),
    )
    twice = {name: source for name, source in tied.items() if not {name, source} & found.missing_keys}
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    what, fix = f"model.init_from={place!r}", "Set the model section to the architecture of the source."
    constants = {name for name, _ in model.named_buffers()} - model.state_dict().keys()  # old versions stored them
    unexpected = sorted(n for n in found.unexpected_keys if n not in constants and not n.endswith(".masked_bias"))
    if missing := sorted(found.missing_keys):
        besides = (
            f" It has {unexpected[0]!r}, which the model lacks ({len(unexpected)} unexpected)." if unexpected else ""
        )
        raise ConfigError(
            f"{what} has no tensor for {missing[0]!r} ({len(missing)} missing): it would be drawn at random.{besides} "
            f"Give a whole checkpoint of this architecture."
        )
    if unexpected:
        raise ConfigError(f"{what} has {unexpected[0]!r}, which the model lacks ({len(unexpected)} unexpected). {fix}")
    for name, theirs, ours in sorted(found.mismatched_keys):
        raise ConfigError(f"{what}: {name} has shape {tuple(theirs)}, the model {tuple(ours)}. {fix}")
    for name, text in sorted(found.conversion_errors.items()):
        raise ConfigError(f"{what}: {name} cannot be made of what is stored: {text.splitlines()[-1]}")
    for name, source in twice.items():
        if name not in model.all_tied_weights_keys:  # transformers unties what is not equal
            raise ConfigError(
                f"{what} has {name} and {source} with different values, and its config.json says that they are one "
                f"(tie_word_embeddings). Set that to false in the config.json of the architecture and of the source, "
                f"or remove the one that is wrong."
            )
    return sorted({*twice, *twice.values()})


def _refuse_doubled(model: Any, tensors: Mapping[str, Stored], place: str) -> None:
    """ConfigError if two stored tensors are for one place: transformers takes one of them and says nothing. Experts
    that are stored one by one are stacked in the order of their numbers, so none may be left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    own, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stored: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name in tensors:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if target in own:
            stored[target, pattern].append(name)
    for (target, pattern), names in stored.items():
        if len(names) < 2:
            continue
        digits = [[int(part) for part in name.split(".") if part.isdigit()] for name in names]
        if pattern is None or sorted(numbers := [n[-1] for n in digits if n]) != list(range(len(names))):
            wrong = f"has {names[0]} and {names[1]}, both of which are the model's {target}"
            if pattern is not None:
                wrong = f"has parts {sorted(numbers)} of {target}, which are numbered from 0 without a gap"
            raise ConfigError(f"model.init_from={place!r} {wrong}. Remove or rename what is wrong.")


def _config(place: str) -> Any:
    """The configuration that the weights there are for. ConfigError if there can be none to train from."""
    source = f"model.init_from={place!r}"
    if "://" in place:
        raise ConfigError(f"{source} is no run, and other models are read from folders and by hub names only.")
    if problem := missing(place):
        _, at, step = place.rpartition("@")
        hint = f" And {step!r} after the @ is no step of a run." if at else ""
        raise ConfigError(f"{source} {problem}{hint} {_GIVE}")
    if Path(place).is_file():
        raise ConfigError(f"{source} is a file. Give the folder that it lies in, with its config.json.")
    if Path(place, "adapter_config.json").is_file():
        raise ConfigError(
            f"{source} is an adapter of PEFT, not a model. Merge it (merge_and_unload) and save the model that results."
        )
    config = read_hf_config(place, source)
    if (method := _quantisation(config)) is not None:
        raise ConfigError(
            f"{source} is quantised ({method}; quantization_config in its config.json). Training needs the weights "
            f"themselves: give the checkpoint it was made from, or load it, dequantise it and save it again."
        )
    return config


def _quantisation(config: Any) -> str | None:
    """The method by which weights of this configuration are quantised."""
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", "compression_config"):
            if (found := getattr(part, key, None)) is not None:
                found = found if isinstance(found, dict) else found.to_dict()
                return str(found.get("quant_method") or "unknown method")
    return None


def _local(place: str) -> Path | None:
    """The folder, or what this machine has of a hub name; None if it has nothing."""
    if (folder := Path(place)).is_dir():
        return folder
    try:
        found = huggingface_hub.snapshot_download(place, local_files_only=True, allow_patterns=_WANTED)
    except Exception as error:  # what is no hub name, and what is not in the cache
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            return None
        raise _unreadable(place, error) from error
    return Path(found) if any(Path(found, name).exists() for name in (SINGLE, INDEX)) else None


def _download(place: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(place, allow_patterns=_WANTED))
    except Exception as error:  # of many kinds: no such name, no network, no right
        raise _unreadable(place, error) from error


def _hub_headers(place: str) -> dict[str, Stored]:
    """Of the tensors that a hub name has; some hundred kilobytes are read."""
    try:
        files = huggingface_hub.get_safetensors_metadata(place).files_metadata
    except Exception as error:  # of many kinds: no safetensors, no such name, no network, no right
        raise _unreadable(place, error) from error
    return {
        name: Stored(name, tuple(info.shape), info.dtype, f"{place}/{file}")
        for file, content in files.items()
        for name, info in content.tensors.items()
    }


def _unreadable(place: str, error: Exception) -> ConfigError:
    return ConfigError(f"model.init_from={place!r} is not a readable Hugging Face model: {first_words(error)} {_GIVE}")


def _open(folder: Path, place: str, opened: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder, with their files open."""
    tensors: dict[str, Stored] = {}
    for file in _files(folder, place):
        found = read_headers(file, opened)
        if both := sorted(tensors.keys() & found.keys()):
            raise ConfigError(
                f"model.init_from={place!r} has {both[0]} in two files, {Path(tensors[both[0]].where).name} and "
                f"{file.name}. {_AGAIN}"
            )
        tensors |= found
    return tensors


def _named_in_config(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):  # it is read, and refused, elsewhere
        return None
    return named if isinstance(named, str) else None


def _files(folder: Path, place: str) -> list[Path]:
    """The safetensors files that transformers would read. ConfigError if one is missing."""
    if (named := _named_in_config(folder)) is not None:
        if Path(named).name != named or not (folder / named).is_file() or not named.endswith(".safetensors"):
            raise ConfigError(
                f"model.init_from={place!r}: its config.json names {named!r} as its weights (transformers_weights), "
                f"which is no safetensors file in it. {_AGAIN}"
            )
        return [folder / named]
    if (single := folder / SINGLE).is_file():
        return [single]
    index = folder / INDEX
    if not index.is_file():
        there = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f" {there[0]} is a pickle, which can run code when it is read, and is not." if there else ""
        raise ConfigError(
            f"model.init_from={place!r} has no {SINGLE} and no {INDEX}.{why} Load the model where you trust it, and "
            f"save it with save_pretrained of a present transformers, which writes safetensors."
        )
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} is no index of safetensors files ({error!r}). {_AGAIN}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"model.init_from={place!r}: {INDEX} names {name!r}, which is not there. {_AGAIN}")
    return [folder / name for name in names]
