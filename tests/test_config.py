"""Configs: loading, overrides, and messages with key, value, rule and fix."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from relora_ray.config.file import load_config, parse_config, parse_mapping, to_yaml
from relora_ray.config.sizes import LLAMA_SIZES
from relora_ray.errors import ConfigError
from tests.tiny import TINY, tiny_config

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs/quickstart.yaml"
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in ("ablations", "sweeps"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_shipped_config_loads(path: Path) -> None:
    cfg = load_config(path)
    if path.parent.name in ("full", "lora", "relora"):
        assert cfg.method.kind == path.parent.name
        assert cfg.model.size == path.stem
        assert cfg.name == f"{path.parent.name}-{path.stem}"


def test_every_size_ships_for_every_method() -> None:
    shipped = {(p.parent.name, p.stem) for p in SHIPPED}
    assert {(m, s) for m in ("full", "lora", "relora") for s in LLAMA_SIZES} <= shipped


def test_overrides_change_keys_and_leave_the_rest() -> None:
    plain, changed = parse_config(TINY), parse_config(TINY, ["optimizer.learning_rate=3e-4", "seed=9"])
    assert changed.optimizer.learning_rate == 3e-4
    assert changed.seed == 9
    assert changed.model == plain.model


def test_yaml_round_trip() -> None:
    cfg = parse_config(TINY)
    assert parse_config(to_yaml(cfg)) == cfg


def test_config_is_frozen() -> None:
    cfg = parse_config(TINY)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.steps = 5


def test_identity_leaves_out_what_does_not_decide_the_result() -> None:
    first = parse_config(TINY)
    operational = ["cluster.workers=4", "train.micro_batch_rows=2", "checkpoint.save_every_steps=5", "name=other"]
    assert parse_config(TINY, operational).identity() == first.identity()
    for item in ("seed=4", "method.lora_rank=2", "optimizer.beta2=0.9", "global_batch_rows=3", "data.seq_len=8"):
        assert parse_config(TINY, [item]).identity() != first.identity(), item


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimzer.learning_rate=1"], ["unknown key optimzer", "Did you mean 'optimizer'?"]),
        (["method.lora_rnk=8"], ["unknown key method.lora_rnk=8", "Did you mean 'lora_rank'?"]),
        (["train.micro_batch=8"], ["unknown key train.micro_batch=8", "Did you mean 'micro_batch_rows'?"]),
        (["method.reset.knd=zero"], ["unknown key method.reset.knd", "Did you mean 'kind'?"]),
        (["method.kind=rellora"], ["method.kind='rellora'", "Did you mean 'relora'?"]),
        (["model.size=61m"], ["model.size='61m'", "Did you mean '60m'?"]),
        (["steps=many"], ["steps='many'", "whole number", "Optimizer updates in the whole run"]),
        (["optimizer.learning_rate=-1"], ["optimizer.learning_rate=-1", "greater than 0"]),
        (["optimizer.learning_rate=.nan"], ["optimizer.learning_rate=nan", "finite"]),
        (["method.reset.ratio=1.5"], ["method.reset.ratio=1.5", "less than 1"]),
        (["method.lora_rank=33"], ["method.lora_rank=33 is more than 32", "Use a rank of at most 32"]),
        (["method.target_modules=[q_proj,v_prj]"], ["'v_prj'", "Did you mean 'v_proj'?"]),
        (["method.target_modules=[]"], ["method.target_modules=[]", "must name at least one layer"]),
        (["method.target_modules=q_proj"], ["method.target_modules='q_proj' must be all-linear or a list of names"]),
        (["method.target_modules=[q_proj,q_proj]"], ["each once"]),
        (["steps=13:20"], ["steps='13:20'", "whole number"]),
        (["steps=true"], ["steps=True is neither a number"]),
        (["optimizer.learning_rate=true"], ["optimizer.learning_rate=True is neither"]),
        (["data.path=s3:/bucket"], ["data.path='s3:/bucket' is half a URL"]),
        (["storage=s3://"], ["storage='s3://' is half a URL"]),
        (["storage=file://runs"], ["storage='file://runs' is relative"]),
        (["storage=$HOME/runs"], ["storage='$HOME/runs' has a $"]),
        (["storage='  '"], ["storage='  ' is blank"]),
        (["model.size=9m"], ["model.size='9m' has no effect"]),
        (["schedule.restart_warmup_steps=0"], ["schedule.restart_warmup_steps=0", "plain cosine"]),
        (["schedule.kind=constant", "schedule.restart_warmup_steps=0", "schedule.min_lr_ratio=0"], ["has no effect"]),
        (["method.warm_start_steps=0", "method.warm_start_lr_ratio=0.5"], ["method.warm_start_lr_ratio=0.5 has no"]),
        (["method.reset={ratio: 0.5}"], ["method.reset.ratio=0.5 has no effect with method.reset.kind=zero"]),
        (["checkpoint.keep_every_steps=5"], ["checkpoint.keep_every_steps=5 is not a multiple"]),
        (["cluster.gpus_per_worker=2"], ["cluster.gpus_per_worker=2", "at most 1"]),
        (["method.kind=full"], ["method.kind=full has none. Use schedule.kind=cosine ~schedule.restart_warmup_steps"]),
        (["method.kind=full", "method.alpha=3"], ["unknown key method.alpha=3.", "It belongs to kind galore and lora"]),
        (["method.rank=4"], ["unknown key method.rank=4.", "The rank is method.lora_rank of lora and relora"]),
        (["lora_rank=8"], ["unknown key lora_rank=8. It is method.lora_rank."]),
        (["learning_rte=8"], ["unknown key learning_rte=8. Did you mean 'optimizer.learning_rate'?"]),
        (["schedule.merge_every_steps=3"], ["It is method.merge_every_steps."]),
        (["lr=1e-3"], ["unknown key lr=0.001. The learning rate is optimizer.learning_rate."]),
        (["optimizer.lr=1e-3"], ["unknown key optimizer.lr=0.001. The learning rate is optimizer.learning_rate."]),
        (["batch_size=8"], ["unknown key batch_size=8. Rows per update over all workers are global_batch_rows"]),
        (["num_workers=8"], ["unknown key num_workers=8. The number of training processes is cluster.workers."]),
        (["use_gpu=true"], ["unknown key use_gpu=True. Training on GPUs is cluster.gpus_per_worker=1."]),
        (["epochs=3"], ["unknown key epochs=3. The length of a run is steps, in updates, or tokens."]),
        (["model.size=125m"], ["model.size='125m'", "Did you mean '130m'?"]),
        (["model.size=1.3B"], ["Did you mean '1b'?"]),
        (["schedule.kind=cosin"], ["must be one of constant, linear, cosine, ", "Did you mean 'cosine'?"]),
        (["method.lora_rank=x"], ["method.lora_rank='x' must be a whole number."]),
        (["train.skip_steps=5"], ["train.skip_steps=5 must be a list."]),
        (["cluster=2"], ["cluster=2 must be a section of keys and values."]),
        (["~method.alhpa"], ["override ~method.alhpa drops nothing", "Did you mean 'method.alpha'?"]),
        (["~method.alpha=2"], ["~key drops a key, and takes no value"]),
        (["~steps"], ["steps is missing: it has no default"]),
        (["storage=my runs #1"], ["override storage=...: YAML takes what follows a blank and # for a comment."]),
        (["method.warm_start=0.25"], ["method.warm_start=0.25 is no share: write method.warm_start: 25%."]),
        (["method.warm_start=3"], ["A number of updates is method.warm_start_steps=3."]),
        (["method.warm_start=100%"], ["method.warm_start='100%' is no share", "above 0 and below 100"]),
        (
            ["schedule.warmup_steps=5%"],
            ["is a share, and this key is a number of updates. Write it as schedule.warmup: 5%"],
        ),
        (
            ["method.cycles=2"],
            ["method.cycles=2 does not divide the 9 updates", "Use steps=11 or 13, cycles=1 or 3, or a"],
        ),
        (["method.cycles=0"], ["method.cycles=0 is no number of cycles"]),
        (["steps=3", "method.cycles=3", "method.warm_start=25%"], ["does not fit steps=3", "Use steps=4 or more"]),
        (["steps=3", "method.warm_start=25%"], ["not one cycle is left. Use steps=4 or more"]),
        (["method.merge_every_steps=4"], ["cycles end at 11 and 15", "not at steps=12", "use steps=11"]),
        (["method.merge_every_steps={0: 3, 6: 4}"], ["cycles end at 10 and 14", "not at steps=12", "use steps=10"]),
        (["method.merge_every_steps={0: 3, 7: 1}"], ["changes at step 7, where no cycle begins", "at 6 and 9."]),
        (["method.merge_every_steps={3: 3}"], ["method.merge_every_steps={3: 3} must say first what holds at step 0"]),
        (["method.merge_every_steps={0: 0}"], ["method.merge_every_steps={0: 0} must give whole numbers above 0"]),
        (["method.merge_every_steps=0"], ["method.merge_every_steps", "greater than 0"]),
        (
            ["method.merge_every_steps={0: 3, 9: 3}", "schedule.restart_every_steps=3"],
            ["the learning rate restarts at every merge"],
        ),
        (
            ["method.merge_every_steps={0: 3, 6: 2, 8: 4}", "schedule.restart_warmup_steps=2"],
            ["schedule.restart_warmup_steps=2 is not less than the 2 steps"],
        ),
        (["method.lora_rank={0: 4, 12: 2}"], ["method.lora_rank changes at step 12", "begin at 9."]),
        (["method.lora_rank={0: 4, 3: 2}"], ["method.lora_rank changes at step 3", "begin at 6."]),
        (["method.lora_rank={0: 4, 6: 33}"], ["method.lora_rank={0: 4, 6: 33} is more than 32"]),
        (["method.lora_rank={0: 4, 6: 2.5}"], ["must give whole numbers above 0"]),
        (["method.lora_rank={0: 4, 6.5: 2}"], ["must give whole numbers above 0"]),
        (["method.lora_rank={}"], ["must give whole numbers above 0"]),
        (["method={kind: lora, lora_rank: {0: 4, 6: 2}}", "schedule.restart_every_steps=3"], ["lora never merges"]),
        (["method.warm_start_steps=12"], ["method.warm_start_steps=12 is not less than steps=12"]),
        (["method.warm_start_steps=50"], ["method.warm_start_steps=50 is not less than steps=12"]),
        (
            ["train.micro_batch_rows=4"],
            ["global_batch_rows=6", "train.micro_batch_rows=4", "micro_batch_rows=2 or global_batch_rows=8"],
        ),
        (
            ["train.micro_batch_rows_by_device={H100: 4}"],
            [
                "global_batch_rows=6",
                "train.micro_batch_rows_by_device.H100=4",
                "use train.micro_batch_rows_by_device.H100=2",
            ],
        ),
        (["train.micro_batch_rows_by_device={H100: 0}"], ["micro_batch_rows_by_device.H100", "greater than 0"]),
        (["schedule.restart_every_steps=4"], ["schedule.restart_every_steps=4", "not a multiple", "use 3 or 6"]),
        (["schedule.restart_warmup_steps=3"], ["schedule.restart_warmup_steps=3 is not less than the 3 steps"]),
        (["schedule.warmup_steps=4"], ["schedule.warmup_steps=4 is longer than the 3 steps"]),
        (["schedule.kind=linear"], ["schedule.restart_warmup_steps=1 has no effect with schedule.kind=linear"]),
        (["model.num_heads=5"], ["model.hidden_size=32 with model.num_heads=5"]),
        (["model.huggingface=gpt2"], ["model.hidden_size=32 is given together with model.huggingface='gpt2'"]),
        (["name=a/b"], ["name='a/b'", "pattern"]),
        (["name=a."], ["name='a.'", "pattern"]),
        (["name=a..b"], ["name='a..b'", "pattern"]),
        (["name=.."], ["name='..'", "pattern"]),
        (["storage=s3://bucket/run*"], ["storage='s3://bucket/run*' has a *", "Use letters"]),
        (["data.path=/data/[a]"], ["data.path='/data/[a]' has a ["]),
        (["data.path=/data/../x"], ["data.path='/data/../x' has a part . or .."]),
        (["model.init_from=s3://bucket//run@5"], ["model.init_from='s3://bucket//run@5' has an empty part"]),
        (["train.skip_steps=[12]"], ["train.skip_steps has 12", "they are 0 to 11"]),
        (
            ["storage_options={s3_additional_kwargs: {SSECustomerKey: hunter2}}"],
            ["s3_additional_kwargs.SSECustomerKey"],
        ),
        (["storage_options={client_kwargs: {password: hunter2}}"], ["client_kwargs.password must not be written out"]),
        (["storage_options=[{secret: hunter2}]"], ["storage_options=***"]),
        (["secret=hunter2"], ["unknown key secret=***"]),
        (["sas=hunter2"], ["unknown key sas=***"]),
        (["storage_optons.secret=hunter2"], ["unknown key storage_optons=***", "Did you mean 'storage_options'?"]),
        (["storage={secret: hunter2}"], ["storage=*** must be text"]),
        (["storage_options.secret=[hunter2"], ["override storage_options.secret=...: the value is not valid YAML"]),
        (["storage_options.secret=*hunter2"], ["override storage_options.secret=...: the value is not valid YAML"]),
        (["seed.secret=hunter2"], ["override seed.secret=...: 'seed' is a value, not a section"]),
        (["storage_options.sas=hunter2"], ["storage_options.sas must not be written out", "sas: $STORAGE_SAS"]),
        (["storage_options.username=hunter2"], ["storage_options.username must not be written out"]),
        (["storage_options.secret=1234"], ["storage_options.secret must not be written out"]),
        (["storage_options.sas=[hunter2]"], ["storage_options.sas must not be written out"]),
        (
            ["storage_options={client_kwargs: {headers: {Authorization: hunter2}}}"],
            ["storage_options.client_kwargs.headers.Authorization must not", "Authorization: $STORAGE_AUTHORIZATION"],
        ),
        (["storage_options.endpoint_url={url: hunter2}"], ["storage_options.endpoint_url.url must not be written out"]),
        (
            ["storage_options.endpoint_url=https://host/?sig=hunter2"],
            ["storage_options.endpoint_url='https://host/?***' must not have a query"],
        ),
        (["storage=https://host/x?sig=hunter2"], ["storage='https://host/x?***' must not have a query"]),
        (["data.path=https://host/x?sig=hunter2"], ["data.path='https://host/x?***' must not have a query"]),
        (["model.init_from=https://host/x#hunter2"], ["model.init_from='https://host/x?***' must not have a query"]),
        (["model.huggingface=https://a:hun/ter2@host/x"], ["model.huggingface='https://***@host/x' must not carry"]),
        (["storage=s3://key:secret@bucket/x"], ["must not carry credentials"]),
        (
            ["storage_options.secret=hunter2"],
            ["storage_options.secret must not be written out", "secret: $STORAGE_SECRET"],
        ),
        (
            ["data.storage_options={client_kwargs: {aws_session_token: hunter2}}"],
            ["data.storage_options.client_kwargs"],
        ),
        (["steps"], ["override 'steps' is not of the form key=value"]),
        (["seed.x=1"], ["'seed' is a value, not a section"]),
    ],
)
def test_error_names_value_rule_and_fix(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TINY, overrides)
    for part in expected:
        assert part in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_secret_in_a_storage_url_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TINY, ["storage=s3://key:secret@bucket/x", "strage=s3://key:secret@bucket/x"])
    assert "unknown key strage=***" in str(caught.value)
    assert "secret" not in str(caught.value)
    for key in ("storage", "data.path", "model.init_from"):
        with pytest.raises(ConfigError, match=r"='s3://\*\*\*@bucket/x' must not carry credentials") as caught:
            parse_config(TINY, [f"{key}=s3://key:secret@bucket/x"])
        assert "secret" not in str(caught.value)
    for place in ("s3://bucket/run@5", "runs/a@b/model", "s3://bucket/a@b/run@5"):
        assert parse_config(TINY, [f"model.init_from={place}"]).model.init_from == place


def test_options_that_hold_no_secret_may_be_written_out() -> None:
    options = {
        "endpoint_url": "http://host:9000",
        "anon": True,
        "max_concurrency": 4,
        "key": "$KEY",
        "sas_token": "${SAS}",
        "token": None,
        "client_kwargs": {"region_name": "eu", "verify": False},
        "config_kwargs": {"read_timeout": 5.5, "s3": {"addressing_style": "path"}},
    }
    assert parse_config(TINY, [f"storage_options={json.dumps(options)}"]).storage_options == options


def test_misspelt_option_is_called_that() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'endpoint_url'\?") as found:
        load_config(QUICKSTART, ["storage_options.endpont_url=http://minio:9000"])
    assert "minio" not in str(found.value)


@pytest.mark.parametrize("item", ["storage=", "name= ", "method.lora_rank="])
def test_override_without_a_value_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="has no value"):
        load_config(QUICKSTART, [item])


def test_section_without_lines_has_its_defaults_and_a_key_without_a_value_is_refused() -> None:
    text = QUICKSTART.read_text().replace("storage: runs\n", "")
    assert parse_config(text + "\nstorage_options:\n") == parse_config(text)
    with pytest.raises(ConfigError, match="storage=None must be text"):
        parse_config(text + "\nstorage:\n")


def test_snippet_of_broken_yaml_is_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"config is not valid YAML: .* at line 3") as caught:
        parse_config("storage_options:\n  secret: [hunter2\n")
    assert "hunter2" not in str(caught.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TINY, ["steps=x", "optimizer.betta1=1"])
    assert "steps='x'" in str(caught.value)
    assert "optimizer.betta1" in str(caught.value)


def test_token_budget_counts_tokens() -> None:
    """Not rows, as the reference's max_train_tokens does (`args_utils.py:50`)."""
    without_steps = TINY.replace("steps: 12\n", "")
    cfg = parse_config(without_steps, [f"tokens={12 * 6 * 24}"])
    assert (cfg.steps, cfg.tokens_per_step) == (12, 6 * 24)
    assert parse_config(to_yaml(cfg)) == cfg
    assert parse_config(TINY, []).identity() == cfg.identity(), "saying it in steps is the same run"
    with pytest.raises(ConfigError, match=r"tokens=1729 is not a whole number of updates of 144 .*tokens=1728 or 1872"):
        parse_config(without_steps, ["tokens=1729"])
    with pytest.raises(ConfigError, match=r"tokens=1728 is 12 updates of 144 tokens, but steps=15"):
        parse_config(TINY, ["tokens=1728", "steps=15"])
    assert parse_config(without_steps, ["tokens=1.728e3"]).steps == 12
    with pytest.raises(ConfigError, match="tokens='1B'"):
        parse_config(without_steps, ["tokens=1B"])


def test_missing_key_and_missing_file() -> None:
    with pytest.raises(ConfigError, match="steps is missing: it has no default"):
        parse_config("name: x\nglobal_batch_rows: 1\n")
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml' cannot be read: No such file"):
        load_config("nowhere.yaml")
    with pytest.raises(ConfigError, match="not a mapping"):
        parse_config("- 1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_config("a: [1\n")


def test_yaml_means_what_it_looks_like() -> None:
    cfg = parse_config(TINY, ["seed=010", "optimizer.learning_rate=1e-3", "steps=12", "storage=~/runs"])
    assert (cfg.seed, cfg.optimizer.learning_rate) == (10, 1e-3)
    assert cfg.storage.startswith("/")
    assert parse_config(TINY + "\ncluster:\n").cluster.workers == 1, "a section that is all comments has its defaults"
    with pytest.raises(ConfigError, match="key 'steps' is there twice, once at line"):
        parse_config(TINY + "\nsteps: 15\n")
    with pytest.raises(ConfigError, match="key 'eval_rows' is there twice"):
        parse_config(TINY, ["train={micro_batch_rows: 3, eval_rows: 5, eval_rows: 6}"])
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_config("[" * 3000)


def test_rank_is_held_against_the_named_layers() -> None:
    narrow = ["model.intermediate_size=16", "method.lora_rank=20"]
    with pytest.raises(ConfigError, match=r"method.lora_rank=20 is more than 16"):
        parse_config(TINY, narrow)
    parse_config(TINY, [*narrow, "method.target_modules=[q_proj, o_proj]"])


def test_another_kind_keeps_what_both_have_and_says_what_it_dropped(caplog: pytest.LogCaptureFixture) -> None:
    plain = ["schedule.kind=cosine", "~schedule.restart_warmup_steps"]
    lora = parse_config(TINY, ["method.kind=lora", *plain])
    assert (lora.method.kind, lora.warm_start_steps) == ("lora", 3)
    assert lora.settings()["method.alpha"] == 8
    assert "method.kind=lora: dropped what belongs to the kind before, method.merge_every_steps=3." in caplog.text
    galore = parse_config(TINY, ["method.rank=4", "method.kind=galore", *plain])
    assert galore.settings()["method.alpha"] == 0.25, "LoRA's alpha means something else"
    assert galore.settings()["method.rank"] == 4
    with pytest.raises(ConfigError, match=r"unknown key method\.merge_every_steps=4"):
        parse_config(TINY, ["method.merge_every_steps=4", "method.kind=lora", *plain])


def test_tilde_drops_a_key_to_its_default() -> None:
    assert parse_config(TINY, ["~method.alpha"]).settings()["method.alpha"] == 32
    assert parse_config(TINY, ["~optimizer.weight_decay", "~checkpoint.keep_last"]).checkpoint.keep_last == 3
    without = parse_config(TINY, ["~schedule", "method={kind: full}"])
    assert without.schedule.warmup_steps == 0
    assert parse_config(TINY, ["~steps", "tokens=1728"]).steps == 12


def test_alias_is_a_value_of_its_own() -> None:
    shared = TINY.replace("storage: runs", "storage: runs\nstorage_options: &s3 {endpoint_url: http://one}")
    shared = shared.replace("data: {path: data,", "data: {path: data, storage_options: *s3,")
    cfg = parse_config(shared, ["storage_options.endpoint_url=http://two"])
    assert cfg.data.storage_options == {"endpoint_url": "http://one"}
    assert cfg.storage_options == {"endpoint_url": "http://two"}
    assert parse_config(shared, ["~storage_options"]).data.storage_options == {"endpoint_url": "http://one"}


def test_overrides_hold_in_the_order_in_which_they_are_given() -> None:
    """Also where one lies in another."""
    section = "optimizer={learning_rate: 1e-3, weight_decay: 0.1}"
    assert parse_config(TINY, [section, "~optimizer.weight_decay"]).optimizer.weight_decay == 0.0
    assert parse_config(TINY, ["~optimizer.weight_decay", section]).optimizer.weight_decay == 0.1
    dropped = parse_config(TINY, ["train.eval_rows=7", "~train", "train={micro_batch_rows: 3}"]).train
    assert dropped == parse_config(TINY, ["~train", "train={micro_batch_rows: 3}"]).train


SHARES = TINY.replace("warm_start_steps: 3, merge_every_steps: 3", "warm_start: 25%, cycles: 3").replace(
    "warmup_steps: 1, restart_warmup_steps: 1", "warmup: 5%, restart_warmup: 10%"
).replace("save_every_steps: 2", "save_every: 12.5%")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "warm", "ends", "rest"),
    [
        (["steps=400"], 100, (200, 300, 400), (20, 10, 50)),
        (["steps=402"], 99, (200, 301, 402), (20, 10, 50)),  # 99 and 102 are as near to 100.5: the longer cycles
        (["steps=401"], 101, (201, 301, 401), (20, 10, 50)),  # 101 is nearer to 100.25 than 98
        (["steps=12"], 3, (6, 9, 12), (1, 1, 2)),
        (["steps=400", "method.cycles=5"], 100, (160, 220, 280, 340, 400), (20, 6, 50)),
        (["steps=400", "method.merge_every_steps=70"], 120, (190, 260, 330, 400), (20, 7, 50)),
        (["steps=400", "method.warm_start_steps=40"], 40, (160, 280, 400), (20, 12, 50)),
        (["steps=400", "~method.warm_start", "method.cycles=4"], 0, (100, 200, 300, 400), (20, 10, 50)),
        (["~steps", "tokens=57600"], 100, (200, 300, 400), (20, 10, 50)),
        (["steps=400", "checkpoint.save_every_steps=7"], 100, (200, 300, 400), (20, 10, 7)),
    ],
)
def test_lengths_as_shares(overrides: list[str], warm: int, ends: tuple[int, ...], rest: tuple[int, int, int]) -> None:
    cfg = parse_config(SHARES, overrides)
    schedule = cfg.schedule
    assert (cfg.warm_start_steps, cfg.merges) == (warm, ends)
    assert (schedule.warmup_steps, schedule.restart_warmup_steps, cfg.checkpoint.save_every_steps) == rest
    assert parse_config(to_yaml(cfg)) == cfg, "what is stored has the numbers"
    assert "%" not in to_yaml(cfg)


def test_share_and_number_are_one_identity() -> None:
    assert parse_config(SHARES).identity() == parse_config(TINY).identity()
    with pytest.raises(ConfigError, match=r"method\.warm_start=25% and method\.warm_start_steps=3 say the same twice"):
        parse_config(TINY.replace("warm_start_steps: 3", "warm_start_steps: 3, warm_start: 25%"))


def test_every_number_of_steps_fits_a_config_of_shares() -> None:
    for steps in range(8, 300):
        cfg = parse_config(SHARES, [f"steps={steps}"])
        assert cfg.merges[-1] == steps
        assert abs(cfg.warm_start_steps - steps / 4) <= 1.5, "half of the number of cycles"


@pytest.mark.parametrize(
    ("config", "number", "overrides"),
    [
        (SHARES, 1000, "steps={}"),
        (TINY, 100, "steps=1000 ~method.merge_every_steps method.cycles=9 method.warm_start_steps={}"),
        (TINY, 250, "steps=2000 ~method.warm_start_steps method.warm_start=25% method.merge_every_steps={}"),
        (
            TINY,
            250,
            "steps=1003 ~schedule.restart_warmup_steps schedule.restart_warmup=10% method.merge_every_steps={}",
        ),
    ],
)
def test_whole_numbers_may_be_written_otherwise(config: str, number: int, overrides: str) -> None:
    """All that the config's own check takes for one: shares fit them too."""
    expected = parse_config(config, overrides.format(number).split())
    for written in (f"{number}.0", f"'{number}'", f"{number / 100:g}e2"):
        assert parse_config(config, overrides.format(written).split()) == expected, written


def test_weights_name_their_architecture() -> None:
    model = "model={init_from: some/folder}"
    assert parse_config(TINY, [model]).model.huggingface == "some/folder"
    assert parse_config(TINY, [model, "model.size=9m"]).model.huggingface == ""
    assert parse_config(TINY, ["model.init_from=some/folder"]).model.huggingface == ""


def test_typo_is_refused_without_torch_or_ray(tmp_path: Path) -> None:
    """In under a second on an idle machine; what makes it so is that neither library is imported."""
    (tmp_path / "run.yaml").write_text(TINY)
    command = [sys.executable, "-X", "importtime", "-m", "relora_ray.launch", str(tmp_path / "run.yaml"), "stepps=3"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    took = time.perf_counter() - began
    assert done.returncode == 2, done.stderr[-2000:]
    assert "ConfigError: unknown key stepps=3. Did you mean 'steps'?" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not {"torch", "ray", "transformers"} & imported
    print(f"refused in {took:.2f} s")


def test_config_can_be_a_key() -> None:
    """Schedules are kept by config."""
    options = "storage_options={endpoint_url: 'http://x', client_kwargs: {region_name: eu}}"
    first, second = parse_config(TINY, [options]), parse_config(TINY, [options])
    assert {first, second} == {first}
    assert hash(first) != hash(parse_config(TINY))
    assert parse_config(to_yaml(first)) == first


def test_yaml_may_merge_and_must_not_contain_itself() -> None:
    both = parse_mapping("train: &t {micro_batch_rows: 4, eval_rows: 8}\nother:\n  <<: *t\n  eval_rows: 9")
    assert both["other"] == {"micro_batch_rows": 4, "eval_rows": 9}
    with pytest.raises(ConfigError, match="refers to itself"):
        parse_config("model: &m {x: *m}")


def test_tokens_given_as_steps_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"steps=9999999999 with method\.merge_every_steps=150 is 66,666,666 cycles"):
        load_config(QUICKSTART, ["steps=9999999999"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full", r"method='full' is no section\. Write it as method: \{kind: full\}"),
        ({}, r"method\.kind is missing: it says how weights are trained"),
        ({"kind": "galore", "lora_rank": 4}, r"Did you mean 'rank'\? It belongs to kind lora and relora"),
        ({"kind": "galore", "leave_out": "q_proj"}, r"method\.leave_out='q_proj' must be a list of names"),
    ],
)
def test_what_is_wrong_with_a_method_is_said_of_its_own_kind(method: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, tmp_path, method=method, schedule={"kind": "cosine"})
