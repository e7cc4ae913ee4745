"""What is given away: base and adapter for peft, files of a size, the card. Nothing is faked but where it says so."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

from relora_ray.checkpoint import read_manifest
from relora_ray.commands.export import export, main
from relora_ray.config import RunConfig
from relora_ray.data.tokens import read_index
from relora_ray.runs.card import model_card
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.checkpoint.test_manifest import manifest
from tests.s3 import Server
from tests.test_architecture import SIZES
from tests.tiny import run, tiny_config

TOLERANCE = 1e-4
"""Relative to the largest logit, in fp32: peft adds x A^T B^T to x W^T, and a merged export has one matrix. What is
seen is 1e-7 to 1e-6."""
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 2048}
EXPERTS = SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 2048, "num_key_value_heads": 2}
RANKS = {"galore": {"rank": 4, "refresh_every_steps": 1}, "sltrain": {"rank": 4, "alpha": 8, "density": 0.1}}
CONFIGS: dict[str, Any] = {
    "llama": None,
    "gpt2": lambda: transformers.GPT2Config(**GPT2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES | {"vocab_size": 2048}),
    "mixtral": lambda: transformers.MixtralConfig(**EXPERTS),
}


def trained(data: Path, tmp_path: Path, *overrides: str, architecture: str = "llama", **method: Any) -> RunConfig:
    """A run of 8 updates that ends within a cycle: merges after 3 and 6."""
    kind = {"kind": "relora", "lora_rank": 4, "alpha": 8, "warm_start_steps": 3, "merge_every_steps": 3} | method
    if kind["kind"] == "lora":
        del kind["merge_every_steps"]
        overrides = ("schedule.kind=cosine", "schedule.restart_warmup_steps=0", *overrides)
    sections: dict[str, Any] = {"method": kind}
    if (config := CONFIGS[architecture]) is not None:
        config().save_pretrained(tmp_path / "architecture")
        sections["model"] = {"huggingface": str(tmp_path / "architecture")}
    cfg = tiny_config(data, tmp_path, "train.stop_after_steps=8", *overrides, **sections)
    run(cfg)
    return cfg


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.parametrize(
    ("architecture", "step", "method"),
    [
        ("llama", 8, {}),
        ("llama", 6, {}),
        ("llama", 8, {"rslora": True, "trainable_scaling": True, "frozen_weights": "bf16_int8"}),
        ("llama", 8, {"kind": "lora", "alpha": 6.5, "target_modules": ["q_proj", "down_proj"]}),
        ("gpt2", 8, {}),
        ("gpt_neox", 8, {"dropout": 0.1}),
        ("mixtral", 8, {}),
    ],
    ids=lambda value: value if isinstance(value, str | int) else ",".join(value) or "plain",
)
def test_base_and_adapter_are_the_merged_export(
    architecture: str, step: int, method: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """In a cycle, right after a merge, and with every way to scale."""
    peft = pytest.importorskip("peft")
    cfg = trained(data, tmp_path, architecture=architecture, **method)
    run_folder, out = run_storage(cfg), tmp_path / "out"
    export(run_folder, Storage(str(tmp_path / "merged")), step=step)
    assert main([run_folder.url, str(out), "--adapter", "--step", str(step)]) == 0
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    base, info = transformers.AutoModelForCausalLM.from_pretrained(out / "base", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    alone = logits(base)
    both = logits(peft.PeftModel.from_pretrained(base, str(out / "adapter")))
    assert (both - merged).abs().max() <= TOLERANCE * merged.abs().max()
    moved = (alone - merged).abs().max() > 100 * TOLERANCE * merged.abs().max()
    assert moved == (step == 8), "right after a merge the adapter adds nothing"
    tensors = load_file(out / "adapter/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_what_has_no_adapter_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(cfg: RunConfig, *more: str) -> str:
        assert main([run_storage(cfg).url, str(tmp_path / "out"), "--adapter", *more]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    plain = {"schedule": {"kind": "cosine"}, "steps": 1}
    for kind, why in (
        ("full", "trains the weights themselves"),
        ("galore", "trains the weights themselves: low-rank are its gradients alone"),
        ("sltrain", "adds a sparse matrix"),
    ):
        cfg = tiny_config(data, tmp_path, f"name={kind}", **plain, method={"kind": kind} | RANKS.get(kind, {}))
        run(cfg)
        assert f"method.kind={kind} {why}" in refused(cfg)
    cfg = trained(data, tmp_path)
    assert "until its warm start ends, after step 3, and this is the state after step 2" in refused(cfg, "--step", "2")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert "pip install 'relora-ray[adapter]'" in refused(cfg)
    out, source = str(tmp_path / "out"), run_storage(cfg).url
    for wrong, said in (
        (["--base-model", "you/base"], "--base-model=you/base has no effect without --adapter"),
        (["--adapter", "--base-model", "s3://you/base"], "is no name on the Hugging Face hub"),
        (["--max-shard-size", "4"], "'4' is no size of a file"),
        (["--best", "--step", "2"], "not allowed with argument"),
    ):
        with suppress(SystemExit):
            assert main([source, out, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_any_url_and_files_of_a_size(
    data: Path, tmp_path: Path, moto: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base and adapter on a server that speaks S3, cut into files, and back."""
    peft = pytest.importorskip("peft")
    cfg = trained(data, tmp_path)
    url, options = "s3://bucket/models/tiny", moto.options
    given = [item for name, value in options.items() for item in ("--storage-option", f"{name}={value}")]
    command = [run_storage(cfg).url, url, "--adapter", "--max-shard-size", "20KB", *given]
    assert main(command) == 0
    assert main(command) == 2
    assert f"{url} is not empty" in capsys.readouterr().err
    there, back = Storage(url, options), Storage(str(tmp_path / "back"))
    for path in there.list():
        back.put(path, there.get(path))
    index = json.loads(back.get("base/model.safetensors.index.json"))
    files = set(index["weight_map"].values())
    assert len(files) > 3
    sizes = sorted((tmp_path / "back/base" / name).stat().st_size for name in files)
    assert sizes[-3] < 25_000, "but for embedding and head, which are one tensor each"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back/base")
    model = transformers.AutoModelForCausalLM.from_pretrained(run_merged(cfg, tmp_path))
    both = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "back/adapter")))
    assert (both - logits(model)).abs().max() <= TOLERANCE * both.abs().max()


def run_merged(cfg: RunConfig, tmp_path: Path) -> Path:
    export(run_storage(cfg), Storage(str(tmp_path / "merged")))
    return tmp_path / "merged"


def test_card_says_what_the_model_is_and_no_place(data: Path, tmp_path: Path) -> None:
    """Read as the hub reads it."""
    pytest.importorskip("peft")
    cfg = trained(data, tmp_path, "name=the-run", "train.stop_after_steps=12", "train.eval_every_steps=4")
    source = run_storage(cfg)
    export(source, Storage(str(tmp_path / "given")), step=8)
    main([source.url, str(tmp_path / "both"), "--adapter", "--step", "8", "--base-model", "you/tiny-base"])
    model, adapter, base = (
        huggingface_hub.ModelCard.load(tmp_path / folder / "README.md")
        for folder in ("given", "both/adapter", "both/base")
    )
    assert (model.data.library_name, model.data.pipeline_tag) == ("transformers", "text-generation")
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", "you/tiny-base")
    assert (model.data.license, model.data.base_model, base.data.base_model) == (None, None, None)
    assert "Alone it is no result" in base.text
    manifest = read_manifest(source, 8)
    for fact in (
        "method.kind: relora", "after update 8 of 12, 1 merges", f"{manifest.tokens:,}", manifest.data_fingerprint,
        f"{manifest.held_out.loss:.4f} nats", f"torch {torch.__version__}", "lora_rank: 4", "learning_rate: 0.01",
    ):  # fmt: skip
        assert fact in model.text, fact
    end = Path(source.url, "model/README.md").read_text()
    assert "after update 12 of 12" in end
    for text in (str(model), str(adapter), str(base), end):
        assert str(tmp_path) not in text
        assert str(data.parent) not in text
        assert f"| data | {data.name}, fingerprint" in text


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/me/secret project/c4-t5/", "c4-t5"),
        ("s3://company-bucket/data/c4-t5", "c4-t5"),
        ("s3://company-bucket", "not named"),
        ("c4|t5", "c4?t5"),
    ],
)
def test_card_names_no_bucket_and_no_folder(place: str, name: str, data: Path, cfg: RunConfig) -> None:
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"path": place})})
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"init_from": "/home/me/weights"})})
    card = model_card(cfg, manifest(0), read_index(Storage(str(data))), dtype="float32")
    assert f"| data | {name}, fingerprint f" in card
    assert "not recorded" in card
    assert "a folder or run not named here" in card
    assert not any(word in card for word in ("/home", "secret project", "company", "base_model"))
