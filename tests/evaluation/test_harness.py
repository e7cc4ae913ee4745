"""The lm-evaluation-harness on an export, with a task that lies on this machine; without it, the message."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relora_ray.commands.evaluate import main
from relora_ray.config import RunConfig
from relora_ray.evaluation.harness import request, scores
from relora_ray.evaluation.subject import open_subject
from relora_ray.runs.evaluations import read_evaluations
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.tiny import run

TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["good", "bad"]
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def place(cfg: RunConfig) -> str:
    run(cfg)
    return run_storage(cfg).url


def write_task(folder: Path) -> list[dict[str, Any]]:
    docs = [{"text": f"The {word} man was", "answer": n % 2} for n, word in enumerate(("old", "red", "kind", "tall"))]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "task.yaml").write_text(TASK.format(file=folder / "docs.jsonl"))
    return docs


def test_own_task_is_scored_by_the_exports_likelihoods(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = write_task(folder)
    args = [place, "--lm-eval", "which_word", "--lm-eval-include", str(folder)]
    assert main(args) == 0
    out = capsys.readouterr().out
    (record,) = read_evaluations(Storage(place))
    score = record["result"]["scores"]["which_word acc"]
    assert f"which_word acc {score:.4f} +- " in out
    assert score == pytest.approx(sum(likelier(f"{place}/model", d["text"]) == d["answer"] for d in docs) / len(docs))
    assert main(args) == 0
    assert capsys.readouterr().out == out  # from what is stored


def likelier(folder: str, text: str) -> int:
    """Which of two words transformers finds likelier behind a text, without the harness."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for word in ("good", "bad"):
        before, whole = (tokenizer.encode(t, add_special_tokens=False) for t in (text, f"{text} {word}"))
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        found.append(sum(float(logs[n - 1, whole[n]]) for n in range(len(before), len(whole))))
    return 0 if found[0] >= found[1] else 1


def test_without_the_harness_it_says_how_to_get_it(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([place, "--lm-eval", "arc_easy"]) == 2
    assert "pip install 'relora-ray[evaluate]'" in capsys.readouterr().err


def test_request_names_the_export_and_what_begins_a_text(place: str) -> None:
    with open_subject(Storage(place)) as subject:
        asked = request(subject, ["a", "b"], 5, None, 4, torch.device("cpu"), "bf16")
        assert Path(asked["model_args"]["pretrained"], "config.json").is_file()
        assert asked["model_args"]["dtype"] == "bfloat16"
        assert asked["model_args"]["prefix_token_id"] == subject.need_tokens("this").end_id
    assert (asked["tasks"], asked["num_fewshot"], asked["batch_size"]) == (["a", "b"], 5, 4)


def test_scores_are_flat_and_filters_named() -> None:
    found = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "sample_len": 3}}
    assert scores(found) == {"arc acc": 0.5, "arc acc stderr": 0.1, "arc exact (strict)": 1.0}
    assert not math.isnan(sum(scores(found).values()))
