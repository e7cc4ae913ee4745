"""What a run's model is: the content of a Hugging Face config.json, not the place where it lay.

A run writes the content down when it begins (`architecture.json` in its set-up) and reads it from there ever after, so
that the folder may move, change or be missing on other machines. Its digest is the run's identity. LLaMA sizes need
none of this: their settings are the config's own.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers

from relora_ray.config import ModelConfig, flatten
from relora_ray.errors import CheckpointError, ConfigError, first_words
from relora_ray.hub import missing
from relora_ray.modeling.small import pad_moves_others

logger = logging.getLogger(__name__)

_OF_NO_ACCOUNT = (
    "transformers_version", "_name_or_path", "name_or_path",  # who wrote it, and where
    "dtype", "torch_dtype", "architectures", "use_cache",  # of the weights beside it, of their head, of generation
    "quantization_config", "compression_config",  # of the weights beside it: ours are dense
    "transformers_weights",  # the name of a file that an export does not have
)  # fmt: skip
"""Keys that do not decide the function that a model computes: not stored, and not part of its identity."""

_NOT_THE_FUNCTION = re.compile(
    r"(^|\.)(vocab_size|tie_word_embeddings|initializer\w*|init_\w+|\w*_token_ids?|\w*dropout\w*|\w*_pdrop|"
    r"\w*_loss_coef|output_(hidden_states|attentions|scores|router_logits|past)|return_dict|id2label.*|label2id.*|"
    r"num_labels|problem_type|"
    r"chunk_size_feed_forward|pretraining_tp|gradient_checkpointing|auto_map.*|max_window_layers|summary_\w+|"
    r"rescale_every)$"
)
"""Keys in which a model may differ from the one whose weights it takes: what they change shows in names and shapes of
tensors, or is training's, or nobody reads it."""

_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_seq_length",
    "max_sequence_length", "n_ctx",
)  # fmt: skip
"""What architectures call the length of their longest row; the first that is there counts, as the others may be
left over from another version."""


_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What a model is asked for beside logits, which is of no use here."""
_IN_TRAINING = {
    "use_cache": False,  # of generation
    # RWKV divides weights in place whenever it is evaluated, and multiplies them again: of no use in fp32 and bf16,
    # and a checkpoint would hold the one or the other.
    "rescale_every": 0,
}
"""Settings that a model has while it is trained, whatever the config.json says of its use."""


@dataclass(frozen=True)
class Architecture:
    """The content of a config.json: all settings, those left to their defaults too, as a later version of transformers
    may have others."""

    content: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any setting that decides the function."""
        return sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> bytes:
        return json.dumps(self.content, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Architecture:
        """CheckpointError if it is not what `to_json` wrote."""
        try:
            content = json.loads(data)
            assert isinstance(content, dict)
            assert isinstance(content["model_type"], str)
        except (ValueError, KeyError, AssertionError) as error:
            raise CheckpointError(f"{source} is not the architecture of a run. Restore it.") from error
        return cls(content)

    def hf_config(self) -> transformers.PretrainedConfig:
        """A new one. ConfigError if this version of transformers does not know it."""
        content = json.loads(json.dumps(self.content))
        kind = content.pop("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise ConfigError(
                f"the run's architecture is {kind!r}, which transformers {transformers.__version__} does not know. Use "
                f"the version that it began with, or a later one."
            )
        return transformers.AutoConfig.for_model(kind, **content)

    def differences(self, other: Architecture) -> list[str]:
        """`num_attention_heads: 4 there, 2 here`, for settings that are not the same in `other`, which is here. Both as
        this version of transformers reads them: a setting that is new in it is not a difference."""
        there, here = (flatten(_content(a.hf_config())) for a in (self, other))
        return [
            f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]


def read_architecture(place: str) -> Architecture:
    """What `model.huggingface` names: a folder with config.json, the file itself, or a hub name, which is looked up
    now. ConfigError if it cannot be read or needs code of its own, which is never run."""
    return Architecture(_content(read_hf_config(place, f"model.huggingface={place!r}")))


def say_what_is_not_read(place: str) -> None:
    """Warn of keys in the config.json of a folder that look like a setting of the architecture, which is left to its
    default. Published files have many keys besides that nobody reads."""
    source = f"model.huggingface={place!r}"
    config, written = read_hf_config(place, source), transformers.PretrainedConfig.get_config_dict(place)[0]
    known = _settings(config) | set(type(config).attribute_map)
    for key in sorted(written.keys() - known - set(_OF_NO_ACCOUNT)):
        for meant in difflib.get_close_matches(key, known - written.keys(), n=1, cutoff=0.85):
            logger.warning(
                "%s: its config.json has %s, which %r does not read. %s is meant? It is %r now.",
                source, key, config.model_type, meant, getattr(config, meant, None),
            )  # fmt: skip
    if written.get("quantization_config"):
        logger.warning("%s: its config.json asks for quantised weights, and the run's are dense.", source)


def is_there(place: str) -> bool:
    """Whether a folder or file is on this machine. A hub name is not."""
    return os.path.exists(place)


def is_same_place(one: str, other: str) -> bool:
    return one == other or os.path.abspath(one) == os.path.abspath(other)


def hf_config(model: ModelConfig, seq_len: int, architecture: Architecture | None = None) -> Any:
    """The Hugging Face configuration of `model`; of `architecture`, if it is given, which is then the one that
    `model.huggingface` named. ConfigError if `seq_len` is beyond its positions."""
    llama = model.llama
    if llama is not None:
        return transformers.LlamaConfig(
            vocab_size=model.llama_vocab_size,
            hidden_size=llama.hidden_size,
            intermediate_size=llama.intermediate_size,
            num_hidden_layers=llama.num_layers,
            num_attention_heads=llama.num_heads,
            # Rotary embedding has no table to outgrow, so a longer row only moves this number.
            max_position_embeddings=max(llama.max_positions, seq_len),
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=model.tie_embeddings,
        )
    # Without an architecture: a run of a version that did not store it, and asks its folder each time.
    place = f"model.huggingface={model.huggingface!r}"
    config = architecture.hf_config() if architecture is not None else _read(model.huggingface, place)
    parts = list(language_model_parts(config))
    for part in parts:
        if model.vocab_size is not None and hasattr(part, "vocab_size"):
            part.vocab_size = model.vocab_size
            if getattr(part, "vocab_size_per_layer_input", None):  # Gemma's second table of token ids
                part.vocab_size_per_layer_input = model.vocab_size
            if (getattr(part, "pad_token_id", None) or 0) >= model.vocab_size:
                part.pad_token_id = None  # there is no such row to keep at zero
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
        _set(part, _OUTPUTS)
    positions = next((n for part in reversed(parts) if (n := position_limit(part)) is not None), None)
    if positions is not None and seq_len > positions:
        raise ConfigError(
            f"data.seq_len={seq_len} is more than the {positions} positions of {place}. Use data.seq_len={positions} "
            f"or less."
        )
    for part in parts:
        heads, groups = (getattr(part, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
            raise ConfigError(
                f"{place} has num_key_value_heads={groups}, which does not divide its num_attention_heads={heads}: "
                f"every key and value serves as many heads. Set it to a divisor in its config.json."
            )
    return config


def in_training(config: Any) -> Any:
    """The configuration, changed in place to what a model has while it is trained."""
    for part in language_model_parts(config):
        _set(part, _IN_TRAINING)
    return config


def _set(part: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if hasattr(part, key):
            setattr(part, key, value)


def function_differences(there: Any, here: Any) -> list[str]:
    """Settings in which two configurations compute another function from the same weights, as `Architecture` words
    them. Names and shapes of tensors do not show these."""
    there, here = (list(language_model_parts(config))[-1] for config in (there, here))
    if there.model_type != here.model_type:
        return [f"model_type: {there.model_type!r} there, {here.model_type!r} here"]
    positions = set() if _depends_on_positions(here) or _depends_on_positions(there) else set(_POSITIONS)
    known = _settings(here)
    return [
        line
        for line in Architecture(_content(there)).differences(Architecture(_content(here)))
        if (key := line.partition(":")[0]).partition(".")[0] in known
        and key.rpartition(".")[2] not in positions
        and (not _NOT_THE_FUNCTION.search(key) or (key == "pad_token_id" and pad_moves_others(here)))
    ]


def _settings(config: Any) -> set[str]:
    """What architectures of this kind have: what other tools leave in a config.json besides, no model reads."""
    try:
        return set(type(config)().to_dict())
    except Exception:  # a kind without defaults
        return set(config.to_dict())


def _depends_on_positions(config: Any) -> bool:
    """Whether rotary frequencies are computed from the number of positions."""
    found = json.dumps(getattr(config, "rope_parameters", None) or {})
    return any(kind != "default" for kind in re.findall(r'"rope_type": "(\w+)"', found))


def read_hf_config(place: str, source: str) -> Any:
    """The configuration in a folder or file, or of a hub name, as transformers reads it; `source` names the setting.
    ConfigError if there is none, or if it wants code of its own to be run."""
    config = _read(place, source)
    code = getattr(config, "auto_map", None) or {}
    if any(name == "AutoConfig" or name.startswith("AutoModel") for name in code):
        raise ConfigError(
            f"{source} names code of its own (auto_map in its config.json), which is not run here. If transformers' "
            f"own {config.model_type!r} is what you mean, use a copy without auto_map."
        )
    return config


def _read(place: str, source: str) -> Any:
    if "://" in place:
        raise ConfigError(f"{source} is a URL. Give a folder with config.json, the file itself, or a hub name.")
    if problem := missing(place):
        raise ConfigError(f"{source} {problem} Give a folder with config.json, the file itself, or a hub name.")
    try:
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and what the classes of architectures raise
        if "trust_remote_code" in str(error) or _needs_code(place):
            raise ConfigError(
                f"{source} needs code of its own (auto_map in its config.json), which is not run here. Use an "
                f"architecture that transformers {transformers.__version__} has."
            ) from error
        raise ConfigError(
            f"{source} is not a readable Hugging Face configuration: {first_words(error)} "
            f"Give a folder with config.json, the file itself, or a hub name."
        ) from error


def _needs_code(place: str) -> bool:
    path = Path(place)
    try:
        return "auto_map" in json.loads((path / "config.json" if path.is_dir() else path).read_text())
    except (OSError, ValueError):
        return False


def _content(config: Any) -> dict[str, Any]:
    """All settings of a configuration as JSON has them, less those of no account."""
    return dict(_without(json.loads(json.dumps(config.to_dict()))))


def _without(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _without(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in _OF_NO_ACCOUNT}


def language_model_parts(config: Any) -> Iterator[Any]:
    """The configuration, and the one of its language model if that lies within."""
    yield config
    if (text := config.get_text_config(decoder=True)) is not config:
        yield text


def position_limit(config: Any) -> int | None:
    """How many positions a configuration names."""
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((n for n in found if isinstance(n, int) and n > 0), None)
