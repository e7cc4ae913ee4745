"""`relora-ray evaluate` on a tiny run and its export: real training, real files, real fine-tuning. Nothing is faked."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers

from relora_ray.commands.checkpoints import copy, delete, prune, verify
from relora_ray.commands.evaluate import main
from relora_ray.commands.export import export
from relora_ray.commands.report import summary
from relora_ray.config import RunConfig
from relora_ray.evaluation import subject
from relora_ray.evaluation.fine_tuning import Encoded, Recipe, _cut, _encoded, _logits, padding
from relora_ray.evaluation.glue import TASKS, Examples, read_task
from relora_ray.evaluation.subject import load_classifier, open_subject
from relora_ray.runs import metrics
from relora_ray.runs.evaluations import lines, read_evaluations
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.evaluation.glue_files import write_glue
from tests.tiny import run, tiny_config

Call = Callable[..., tuple[int, str, str]]
TINY = ("--max-tokens", "16", "--batch-rows", "16", "--epochs", "2", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(data, tmp_path_factory.mktemp("runs"), f"data.validation.same={data}", "train.eval_every_steps=4")
    run(cfg)
    return cfg


@pytest.fixture
def place(trained: RunConfig, tmp_path: Path) -> str:
    """A run's folder of the test's own."""
    shutil.copytree(run_storage(trained).url, tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture(scope="module")
def exported(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("exported") / "model"
    export(run_storage(trained), Storage(str(out)))
    return str(out)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*args: str | Path) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return called


def test_loss_is_that_of_the_runs_own_evaluations(trained: RunConfig, place: str, exported: str, call: Call) -> None:
    """Of every checkpoint that was evaluated: inside a cycle, where the model has adapters, and at a boundary."""
    recorded = {r["step"]: r for r in metrics.read(run_storage(trained), "eval")}
    for step in (0, 4, 8, 12):
        assert call(place, "--step", str(step))[0] == 0
    found = [r for r in read_evaluations(Storage(place)) if r["on"] == "held-out"]
    assert [r["step"] for r in found] == [0, 4, 8, 12]
    for record in found:
        known, result = recorded[record["step"]], record["result"]
        assert result["loss"] == pytest.approx(known["loss"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        assert (result["tokens"], result["rows"]) == (known["tokens"], 5)
        assert result["loss_se"] == pytest.approx(np.std(result["row_losses"], ddof=1) / math.sqrt(5), rel=1e-4)
    assert {r["on"] for r in read_evaluations(Storage(place))} == {"held-out", "same"}
    code, out, _ = call(exported, "--data", f"x={trained.data.path}", "--rows", "5", "--seq-len", "24")
    assert code == 0
    assert f"x            loss {recorded[12]['loss']:.4f}" in out
    assert "are not stored" in out


def test_best_is_taken_on_demand(place: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one that is: tests of the export."""
    monkeypatch.setattr(subject, "best_checkpoint_step", lambda storage: 4 if storage.url == place else None)
    assert "after step 4\n" in call(place, "--best")[1]


def test_bits_per_byte_are_of_the_text(trained: RunConfig, exported: str, call: Call, tmp_path: Path) -> None:
    """All rows: the text between the first token and the end of the last row, as the tokenizer writes it."""
    args = (exported, "--data", trained.data.path, "--rows", "0", "--seq-len", "24", "--out", tmp_path / "out")
    code, out, _ = call(*args)
    assert code == 0
    (path,) = (tmp_path / "out").iterdir()
    result = json.loads(path.read_text())["result"]
    shard = np.load(Path(trained.data.path) / "validation-00000.npy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(trained.data.path) / "tokenizer")
    text = tokenizer.decode(shard[1 : result["tokens"] + 1].tolist(), skip_special_tokens=True)
    assert result["bytes"] == len(text.encode())
    bits = result["loss"] * result["tokens"] / math.log(2) / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert f"{bits:.4f} bits per byte" in out


def test_models_are_compared_row_by_row(trained: RunConfig, place: str, exported: str, call: Call) -> None:
    args = ("--data", trained.data.path, "--rows", "8", "--seq-len", "24")
    code, out, _ = call(exported, place, *args)
    assert code == 0
    assert re.search(r"[+-]0\.0000 \+- 0\.0000 to the first model", out)


def test_the_same_question_is_answered_from_what_is_stored(place: str, call: Call) -> None:
    first = call(place)
    files = {path: path.stat().st_mtime_ns for path in Path(place, "evaluations").iterdir()}
    assert len(files) == 2
    assert call(place) == first
    assert {path: path.stat().st_mtime_ns for path in Path(place, "evaluations").iterdir()} == files
    one = next(iter(files))
    one.write_text("{")
    code, again, _ = call(place)
    assert (code, again) == first[:2]
    assert one.read_text() == "{"  # nobody's record is written over
    assert len(read_evaluations(Storage(place))) == 1


def test_changed_folder_is_another_model(exported: str, tmp_path: Path) -> None:
    """Its tokenizer's settings say where a text ends."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)

    def identity() -> dict[str, str]:
        with open_subject(Storage(str(folder))) as found:
            return found.identity

    before = identity()
    (folder / "README.md").write_text("another card")
    assert identity() == before
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "the"}))
    assert identity() != before


def test_samples_depend_on_seed_and_prompt_only(place: str, exported: str, call: Call) -> None:
    def texts(*args: str) -> list[str]:
        code, out, _ = call(*args, "--max-new-tokens", "6")
        assert code == 0
        return re.split(r"^---.*\n", out, flags=re.MULTILINE)[1:-1]

    alone = texts(place, "--generate", "It was")
    assert alone[0].startswith("It was")
    assert texts(exported, "--generate", "It was", "--generate", "She")[0] == alone[0]
    assert texts(place, "--generate", "It was", "--seed", "1") != alone
    texts(place, "--generate", "It was", "--temperature", "0")
    (greedy,) = (r for r in read_evaluations(Storage(place)) if r["settings"]["temperature"] == 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer.eos_token_id, *tokenizer.encode("It was", add_special_tokens=False)]
    made = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 1:]
    sample = greedy["result"]["samples"][0]
    assert sample["prompt"] + sample["text"] == tokenizer.decode(made, skip_special_tokens=True)
    assert [line.split()[-2:] for line in lines([greedy])] == [["1", "sample"]]


def test_files_of_glue_are_read_as_they_are(glue: str) -> None:
    cola, mrpc, stsb, rte = (read_task(TASKS[name], glue) for name in ("cola", "mrpc", "stsb", "rte"))
    assert len(cola.train.texts) == len(mrpc.train.texts) == len(stsb.train.texts) == 48
    assert cola.train.texts[0] == ('The "old man said bad',)
    assert cola.train.labels[:2] == [0, 1]
    assert mrpc.train.texts[0] == ('The "old man said', "It's old no. 0")
    assert stsb.train.labels[:7] == [0, 1, 2, 3, 4, 5, 0]
    assert rte.train.labels[:2] == [1, 0]


def test_same_examples_come_from_a_copy_of_the_hubs(glue: str, tmp_path: Path) -> None:
    there = read_task(TASKS["rte"], glue)
    for split, part in (("train", there.train), ("validation", there.dev[""])):
        rows = {"sentence1": [t[0] for t in part.texts], "sentence2": [t[1] for t in part.texts]}
        rows["label"] = [int(label) for label in part.labels]
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "glue" / "rte" / f"{split}.parquet")
    card = "---\nconfigs:\n- config_name: rte\n  data_files:\n  - {split: train, path: rte/train.parquet}\n"
    (tmp_path / "glue" / "README.md").write_text(card + "  - {split: validation, path: rte/validation.parquet}\n---\n")
    assert read_task(TASKS["rte"], f"hub:{tmp_path}/glue") == there


def test_fine_tuning_learns_and_is_done_once(place: str, glue: str, call: Call) -> None:
    args = (place, "--glue", "cola,rte,stsb", "--glue-data", glue, "--seeds", "1,2", *TINY, "--epochs", "12")
    code, out, _ = call(*args)
    assert code == 0
    found = [r for r in read_evaluations(Storage(place)) if r["kind"] == "glue"]
    each = [(task, seed) for task in ("cola", "rte", "stsb") for seed in (1, 2)]
    assert [(r["on"], r["settings"]["seed"]) for r in found] == each
    by_task = {r["on"]: r["result"] for r in found}
    assert by_task["cola"]["scores"]["matthews"] > 0.9  # the last word says it
    assert by_task["cola"]["last_loss"] < by_task["cola"]["first_loss"] / 2
    assert set(by_task["stsb"]["scores"]) == {"pearson", "spearman"}
    assert by_task["rte"]["updates"] == 12 * 3
    assert re.search(r"  cola  matthews \d+\.\d \+- \d+\.\d  \(2 seeds\)", out)
    assert "average of 3 tasks" in out
    assert "no padding token: its end token, 0, is padding" in out
    assert re.search(r"rows of train are longer than 16 tokens and are cut", out)
    again = call(*args)[1]
    assert "6 of 6 were done before" in again
    assert again.splitlines()[-8:] == out.splitlines()[-8:]
    page = summary(Storage(place))
    assert re.search(r"evaluated step +12  glue +cola +matthews .* \(2 seeds\)", page)


def test_killed_fine_tuning_goes_on(place: str, glue: str, call: Call) -> None:
    """One result is gone: only that is made again, and is the same."""
    args = (place, "--glue", "rte,mrpc", "--glue-data", glue, "--seeds", "1", *TINY, "--max-train-rows", "16")
    code, out, _ = call(*args)
    assert code == 0
    assert "these are no results of GLUE" in out
    (path,) = Path(place, "evaluations").glob("*glue-rte*")
    before = json.loads(path.read_text())["result"]
    path.unlink()
    code, out, _ = call(*args)
    assert "1 of 2 were done before" in out
    assert json.loads(path.read_text())["result"] == before


def test_padding_does_not_change_a_prediction(exported: str) -> None:
    with open_subject(Storage(exported)) as subject:
        tokens = subject.need_tokens("this")
        pad_id, _ = padding(tokens, "it")
        torch.manual_seed(0)
        model = load_classifier(subject.folder, 2, pad_id)
        rows = _encoded(Examples([("a",), ("It was a truth universally acknowledged",)], [0, 1]), tokens, 24).rows
        with torch.no_grad():
            together = _logits(model, rows, Recipe(), pad_id, torch.device("cpu"))
            alone = torch.cat([_logits(model, [row], Recipe(), pad_id, torch.device("cpu")) for row in rows])
            last = model.score(model.model(input_ids=torch.tensor(rows[:1])).last_hidden_state)[:, -1]
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together[:1], last, atol=1e-5)


def test_the_longer_text_is_cut() -> None:
    assert _cut([[1, 2, 3, 4, 5], [6, 7]], 4) == [[1, 2], [6, 7]]
    assert _cut([[1], [6, 7]], 4) == [[1], [6, 7]]
    assert Encoded([[1]], torch.zeros(1), 0).num_cut == 0


def test_commands_on_checkpoints_leave_results_alone(place: str, call: Call, tmp_path: Path) -> None:
    call(place)
    storage = Storage(place)
    names = sorted(path.name for path in Path(place, "evaluations").iterdir())
    assert names == [r.rpartition("/")[2] for r in storage.list("evaluations")]
    assert len(names) == 2
    list(prune(storage, keep_last=1, keep_every_steps=0, dry_run=False))
    assert all(problem == "" for _, problem in verify(storage, None))
    assert sorted(path.name for path in Path(place, "evaluations").iterdir()) == names
    copy(storage, Storage(str(tmp_path / "copied")), None)
    assert not (tmp_path / "copied" / "evaluations").exists()  # a copy is of one checkpoint
    assert call(tmp_path / "copied")[0] == 0
    delete(storage)
    assert not Path(place, "evaluations").exists()


def test_mistakes_end_in_one_message(
    trained: RunConfig, place: str, exported: str, glue: str, call: Call, tmp_path: Path
) -> None:
    data, bare = trained.data.path, tmp_path / "bare"
    shutil.copytree(exported, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    Path(tmp_path, "test", "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "test/RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t-1\n")
    for args, message in (
        ((tmp_path,), "is neither a run nor a Hugging Face folder"),
        ((place, "--step", "5"), "step 5"),
        ((exported,), "is a model without data of its own"),
        ((exported, "--step", "5", "--data", data), "--step=5 has no effect"),
        ((exported, "--best", "--data", data), "--best has no effect"),
        ((exported, "--data", tmp_path / "nowhere"), "has no index.json"),
        ((exported, "--data", f"{data},{data}"), "twice"),
        ((exported, "--data", "a="), "names no data"),
        ((exported, "--data", data, "--seq-len", "5000"), "--seq-len=5000 is more than"),
        ((bare, "--generate", "x"), "has no tokenizer"),
        ((bare, "--glue", "rte", "--glue-data", glue), "has no tokenizer"),
        ((place, "--glue", "rt", "--glue-data", glue), "'rt' is not a task. Did you mean 'rte'?"),
        ((place, "--glue", "all", "--glue-data", glue), "has no SST-2/train.tsv, SST-2/dev.tsv, QQP/train.tsv"),
        ((place, "--glue", "rte", "--glue-data", tmp_path / "test"), "1 without a label of the task"),
        ((place, "--glue", "rte", "--glue-data", "hub:/nowhere/at/all"), "there is no such folder"),
        (
            (place, "--glue", "rte", "--glue-data", glue, "--max-tokens", "2"),
            "--max-tokens leaves 0 tokens for 2 texts",
        ),
        ((place, "--glue", "rte", "--glue-data", glue, "--seeds", "a"), "--seeds='a' is not a list"),
        ((place, "--glue", "rte", "--glue-data", glue, "--learning-rate", "nan"), "--learning-rate=nan is not above 0"),
        ((place, "--generate", "x", "--temperature", "-1"), "--temperature=-1"),
        ((place, "--generate", "x", "--max-new-tokens", "9999"), "--max-new-tokens=9999 more than the"),
        ((place, "--ray"), "--ray has no effect"),
        ((place, "--device", "cuda"), "no GPU can be used here") if not torch.cuda.is_available() else ((), "usage"),
    ):
        if args:
            code, out, err = call(*args)
            assert code == 2, (args, out, err)
            assert message in err, (args, err)
            assert err.count("\n") == 1 or "note" in out, err


def test_other_tokens_are_refused(trained: RunConfig, place: str, exported: str, call: Call, tmp_path: Path) -> None:
    from relora_ray.data.tokenizer import train_tokenizer
    from tests.test_validation_sets import prepared

    train_tokenizer(["It was another text. " * 50], vocab_size=300, out=str(tmp_path / "tokenizer"))
    (tmp_path / "a.txt").write_text("\n\n".join(f"It was another text, the {n}th" for n in range(199)))
    other = prepared(tmp_path / "a.txt", tmp_path / "other", tmp_path / "tokenizer")
    for model in (place, exported):
        code, _, err = call(model, "--data", other, "--seq-len", "24")
        assert (code, "was prepared with another tokenizer than that of" in err) == (2, True), err
    shutil.copytree(exported, tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    (tmp_path / "bare/tokenizer_config.json").unlink()
    code, out, _ = call(tmp_path / "bare", "--data", other, "--seq-len", "24")
    assert code == 0
    assert "is taken on trust" in out


def test_divergence_is_told_and_the_rest_kept(place: str, glue: str, call: Call) -> None:
    args = (place, "--glue", "stsb", "--glue-data", glue, "--seeds", "1", *TINY)
    code, _, err = call(*args[:-1], "1e30")
    assert code == 1
    assert "fine-tuning on stsb with seed 1 diverged at update" in err
    assert call(*args)[0] == 0


def test_fine_tunings_are_ray_tasks(place: str, glue: str, call: Call) -> None:
    """The same results as in this process, stored by the tasks; a failed one is told, and the rest kept."""
    args = (place, "--glue", "rte,cola", "--glue-data", glue, "--seeds", "1", *TINY, "--max-train-rows", "16")
    code, _, err = call(*args, "--ray")
    assert code == 0, err
    on_ray = {r["on"]: r["result"] for r in read_evaluations(Storage(place))}
    shutil.rmtree(Path(place, "evaluations"))
    assert call(*args)[0] == 0
    here = {r["on"]: r["result"] for r in read_evaluations(Storage(place))}
    assert on_ray.keys() == here.keys() == {"rte", "cola"}
    for task, result in here.items():
        assert on_ray[task]["scores"] == pytest.approx(result["scores"])
        assert on_ray[task]["last_loss"] == pytest.approx(result["last_loss"], rel=1e-4)


def test_models_on_other_rows_or_in_other_arithmetic_are_not_compared_and_it_is_said(
    call: Call, place: str, data: Path, tmp_path: Path
) -> None:
    cfg = tiny_config(data, tmp_path / "other", "data.seq_len=16")
    run(cfg)
    code, out, err = call(place, run_storage(cfg).url)
    assert code == 0, err
    assert "note: not compared with the first model: seq_len=16 and not 24." in out
    shutil.rmtree(tmp_path / "other")
    cfg = tiny_config(data, tmp_path / "other", "train.precision=bf16")
    run(cfg)
    _, out, _ = call(place, run_storage(cfg).url)
    assert "precision=bf16 and not fp32" in out
    _, out, _ = call(place, run_storage(cfg).url, "--precision", "fp32")
    assert "to the first model, row by row" in out
    assert "not compared" not in out
