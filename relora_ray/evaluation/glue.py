"""The tasks of GLUE (Wang et al. 2018) that ReLoRA's authors report, and their files.

A folder has them as gluebenchmark.com gives them out: `<folder>/RTE/train.tsv` and so on. They are no CSV: quotes in
them are letters. CoLA has no header, and MRPC begins with a byte order mark. Or they are loaded by `datasets`, of a
name of the hub or a local copy of such a repository.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from relora_ray.errors import ConfigError, DataError, first_words
from relora_ray.storage import Storage

HUB = "hub:"
DEFAULT_PLACE = "hub:nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    name: str
    folder: str
    sentences: tuple[str, ...]
    """Columns of a .tsv: one or two."""
    label: str
    labels: tuple[str, ...]
    """By class, in the order of the hub's; none: a number is predicted."""
    scores: tuple[str, ...]
    hub_sentences: tuple[str, ...]
    columns: tuple[str, ...] = ()
    """Of a file without a header."""
    dev: tuple[str, ...] = ("dev",)
    """Files that are evaluated on."""
    hub_dev: tuple[str, ...] = ("validation",)


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), "label", ("0", "1"), ("matthews",), ("sentence",),
             columns=("source", "label", "mark", "sentence")),
        Task("sst2", "SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), ("sentence",)),
        Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("f1", "accuracy"), _PAIR),
        Task("stsb", "STS-B", _PAIR, "score", (), ("pearson", "spearman"), _PAIR),
        Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("f1", "accuracy"),
             ("question1", "question2")),
        Task("mnli", "MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
             ("premise", "hypothesis"), dev=("dev_matched", "dev_mismatched"),
             hub_dev=("validation_matched", "validation_mismatched")),
        Task("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILS, ("accuracy",), ("question", "sentence")),
        Task("rte", "RTE", _PAIR, "label", _ENTAILS, ("accuracy",), _PAIR),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """Of one file."""

    texts: list[tuple[str, ...]]
    labels: list[float]
    """Classes by number, or the number that is predicted."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """By reason, rows that are not among them."""


@dataclass(frozen=True)
class TaskData:
    train: Examples
    dev: dict[str, Examples]
    """By what is put behind a score's name: nothing, or which of several files it is of."""
    digest: str
    """Of all texts and labels."""


def chosen_tasks(names: str) -> list[Task]:
    """`cola,rte` or `all`. ConfigError for another name."""
    wanted = list(TASKS) if names.strip() == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in TASKS:
            from relora_ray.config import nearest

            raise ConfigError(
                f"--glue={names!r}: {name!r} is not a task.{nearest(name, list(TASKS))} They are {', '.join(TASKS)}, "
                f"or all."
            )
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def missing_files(tasks: Iterable[Task], place: str) -> list[str]:
    """Files of these tasks that are not there. A name of the hub is not looked at."""
    if place.startswith(HUB):
        return []
    root = Storage(place)
    return [path for task in tasks for path in _files(task) if not root.exists(path)]


def refuse_missing(tasks: Sequence[Task], place: str) -> None:
    """DataError that names the files which are expected and not there, before anything is trained."""
    if not (missing := missing_files(tasks, place)):
        return
    there = [task.name for task in tasks if not missing_files([task], place)]
    instead = f" For those that are there give --glue {','.join(there)}." if there else ""
    raise DataError(
        f"--glue-data={place!r} has no {', '.join(missing)}. It must have a folder for each task, as the archives of "
        f"gluebenchmark.com unpack.{instead}"
    )


def read_task(task: Task, place: str) -> TaskData:
    """DataError if a file is missing, or is not of this task."""
    if place.startswith(HUB):
        train, *dev = _from_datasets(task, place.removeprefix(HUB))
    else:
        refuse_missing([task], place)
        root = Storage(place)
        train, *dev = (_read_tsv(task, root, path) for path in _files(task))
    names = [file.removeprefix("dev").strip("_") for file in task.dev]
    for where, examples in zip(("train", *task.dev), (train, *dev), strict=True):
        if not examples.texts:
            why = ", ".join(f"{count:,} {reason}" for reason, count in examples.passed_over.items()) or "it is empty"
            raise DataError(
                f"{place}: nothing can be learned from {task.name}'s {where}: {why}. Test sets have no labels: give "
                f"the development set."
            )
    digest = sha256()
    for examples in (train, *dev):
        for texts, label in zip(examples.texts, examples.labels, strict=True):
            digest.update("\t".join((*texts, repr(label))).encode())
            digest.update(b"\n")
    return TaskData(train, dict(zip(names, dev, strict=True)), digest.hexdigest()[:16])


def _files(task: Task) -> list[str]:
    return [f"{task.folder}/{name}.tsv" for name in ("train", *task.dev)]


def _read_tsv(task: Task, root: Storage, path: str) -> Examples:
    where = f"{root.url}/{path}"
    try:
        text = root.get(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}. Fetch it again.") from error
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip()]
    columns = list(task.columns) or (rows.pop(0) if rows else [])
    if missing := [name for name in (*task.sentences, task.label) if name not in columns]:
        raise DataError(
            f"{where} has no column {missing[0]!r}: it has {', '.join(columns[:12])}. Test sets have no labels: give "
            f"{task.folder}'s own train and dev files."
        )
    places, at = [columns.index(name) for name in task.sentences], columns.index(task.label)
    found = Examples([], [])
    for row in rows:
        if len(row) != len(columns):
            found.passed_over["with another number of columns"] += 1
        else:
            _add(found, task, tuple(row[n] for n in places), row[at])
    return found


def _from_datasets(task: Task, name: str) -> list[Examples]:
    import datasets

    if os.sep in name and not os.path.isdir(name) and name.count("/") != 1:
        raise DataError(f"--glue-data=hub:{name}: there is no such folder, and it is no name of the hub.")
    before = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, task.name)
        parts = [loaded[split] for split in ("train", *task.hub_dev)]
    except Exception as error:  # of datasets, the hub, httpx: all that keeps it from being there
        raise DataError(
            f"--glue-data=hub:{name}: {task.name} cannot be loaded by datasets: {first_words(error)} Where there is "
            f"no hub, give a folder with {', '.join(_files(task))}."
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(before)
    examples = []
    for part in parts:
        if lacking := {*task.hub_sentences, "label"} - set(part.column_names):
            raise DataError(f"--glue-data=hub:{name}: {task.name} has no column {min(lacking)!r}. Give another.")
        found = Examples([], [])
        for row in part:
            label = row["label"]
            if task.labels and isinstance(label, int):
                label = task.labels[label] if 0 <= label < len(task.labels) else "-1"
            _add(found, task, tuple(str(row[c]) for c in task.hub_sentences), str(label))
        examples.append(found)
    return examples


def _add(examples: Examples, task: Task, texts: tuple[str, ...], label: str) -> None:
    value = _value(task, label.strip())
    if value is None:
        examples.passed_over["without a label of the task"] += 1
        return
    examples.texts.append(texts)
    examples.labels.append(value)


def _value(task: Task, label: str) -> float | None:
    if task.labels:
        return float(task.labels.index(label)) if label in task.labels else None
    try:
        value = float(label)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None  # STS-B's scale; -1 is what test sets have
