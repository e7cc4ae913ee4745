"""The loop in one process: accumulation, non-finite steps, precision, evaluation, starts from other weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relora_ray import loop
from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.checkpoint.ownership import claim
from relora_ray.commands.report import summary
from relora_ray.config import RunConfig
from relora_ray.conformance.ours import poisoned
from relora_ray.errors import ConfigError, NonFiniteError, SupersededError
from relora_ray.loop import evaluate, run_attempt
from relora_ray.methods.base import Boundary, BoundaryReport
from relora_ray.methods.lowrank.config import ReloraConfig
from relora_ray.methods.lowrank.layer import LowRankLinear, low_rank_layers
from relora_ray.methods.lowrank.relora import Relora
from relora_ray.modeling.model import build_model
from relora_ray.modeling.parallel import World
from relora_ray.modeling.schedule import lr_multiplier
from relora_ray.runs.batches import open_batches
from relora_ray.runs.metrics import Record, read, read_all, size_text
from relora_ray.runs.places import run_storage
from relora_ray.runs.run import load_trained
from relora_ray.runs.setting import check_run
from tests.tiny import Crash, assert_loads_as_the_live_model, crash_at, losses, run, state_digest, tiny_config

NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_accumulation_changes_only_rounding(data: Path, tmp_path: Path, micro: int) -> None:
    _, whole = run(tiny_config(data, tmp_path, "name=whole"))
    _, parts = run(tiny_config(data, tmp_path, "name=parts", f"train.micro_batch_rows={micro}"))
    for step, loss in losses(whole).items():
        assert losses(parts)[step] == pytest.approx(loss, rel=1e-5)


def test_loss_is_the_mean_over_all_tokens_of_the_batch(cfg: RunConfig) -> None:
    _, records = run(cfg)
    model = build_model(cfg.model, seq_len=24, seed=cfg.seed)
    total = 0.0
    with torch.no_grad():
        for batch in open_batches(cfg, World()).train.step(0):
            logits = model(input_ids=batch.inputs).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            )
    assert losses(records)[1] == pytest.approx(total / (6 * 24), rel=1e-6)


def test_loss_falls_and_the_schedule_is_followed(cfg: RunConfig) -> None:
    _, records = run(cfg)
    trained = [r for r in records if r["kind"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.3
    for record in trained:
        assert record["learning_rate"] == pytest.approx(0.01 * lr_multiplier(record["step"] - 1, cfg))
        assert record["tokens"] == record["step"] * 6 * 24


def test_skipped_step_leaves_weights_and_shifts_nothing(cfg: RunConfig) -> None:
    plain = [r for r in run(cfg.model_copy(update={"name": "plain"}))[1] if r["kind"] == "boundary"]
    with poisoned({5, 7}):
        state, records = run(cfg)
    trained = {r["step"]: r for r in records if r["kind"] == "train"}
    assert [s for s, r in trained.items() if not math.isfinite(r["loss"])] == [6, 8]
    assert trained[12]["skipped_steps"] == 2
    assert [r["step"] for r in records if r["kind"] == "boundary"] == [r["step"] for r in plain] == [3, 6, 9, 12]
    for step, record in trained.items():
        assert record["learning_rate"] == pytest.approx(0.01 * lr_multiplier(step - 1, cfg))
    assert all(bool(p.isfinite().all()) for p in state.model.parameters())
    embedding = state.model.get_input_embeddings().weight
    assert float(state.optimizer.state[embedding]["step"]) == 10


def test_updates_that_are_not_made_say_nothing_of_speed(data: Path, tmp_path: Path) -> None:
    steps = ",".join(map(str, range(1, 10)))
    _, records = run(tiny_config(data, tmp_path, f"train.skip_steps=[{steps}]"))
    taken = {r["step"]: r["step_s"] for r in records if r["kind"] == "train"}
    assert max(taken[step] for step in range(2, 11)) < taken[12] / 5
    assert taken[11] > taken[1] / 5


def test_steps_named_in_the_config_are_passed_over(data: Path, tmp_path: Path) -> None:
    plain, records = run(tiny_config(data, tmp_path, "name=plain"))
    state, skipping = run(tiny_config(data, tmp_path, "train.skip_steps=[5]"))
    before, after = losses(records), losses(skipping)
    assert math.isnan(after[6])
    assert {s: after[s] for s in range(1, 6)} == {s: before[s] for s in range(1, 6)}
    assert after[7] == pytest.approx(before[7], abs=0.3), "the next step reads its own rows"
    assert after[7] != before[7]
    assert state.position.counters.skipped_steps == 1
    assert state.position.boundary == plain.position.boundary == 12
    rates = [[r["learning_rate"] for r in rs if r["kind"] == "train"] for rs in (records, skipping)]
    assert rates[0] == rates[1]


@poisoned({2, 3, 6})
def test_resume_after_skipped_steps_is_bitwise(cfg: RunConfig) -> None:
    whole, _ = run(cfg.model_copy(update={"name": "whole"}))
    for step in (4, 7):
        broken = cfg.model_copy(update={"name": f"broken-{step}"})
        with pytest.raises(Crash):
            run(broken, crash_at(step, "train"))
        state, after = run(broken)
        assert state_digest(state) == state_digest(whole)
        assert state.position == whole.position
        assert {r["step"]: r["skipped_steps"] for r in after if r["kind"] == "train"}[12] == 3


@poisoned({1, 2, 4, 6, 7, 8})
def test_too_many_skipped_steps_in_a_row_end_the_run(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path, "train.max_nonfinite_steps=2", "train.max_rollbacks=0")
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 8, .*train.max_nonfinite_steps=2 allows"):
        run(cfg)
    assert list_manifests(run_storage(cfg))[-1] == 8


def test_real_divergence_ends_with_a_named_error(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(
        data,
        tmp_path,
        "optimizer.learning_rate=1e30",
        "optimizer.grad_clip=0",
        "train.max_nonfinite_steps=3",
        "train.max_rollbacks=0",
    )
    with pytest.raises(NonFiniteError, match=r"with a lower optimizer\.learning_rate"):
        run(cfg)


def test_bf16_trains_like_fp32_and_keeps_weights_in_fp32(data: Path, tmp_path: Path) -> None:
    _, exact = run(tiny_config(data, tmp_path, "name=fp32"))
    state, rounded = run(tiny_config(data, tmp_path, "name=bf16", "train.precision=bf16"))
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert losses(rounded) != losses(exact)
    for step, loss in losses(exact).items():
        assert losses(rounded)[step] == pytest.approx(loss, rel=0.01)  # bf16 has 8 bits


@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_trains_the_same(data: Path, tmp_path: Path) -> None:
    short = ["steps=6", "method.warm_start_steps=0", "model.num_layers=1"]
    _, plain = run(tiny_config(data, tmp_path, "name=plain", *short))
    _, compiled = run(tiny_config(data, tmp_path, "name=compiled", "train.compile=true", *short))
    for step, loss in losses(plain).items():
        assert losses(compiled)[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("overrides", [(), ("train.precision=bf16",)])
def test_kept_effective_weights_train_the_same_bits(data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """Over a warm start, three cycles and two micro-batches an update; resumed with the other in the middle, too."""
    overrides = (*overrides, "method.trainable_scaling=true")
    rebuilt, expected = run(tiny_config(data, tmp_path, *overrides, "name=r", "train.effective_weights=rebuilt"))
    kept_config = tiny_config(data, tmp_path, *overrides, "name=k", "train.effective_weights=kept")
    kept, records = run(kept_config)
    assert losses(records) == losses(expected)
    assert state_digest(kept) == state_digest(rebuilt)
    layers = low_rank_layers(kept.model).values()
    assert all(layer.effective is not None for layer in layers)
    assert all(layer.effective is None for layer in low_rank_layers(rebuilt.model).values())
    changed = tiny_config(data, tmp_path, *overrides, "name=c", "train.effective_weights=rebuilt")
    with pytest.raises(Crash):
        run(changed, crash_at(8, "train"))
    again, _ = run(tiny_config(data, tmp_path, *overrides, "name=c", "train.effective_weights=kept"))
    assert state_digest(again) == state_digest(rebuilt)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 5e-3)])
def test_fast_layer_trains_as_the_plain_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, bound: float
) -> None:
    """One matrix and its own backward, layers together, the loss in chunks; against x W^T + s (x A^T) B^T and autograd,
    over a warm start and three cycles. The bounds are some ten times what rounding made of it."""
    fast_config = tiny_config(data, tmp_path, "name=fast", f"train.precision={precision}", "train.loss_chunk_tokens=40")
    _, fast = run(fast_config)
    monkeypatch.setattr(LowRankLinear, "forward", LowRankLinear._factored)
    _, plain = run(tiny_config(data, tmp_path, "name=plain", f"train.precision={precision}"))
    assert losses(fast) != losses(plain)
    for step, loss in losses(plain).items():
        assert losses(fast)[step] == pytest.approx(loss, rel=bound), step


@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler")
def test_a_merge_compiles_nothing_anew(data: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    seen: dict[int, int] = {}

    def note(record: Record) -> None:
        if record["kind"] == "train":
            seen[record["step"]] = counters["stats"]["unique_graphs"]

    cfg = tiny_config(
        data, tmp_path, "train.compile=true", "method.warm_start_steps=0", "model.num_layers=1",
        "train.loss_chunk_tokens=64",
    )  # fmt: skip
    _, records = run(cfg, on_record=note)
    assert next(r["step"] for r in records if r["kind"] == "boundary") < 6
    assert seen[1] > 0
    assert set(seen.values()) == {seen[1]}


def test_effective_weights_are_kept_where_memory_is_not_short(data: Path, tmp_path: Path) -> None:
    for overrides, kept in {
        (): True, ("method.frozen_weights=bf16_int8",): False, ("method.dropout=0.1",): False,
        ("method.frozen_weights=bf16_int8", "train.effective_weights=kept"): True,
        ("train.effective_weights=rebuilt",): False,
    }.items():  # fmt: skip
        cfg = tiny_config(data, tmp_path, *overrides)
        assert isinstance(cfg.method, ReloraConfig)
        assert cfg.method.keeps_effective_weights(cfg.train) is kept


def test_warm_start_keeps_the_moments_of_what_stays_trained(cfg: RunConfig) -> None:
    """Parameters that are trained on both sides of the switch have been stepped every time."""
    state, _ = run(cfg)
    steps = {n: float(state.optimizer.state[p]["step"]) for n, p in state.model.named_parameters() if p.requires_grad}
    assert {v for n, v in steps.items() if "lora_" not in n} == {12.0}
    assert {v for n, v in steps.items() if "lora_" in n} == {0.0}, "the last merge reset them"


def test_evaluation_counts_the_asked_rows_once(cfg: RunConfig) -> None:
    state, records = run(cfg)
    data = open_batches(cfg, World())
    record = evaluate(cfg, World(), state, data.validation)
    assert record["tokens"] == 5 * 24
    assert record["loss"] == [r for r in records if r["kind"] == "eval"][-1]["loss"]
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert state.model.training
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3, 12]


def test_end_is_not_told_of_a_run_that_is_another_drivers(cfg: RunConfig) -> None:
    """An attempt that finds it at its end stores nothing, and would not hear of it. The other may be going back."""
    run(cfg)
    storage = run_storage(cfg)
    earlier = claim(storage).attempt(2)
    claim(storage)
    records: list[Any] = []
    with pytest.raises(SupersededError):
        run_attempt(check_run(cfg), World(), attempt=earlier, on_record=records.append)
    assert [r["kind"] for r in records] == ["attempt"]


def test_evaluation_does_not_change_the_run(data: Path, tmp_path: Path) -> None:
    often, _ = run(tiny_config(data, tmp_path, "name=often", "train.eval_every_steps=1"))
    seldom, _ = run(tiny_config(data, tmp_path, "name=seldom"))
    assert state_digest(often) == state_digest(seldom)


def test_several_epochs_work(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path, "data.seq_len=2000", "train.eval_rows=1", "model.num_layers=1")
    assert open_batches(cfg, World()).train._rows.num_rows < 6 * 12
    state, _ = run(cfg)
    assert state.position.step == 12


def test_metrics_are_plain_json_with_every_step_once(cfg: RunConfig) -> None:
    with pytest.raises(Crash):
        run(cfg, crash_at(7, "train"))
    run(cfg)
    storage = run_storage(cfg)
    assert [r["step"] for r in read(storage, "train")] == list(range(1, 13))
    assert [a["attempt"][:4] for a in read_all(storage, "attempt")] == ["0001", "0002"]
    for path in storage.list("metrics"):
        for line in storage.get(path).decode().splitlines():
            assert json.loads(line)["kind"]


def test_init_from_a_run_begins_where_it_ended(cfg: RunConfig, data: Path, tmp_path: Path) -> None:
    first, records = run(cfg)
    ended_at = [r for r in records if r["kind"] == "eval"][-1]["loss"]
    second = tiny_config(data, tmp_path, "name=second", f"model.init_from={run_storage(cfg).url}")
    _, records = run(second)
    assert next(r for r in records if r["kind"] == "eval")["loss"] == pytest.approx(ended_at, rel=1e-6)
    early = tiny_config(data, tmp_path, "name=early", f"model.init_from={run_storage(cfg).url}@4")
    dense = load_trained(run_storage(cfg), 4)
    expected = dense.method.dense_state_dict(dense.model)["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(Crash):
        run(early, crash_at(0, "checkpoint"))
    began = load_trained(run_storage(early), 0).model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(began, expected)
    assert first.position.step == 12


def test_init_from_a_hugging_face_folder(cfg: RunConfig, data: Path, tmp_path: Path) -> None:
    run(cfg)
    folder = f"{run_storage(cfg).url}/model"
    second = tiny_config(data, tmp_path, "name=second", f"model.init_from={folder}")
    with pytest.raises(Crash):
        run(second, crash_at(0, "checkpoint"))
    began = load_trained(run_storage(second), 0).model.state_dict()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(began[n], t) for n, t in plain.items())


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("", "model.num_layers=1", r"has 'model\.layers\.1\.\S+', which the model lacks"),
        ("", "model.num_layers=3", r"has no tensor 'model\.layers\.2\.\S+' \(9 missing\)"),
        ("", "model.intermediate_size=44", r"has shape \(48, 32\), the model \(44, 32\)|has shape"),
        ("@5", "seed=3", r"has no checkpoint at step 5. It has 0, 2"),
        ("/nothing", "seed=3", r"model.init_from='.*/nothing' does not exist: there is no such file or folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    cfg: RunConfig, data: Path, tmp_path: Path, source: str, change: str, message: str
) -> None:
    run(cfg)
    second = tiny_config(data, tmp_path, "name=second", f"model.init_from={run_storage(cfg).url}{source}", change)
    with pytest.raises(Exception, match=message):
        run(second)
    assert not list_manifests(run_storage(second))


@pytest.mark.parametrize("name", ["gpt2", "pythia", "qwen"])
def test_any_causal_model_trains_merges_and_exports(name: str, data: Path, tmp_path: Path) -> None:
    settings = {
        "gpt2": transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "pythia": transformers.GPTNeoXConfig(
            vocab_size=2100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        "qwen": transformers.Qwen2Config(
            vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    }[name]  # fmt: skip
    settings.save_pretrained(tmp_path / "architecture")
    cfg = tiny_config(data, tmp_path, model={"huggingface": str(tmp_path / "architecture")})
    with pytest.raises(Crash):
        run(cfg, crash_at(7, "train"))
    state, records = run(cfg)
    whole, _ = run(cfg.model_copy(update={"name": "whole"}))
    assert state_digest(state) == state_digest(whole)  # GPT-2 has dropout of its own: keyed, so resumable
    assert next(r["step"] for r in records if r["kind"] == "attempt") == 6
    ids = open_batches(cfg, World()).validation.step(0)[0].inputs
    assert_loads_as_the_live_model(f"{run_storage(cfg).url}/model", state, ids)


def test_model_that_looks_ahead_is_refused(data: Path, tmp_path: Path) -> None:
    transformers.BertConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="is not causal"):
        run(tiny_config(data, tmp_path, model={"huggingface": str(tmp_path / "a")}))


def test_row_longer_than_the_positions_is_refused(data: Path, tmp_path: Path) -> None:
    transformers.GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=4, n_positions=16).save_pretrained(
        tmp_path / "a"
    )
    cfg = tiny_config(data, tmp_path, model={"huggingface": str(tmp_path / "a")})
    with pytest.raises(ConfigError, match=r"data.seq_len=24 is more than the 16 positions"):
        run(cfg)


def test_manifest_says_what_it_holds(cfg: RunConfig) -> None:
    run(cfg)
    manifest = read_manifest(run_storage(cfg), 12)
    assert (manifest.step, manifest.boundary, manifest.tokens) == (12, 12, 12 * 6 * 24)
    assert manifest.counters.merges == 3
    assert manifest.versions["torch"] == str(torch.__version__)


def test_state_bytes_are_counted_by_role(cfg: RunConfig) -> None:
    """Of each structure: all weights trained, and adapters on frozen ones."""
    _, records = run(cfg)
    (first,) = [r for r in records if r["kind"] == "attempt"]
    last = [r for r in records if r["kind"] == "boundary"][-1]
    assert first["num_trainable"] == first["num_parameters"] > last["num_trainable"]
    for record in (first, last):
        found = record["state_bytes"]
        assert found["weights"] == 4 * record["num_parameters"]
        assert found["gradients"] == 4 * record["num_trainable"]
        steps = found["optimizer"] - 8 * record["num_trainable"]
        assert 0 < steps < 4 * 50, "and a count for each tensor"
    effective = 4 * 2 * (4 * 32 * 32 + 3 * 32 * 48)  # of two blocks' seven layers
    assert last["state_bytes"]["derived"] - first["state_bytes"]["derived"] == effective
    total = size_text(sum(last["state_bytes"].values()))
    assert f"state     {total} on each worker: weights " in summary(run_storage(cfg))


def test_gradient_at_a_boundary_is_that_of_the_last_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is trained it is the one that the update had; of W in a layer with adapters there is none to be had."""
    cfg = tiny_config(data, tmp_path, "optimizer.grad_clip=0", "steps=6", "optimizer.learning_rate=1e-30")
    seen: dict[str, torch.Tensor] = {}
    accumulate, switch = loop._accumulate_gradients, Relora.on_boundary

    def noted(*args: Any) -> Any:
        result = accumulate(*args)
        head = next(p for name, p in args[2].named_parameters() if name.endswith("lm_head.weight"))
        seen["update"] = head.grad.clone()
        return result

    def asked(self: Relora, boundary: Boundary) -> BoundaryReport:
        (seen["boundary"],) = boundary.gradient([boundary.model.get_parameter("lm_head.weight")])
        if boundary.step == 6:
            with pytest.raises(RuntimeError, match=r"no gradient reaches model.layers.0.mlp.up_proj.weight"):
                boundary.gradient([boundary.model.get_parameter("model.layers.0.mlp.up_proj.weight")])
        assert torch.allclose(seen["boundary"], seen["update"], rtol=1e-4, atol=1e-8)
        return switch(self, boundary)

    monkeypatch.setattr(loop, "_accumulate_gradients", noted)
    monkeypatch.setattr(Relora, "on_boundary", asked)
    run(cfg)
    assert seen["boundary"].any()


def test_longer_run_than_planned_says_how(data: Path, tmp_path: Path) -> None:
    run(tiny_config(data, tmp_path))
    with pytest.raises(ConfigError, match=r"steps: 12 there, 15 here") as caught:
        run(tiny_config(data, tmp_path, "steps=15"))
    assert f"name=tiny-2 model.init_from={tmp_path}/tiny steps=3" in str(caught.value)
    assert "begin anew with steps=15; with train.stop_after_steps=12 besides" in str(caught.value)
    with pytest.raises(ConfigError, match=r"keep steps=12 and set train\.stop_after_steps=6"):
        run(tiny_config(data, tmp_path, "steps=6"))
    longer = tiny_config(data, tmp_path, "name=tiny-2", f"model.init_from={tmp_path}/tiny", "steps=9")
    assert run(longer)[0].position.step == 9
