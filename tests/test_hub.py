"""Names of tokenizers and models that are not here: refused at once where they can only be paths."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from relora_ray.config import ModelConfig
from relora_ray.data.tokenizer import load_tokenizer
from relora_ray.errors import ConfigError, DataError
from relora_ray.hub import looks_like_path, missing
from relora_ray.modeling.architecture import hf_config


@pytest.mark.parametrize(
    "name", ["./tok", "/nowhere/tok", "tok/", "a/b/c", "~/tok", "here/tok", "tok.json", "my tok", "../tok", "tok\\x"]
)
def test_a_path_is_not_looked_for_on_a_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "here").mkdir()
    began = time.monotonic()
    with pytest.raises(DataError, match="does not exist: there is no such file or folder"):
        load_tokenizer(name)
    with pytest.raises(ConfigError, match=r"model\.huggingface=.* does not exist: there is no such file or folder"):
        hf_config(ModelConfig(huggingface=name), 8)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["gpt2", "t5-base", "EleutherAI/pythia-70m", "google/gemma-2-2b"])
def test_what_may_be_a_hub_name_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here offline, which the message says."""
    assert not looks_like_path(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "there is no such folder, and the hub cannot be asked" in missing(name)


def test_what_exists_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "llama@v2").mkdir()
    assert missing("gpt2") == missing("llama@v2") == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache/models--google--gemma").mkdir(parents=True)
    assert missing("google/gemma") == ""
