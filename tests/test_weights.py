"""Weights that are whole are taken as transformers takes them; others are refused by name, before they are read too.

The folders are real, small, and damaged as they are found in the wild. Nothing is faked but the hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from relora_ray.config import ModelConfig, RunConfig
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.modeling import weights
from relora_ray.modeling.architecture import read_architecture
from relora_ray.modeling.model import build_model
from relora_ray.modeling.small import small_config
from relora_ray.modeling.weights import check_weights, load_weights
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained, new_model
from relora_ray.runs.setting import check_run
from relora_ray.runtime.preflight import preflight
from tests.conftest import ROOT
from tests.test_architecture import SIZES, edit
from tests.tiny import TINY, run, tiny_config

LLAMA = ModelConfig(vocab_size=2048, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
TIED = LLAMA.model_copy(update={"tie_embeddings": True})
UP = "model.layers.1.mlp.up_proj.weight"


def llama(folder: Path, **settings: Any) -> transformers.LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | settings, max_position_embeddings=64))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(tmp_path / "llama")
    return tmp_path / "llama"


def change(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None
) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors = edit(tensors) or tensors
    save_file(tensors, file, metadata)


def shard(folder: Path) -> None:
    """In two files, with an index."""
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "s", max_shard_size="200KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "s").iterdir():
        file.replace(folder / file.name)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def check(model: ModelConfig, place: str) -> None:
    architecture = read_architecture(model.huggingface) if model.huggingface else None
    check_weights(build_model(model, seq_len=24, seed=1, device="meta", architecture=architecture), place)


def load(model: ModelConfig, place: str) -> Any:
    architecture = read_architecture(model.huggingface) if model.huggingface else None
    built = build_model(model, seq_len=24, seed=1, architecture=architecture)
    load_weights(built, place)
    return built


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


WHOLE: dict[str, Callable[[Path], Any]] = {
    "as saved": lambda f: None,
    "in shards": shard,
    "half precision": lambda f: change(f, cast(torch.float16)),
    "bfloat16": lambda f: change(f, cast(torch.bfloat16)),
    "no metadata": lambda f: change(f, lambda t: None),
    "constants of old versions": lambda f: change(
        f, lambda t: t.update({f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(2)})
    ),
    "a shard more than the index tells": lambda f: (shard(f), save_file({}, f / "model-00009-of-00009.safetensors")),
    "other ids and dtype": lambda f: edit(f, bos_token_id=5, eos_token_id=[6, 7], dtype="bfloat16", use_cache=True),
    "notes of other tools": lambda f: edit(f, unsloth_version="2026.1", max_sequence_length=9, training={"lr": 1e-4}),
    "a pickle beside it": lambda f: (f / "pytorch_model.bin").write_bytes(b"never read"),
}


def put_in_two_files(folder: Path) -> None:
    shard(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(last) | {name: load_file(first)[name] + 1}, last)


DOUBLED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "with and without prefix": (
        lambda f: change(f, lambda t: t.update({UP.removeprefix("model."): t[UP] + 1})),
        rf"has {UP.removeprefix('model.')} and {UP}, both of which are the model's {UP}",
    ),
    "in two files": (put_in_two_files, r"has \S+ in two files, model-00001\S+ and model-0000"),
}


@pytest.mark.parametrize("kind", DOUBLED)
def test_tensor_that_is_there_twice_is_refused(kind: str, folder: Path) -> None:
    spoil, message = DOUBLED[kind]
    spoil(folder)
    for read in (check, load):
        with pytest.raises(ConfigError, match=message):
            read(LLAMA, str(folder))


def test_experts_are_numbered_without_a_gap(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    change(tmp_path, renamed("experts.3.", "experts.7."))
    for read in (check, load):
        with pytest.raises(ConfigError, match=r"has parts \[0, 1, 2, 7\] of \S+gate_up_proj"):
            read(ModelConfig(huggingface=str(tmp_path)), str(tmp_path))


def test_constants_that_an_old_version_stored_are_passed_over(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    constants = {"bias": torch.ones(1, 1, 64, 64), "masked_bias": torch.tensor(-1e9)}
    names = {f"transformer.h.{n}.attn.attention.{name}": tensor for n in range(2) for name, tensor in constants.items()}
    change(tmp_path, lambda t: t.update({name: tensor.clone() for name, tensor in names.items()}))
    for read in (check, load):
        read(ModelConfig(huggingface=str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_weights_are_taken_as_transformers_takes_them(kind: str, folder: Path) -> None:
    WHOLE[kind](folder)
    check(LLAMA, str(folder))
    ours, theirs = load(LLAMA, str(folder)), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())


def test_what_is_frozen_stays_so(folder: Path) -> None:
    built = load(LLAMA.model_copy(update={"frozen": ("layers.1",)}), str(folder))
    assert {n for n, p in built.named_parameters() if not p.requires_grad} == {
        n for n, _ in built.named_parameters() if ".layers.1." in n
    }


def test_weights_are_no_window_on_the_file(folder: Path) -> None:
    built = load(LLAMA, str(folder))
    before = built.get_parameter(UP).detach().clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096 * 64))
    assert torch.equal(built.get_parameter(UP), before)


ARCHITECTURES = {
    "gpt2 without head and prefix": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "qwen without its tied head": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "mixtral, an expert a tensor": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_are_mapped_as_transformers_maps_them(kind: str, tmp_path: Path) -> None:
    ARCHITECTURES[kind]().save_pretrained(tmp_path)
    model = ModelConfig(huggingface=str(tmp_path))
    check(model, str(tmp_path))
    ours, theirs = load(model, str(tmp_path)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    tied = getattr(ours.config, "tie_word_embeddings", False)
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path: Path) -> None:
    llama(tmp_path, tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    change(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    check(TIED, str(tmp_path))
    built = load(TIED, str(tmp_path))
    assert built.lm_head.weight is built.model.embed_tokens.weight
    change(tmp_path, lambda t: t.update({"lm_head.weight": t[embedding] + 1}))
    for act in (check, load):
        with pytest.raises(
            ConfigError, match=r"has lm_head.weight and model.embed_tokens.weight with different values"
        ):
            act(TIED, str(tmp_path))
    change(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if name != embedding})
    check(TIED, str(tmp_path))  # as some are published


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def first_shard(folder: Path) -> Path:
    shard(folder)
    return sorted(folder.glob("model-*.safetensors"))[0]


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (lambda f: change(f, without(UP)), rf"has no tensor for '{UP}' \(1 missing\)"),
    "no head": (lambda f: change(f, without("lm_head.weight")), "has no tensor for 'lm_head.weight'"),
    "another head": (
        lambda f: change(f, renamed("lm_head", "score")),
        r"has no tensor for 'lm_head.weight' \(1 missing\): .* It has 'score.weight', which the model lacks",
    ),
    "a tensor more": (
        lambda f: change(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        "has 'model.layers.0.self_attn.q_proj.bias', which the model lacks",
    ),
    "a layer more": (
        lambda f: change(f, lambda t: t.update({UP.replace("1", "2"): t[UP].clone()})),
        "has 'model.layers.2.mlp.up_proj.weight', which the model lacks",
    ),
    "padded vocabulary": (
        lambda f: llama(f, vocab_size=2056),
        r"lm_head.weight has shape \(2056, 32\), the model \(2048, 32\)",
    ),
    "cut in half": (lambda f: cut(f, 200_000), r"llama/model.safetensors is damaged or cut short"),
    "cut in its header": (lambda f: cut(f, 100), r"llama/model.safetensors is damaged or cut short"),
    "empty": (lambda f: cut(f, 0), r"llama/model.safetensors is damaged or cut short"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_text("<html>404</html>"),
        r"llama/model.safetensors is damaged or cut short, or no safetensors file",
    ),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"llama/model.safetensors is a pointer of Git LFS.*git lfs pull",
    ),
    "a shard missing": (
        lambda f: first_shard(f).unlink(),
        r"model.safetensors.index.json names 'model-00001-of-\d+.safetensors', which is not there",
    ),
    "a shard cut": (
        lambda f: (file := first_shard(f)).write_bytes(file.read_bytes()[:-1]),
        r"llama/model-00001-of-\d+.safetensors is damaged or cut short",
    ),
    "a shard outside": (
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "x.safetensors")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
        ),
        r"names '../x.safetensors', which is not there",
    ),
    "an index that is none": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("[]")),
        "index.json is no index of safetensors files",
    ),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle, which can run code when it is read, and is not"),
    "nothing": (
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors and no model.safetensors.index",
    ),
    "4 bit": (
        lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"is quantised \(bitsandbytes; quantization_config in its config.json\)",
    ),
    "gptq": (
        lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        r"is quantised \(gptq;",
    ),
    "fp8 without a word": (
        lambda f: change(f, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        rf"model.safetensors has {UP} as F8_E4M3, which is quantised",
    ),
    "int8 without a word": (
        lambda f: change(f, lambda t: t.update({UP: t[UP].to(torch.int8)})),
        rf"model.safetensors has {UP} as I8, which is quantised",
    ),
    "other heads": (
        lambda f: edit(f, num_attention_heads=4, num_key_value_heads=4, head_dim=8),
        r"(?s)for another function than.*num_attention_heads: 4 there, 2 here",
    ),
    "another rotary base": (
        lambda f: edit(f, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        r"(?s)for another function than.*rope_parameters.rope_theta: 500000.0 there, 10000.0 here",
    ),
    "another family": (lambda f: edit(f, model_type="mistral"), r"(?s)model_type: 'mistral' there, 'llama' here"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter of PEFT, not a model"),
    "no config": (lambda f: (f / "config.json").unlink(), "is not a readable Hugging Face configuration"),
    "code": (
        lambda f: edit(f, auto_map={"AutoModelForCausalLM": "modeling.M"}),
        "names code of its own",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_weights_are_refused_by_name(kind: str, folder: Path) -> None:
    """With the same words before anything is spent and when they are read."""
    spoil, message = BROKEN[kind]
    spoil(folder)
    said = []
    for act in (check, load):
        with pytest.raises(ConfigError, match=message) as error:
            act(LLAMA, str(folder))
        said.append(str(error.value))
    assert said[0] == said[1]


def test_what_is_not_finite_is_refused_when_it_is_read(folder: Path) -> None:
    change(folder, lambda t: t[UP].view(-1)[7:8].fill_(torch.inf) and None)
    with pytest.raises(ConfigError, match=f"{UP} has values that are not finite"):
        load(LLAMA, str(folder))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{folder}/model.safetensors", "is a file. Give the folder that it lies in"),
        ("{folder}/none", "does not exist: there is no such file or folder"),
        ("{folder}@last", "'last' after the @ is no step of a run"),
        ("s3://bucket/model", "is no run, and other models are read from folders and by hub names only"),
    ],
)
def test_place_that_holds_no_weights_is_refused(place: str, message: str, folder: Path) -> None:
    for act in (check, load):
        with pytest.raises(ConfigError, match=message):
            act(LLAMA, place.format(folder=folder))


def test_hub_name_is_checked_by_the_headers_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faked: the hub's answers, which are those of a folder here."""

    def snapshot(place: str, *, local_files_only: bool = False, **_: Any) -> str:
        assert place == "org/model"
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(folder)

    def metadata(place: str) -> Any:
        tensors = {n: SimpleNamespace(shape=list(t.shape), dtype="F32") for n, t in load_file(file).items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    file, config = folder / "model.safetensors", transformers.AutoConfig.from_pretrained(folder)
    for module in ("weights", "architecture"):
        monkeypatch.setattr(f"relora_ray.modeling.{module}.missing", lambda name: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda place, **_: config)
    check(LLAMA, "org/model")
    assert torch.equal(load(LLAMA, "org/model").get_parameter(UP), load_file(file)[UP])
    change(folder, without(UP))
    for act in (check, load):
        with pytest.raises(ConfigError, match=rf"model.init_from='org/model' has no tensor for '{UP}'"):
            act(LLAMA, "org/model")


def test_no_weights_are_read_to_see_whether_they_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    to = weights.Stored.to
    monkeypatch.setattr(
        weights.Stored, "to", lambda self, device=None, dtype=None: read.append(str(device)) or to(self, device, dtype)
    )
    check(LLAMA, str(folder))
    assert set(read) == {"meta"}
    load(LLAMA, str(folder))
    assert set(read) == {"meta", "cpu"}


@pytest.fixture
def base(data: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(data, tmp_path, "name=base")


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_launch_refuses_before_ray_starts(base: RunConfig, folder: Path, tmp_path: Path, flag: list[str]) -> None:
    cut(folder, 200_000)
    raw = yaml.safe_load(TINY) | {"storage": str(tmp_path), "data": {"path": base.data.path, "seq_len": 24}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "relora_ray.launch", str(tmp_path / "run.yaml"), f"model.init_from={folder}"]
    done = subprocess.run([*command, *flag], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    said = done.stdout if flag else done.stderr
    assert said.count(f"{folder}/model.safetensors is damaged or cut short") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_run_that_has_begun_reads_its_source_no_more(base: RunConfig, folder: Path) -> None:
    cfg = base.model_copy(update={"model": base.model.model_copy(update={"init_from": str(folder)})})
    run(preflight(cfg))
    shutil.rmtree(folder)
    assert preflight(cfg).model.init_from == str(folder)


def test_source_that_is_a_run_is_checked_too(base: RunConfig, data: Path, tmp_path: Path) -> None:
    run(base)
    url = run_storage(base).url
    for source, change, message in (
        (url, "model.num_layers=1", "which the model lacks"),
        (url, "model.num_heads=4", r"(?s)another function.*num_attention_heads: 2 there, 4 here"),
        (f"{url}@5", "seed=3", "has no checkpoint at step 5"),
    ):
        cfg = tiny_config(data, tmp_path, "name=next", f"model.init_from={source}", change)
        with pytest.raises((ConfigError, CheckpointError), match=message):
            preflight(cfg)


def test_folder_that_is_called_like_a_step_is_itself(base: RunConfig, folder: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a@v2", "base@4"):
        shutil.copytree(folder, tmp_path / name)
        cfg = preflight(tiny_config(data, tmp_path, "name=next", f"model.init_from={tmp_path / name}"))
        assert torch.equal(new_model(check_run(cfg)).get_parameter(UP), load_file(folder / "model.safetensors")[UP])
    run(base)
    shutil.rmtree(tmp_path / "base@4")
    cfg = preflight(tiny_config(data, tmp_path, "name=next", f"model.init_from={tmp_path}/base@4"))
    trained = load_trained(run_storage(base), 4)
    dense = trained.method.dense_state_dict(trained.model)
    assert torch.equal(new_model(check_run(cfg)).get_parameter(UP), dense[UP])
    shutil.copytree(run_storage(base).url, tmp_path / "runs@home" / "base")
    here = tiny_config(data, tmp_path, "name=next", f"model.init_from={tmp_path}/runs@home/base")
    assert torch.equal(
        new_model(check_run(preflight(here))).get_parameter(UP),
        transformers.AutoModelForCausalLM.from_pretrained(f"{tmp_path}/base/model").get_parameter(UP),
    )


def test_published_checkpoint_is_checked_by_its_headers(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    llama(folder)
    settings = {"r": 4, "lora_alpha": 16}
    (folder / "relora_config.json").write_text(json.dumps(settings))
    change(folder, lambda t: t.update({UP.replace("weight", "lora_A.weight"): torch.ones(4, 32)}))
    cfg = tiny_config(data, tmp_path, f"model.init_from={folder}")
    with pytest.raises(ConfigError, match=r"the adapters of model.layers.1.mlp.up_proj are not whole"):
        preflight(cfg)
    change(folder, lambda t: t.update({UP.replace("weight", "lora_B.weight"): torch.ones(48, 4)}))
    preflight(cfg)
    edit(folder, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ConfigError, match=r"(?s)another function.*num_attention_heads: 4 there, 2 here"):
        preflight(cfg)


def test_run_whose_head_is_apart_is_no_source_for_a_tied_model(data: Path, tmp_path: Path) -> None:
    """One of two trained matrices would be lost without a word; the other way round nothing is."""
    apart, tied = tiny_config(data, tmp_path), tiny_config(data, tmp_path, "name=tied", "model.tie_embeddings=true")
    run(apart)
    run(tied)
    with pytest.raises(ConfigError, match=r"has .*lm_head.weight.* apart, and they are one weight in the run's model"):
        preflight(
            tiny_config(data, tmp_path, "name=c", "model.tie_embeddings=true", f"model.init_from={tmp_path}/tiny")
        )
    preflight(tiny_config(data, tmp_path, "name=d", f"model.init_from={tmp_path}/tied"))


def test_file_that_the_config_names_is_the_one_that_is_read(folder: Path) -> None:
    """As transformers reads it; another model lies where weights lie otherwise."""
    other = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "good.safetensors")
    save_file({name: tensor + 1 for name, tensor in other.items()}, folder / "model.safetensors", {"format": "pt"})
    edit(folder, transformers_weights="good.safetensors")
    check(LLAMA, str(folder))
    assert torch.equal(load(LLAMA, str(folder)).lm_head.weight, other["lm_head.weight"])
    edit(folder, transformers_weights="gone.safetensors")
    with pytest.raises(ConfigError, match=r"names 'gone.safetensors' as its weights \(transformers_weights\)"):
        check(LLAMA, str(folder))


@pytest.mark.parametrize(
    ("kind", "setting", "there", "here"),
    [("xlstm", "output_logit_soft_cap", 30.0, 2.0), ("xglm", "pad_token_id", 1, 9), ("roberta", "pad_token_id", 1, 9)],
)
def test_setting_that_changes_the_function_is_one(
    kind: str, setting: str, there: Any, here: Any, tmp_path: Path
) -> None:
    """Though others with such names do not: of LLaMA pad_token_id is a name."""
    own = {"is_decoder": True} if kind == "roberta" else {}
    configs = [small_config(transformers.CONFIG_MAPPING[kind](**{setting: value}, **own)) for value in (there, here)]
    transformers.AutoModelForCausalLM.from_config(configs[0]).save_pretrained(tmp_path / "source")
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(configs[1])
    with pytest.raises(ConfigError, match=f"{setting}: {there} there, {here} here"):
        check_weights(shell, str(tmp_path / "source"))


def test_padding_of_llama_is_a_name(folder: Path, tmp_path: Path) -> None:
    edit(folder, pad_token_id=9)
    check(LLAMA, str(folder))


def test_weights_alone_give_the_architecture(folder: Path, data: Path, tmp_path: Path) -> None:
    """A folder's, and a run's export; a run's own folder does not say it."""
    cfg = check_run(tiny_config(data, tmp_path, model={"init_from": str(folder)}))
    assert cfg.model.huggingface == str(folder)
    assert cfg.model.fingerprint
    assert torch.equal(new_model(cfg).state_dict()[UP], load_file(folder / "model.safetensors")[UP])
    run(cfg)
    on = check_run(tiny_config(data, tmp_path, "name=on", model={"init_from": f"{tmp_path}/tiny/model"}))
    assert torch.equal(new_model(on).state_dict()[UP], load_file(tmp_path / "tiny/model/model.safetensors")[UP])
    with pytest.raises(ConfigError, match=r"tiny' is a run's folder, which says no architecture .* or give its export"):
        check_run(tiny_config(data, tmp_path, "name=on", model={"init_from": f"{tmp_path}/tiny"}))
