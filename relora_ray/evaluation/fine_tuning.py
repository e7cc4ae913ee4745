"""Fine-tune a model on one task of GLUE with one seed, and score it on the development set.

As the published ReLoRA code does (Guitaricet/relora `run_glue.py`, a copy of transformers' script of that name): all
weights are trained, under a new linear head on the last token, with AdamW and a linear decay. The defaults are those of
that script's documented run (transformers, examples/pytorch/text-classification/README.md): 3 epochs, batches of 32,
learning rate 2e-5, 128 tokens. The scores are of the last epoch: no checkpoint is chosen by the set that is reported.

A text is given as the model has met texts in training: behind what begins one, with the end token between two
sentences.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from relora_ray.errors import ConfigError, DataError, DivergedError
from relora_ray.evaluation.glue import TASKS, Examples, Task, TaskData, read_task
from relora_ray.evaluation.scores import SCORES
from relora_ray.evaluation.subject import Subject, Tokens, load_classifier, open_subject
from relora_ray.keyed import key
from relora_ray.runs.evaluations import Evaluation, find_evaluation, new_record, path_of, put_evaluation
from relora_ray.storage import Options, Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How it is fine-tuned; part of a result's identity."""

    learning_rate: float = 2e-5
    """Peak, from which it falls linearly to 0."""
    epochs: int = 3
    batch_rows: int = 32
    max_tokens: int = 128
    """Of a row, with what stands in front and between; longer ones are cut."""
    max_train_rows: int | None = None
    """The first so many of a seeded order; None: all."""
    max_dev_rows: int | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Job:
    """One task with one seed, in values that can be sent to another machine."""

    place: str
    options: Options
    step: int | None
    """Of a run; the same for all jobs, though it may train on."""
    out: str | None
    """Where the result goes."""
    out_options: Options
    data: str
    task: str
    seed: int
    recipe: Recipe
    device: str
    """cpu or cuda; empty: what there is."""

    @property
    def results(self) -> Storage | None:
        return None if self.out is None else Storage(self.out, self.out_options)


@dataclass(frozen=True)
class Encoded:
    rows: list[list[int]]
    labels: torch.Tensor
    num_cut: int


def device_of(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device={name}: no GPU can be used here. Leave it out, or give cpu.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def do(job: Job, subject: Subject | None = None) -> tuple[Evaluation, str]:
    """The record of a job, found where it was stored or else computed and stored; and why it could not be stored, or
    "". `subject`: the job's own, if it is open already."""
    if subject is None:
        with open_subject(Storage(job.place, job.options), job.step) as opened:
            return do(job, opened)
    began, task, data = time.time(), TASKS[job.task], read_task(TASKS[job.task], job.data)
    path, settings = _asked(job, subject, data)
    if (known := find_evaluation(job.results, path)) is not None:
        return known, ""
    result = fine_tune(subject, task, data, job.recipe, job.seed, device_of(job.device))
    record = new_record("glue", task.name, subject.name, subject.step, settings, result, began)
    return record, put_evaluation(job.results, path, record) if job.results is not None else ""


def done_before(job: Job, subject: Subject, data: TaskData) -> Evaluation | None:
    """The record of a job, if it is stored."""
    return find_evaluation(job.results, _asked(job, subject, data)[0])


def _asked(job: Job, subject: Subject, data: TaskData) -> tuple[str, dict[str, Any]]:
    """The name of a job's record, and the settings that it is of."""
    settings = {**subject.identity, **asdict(job.recipe), "task": job.task, "seed": job.seed, "data": data.digest}
    return path_of("glue", f"{job.task}-seed{job.seed}", subject.step, settings), settings


def fine_tune(
    subject: Subject, task: Task, data: TaskData, recipe: Recipe, seed: int, device: torch.device
) -> dict[str, Any]:
    """What a record says of it: scores, and all that was cut, left out or not as one may expect."""
    tokens = subject.need_tokens(f"GLUE's {task.name}")
    if subject.positions is not None and recipe.max_tokens > subject.positions:
        raise ConfigError(
            f"--max-tokens={recipe.max_tokens} is more than the {subject.positions} positions of {subject.name}. Give "
            f"less."
        )
    train = _encoded(_some(data.train, recipe.max_train_rows, seed), tokens, recipe.max_tokens)
    dev = {
        name: _encoded(_some(examples, recipe.max_dev_rows, 0), tokens, recipe.max_tokens)
        for name, examples in data.dev.items()
    }
    pad_id, pad_note = padding(tokens, subject.name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key(seed, "glue", task.name))  # draws the head, and dropout if there is any
        model = load_classifier(subject.folder, len(task.labels) or 1, pad_id).to(device)
        losses = list(_updates(model, task, train, recipe, seed, pad_id, device))
        scores = {
            f"{name} {which}".strip(): SCORES[name](*predicted)
            for which, rows in dev.items()
            if (predicted := _predictions(model, task, rows, recipe, pad_id, device))
            for name in task.scores
        }
    return {
        "scores": scores,
        "score": fmean(scores.values()),
        "train_rows": len(train.rows),
        "dev_rows": {name or "dev": len(rows.rows) for name, rows in dev.items()},
        "updates": len(losses),
        "first_loss": losses[0],
        "last_loss": fmean(losses[-10:]),
        "cut": {"train": train.num_cut, "dev": sum(rows.num_cut for rows in dev.values())},
        "passed_over": {
            name: dict(examples.passed_over)
            for name, examples in (("train", data.train), *((n or "dev", e) for n, e in data.dev.items()))
            if examples.passed_over
        },
        "padding": pad_note,
        "device": device.type,
    }


def padding(tokens: Tokens, name: str) -> tuple[int, str]:
    """The id of padding, and a note if the model has none of its own. The head reads the last token that is not
    padding: so it must be one that no text ends with."""
    own = tokens.tokenizer.pad_token_id
    if own is not None:
        return int(own), ""
    if tokens.end_id is None:
        raise DataError(
            f"{name} has neither a padding nor an end token, and rows of unequal length need one of them. Give its "
            f"tokenizer one: pad_token in tokenizer_config.json."
        )
    return (
        tokens.end_id,
        f"the tokenizer has no padding token: its end token, {tokens.end_id}, is padding behind a text",
    )


def _some(examples: Examples, at_most: int | None, seed: int) -> Examples:
    if at_most is None or at_most >= len(examples.texts):
        return examples
    kept = np.random.default_rng(key(seed, "glue rows")).permutation(len(examples.texts))[:at_most]
    return replace(examples, texts=[examples.texts[n] for n in kept], labels=[examples.labels[n] for n in kept])


def _encoded(examples: Examples, tokens: Tokens, max_tokens: int) -> Encoded:
    between = [] if tokens.end_id is None else [tokens.end_id]
    columns = [
        tokens.tokenizer(list(texts), add_special_tokens=False).input_ids for texts in zip(*examples.texts, strict=True)
    ]
    rows, num_cut = [], 0
    for parts in zip(*columns, strict=True):
        room = max_tokens - len(tokens.begin_ids) - len(between) * (len(parts) - 1)
        cut = _cut([list(part) for part in parts], room)
        num_cut += sum(map(len, cut)) < sum(map(len, parts))
        row = [*tokens.begin_ids, *cut[0]]
        for part in cut[1:]:
            row += [*between, *part]
        rows.append(row or between or [0])
    return Encoded(rows, torch.tensor(examples.labels), num_cut)


def _cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """The ends of the longer part go first, one token at a time."""
    if room < len(parts):
        raise ConfigError(f"--max-tokens leaves {max(room, 0)} tokens for {len(parts)} texts. Give more.")
    while sum(map(len, parts)) > room:
        longest = max(parts, key=len)
        del longest[-1]
    return parts


def _updates(
    model: Any, task: Task, train: Encoded, recipe: Recipe, seed: int, pad_id: int, device: torch.device
) -> Iterator[float]:
    """The loss of every update, which is made. DivergedError if one is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    total = recipe.epochs * math.ceil(len(train.rows) / recipe.batch_rows)
    done = 0
    model.train()
    for epoch in range(recipe.epochs):
        order = np.random.default_rng(key(seed, "glue order", task.name, epoch)).permutation(len(train.rows))
        for begin in range(0, len(order), recipe.batch_rows):
            some = order[begin : begin + recipe.batch_rows]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 - done / total)
            logits = _logits(model, [train.rows[n] for n in some], recipe, pad_id, device)
            labels = train.labels[torch.from_numpy(some)].to(device)
            loss = F.cross_entropy(logits, labels.long()) if task.labels else F.mse_loss(logits.squeeze(1), labels)
            optimizer.zero_grad()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            value = float(loss.detach())
            if not math.isfinite(value + norm):
                raise DivergedError(
                    f"fine-tuning on {task.name} with seed {seed} diverged at update {done:,} of {total:,}. Lower "
                    f"--learning-rate={recipe.learning_rate:g}; what is done is kept."
                )
            optimizer.step()
            done += 1
            yield value


@torch.no_grad()
def _predictions(
    model: Any, task: Task, dev: Encoded, recipe: Recipe, pad_id: int, device: torch.device
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Labels and predictions. Rows of like length together, which makes no difference but for speed."""
    model.eval()
    order = sorted(range(len(dev.rows)), key=lambda n: len(dev.rows[n]))
    predicted = np.empty(len(order))
    for begin in range(0, len(order), recipe.batch_rows):
        some = order[begin : begin + recipe.batch_rows]
        logits = _logits(model, [dev.rows[n] for n in some], recipe, pad_id, device)
        predicted[some] = (logits.argmax(1) if task.labels else logits.squeeze(1)).double().cpu().numpy()
    return dev.labels.double().numpy(), predicted


def _logits(model: Any, rows: Sequence[list[int]], recipe: Recipe, pad_id: int, device: torch.device) -> torch.Tensor:
    """Padded on the right, where a causal model's last token does not see it."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()
