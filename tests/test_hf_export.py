"""An exported folder is the model that was trained, for whoever has transformers only. Nothing is faked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from relora_ray.commands.export import export
from relora_ray.config import RunConfig
from relora_ray.data.prepare import main as prepare
from relora_ray.errors import ExportError
from relora_ray.methods.full import Full
from relora_ray.modeling import hf_export
from relora_ray.modeling.small import small_config
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained
from relora_ray.runs.setting import find_setting
from relora_ray.runtime.preflight import preflight
from relora_ray.storage import Storage
from tests.test_architecture import SIZES, edit
from tests.tiny import run, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "arch"


def trained(cfg: RunConfig) -> Path:
    """The folder that a run of two updates or so leaves."""
    run(preflight(cfg))
    return Path(run_storage(cfg).url, "model")


def hf(data: Path, tmp_path: Path, folder: Path, config: Any, **model: Any) -> RunConfig:
    config.save_pretrained(folder)
    short = {"method": {"kind": "relora", "lora_rank": 4, "alpha": 8, "merge_every_steps": 2}, "steps": 2}
    return tiny_config(data, tmp_path, "name=hf", "schedule.warmup_steps=0", model={"huggingface": str(folder)} | model,
                       schedule={"kind": "cosine"}, **short)  # fmt: skip


def ids_of(folder: Path) -> tuple[Any, Any, Any]:
    said = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
    config, generation = ((s.get("bos_token_id"), s.get("eos_token_id"), s.get("pad_token_id")) for s in said)
    assert config == generation
    return config


@pytest.fixture
def bos_data(tmp_path: Path) -> Path:
    """Data of a tokenizer that has <s> and </s>."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tok/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    )
    texts = (" ".join(f"w{(n * m) % 60}" for m in range(40)) for n in range(60))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def test_ids_are_the_tokenizers(bos_data: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--out", str(tmp_path / "d"), "--tokenizer", str(bos_data / "tok"), "--validation-fraction", "0.2"]
    command = ["prepare", str(bos_data / "text.jsonl"), *options]
    monkeypatch.setattr("sys.argv", command)
    prepare()
    sizes = tiny_config(tmp_path / "d", tmp_path, "name=sizes", "model.vocab_size=64")
    out = trained(sizes)
    assert ids_of(out) == (1, 2, None)
    assert transformers.AutoTokenizer.from_pretrained(out).bos_token_id == 1
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 64}, bos_token_id=7, eos_token_id=[9, 2], pad_token_id=5)
    assert ids_of(trained(hf(tmp_path / "d", tmp_path, folder, config))) == (1, [9, 2], 5)


def test_ids_that_no_tokenizer_has_are_the_architectures(data: Path, tmp_path: Path, folder: Path) -> None:
    """The data's has one token that is both ends, and no padding."""
    config = transformers.LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=5)
    end = transformers.AutoTokenizer.from_pretrained(data / "tokenizer").eos_token_id
    assert ids_of(trained(hf(data, tmp_path, folder, config))) == (end, end, 5)
    made = hf_export.export_config(config, None, end_token_id=9, own_ids=True)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, 5)
    made = hf_export.export_config(transformers.LlamaConfig(**SIZES), None, end_token_id=9, own_ids=False)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (9, 9, None)
    beyond = transformers.LlamaConfig(**SIZES, bos_token_id=128000, eos_token_id=[128001], pad_token_id=-1)
    made = hf_export.export_config(beyond, None, end_token_id=9, own_ids=True)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, 9, None)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("phi", {"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25, "rope_theta": 5e5}),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5, "rotary_emb_base": 5e5}),
        ("stablelm", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5, "rope_theta": 5e5}),
    ],
)
def test_rotary_settings_are_where_version_4_looks_for_them(
    kind: str, settings: dict[str, float], expected: dict[str, float], tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5} | settings
    config = small_config(transformers.CONFIG_MAPPING[kind](rope_parameters=rope))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hf_export.write_hf_folder(model, dense, config, str(tmp_path), dtype=torch.float32)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {name: said.get(name) for name in expected} == expected


def test_rotary_settings_of_layers_are_where_version_4_looks_for_them(tmp_path: Path) -> None:
    """Gemma 3 has one base for layers that see all and one for those that see nearby tokens."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = small_config(transformers.Gemma3TextConfig(rope_parameters=rope))
    for said in (config, transformers.Gemma3Config(text_config=config.to_dict())):
        said.save_pretrained(tmp_path)
        before = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        hf_export._tell_earlier_versions(tmp_path / "config.json")
        raw = json.loads((tmp_path / "config.json").read_text())
        raw = raw.get("text_config", raw)
        assert (raw["rope_theta"], raw["rope_local_base_freq"], raw["rope_scaling"]["factor"]) == (5e5, 2e4, 8.0)
        assert transformers.AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_whole_numbers_are_exported_as_they_are(tmp_path: Path) -> None:
    config = small_config(transformers.DeepseekV4Config())
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("tid2eid")}
    assert tables
    for table in tables.values():
        table.copy_(torch.randint(0, 4, table.shape))
        table[0, 0] = 257  # a number that bf16 has not, of an expert that no token here goes to
    dense = Full(tiny_config(tmp_path, tmp_path)).dense_state_dict(model)
    hf_export.write_hf_folder(
        model, dense, hf_export.export_config(config, None, end_token_id=1, own_ids=True), str(tmp_path / "out"),
        dtype=torch.bfloat16,
    )  # fmt: skip
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.get_buffer(name), table) for name, table in tables.items())


@pytest.mark.parametrize("kind", ["roberta", "xglm"])
def test_padding_that_decides_positions_stays_the_architectures(kind: str, tmp_path: Path) -> None:
    config = small_config(transformers.CONFIG_MAPPING[kind](pad_token_id=1, is_decoder=True))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=9)
    made = hf_export.export_config(config, tokenizer, end_token_id=0, own_ids=True)
    assert made.pad_token_id == 1
    hf_export.write_hf_folder(model, dense, made, str(tmp_path), dtype=torch.float32)


def test_settings_of_the_architecture_stay(data: Path, tmp_path: Path, folder: Path) -> None:
    settings = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "attention_bias": True}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1234.0}
    config = transformers.LlamaConfig(**settings, rope_parameters=rope, max_position_embeddings=77)
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    cfg = hf(data, tmp_path, folder, config, vocab_size=2100)
    edit(folder, quantization_config=quantised, transformers_weights="elsewhere.safetensors", use_cache=False)
    out = trained(cfg)
    said = json.loads((out / "config.json").read_text())
    assert {k: said[k] for k in settings} == settings | {"vocab_size": 2100}
    assert said["rope_parameters"] == rope
    assert said["rope_theta"] == 1234.0, "transformers 4 would take 10000"
    assert said["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert said["max_position_embeddings"] == 77
    assert said["use_cache"]
    assert not {"quantization_config", "transformers_weights"} & said.keys()


def test_vocabulary_of_a_nested_config_is_exported(data: Path, tmp_path: Path, folder: Path) -> None:
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    images = ["multi_modal_projector", "vision_tower"]
    out = trained(hf(data, tmp_path, folder, config, vocab_size=2100, frozen=images))
    said = transformers.AutoConfig.from_pretrained(out).get_text_config()
    end = transformers.AutoTokenizer.from_pretrained(out).eos_token_id
    assert (said.vocab_size, said.eos_token_id) == (2100, end)


def test_tied_tensors_are_stored_once(data: Path, tmp_path: Path) -> None:
    out = trained(tiny_config(data, tmp_path, "model.tie_embeddings=true"))
    names = load_file(out / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture
def finished(data: Path, tmp_path: Path) -> Storage:
    """A run whose model has yet to be exported."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    shutil.rmtree(f"{run_storage(cfg).url}/model")
    return run_storage(cfg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_seen_to_be_right(finished: Storage, tmp_path: Path, dtype: torch.dtype) -> None:
    export(finished, Storage(str(tmp_path / "out")), dtype=dtype)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def lose_a_tensor(state: dict[str, torch.Tensor]) -> None:
    state.pop("model.layers.1.mlp.up_proj.weight")


def swap_two(state: dict[str, torch.Tensor]) -> None:
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    state[one], state[two] = state[two], state[one]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (lose_a_tensor, {}, r"(missing_keys|has no tensor for).*model\.layers\.1\.mlp\.up_proj\.weight"),
        (swap_two, {}, r"model\.layers\.0\.mlp\.gate_proj\.weight has other values there"),
        (None, {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4}, "num_attention_heads: 2 there, 4"),
        (None, {"rms_norm_eps": 0.5}, r"rms_norm_eps: 1e-06 there, 0\.5 here"),
    ],
)
def test_folder_that_is_not_the_model_does_not_count(
    finished: Storage, tmp_path: Path, spoil: Any, settings: Any, message: str, large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As if transformers saved something else than it was given."""
    save = transformers.LlamaForCausalLM.save_pretrained

    def wrong(self: Any, folder: str, state_dict: dict[str, torch.Tensor], **given: Any) -> None:
        if spoil is not None:
            spoil(state_dict)
        save(self, folder, state_dict=state_dict, **given)
        edit(Path(folder), **settings)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", wrong)
    if large:
        monkeypatch.setattr(hf_export, "LOADED_UP_TO_BYTES", 0)
    out = Storage(str(tmp_path / "out"))
    if large and spoil is swap_two:  # which names, shapes and headers do not show
        export(finished, out)
        return
    with pytest.raises(ExportError, match=rf"(?s)does not load as the model that was trained: .*{message}"):
        export(finished, out)
    assert out.list() == []


def test_logits_tell_what_settings_do_not(finished: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export, "function_differences", lambda there, here: [])
    save = transformers.LlamaForCausalLM.save_pretrained

    def wrong(self: Any, folder: str, **given: Any) -> None:
        save(self, folder, **given)
        edit(Path(folder), rope_parameters={"rope_type": "default", "rope_theta": 20.0})

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", wrong)
    with pytest.raises(ExportError, match="its logits differ by"):
        export(finished, Storage(str(tmp_path / "out")))


def test_large_model_is_not_loaded_for_the_test(
    finished: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(hf_export, "LOADED_UP_TO_BYTES", 0)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", never)
    export(finished, Storage(str(tmp_path / "out")))
    assert "is not loaded for a test" in caplog.text
    assert (tmp_path / "out/config.json").exists()


def test_tokenizer_that_an_architecture_reads_otherwise_is_found(tmp_path: Path, data: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    hf_export.check_exported_tokenizer(str(tmp_path), tokenizer)
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ExportError, match="makes other tokens when it is loaded"):
        hf_export.check_exported_tokenizer(str(tmp_path), tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="does not load beside the model"):
        hf_export.check_exported_tokenizer(str(tmp_path), tokenizer)


def test_tokenizer_that_auto_tokenizer_reads_otherwise_is_said(
    bos_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers forces a class on Qwen2: words become letters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bos_data / "tok")
    for config, said in ((transformers.LlamaConfig(), False), (transformers.Qwen2Config(), True)):
        config.save_pretrained(bos_data / "tok")
        hf_export.check_exported_tokenizer(str(bos_data / "tok"), tokenizer)
        assert ("AutoTokenizer reads the data's tokenizer as a Qwen2Tokenizer" in caplog.text) == said


def test_config_is_put_last(finished: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, put = Storage(str(tmp_path / "out")), Storage.put_file
    names: list[str] = []

    def note(self: Storage, path: str, source: str) -> None:
        names.append(path) if self.url == out.url else None
        put(self, path, source)

    monkeypatch.setattr(Storage, "put_file", note)
    export(finished, out)
    assert names[-1] == "config.json"
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= set(names)


def test_run_that_fails_to_export_exports_when_started_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(data, tmp_path)
    monkeypatch.setattr(hf_export, "TOLERANCE", {"cpu": -1.0})
    with pytest.raises(ExportError, match="Nothing is lost"):
        run(cfg)
    monkeypatch.undo()
    assert run(cfg)[0].position.step == 12
    assert (tmp_path / "tiny/model/config.json").exists()
    trained = load_trained(run_storage(cfg))
    assert find_setting(run_storage(cfg)).config() == trained.cfg
