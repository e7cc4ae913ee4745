"""relora-ray plan: what it prints, draws, suggests and refuses, on configs that come with the package and others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
import yaml

from relora_ray.commands.plan import main
from relora_ray.config.file import load_config
from relora_ray.config.method import BUILT_IN
from relora_ray.planning import suggest
from relora_ray.planning.forecast import CONTEXT_BYTES, HEADROOM, Cluster, fits, largest_rows, memory
from relora_ray.planning.machines import Gpu, Machine, find_machines
from relora_ray.planning.page import page
from relora_ray.planning.picture import draw_plan
from relora_ray.planning.plan import RunPlan, make_plan
from tests.conftest import ROOT
from tests.tiny import run, tiny_config

SMALL = [
    "model={hidden_size: 512, intermediate_size: 1376, num_layers: 1, num_heads: 4, vocab_size: 32100}",
    "cluster.workers=4",
    "data.seq_len=256",
    "method.lora_rank=16",
]
QUICK = ["model.num_layers=1", "train.micro_batch_rows=1", "data.seq_len=128", "model.vocab_size=4000"]
"""Counted in a second."""


def told(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert main(list(args)) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if code == 0 else err


def cluster(text: str, **others: object) -> Cluster:
    machine, count = find_machines(text)
    return Cluster(machine, count, 0.4 * machine.gpu.tflops("bf16") * 1e12, **others)


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    cfg = load_config(str(ROOT / "configs/relora/1b.yaml"), SMALL)
    return make_plan(cfg, cluster("g6.xlarge:4", failures_per_day=20.0, price=0.35), rates=[20.0, 90.0])


def test_page_is_short_and_says_what_was_asked(plan: RunPlan) -> None:
    lines = list(page(plan, suggest.pasteable(plan)))
    text = "\n".join(lines)
    assert len(lines) <= 60
    assert "4 x g6.xlarge: 1 L4 of 24 GB each, 48.4 of 121 TFLOP/s in bf16, 2.5 Gbit/s, up to 10 for a while" in text
    for subject in (
        "trained",
        "optimizer",
        "activations",
        "PFLOPs",
        "gradients reduced, MB",
        "delta",
        "goodput",
        "full, $",
    ):
        assert subject in text
    first, end = (
        next(n for n, line in enumerate(lines) if line.startswith(word)) for word in ("parameters", "failures")
    )
    assert {len(line) for line in lines[first:end]} == {38 + 2 * 19}, "columns are aligned"


def test_numbers_hang_together(plan: RunPlan) -> None:
    last, full = plan.last, plan.full
    assert full is not None
    assert (last.phase.steps, plan.columns[0].phase.steps) == (120_000, 10_000)
    assert last.flops < full.flops < last.flops + last.frozen_gradient_flops < 1.2 * full.flops
    assert last.phase.gradient_bytes < full.phase.gradient_bytes
    assert last.phase.delta_bytes < full.phase.delta_bytes
    assert last.memory["optimizer"] == pytest.approx(2 * last.memory["gradients"], rel=0.01)
    assert plan.cluster is not None
    fast = replace(plan.cluster, machine=replace(plan.cluster.machine, network_gbps=1000.0))
    one, two = (plan.outcome(replace(fast, count=count)) for count in (1, 2))
    assert one.days / 2 < two.days < 0.6 * one.days
    assert (one.dollars, two.dollars) == pytest.approx((one.days * 24 * 0.35, two.days * 48 * 0.35))
    assert all(a.days < b.days for a, b in zip(plan.outcomes(), plan.outcomes(full=True), strict=True))
    calm, stormy = plan.outcomes(rate=0.5)[-1], plan.outcomes(rate=90.0)[-1]
    assert stormy.goodput < calm.goodput
    young, daly, best = plan.intervals()
    assert daly == pytest.approx(young, rel=0.1)
    assert best >= daly
    assert plan.outcome(plan.cluster).goodput > plan.outcome(plan.cluster, every_steps=500).goodput


def test_largest_micro_batch_fits_and_the_next_does_not(plan: RunPlan) -> None:
    """On GPUs made up: of 5 GB, and of so little that logits are not chunked."""
    for gigabytes in (5.0, 2.1):
        machine = Machine("x", Gpu("x", gigabytes, 1.0, ""), 1, 1.0)
        for column in plan.columns:
            rows = largest_rows(plan.cfg, column.phase, machine, 4)
            assert 1024 % rows == 0
            assert fits(column.phase, rows, machine, 4)
            assert not fits(column.phase, 2 * rows, machine, 4)
    assert largest_rows(plan.cfg, plan.last.phase, Machine("x", Gpu("x", 1.2, 1.0, ""), 1, 1.0), 4) == 0


def test_suggestions_can_be_pasted(plan: RunPlan) -> None:
    found = suggest.pasteable(plan)
    settings = [each.setting for each in found if each.setting]
    assert any(s.startswith("checkpoint.save_every_steps=") for s in settings)
    assert all(each.reason for each in found)
    again = load_config(str(ROOT / "configs/relora/1b.yaml"), [*SMALL, *" ".join(settings).split()])
    better = make_plan(again, plan.cluster, rates=plan.rates)
    assert [each.setting for each in suggest.pasteable(better) if each.setting] == []


def test_suggestions_for_more_machines_than_are_worth_it_agree_with_each_other() -> None:
    """Fewer workers, of which half may be missing: half of what there is would be more than the run then has."""
    cfg = load_config(str(ROOT / "configs/relora/1b.yaml"), [*SMALL, "cluster.workers=64"])
    machine = Machine("slow", Gpu("T4", 16.0, 8.1, "", 65.0), 1, 5.0)
    found = make_plan(cfg, Cluster(machine, 64, 1e13, failures_per_day=1.0))
    settings = dict(each.setting.split("=") for each in suggest.pasteable(found) if each.setting.startswith("cluster."))
    assert int(settings["cluster.workers"]) < 64
    assert int(settings["cluster.min_workers"]) == int(settings["cluster.workers"]) // 2


@pytest.mark.slow
def test_recomputation_is_suggested_where_it_is_what_makes_a_row_fit() -> None:
    """A GPU made up, that has room for the state and for blocks' inputs."""
    dims = "model={hidden_size: 256, intermediate_size: 688, num_layers: 16, num_heads: 4, vocab_size: 2000}"
    overrides = [dims, "data.seq_len=512", "method.lora_rank=16", "train.micro_batch_rows=1"]
    cfg = load_config(str(ROOT / "configs/relora/1b.yaml"), overrides)
    large = make_plan(cfg, Cluster(Machine("x", Gpu("x", 80.0, 8.1, "", 65.0), 1, 10.0), 1, 1e13))
    state = max(sum(column.phase.state.values()) for column in large.columns)
    one_row = max(sum(memory(column.phase, column.phase.measure(1), 1).values()) for column in large.columns)
    room = ((state + one_row) / 2 + CONTEXT_BYTES) / (1 - HEADROOM)
    found = make_plan(cfg, Cluster(Machine("small", Gpu("T4", room / 1e9, 8.1, "", 65.0), 1, 10.0), 1, 1e13))
    assert not all(column.largest_rows for column in found.columns)
    assert "train.recompute=true" in [each.setting for each in suggest.pasteable(found)]
    again = load_config(str(ROOT / "configs/relora/1b.yaml"), [*overrides, "train.recompute=true"])
    assert all(column.largest_rows for column in make_plan(again, found.cluster).columns)


def test_what_does_not_fit_is_said_with_what_helps() -> None:
    """A GPU made up, of 180 MB for tensors and without bf16."""
    dims = "model={hidden_size: 512, intermediate_size: 1376, num_layers: 4, num_heads: 4, vocab_size: 2000}"
    overrides = [dims, "data.seq_len=64", "method.lora_rank=16", "train.micro_batch_rows=1"]
    cfg = load_config(str(ROOT / "configs/relora/1b.yaml"), overrides)
    found = make_plan(cfg, Cluster(Machine("small", Gpu("T4", 1.243, 8.1, ""), 1, 1.0), 8, 1e12))
    assert [bool(column.largest_rows) for column in found.columns] == [False, True]
    text = "\n".join(f"{each.setting} # {each.reason}" for each in suggest.pasteable(found))
    assert "train.precision=fp32 # a T4 has no bf16 units" in text
    assert "method.warm_start_steps=0 method.warm_start_lr_ratio=1 # the warm start is full-rank training" in text
    assert "does not fit on T4" in text


@pytest.mark.parametrize("method", ["full", "lora", "galore", "sltrain"])
def test_every_method_has_a_plan(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = "9m" if method in ("full", "lora") else "60m"
    args = (f"{method}/{size}", *QUICK, *(("--machines", "g5.xlarge:2") if method == "galore" else ()), "--json")
    found = json.loads(told(capsys, *args))
    assert found["method"] == method
    assert (found["full_rank"] is None) == (method == "full")
    assert found["phases"][-1]["flops_by_formula"] is False
    if method == "galore":
        assert found["phases"][-1]["largest_micro_batch_rows"] > 0
        assert found["save_every_s"] == {"young": None, "daly": None, "best": None}, "there are no failures"
        assert found["outcomes"][0]["goodput"] == pytest.approx(1.0, abs=1e-3)


def test_a_method_of_another_package_has_a_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/add-a-method"))
    monkeypatch.setitem(BUILT_IN, "lora_fa", "lora_fa.config:LoraFaConfig")  # in place of an entry point
    out = told(capsys, "full/9m", "method={kind: lora_fa, rank: 8}", *QUICK, "--json")
    assert json.loads(out)["phases"][-1]["parameters"]["adapters"] > 0


@pytest.fixture
def written(tmp_path: Path) -> str:
    """A config of one's own."""
    raw = yaml.safe_load((ROOT / "configs/full/9m.yaml").read_text())
    raw["data"]["path"] = str(tmp_path / "data")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_architectures_of_transformers_have_a_plan(
    kind: str, tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 500},
        "mixtral": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 500,
        },
    }[kind]  # fmt: skip
    transformers.AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / kind)
    method = "method={kind: lora, lora_rank: 4}"
    args = [written, f"model={{huggingface: {tmp_path / kind}}}", method, "train.micro_batch_rows=2", "data.seq_len=64"]
    found = json.loads(told(capsys, *args, "--json"))
    lora = found["phases"][-1]
    assert lora["parameters"]["adapters"] > 0
    tokens = found["tokens"] / found["steps"]
    active = lora["parameters"]["linear"] * (0.55 if kind == "mixtral" else 1) + lora["parameters"]["embeddings"]
    assert lora["update_flops"] == pytest.approx(4.8 * tokens * active, rel=0.5)


def test_speed_of_another_run_is_taken_over(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from relora_ray.planning.count import phases
    from relora_ray.planning.forecast import update_flops
    from relora_ray.planning.like import reached_flops_per_s
    from relora_ray.runs.places import run_storage

    cfg = tiny_config(data, tmp_path)
    _, records = run(cfg)
    reached = reached_flops_per_s(run_storage(cfg))
    seconds = sorted(r["step_s"] for r in records if r["kind"] == "train" and r["step"] > 3)
    flops = update_flops(cfg, phases(cfg)[-1].measure(3))
    assert flops / seconds[-1] <= reached <= flops / seconds[0]
    args = ["full/9m", *QUICK, "--machines", "g6.xlarge:1", "--json"]
    found = json.loads(told(capsys, *args, "--like", run_storage(cfg).url))
    assert found["cluster"]["flops_per_s"] == pytest.approx(reached)
    assert "is not a run" in told(capsys, *args, "--like", str(tmp_path / "none"), code=2)


def test_picture_is_drawn(plan: RunPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_plan(plan, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    told(capsys, "full/9m", *QUICK, "--picture", str(tmp_path / "b.svg"))
    assert "<svg" in (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--machines", "g6.xlarg:8"], "--machines 'g6.xlarg' is not in the table. Did you mean 'g6.xlarge'?"),
        (["--machines", "g6.xlarge:x"], "'x' is no number of machines"),
        (["--gpu-memory-gb", "24"], "--gpu-memory-gb and --gpu-tflops describe a GPU together"),
        (["--gpu-memory-gb", "24", "--gpu-tflops", "9", "--machines", "g6.xlarge"], "Give one of the two"),
        (["--spot", "often", "--machines", "g6.xlarge"], "--spot 'often': give failures of one machine a day"),
        (["--spot", "-1", "--machines", "g6.xlarge"], "--spot '-1'"),
        (["--price", "3"], "--price has no effect without a machine"),
        (["--suggest"], "--suggest has no effect without a machine"),
        (["--picture", "a.gif"], "is neither a .png nor a .svg file"),
        (["--machines", "g6.xlarge", "--like", "x", "--utilisation", "0.5"], "both say how fast a GPU is"),
        (["optimizer.learning_rat=1"], "unknown key optimizer.learning_rat"),
    ],
)
def test_mistakes_are_one_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in told(capsys, "relora/9m", *args, code=2)


@pytest.mark.parametrize("args", [["--utilisation", "1.5"], ["--price", "nan"], ["--restart-s", "-1"]])
def test_numbers_that_cannot_be_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["relora/9m", "--machines", "g6.xlarge", *args])
    assert "is no number" in capsys.readouterr().err


def test_sweeps_and_files_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a sweep: a plan is of one run" in told(capsys, "sweeps/60m", code=2)
    assert "neither a file nor a config that comes" in told(capsys, "relora/2b", code=2)
