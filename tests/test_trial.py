"""Models are tried out before anything is spent, and gradients looked at after the first backward pass."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from relora_ray.config import ModelConfig, RunConfig, TrainConfig
from relora_ray.conformance.processes import run_ranks
from relora_ray.errors import CheckpointError, ConfigError
from relora_ray.loop import run_attempt
from relora_ray.modeling.architecture import hf_config
from relora_ray.modeling.model import build_model, check_causal
from relora_ray.modeling.optim import build_adamw
from relora_ray.modeling.parallel import World
from relora_ray.modeling.small import small_config
from relora_ray.modeling.token_loss import TokenLoss
from relora_ray.runs.batches import open_batches
from relora_ray.runs.run import _check_padding, bare_model, check_embedding
from relora_ray.runs.setting import Setting, check_run, open_data
from relora_ray.runs.trial import shortest_names, try_architecture
from relora_ray.runtime.preflight import preflight
from tests.architectures import INCOMPLETE
from tests.tiny import Crash, crash_at, run, state_digest, tiny_config

CASES: dict[str, dict[str, Any]] = {
    "jamba": {
        "num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "intermediate_size": 48,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 48,
    },
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "intermediate_size": 48},
    "bert": {"intermediate_size": 48},
    "llama": {"intermediate_size": 48},
}  # fmt: skip
DEEPSEEK = {
    "moe_intermediate_size": 16, "intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
CASES |= {
    "deepseek_v3": DEEPSEEK | {"num_hidden_layers": 6, "first_k_dense_replace": 4, "num_key_value_heads": 4},
    "big_bird": {
        "intermediate_size": 48, "is_decoder": True, "block_size": 8, "num_random_blocks": 1,
        "max_position_embeddings": 256,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"intermediate_size": 48},
    "falcon": {"new_decoder_architecture": False},
    "roberta": {"intermediate_size": 48, "is_decoder": True, "num_hidden_layers": 1},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
}  # fmt: skip
WIDTHS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def config_of(kind: str, data: Path, folder: Path, *overrides: str, **more: Any) -> RunConfig:
    """The tiny run with another architecture."""
    (folder / "config").mkdir(exist_ok=True)
    widths = {} if kind == "bart" else WIDTHS
    config = {"model_type": kind, "vocab_size": 2048, "max_position_embeddings": 64, **widths, **CASES[kind], **more}
    (folder / "config/config.json").write_text(json.dumps(config))
    return tiny_config(data, folder, *overrides, model={"huggingface": str(folder / "config")})


def test_layer_whose_weight_is_only_read_is_named_before_ray_and_trains_when_left_out(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"mamba.dt_proj of Jamba.* Set method.leave_out=\[dt_proj\]"):
        preflight(config_of("jamba", data, tmp_path))
    cfg = config_of("jamba", data, tmp_path, "method.leave_out=[dt_proj]")
    preflight(cfg)
    _, records = run(cfg)
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_what_is_never_used_is_named_before_ray_and_at_the_first_update(data: Path, tmp_path: Path) -> None:
    refusal = r"encoder_attn.* would never be trained.* Set model.frozen=\[encoder_attn,encoder_attn_layer_norm\]"
    with pytest.raises(ConfigError, match=refusal):
        preflight(config_of("bart", data, tmp_path))
    with pytest.raises(ConfigError, match=refusal):
        run(config_of("bart", data, tmp_path))
    cfg = config_of("bart", data, tmp_path, "model.frozen=[encoder_attn,encoder_attn_layer_norm]", "name=other")
    preflight(cfg)
    run(cfg)


def two_ranks(cfg: RunConfig) -> str:
    try:
        run_attempt(cfg, World.current())
    except ConfigError as error:
        return str(error)
    return "trained"


def test_two_ranks_are_told_too(data: Path, tmp_path: Path) -> None:
    """And not by DDP, which would fail one pass later without a name."""
    said = run_ranks(2, two_ranks, check_run(config_of("bart", data, tmp_path)))
    assert all("Set model.frozen=[encoder_attn,encoder_attn_layer_norm]" in text for text in said), said


def test_run_of_a_version_without_these_settings_may_be_given_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its experts were trained in full: it is refused by default, and goes on with them left out."""
    in_full = "method.leave_out=[gate_up_proj,down_proj]"
    run(config_of("mixtral", data, tmp_path, in_full, "steps=6"))
    own = Setting.get

    def get(self: Setting, name: str) -> bytes:
        """As the version before wrote it."""
        if name != "config.yaml":
            return own(self, name)
        old = yaml.safe_load(own(self, name))
        del old["method"]["leave_out"], old["model"]["frozen"]
        return yaml.safe_dump(old).encode()

    with pytest.raises(ConfigError, match=r"method.leave_out: \['gate_up_proj', 'down_proj'\] there, \[\] here"):
        run(config_of("mixtral", data, tmp_path, "steps=6"))
    monkeypatch.setattr(Setting, "get", get)
    with pytest.raises(CheckpointError, match=r"name in method.leave_out the stacks of experts"):
        run(config_of("mixtral", data, tmp_path, "steps=6"))
    again, _ = run(config_of("mixtral", data, tmp_path, in_full, "steps=6"))
    assert again.position.step == 6


def test_segments_of_model_frozen_that_are_in_no_name_are_refused(data: Path, tmp_path: Path) -> None:
    cfg = config_of("llama", data, tmp_path, "model.frozen=[encoder_attn]")
    with pytest.raises(ConfigError, match=r"model.frozen has 'encoder_attn', which is in the name of no parameter"):
        preflight(cfg)


def test_what_the_architecture_freezes_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    cfg = config_of("llama", data, tmp_path, "model.frozen=[layers.0.mlp]")
    before = {n: p.clone() for n, p in build_model(cfg.model, seq_len=24, seed=cfg.seed).named_parameters()}
    state, _ = run(cfg)
    after = dict(state.model.named_parameters())
    for name in [name for name in before if ".layers.0.mlp." in name]:
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("seed", range(4))
def test_experts_are_causal_whatever_the_seed(seed: int, data: Path, tmp_path: Path) -> None:
    cfg = config_of("mixtral", data, tmp_path)
    check_causal(build_model(cfg.model, seq_len=24, seed=seed))


@pytest.mark.parametrize("hidden_size", [32, 256])
def test_model_that_looks_ahead_is_refused_before_ray(hidden_size: int, data: Path, tmp_path: Path) -> None:
    cfg = config_of("bert", data, tmp_path, hidden_size=hidden_size)
    with pytest.raises(ConfigError, match="is not causal"):
        preflight(cfg)
    for seed in range(3):
        with pytest.raises(ConfigError, match="is not causal"):
            check_causal(build_model(cfg.model, seq_len=24, seed=seed))


def ids() -> torch.Tensor:
    return torch.randint(0, 2000, (2, 25), generator=torch.Generator().manual_seed(0))


def mean_loss(model: nn.Module) -> torch.Tensor:
    total = TokenLoss(model, TrainConfig(micro_batch_rows=2))(ids()[:, :-1], ids()[:, 1:], torch.ones(2))
    return total / ids()[:, 1:].numel()


@pytest.mark.parametrize("coefficient", [0.0, 0.02, 1000.0])
def test_loss_of_the_router_counts_as_the_architecture_has_it(coefficient: float, data: Path, tmp_path: Path) -> None:
    cfg = config_of("mixtral", data, tmp_path, output_router_logits=True, router_aux_loss_coef=coefficient)
    try_architecture(cfg)
    model = build_model(cfg.model, seq_len=24, seed=0)
    inputs = ids()[:, :-1]
    aux = model(input_ids=inputs).aux_loss
    plain = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), ids()[:, 1:].flatten())
    loss = mean_loss(model)
    assert loss.item() == pytest.approx(float((plain + coefficient * aux).detach()), rel=1e-5)
    loss.backward()
    router = model.get_parameter("model.layers.0.mlp.gate.weight").grad
    assert router is not None
    assert router.norm() > coefficient / 1e4
    model.eval()
    assert mean_loss(model).item() == pytest.approx(float(plain), rel=1e-5), "evaluation is of the text"


def test_loss_of_the_router_that_is_asked_for_and_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    config = small_config(transformers.CONFIG_MAPPING["llama4_text"]())
    config.output_router_logits = True
    config.save_pretrained(tmp_path / "llama4")
    cfg = tiny_config(data, tmp_path, "method.lora_rank=2", model={"huggingface": str(tmp_path / "llama4")})
    with pytest.raises(
        ConfigError, match="Llama4ForCausalLM returns no loss of its router, though output_router_logits"
    ):
        try_architecture(cfg)


def test_loss_that_adds_something_unknown_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = transformers.LlamaForCausalLM.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-5 * output.logits.logsumexp(-1).square().mean()  # a z-loss
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ConfigError, match="adds something to the cross-entropy of the next token"):
        try_architecture(config_of("llama", data, tmp_path))


def test_capped_logits_are_no_plain_head_though_the_head_is_zero(data: Path, tmp_path: Path) -> None:
    """Its loss is transformers' own, in chunks or not."""
    cfg = config_of("gemma2", data, tmp_path, tie_word_embeddings=False)
    model = build_model(cfg.model, seq_len=24, seed=0)
    nn.init.zeros_(model.lm_head.weight)
    loss = TokenLoss(model, TrainConfig(micro_batch_rows=2, loss_chunk_tokens=7))
    loss(ids()[:, :-1], ids()[:, 1:], torch.ones(2))
    nn.init.normal_(model.lm_head.weight, std=10.0)
    total = loss(ids()[:, :-1], ids()[:, 1:], torch.ones(2))
    theirs = model(input_ids=ids(), labels=ids()).loss
    assert float(total) / 48 == pytest.approx(float(theirs), rel=1e-5)
    run(config_of("gemma2", data, tmp_path))


def test_dropout_of_the_architecture_is_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try_architecture(config_of("mixtral", data, tmp_path, attention_dropout=0.1))
    assert "the architecture has dropout (attention_dropout 0.1)" in caplog.text


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.target_modules=[q_b_proj,gate_up_proj]"], ["method.leave_out=[gate_up_proj]"],
        ["model.frozen=[experts]"], ["model.frozen=[layers.5]"], ["method.leave_out=[layers.5.self_attn.o_proj]"],
    ],
)  # fmt: skip
def test_settings_may_name_what_only_the_whole_depth_has(overrides: list[str], data: Path, tmp_path: Path) -> None:
    """The first four layers have no experts."""
    try_architecture(config_of("deepseek_v3", data, tmp_path, *overrides))


def test_part_that_sees_nothing_in_short_rows_is_not_called_dead(data: Path, tmp_path: Path) -> None:
    """DeepSeek-V4 compresses 128 tokens at a time."""
    small_config(transformers.DeepseekV4Config()).save_pretrained(tmp_path / "v4")
    model: dict[str, Any] = {"huggingface": str(tmp_path / "v4")}
    with pytest.raises(ConfigError, match=r"Set model.frozen=\[indexer\]"):  # it chooses, without a gradient
        try_architecture(tiny_config(data, tmp_path, "data.seq_len=512", "method.lora_rank=2", model=model))
    model |= {"frozen": ["indexer"]}
    try_architecture(tiny_config(data, tmp_path, "data.seq_len=512", "method.lora_rank=2", model=model))
    with pytest.raises(ConfigError, match=r"compressor.* would never be trained"):
        try_architecture(tiny_config(data, tmp_path, "data.seq_len=64", "method.lora_rank=2", model=model))


def test_attention_that_looks_ahead_in_long_rows_only_is_refused(data: Path, tmp_path: Path) -> None:
    cfg = config_of("big_bird", data, tmp_path, "data.seq_len=192", "model.frozen=[pooler]")
    with pytest.raises(ConfigError, match="BigBirdForCausalLM is not causal"):
        preflight(cfg)


def test_layers_that_are_left_out_by_chance_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leaves out layers by chance \(layerdrop=0.2\)"):
        preflight(config_of("opt", data, tmp_path, layerdrop=0.2))


def test_positions_begin_behind_padding(data: Path, tmp_path: Path) -> None:
    settings = {"pad_token_id": 1, "max_position_embeddings": 26}
    fitting, longer = (config_of("roberta", data, tmp_path, f"data.seq_len={n}", **settings) for n in (24, 26))
    check_embedding(fitting, bare_model(fitting, device="meta"))
    with pytest.raises(ConfigError, match=r"seq_len=26 is more than the 24 positions .* behind pad_token_id=1"):
        check_embedding(longer, bare_model(longer, device="meta"))


@pytest.mark.parametrize(("experts", "warned"), [(1, True), (2, False)])
def test_router_that_cannot_be_trained_is_said(
    experts: int, warned: bool, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One expert for each token, with a weight of 1 whatever the router says."""
    try_architecture(config_of("qwen3_moe", data, tmp_path, num_experts_per_tok=experts))
    assert ("[gate] of Qwen3MoeForCausalLM has a gradient of zero" in caplog.text) == warned


def test_bias_that_balances_experts_is_said_to_stay(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try_architecture(config_of("deepseek_v3", data, tmp_path, first_k_dense_replace=1))
    assert "balances its experts by a bias (e_score_correction_bias)" in caplog.text


@pytest.mark.parametrize("kind", ["lfm2_moe", "laguna", "zaya"])
def test_bias_that_balances_is_known_by_other_names(
    kind: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_config(transformers.CONFIG_MAPPING[kind](**INCOMPLETE.get(kind, {}))).save_pretrained(tmp_path / "config")
    try_architecture(tiny_config(data, tmp_path, "method.lora_rank=2", model={"huggingface": str(tmp_path / "config")}))
    assert "balances its experts by a bias" in caplog.text


def test_rwkv_is_not_rescaled_while_it_is_trained(data: Path, tmp_path: Path) -> None:
    """transformers divides its weights in place when it is evaluated."""
    losses = []
    for every in (0, 1):
        config = {"model_type": "rwkv", "vocab_size": 2048, "context_length": 64, "hidden_size": 32}
        folder = tmp_path / str(every)
        (folder / "config").mkdir(parents=True)
        config |= {"num_hidden_layers": 4, "rescale_every": every}
        (folder / "config/config.json").write_text(json.dumps(config))
        cfg = tiny_config(data, folder, "train.eval_every_steps=3", model={"huggingface": str(folder / "config")})
        _, records = run(preflight(cfg))
        losses.append([r["loss"] for r in records if r["kind"] in ("train", "eval")])
        exported = json.loads((folder / "tiny/model/config.json").read_text())
        assert exported["rescale_every"] == every
    assert losses[0] == losses[1]


def test_rwkv_goes_on_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    """Its key and value are named like others' that have one input, and have two."""
    config = {"model_type": "rwkv", "vocab_size": 2048, "context_length": 64, "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    model = {"huggingface": str(tmp_path)}
    whole, broken = (
        preflight(tiny_config(data, tmp_path, f"name={name}", "method.lora_rank=8", model=model))
        for name in ("whole", "broken")
    )
    with pytest.raises(Crash):
        run(broken, crash_at(8, "train"))
    assert state_digest(run(broken)[0]) == state_digest(run(whole)[0])


def test_model_that_changes_itself_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = transformers.LlamaForCausalLM.forward

    def moving(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            with torch.no_grad():
                self.lm_head.weight.mul_(2)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", moving)
    with pytest.raises(ConfigError, match=r"changes lm_head.weight by itself when it is evaluated"):
        try_architecture(config_of("llama", data, tmp_path))


@pytest.mark.parametrize("settings", [{"parallel_attn": True}, {"parallel_attn": False, "multi_query": False}])
def test_output_of_a_layer_may_be_changed_in_place(
    settings: dict[str, bool], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Falcon adds what attention gives to what its last layer gives, in place; with a bias that is a view."""
    cfg = config_of("falcon", data, tmp_path, bias=True, alibi=not settings["parallel_attn"], **settings)
    preflight(cfg)
    assert "no tiny form" not in caplog.text
    run(cfg.model_copy(update={"steps": 6}))


@pytest.mark.parametrize("coefficient", [1.0, 300.0])
def test_loss_of_the_router_is_compared_on_the_same_rows(coefficient: float, data: Path, tmp_path: Path) -> None:
    """Of a row that is a token longer it is another."""
    more = {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    for seed in range(3):
        try_architecture(config_of("mixtral", data, tmp_path, f"seed={seed}", **more))


def test_setting_that_cannot_be_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"field 'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float"):
        preflight(config_of("llama", data, tmp_path, rms_norm_eps="1e-5"))


@pytest.mark.parametrize("vocabulary", [65, 100])
def test_architecture_with_a_small_vocabulary_is_tried(vocabulary: int, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not causal"):
        try_architecture(config_of("bert", data, tmp_path, vocab_size=vocabulary))


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_model_of_small_weights_that_looks_ahead_is_found(spread: float, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not causal"):
        try_architecture(config_of("bert", data, tmp_path, initializer_range=spread))


def test_rotary_factors_of_a_wide_head_fit_the_tiny_one(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factors = [1.0 + n / 10 for n in range(16)]
    rope = {"type": "longrope", "long_factor": factors, "short_factor": factors}
    more = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "resid_pdrop": 0.0}
    cfg = config_of("phi3", data, tmp_path, rope_scaling=rope, original_max_position_embeddings=32, **more)
    try_architecture(cfg)
    assert "no tiny form" not in caplog.text


def test_architecture_that_cannot_be_tried_is_said(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try_architecture(config_of("llama", data, tmp_path, hidden_act="no such"))
    assert "no tiny form, so that it is not tried out before the start" in caplog.text
    with pytest.raises(ConfigError, match=r"can be built here: KeyError: 'no such' \(hidden_act in its config.json\)"):
        preflight(config_of("llama", data, tmp_path, hidden_act="no such"))


def test_outputs_that_a_config_asks_for_besides_are_left_out(data: Path, tmp_path: Path) -> None:
    outputs = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    preflight(config_of("llama", data, tmp_path, **outputs))


def test_blocks_that_begin_late_are_tried(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try_architecture(config_of("deepseek_v3", data, tmp_path))  # first_k_dense_replace is 4
    assert "e_score_correction_bias" in caplog.text


def test_export_that_would_not_load_is_refused_before_ray(data: Path, tmp_path: Path) -> None:
    small_config(transformers.Emu3Config()).save_pretrained(tmp_path / "config")
    cfg = tiny_config(data, tmp_path, "method.lora_rank=2", model={"huggingface": str(tmp_path / "config")})
    with pytest.raises(ConfigError, match="what is exported of Emu3ForCausalLM would not load"):
        try_architecture(cfg)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3, which does not divide"),
        ({"rope_theta": 0}, "computes nan from random weights"),
        ({"pad_token_id": 32000}, "can be built here: AssertionError: Padding_idx must be within"),
    ],
)
def test_config_that_only_looks_right_is_refused(
    settings: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(config_of("llama", data, tmp_path, **settings))


def test_misspelt_setting_is_said_once(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config_of("llama", data, tmp_path, num_key_value_head=1, training_notes="x", quantization_config={"a": 1})
    config = json.loads(Path(cfg.model.huggingface, "config.json").read_text())
    del config["num_key_value_heads"]
    Path(cfg.model.huggingface, "config.json").write_text(json.dumps(config))
    preflight(cfg)
    assert caplog.text.count("has num_key_value_head, which 'llama' does not read. num_key_value_heads is meant?") == 1
    assert caplog.text.count("asks for quantised weights") == 1
    assert "training_notes" not in caplog.text


def test_padding_that_is_a_token_of_the_data_may_not_move_positions(data: Path, tmp_path: Path) -> None:
    cfg = config_of("roberta", data, tmp_path, pad_token_id=1)
    with pytest.raises(ConfigError, match=r"counts positions past its pad_token_id, 1, which is a token of the data"):
        preflight(cfg)
    config, index = hf_config(cfg.model, 24), open_data(cfg)
    _check_padding(config, index, SimpleNamespace(pad_token_id=1))  # which stands nowhere in the data
    _check_padding(hf_config(config_of("llama", data, tmp_path).model, 24), index, None)


def test_tokens_are_spread_over_experts_by_a_table(tmp_path: Path) -> None:
    small_config(transformers.DeepseekV4Config()).save_pretrained(tmp_path)
    model = ModelConfig(huggingface=str(tmp_path))
    one, same, other = (build_model(model, seq_len=16, seed=seed) for seed in (0, 0, 1))
    tables = [dict(m.named_buffers())["model.layers.0.mlp.gate.tid2eid"] for m in (one, same, other)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert tables[0].unique().tolist() == [0, 1, 2, 3]
    assert (tables[0][:, 0] != tables[0][:, 1]).all(), "a token goes to different experts"


def test_row_of_padding_is_trained_in_every_table_of_tokens(tmp_path: Path) -> None:
    small_config(transformers.Gemma4TextConfig(pad_token_id=1)).save_pretrained(tmp_path)
    model = build_model(ModelConfig(huggingface=str(tmp_path)), seq_len=16, seed=0)
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        table = model.get_submodule(f"model.{name}")
        assert table.padding_idx is None
        assert table.weight[1].count_nonzero()


def test_row_of_padding_that_is_a_token_of_the_data_is_trained(data: Path, tmp_path: Path) -> None:
    """As in Phi-3, whose documents end with its padding."""
    cfg = config_of("llama", data, tmp_path, pad_token_id=1)
    before = build_model(cfg.model, seq_len=24, seed=cfg.seed).get_input_embeddings().weight.detach()
    assert float(before[1].std()) == pytest.approx(float(before.std()), rel=0.5)
    after = run(cfg)[0].model.get_input_embeddings().weight
    assert 1 in {int(i) for rows in open_batches(cfg, World()).train.step(0) for i in rows.inputs.flatten()}
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_biases_of_experts_do_not_decay(tmp_path: Path) -> None:
    config = small_config(transformers.GptOssConfig())
    model = transformers.AutoModelForCausalLM.from_config(config)
    decaying, _ = build_adamw(model, tiny_config(tmp_path, tmp_path).optimizer).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert not [names[p] for p in decaying["params"] if names[p].endswith("bias")]


def test_what_is_no_matrix_of_a_product_does_not_decay(data: Path, tmp_path: Path) -> None:
    cfg = config_of("jamba", data, tmp_path)
    model = build_model(cfg.model, seq_len=24, seed=0)
    decaying, spared = build_adamw(model, cfg.optimizer).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert spared["weight_decay"] == 0
    kept = {names[p].split(".", 3)[-1] for p in spared["params"]}
    assert {"mamba.A_log", "mamba.D", "input_layernorm.weight", "mamba.dt_proj.bias"} <= kept
    decayed = {names[p].split(".", 3)[-1] for p in decaying["params"]}
    assert {"mamba.in_proj.weight", "feed_forward.experts.down_proj", "embed_tokens.weight"} <= {
        name.removeprefix("model.") for name in decayed | {names[p] for p in decaying["params"]}
    }


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a.0.x.w", "a.1.x.w"], ["a.0.y.w"], ["x"]),
        (["a.0.x.w"], ["a.1.x.w"], ["a.0"]),
        (["a.0.x.w", "b.v"], ["a.0.y.w", "b.w"], ["x", "v"]),
    ],
)
def test_shortest_names_are_in_all_and_in_no_other(names: list[str], others: list[str], expected: list[str]) -> None:
    assert sorted(shortest_names(names, others)) == sorted(expected)
