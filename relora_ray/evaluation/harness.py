"""Tasks of EleutherAI's lm-evaluation-harness on a model's Hugging Face folder, by its documented Python interface
(lm_eval, docs/interface.md). It is not among the dependencies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from relora_ray.errors import ConfigError, ReloraError, RunFailedError, first_words
from relora_ray.evaluation.subject import Subject, digest_of
from relora_ray.runs.evaluations import Evaluation, find_evaluation, new_record, path_of, put_evaluation
from relora_ray.storage import Storage

SEED = 1234
"""The harness' own for the examples in a prompt, given explicitly."""


def refuse_without_harness() -> None:
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs the lm-evaluation-harness, which is not installed. Install it: pip install "
            "'relora-ray[evaluate]', or pip install 'lm_eval[hf]'."
        )


def run_harness(
    subject: Subject,
    tasks: str,
    *,
    num_fewshot: int | None,
    limit: int | None,
    include_path: str | None,
    batch_rows: int,
    device: torch.device,
    precision: str,
    out: Storage | None,
) -> tuple[Evaluation, str]:
    """`tasks`: names, commas between. The record, and why it could not be stored. `limit`: the first so many examples
    of each task only."""
    refuse_without_harness()
    import lm_eval

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    settings = {
        **subject.identity, "tasks": names, "num_fewshot": num_fewshot, "limit": limit, "precision": precision,
        "lm_eval": str(lm_eval.__version__), "device": device.type, "include": _digest(include_path),
    }  # fmt: skip
    path, began = path_of("harness", "_".join(names), subject.step, settings), time.time()
    if (known := find_evaluation(out, path)) is not None:
        return known, ""
    asked = request(subject, names, num_fewshot, limit, batch_rows, device, precision)
    found = _evaluated(lm_eval, names, include_path, asked)
    result = {"scores": scores(found["results"]), "num_samples": found.get("n-samples", {}), "limit": limit}
    record = new_record("harness", ",".join(names), subject.name, subject.step, settings, result, began)
    return record, put_evaluation(out, path, record) if out is not None else ""


def _digest(include_path: str | None) -> str:
    """Of own tasks' files, data among them, so that a changed one is another. ConfigError without such a folder."""
    if include_path is None:
        return ""
    if not Path(include_path).is_dir():
        raise ConfigError(f"--lm-eval-include={include_path!r} is no folder. Give one with tasks' .yaml files.")
    files = (path for path in Path(include_path).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest_of(Path(include_path), files)[:12]


def request(
    subject: Subject,
    names: list[str],
    num_fewshot: int | None,
    limit: int | None,
    batch_rows: int,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """The arguments of `lm_eval.simple_evaluate`."""
    return {
        "model": "hf",
        "model_args": {
            "pretrained": str(subject.folder),
            "dtype": "bfloat16" if precision == "bf16" else "float32",
            "trust_remote_code": False,
            # What a text without a context is scored behind: as in training.
            **({"prefix_token_id": begin[-1]} if (begin := subject.need_tokens("the harness").begin_ids) else {}),
        },
        "tasks": names,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_rows,
        "device": str(device),
        "random_seed": SEED,
        "numpy_random_seed": SEED,
        "torch_random_seed": SEED,
        "fewshot_random_seed": SEED,
        "log_samples": False,
        "bootstrap_iters": 1000,
    }


def _evaluated(lm_eval: Any, names: list[str], include_path: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The harness reads thousands of files to find its own tasks: not where all lie in the user's folder.
    tasks = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and not all(tasks.match_tasks([name]) for name in names):
        tasks = TaskManager(include_path=include_path)
    if unknown := [name for name in names if not tasks.match_tasks([name])]:
        raise ConfigError(
            f"--lm-eval={','.join(names)}: the harness has no task {unknown[0]!r}. lm-eval ls tasks lists them; own "
            f"ones lie in a folder that --lm-eval-include names."
        )
    try:
        found = lm_eval.simple_evaluate(**asked, task_manager=tasks)
    except ReloraError:
        raise
    except Exception as error:  # the hub that has its data, a task's own code, transformers
        raise RunFailedError(
            f"the harness ended on {','.join(names)}: {type(error).__name__}: {first_words(error)} Most of its tasks "
            f"load their data from the Hugging Face hub."
        ) from error
    if found is None:
        raise RunFailedError(f"the harness returned nothing for {','.join(names)}.")
    return dict(found)


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness' `{task: {"acc,none": 0.5, ...}}` -> `{"task acc": 0.5, "task acc stderr": 0.01}`. A filter other
    than none is named."""
    flat = {}
    for task, values in sorted(results.items()):
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or not filtered:
                continue
            metric = metric.removesuffix("_stderr") + (" stderr" if metric.endswith("_stderr") else "")
            flat[f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")] = float(value)
    return flat
