"""A run is what its config.json said when it began, wherever that lay. One process; nothing is faked but a hub name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from relora_ray.checkpoint import list_manifests
from relora_ray.commands.checkpoints import copy
from relora_ray.commands.export import export
from relora_ray.config import ModelConfig, RunConfig
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.loop import identity_digest
from relora_ray.modeling.architecture import Architecture, hf_config, read_architecture
from relora_ray.modeling.model import build_model, embedding_rows
from relora_ray.modeling.small import small_config
from relora_ray.runs import setting
from relora_ray.runs.fork import fork
from relora_ray.runs.forkable import warm_start_digest
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained
from relora_ray.runs.setting import check_run, find_setting
from relora_ray.runtime.preflight import preflight
from relora_ray.runtime.sweep import _decisive, _goes_by_place, _refuse_another, check_sweep
from relora_ray.storage import Storage
from relora_ray.study import ablations
from relora_ray.study.spectrum import run_spectrum
from relora_ray.sweep.space import load_sweep
from tests.tiny import TINY, Crash, crash_at, losses, run, state_digest, tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers.LlamaConfig(**SIZES, max_position_embeddings=64).save_pretrained(tmp_path / "arch")
    return tmp_path / "arch"


@pytest.fixture
def hf(data: Path, tmp_path: Path, folder: Path) -> RunConfig:
    return tiny_config(data, tmp_path, "name=hf", model={"huggingface": str(folder)})


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def begun(cfg: RunConfig) -> None:
    with pytest.raises(Crash):
        run(cfg, crash_at(7, "train"))


def at(cfg: RunConfig, **model: Any) -> RunConfig:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=model)})


def test_edited_config_json_is_refused_by_what_differs(hf: RunConfig, folder: Path) -> None:
    begun(hf)
    edit(folder, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    with pytest.raises(
        ConfigError, match=r"(?s)is not the architecture.*num_attention_heads: 2 there, 4 here"
    ) as error:
        check_run(hf)
    assert "vocab_size" not in str(error.value)


def test_moved_folder_goes_on(hf: RunConfig, folder: Path, tmp_path: Path) -> None:
    begun(hf)
    shutil.move(folder, tmp_path / "elsewhere")
    edit(tmp_path / "elsewhere", transformers_version="4.0.0", _name_or_path="org/model", torch_dtype="float16")
    state, records = run(at(hf, huggingface=str(tmp_path / "elsewhere")))
    assert [r["step"] for r in records if r["kind"] == "attempt"] == [6]
    whole, _ = run(at(hf, huggingface=str(tmp_path / "elsewhere")).model_copy(update={"name": "whole"}))
    assert state_digest(state) == state_digest(whole)


def test_run_needs_its_folder_no_more(hf: RunConfig, folder: Path, data: Path, tmp_path: Path) -> None:
    """Resumed, exported, measured, copied, forked and taken weights from, on a machine that has not got it."""
    begun(hf)
    shutil.rmtree(folder)
    forked = hf.model_copy(update={"name": "forked", "method": hf.method.model_copy(update={"lora_rank": 3})})
    fork(forked, "hf", 6)
    run(preflight(hf))
    storage = run_storage(hf)
    assert storage.exists("model/config.json")
    assert export(storage, Storage(str(tmp_path / "out"))) == 12
    assert run_spectrum(storage).layers[0].rank > 0
    copied = Storage(str(tmp_path / "copied"))
    copy(storage, copied, None)
    assert load_trained(copied).architecture == load_trained(storage).architecture
    assert run(forked)[0].position.step == 12
    later = tiny_config(data, tmp_path, "name=later", f"model.init_from={storage.url}")
    assert losses(run(preflight(later))[1])[1] < 8
    with pytest.raises(ConfigError, match="does not exist: there is no such file or folder"):
        check_run(at(hf, huggingface=str(tmp_path / "never")))


def test_workers_take_what_is_stored(hf: RunConfig, folder: Path) -> None:
    """The config that they are sent names a folder that they have not got."""
    cfg = check_run(hf)
    begun(hf)
    shutil.rmtree(folder)
    assert cfg.model.fingerprint
    assert run(hf)[0].position.step == 12


def test_config_edited_while_a_run_starts_is_refused(hf: RunConfig, folder: Path) -> None:
    cfg = check_run(hf)
    edit(folder, rms_norm_eps=1e-5)
    with pytest.raises(ConfigError, match=f"but the run needs {cfg.model.fingerprint}"):
        run(cfg)
    assert list_manifests(run_storage(hf)) == []


def test_stored_content_is_what_it_was(hf: RunConfig, folder: Path) -> None:
    """Also before a checkpoint has fixed it."""
    with pytest.raises(Crash):
        run(hf, crash_at(0, "eval"))
    assert list_manifests(run_storage(hf)) == []
    setting = find_setting(run_storage(hf))
    content = json.loads(setting.get("architecture.json"))
    setting.place.put("architecture.json", json.dumps(content | {"rms_norm_eps": 1.0}).encode())
    with pytest.raises(CheckpointError, match=r"architecture.json is not what config.yaml beside it says"):
        setting.architecture()
    setting.place.put("architecture.json", b"[]")
    with pytest.raises(CheckpointError, match=r"architecture.json is not the architecture of a run"):
        setting.architecture()


def test_hub_name_is_looked_up_once(hf: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = transformers.AutoConfig.from_pretrained(folder)
    asked: list[str] = []

    def lookup(place: str, **_: Any) -> Any:
        asked.append(place)
        return known

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lookup)
    monkeypatch.setattr("relora_ray.modeling.architecture.missing", lambda name: "")
    named = at(hf, huggingface="org/model")
    begun(named)
    assert set(asked) == {"org/model"}
    asked.clear()
    known.rms_norm_eps = 1.0  # somebody pushes there
    with pytest.raises(Crash):
        run(named, crash_at(9, "train"))
    assert asked == []


def test_run_of_a_version_that_went_by_the_place_goes_on(
    hf: RunConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "_with_architecture", lambda cfg, known: cfg)
    begun(hf)
    monkeypatch.undo()
    assert not find_setting(run_storage(hf)).place.exists("architecture.json")
    forked = hf.model_copy(update={"name": "forked"})
    fork(forked, "hf", 6)
    state, records = run(preflight(hf))
    assert [r["step"] for r in records if r["kind"] == "attempt"] == [6]
    assert state_digest(state) == state_digest(run(hf.model_copy(update={"name": "whole"}))[0])
    assert run(forked)[0].position.step == 12
    shutil.copytree(folder, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"model.huggingface: '.*/arch' there, '.*/b' here"):
        check_run(at(hf, huggingface=str(tmp_path / "b")))


def test_identity_of_sizes_and_of_earlier_runs_is_as_it_was() -> None:
    """Digests that the version before this made: of checkpoints, shared warm starts and tables of runs."""
    for model, digests in (
        ({}, ("e38ad0ef1aec07b5", "5baed078a429", "e5839ed5280c5600")),
        ({"model": {"huggingface": "some/where"}}, ("a599132a121cda0b", "0854461cae2c", "4cabf1d283234cf5")),
    ):
        cfg = tiny_config(Path("data"), Path("runs"), **model)
        assert (identity_digest(cfg, "f" * 16), warm_start_digest(cfg), ablations.identity(cfg)) == digests


def test_code_of_an_architecture_is_not_run(hf: RunConfig, folder: Path, tmp_path: Path) -> None:
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(folder, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    with pytest.raises(ConfigError, match=r"names code of its own .* use a copy without auto_map"):
        check_run(hf)
    edit(folder, model_type="novel")
    with pytest.raises(ConfigError, match="needs code of its own"):
        check_run(hf)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "novel"}, "is not a readable Hugging Face configuration"),
        ({"hidden_size": "wide"}, "is not a readable Hugging Face configuration"),
    ],
)
def test_unreadable_config_json_is_refused(hf: RunConfig, folder: Path, settings: Any, message: str) -> None:
    edit(folder, **settings)
    with pytest.raises(ConfigError, match=message):
        check_run(hf)


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma3Config(text_config=SIZES | {"num_key_value_heads": 2, "head_dim": 16}),
        transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=4, pad_token_id=2040),
    ],
    ids=["gemma3", "gpt2"],
)
def test_vocabulary_reaches_the_language_model(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    for rows in (2500, 1000):
        model = ModelConfig(huggingface=str(tmp_path), vocab_size=rows)
        architecture = read_architecture(str(tmp_path))
        built = build_model(model, seq_len=24, seed=0, device="meta", architecture=architecture)
        assert embedding_rows(built) == rows
        assert built.config.get_text_config().vocab_size == rows


def test_vocabulary_reaches_the_table_for_each_layer(tmp_path: Path) -> None:
    small_config(transformers.CONFIG_MAPPING["gemma4_text"]()).save_pretrained(tmp_path)
    model = ModelConfig(huggingface=str(tmp_path), vocab_size=300)
    built = build_model(model, seq_len=24, seed=0, architecture=read_architecture(str(tmp_path)))
    tables = {name: len(p) for name, p in built.named_parameters() if "embed_tokens" in name}
    assert set(tables.values()) == {300}
    assert len(tables) == 2


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma3Config(text_config=SIZES | {"max_position_embeddings": 16, "num_key_value_heads": 2}),
        transformers.GPT2Config(n_positions=16),
        transformers.MptConfig(max_seq_len=16),
        transformers.BartConfig(max_position_embeddings=16),
        transformers.LlamaConfig(**SIZES, max_position_embeddings=16),
    ],
    ids=lambda c: c.model_type,
)
def test_rows_beyond_the_positions_are_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    model = ModelConfig(huggingface=str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.seq_len=17 is more than the 16 positions"):
        hf_config(model, 17, read_architecture(str(tmp_path)))
    hf_config(model, 16, read_architecture(str(tmp_path)))


def test_stored_content_is_all_that_a_model_needs() -> None:
    """Every architecture with defaults of its own comes back from its content as it was."""
    unstable = {"moshi"}  # fills in a field when it is read again
    for kind in sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = transformers.CONFIG_MAPPING[kind]()
        except Exception:  # one that has none
            continue
        architecture = Architecture(json.loads(json.dumps(config.to_dict())))
        if kind not in unstable:
            assert architecture.differences(architecture) == []
            again = json.loads(json.dumps(architecture.hf_config().to_dict()))
            assert again == architecture.content, kind


SWEEP = {"space": {"method.lora_rank": [2, 4]}, "seeds": [1]}


def test_sweep_is_of_one_architecture(hf: RunConfig, folder: Path, data: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(TINY) | {"name": "s", "storage": str(tmp_path), "sweep": SWEEP}
    raw |= {"model": {"huggingface": str(folder)}, "data": {"path": str(data), "seq_len": 24}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    sweep, place = check_sweep(load_sweep(str(tmp_path / "s.yaml")))
    fingerprint = read_architecture(str(folder)).fingerprint
    assert sweep.first_run.model.fingerprint == fingerprint
    assert _decisive(sweep)["identity"]["model.fingerprint"] == fingerprint
    # One that a version began which went by the place is gone on with as it is.
    by_place = _decisive(load_sweep(str(tmp_path / "s.yaml"), [f"data.fingerprint={sweep.first_run.data.fingerprint}"]))
    place.put("sweep.yaml", yaml.safe_dump(by_place | {"began": 1.0}, sort_keys=False).encode())
    assert _goes_by_place(place)
    again, _ = check_sweep(load_sweep(str(tmp_path / "s.yaml")))
    assert again.first_run.model.fingerprint == ""
    assert _refuse_another(place, again) == 1.0


def test_tables_of_runs_know_an_architecture_by_its_content(
    hf: RunConfig, folder: Path, data: Path, tmp_path: Path
) -> None:
    raw = yaml.safe_load(TINY) | {"storage": str(tmp_path), "data": {"path": str(data), "seq_len": 24}}
    raw = {k: v for k, v in raw.items() if k not in ("name", "seed")} | {"model": {"huggingface": str(folder)}}
    row = {"name": "a", "label": "a"}
    table = ablations.Table.model_validate({"title": "t", "base": raw, "seeds": (1,), "grid": {}, "rows": (row,)})
    ablations._architecture.cache_clear()
    first = table.config(table.rows[0], {}, 1, [])
    shutil.copytree(folder, tmp_path / "b")
    moved = table.config(table.rows[0], {}, 1, [f"model.huggingface={tmp_path / 'b'}"])
    edit(folder, rms_norm_eps=1e-5)
    ablations._architecture.cache_clear()
    edited = table.config(table.rows[0], {}, 1, [])
    assert ablations.identity(first) == ablations.identity(moved) != ablations.identity(edited)
    # What a version before this has done, or only begun, is not done again.
    before = ablations._named(first.name.rpartition("-")[0], at(first, fingerprint=""))
    results = ablations.Results(tmp_path)
    results.records[ablations.identity(before)] = {"loss": 1.0}
    assert results.get(edited) == {"loss": 1.0}
    assert ablations._as_it_began(first) == first
    run_storage(before).put("config.yaml", b"")
    assert ablations._as_it_began(first) == before


def test_fingerprint_needs_an_architecture_to_be_of(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.fingerprint='abc' has no effect without model.huggingface"):
        tiny_config(data, tmp_path, "model.fingerprint=abc")


def test_quantised_architecture_is_trained_dense(hf: RunConfig, folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    run(preflight(hf))
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{run_storage(hf).url}/model")
    assert not hasattr(model.config, "quantization_config")
    assert all(p.dtype == torch.float32 for p in model.parameters())
