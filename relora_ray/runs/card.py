"""The card of an exported model, README.md in its folder: what it is, by the run's own records.

A card is made to be published. Of places it tells names alone: the last part of `data.path`, and hub names of models,
never a folder, a bucket or a host; no option of a storage, nothing of a machine. The licence is for whoever publishes
it to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from relora_ray.checkpoint import Manifest
from relora_ray.checkpoint.manifest import HeldOut
from relora_ray.config import RunConfig
from relora_ray.data.tokens import DataIndex
from relora_ray.hub import looks_like_path
from relora_ray.masking import masked
from relora_ray.runs.metrics import perplexity

LEFT_OUT = "(left out: a place)"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TRAINING = ("seed", "steps", "global_batch_rows", "data.seq_len", "train.precision", "optimizer", "schedule", "method")
"""Keys of the config that the card shows: what decides the result, and no place."""


def model_card(
    cfg: RunConfig, manifest: Manifest, index: DataIndex, *, dtype: str, adapter_of: str = "", is_base: bool = False
) -> str:
    """Markdown behind YAML, for the model of this checkpoint: the same bytes whenever it is made. `dtype`: of the
    stored weights. `adapter_of`: what the base is called, of an adapter. `is_base`: it is such a base."""
    what = "A LoRA adapter on " + f"`{_plain(adapter_of)}`" if adapter_of else "A causal language model"
    if is_base:
        what = "What an adapter was made for: the model without the update since its last merge. Alone it is no result"
    lines = [*_front_matter(cfg, adapter_of), *_body(cfg, what, _facts(cfg, manifest, index, dtype), adapter_of)]
    return masked("\n".join(lines)) + "\n"


def _front_matter(cfg: RunConfig, adapter_of: str) -> Iterator[str]:
    known: dict[str, Any] = {"library_name": "peft" if adapter_of else "transformers"}
    if base := adapter_of or (cfg.model.init_from if _is_hub_name(cfg.model.init_from) else ""):
        known["base_model"] = base
    known |= {"pipeline_tag": "text-generation", "tags": ["relora-ray", cfg.method.kind] + ["lora"] * bool(adapter_of)}
    yield "---"
    yield yaml.safe_dump(known, sort_keys=False).strip()
    yield "# license: yours to say, such as apache-2.0"
    yield "---"


def _body(cfg: RunConfig, what: str, facts: Iterable[tuple[str, str]], adapter_of: str) -> Iterator[str]:
    yield f"# {_plain(cfg.name)}\n"
    yield f"{what}, trained by relora_ray with `method.kind: {_plain(cfg.method.kind)}`."
    yield "No licence has been chosen for it yet: add one to the head of this file before you publish it.\n"
    yield "## What it is\n"
    yield "| | |\n|---|---|"
    for name, value in facts:
        yield f"| {name} | {_plain(value)} |"
    yield "\n## How it was trained\n"
    yield f"```yaml\n{yaml.safe_dump(_shown_settings(cfg), sort_keys=False).strip()}\n```\n"
    yield "## How to load it\n"
    yield f"```python\n{_how_to_load(adapter_of)}\n```"


def _facts(cfg: RunConfig, manifest: Manifest, index: DataIndex, dtype: str) -> Iterator[tuple[str, str]]:
    yield "architecture", _architecture(cfg)
    if cfg.model.init_from:
        source = cfg.model.init_from
        yield "begun from", source if _is_hub_name(source) else "other weights, of a folder or run not named here"
    yield "state", f"after update {manifest.step:,} of {cfg.steps:,}, {manifest.counters.merges} merges"
    yield "tokens", f"{manifest.tokens:,}"
    train = index.splits.get("train")
    size = f", {train.num_tokens:,} tokens for training" if train else ""
    yield "data", f"{_data_name(cfg.data.path)}, fingerprint {manifest.data_fingerprint}{size}"
    yield "tokenizer", f"{index.vocab_size:,} token ids, SHA-256 {index.tokenizer_sha256[:16]}"
    yield from _losses(manifest)
    yield "stored as", dtype
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _losses(manifest: Manifest) -> Iterator[tuple[str, str]]:
    last, best = manifest.counters.held_out, manifest.counters.best
    if last is not None:
        now = "" if last.step == manifest.step else f" (after update {last.step:,}, the last evaluation before)"
        yield "held-out loss", f"{_loss(last)}{now}"
    if best is not None and best != last:
        yield "lowest held-out loss", f"{_loss(best)} (after update {best.step:,})"
    if last is None:
        yield "held-out loss", "not recorded"


def _loss(found: HeldOut) -> str:
    return f"{found.loss:.4f} nats a token, perplexity {perplexity(found.loss):.2f}, over {found.tokens:,} tokens"


def _architecture(cfg: RunConfig) -> str:
    if cfg.model.llama is None:
        name = cfg.model.huggingface
        return f"as {name}" if _is_hub_name(name) else "see config.json"
    llama = cfg.model.llama
    size = f"LLaMA {cfg.model.size}, " if cfg.model.size else "LLaMA, "
    return f"{size}{llama.num_layers} layers of width {llama.hidden_size}, {llama.num_heads} heads"


def _shown_settings(cfg: RunConfig) -> dict[str, Any]:
    given, shown = cfg.model_dump(mode="json"), dict[str, Any]()
    for key in _TRAINING:
        section, _, name = key.partition(".")
        shown[key] = _without_places(given[section][name] if name else given[section])
    return shown


def _without_places(value: Any) -> Any:
    """Methods of other packages have settings that nobody here knows: what looks like a place is left out."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return LEFT_OUT if isinstance(value, str) and re.search(r"[/\\@~]|:\S", value) else value


def _data_name(place: str) -> str:
    """The last part of a folder or URL, if that is not its bucket."""
    parts = [part for part in place.partition("://")[2].split("/") if part]
    if "://" not in place:
        return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "not named"
    return parts[-1] if len(parts) > 1 else "not named"


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name)) and not looks_like_path(name)


def _plain(text: str) -> str:
    """In one cell of a table, as it is."""
    return re.sub(r"[|`<>\[\]]|[^ -~]", "?", text)


def _how_to_load(adapter_of: str) -> str:
    if not adapter_of:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'
        )
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("THE BASE")  # the folder that was written beside this one\n'
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")'
    )
