"""What `relora-ray evaluate` found out, beside the run or in a folder of the user's: one JSON object each, created
once.

    <run>/evaluations/step-00000600-perplexity-held-out-3f2a9c01d2e4.json

The name has the checkpoint's step (none for a model that is no run's), the kind, what it was evaluated on, and a digest
of all settings, the checkpoint and the data among them. So the same question asked again finds its answer, and another
one never takes its place. Nothing of a run goes by what is here.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from statistics import fmean, stdev
from typing import Any

from relora_ray.errors import StorageError
from relora_ray.runs.metrics import read_pages
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

Evaluation = dict[str, Any]
"""A record: `kind` (perplexity, samples, glue or harness), `on` (which data or task), `model` (its place), `step` or
None, `settings`, `result`, `versions`, `unix_time`, `seconds`."""

FOLDER = "evaluations"
FORMAT = 1
MAX_BYTES = 2**24
KINDS = ("perplexity", "glue", "harness", "samples")


def path_of(kind: str, on: str, step: int | None, settings: Mapping[str, Any]) -> str:
    """The name that all who ask the same give the answer."""
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    at = "" if step is None else f"step-{step:08d}-"
    on = re.sub(r"[^A-Za-z0-9_-]+", "_", on)[:40]
    return f"{at}{kind}-{on}-{digest}.json"


def find_evaluation(folder: Storage | None, path: str) -> Evaluation | None:
    """The record that was stored by this name; None if there is none, or none that can be read."""
    data = folder.find(path, at_most=MAX_BYTES) if folder is not None else None
    if data is None:
        return None
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        record = None
    if not _is_ours(record):
        logger.warning("%s/%s is no evaluation of ours: it is made again, and not stored", folder.url, path)  # type: ignore[union-attr]
        return None
    return dict(record)


def put_evaluation(folder: Storage, path: str, record: Evaluation) -> str:
    """Store it. Returns why that could not be done, or "": what was computed is there in any case. Another process may
    have stored the same before: then that one stays."""
    try:
        folder.put_new(path, json.dumps(_finite(record | {"format": FORMAT}), indent=1, allow_nan=False).encode())
    except FileExistsError:
        return ""
    except StorageError as error:
        return str(error)
    return ""


def _finite(value: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_record(
    kind: str,
    on: str,
    model: str,
    step: int | None,
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    began: float,
) -> Evaluation:
    """`began`: Unix time."""
    import torch
    import transformers

    from relora_ray import __version__

    now = time.time()
    return {
        "kind": kind,
        "on": on,
        "model": model,
        "step": step,
        "settings": dict(settings),
        "result": dict(result),
        "versions": {"relora_ray": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "unix_time": now,
        "seconds": round(now - began, 3),
    }


def read_evaluations(run: Storage) -> list[Evaluation]:
    """All of a run, by step, kind, and what they are on. What is no record of ours is left out."""
    found = [record for record in read_pages(run, FOLDER) if _is_ours(record)]
    return sorted(found, key=lambda r: (r["step"] or 0, KINDS.index(r["kind"]), r["on"], r["unix_time"]))


_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "perplexity": {
        "loss": (int, float),
        "loss_se": (int, float, type(None)),
        "perplexity": (int, float),
        "tokens": int,
    },
    "glue": {"scores": dict, "score": (int, float, type(None))},
    "harness": {"scores": dict},
    "samples": {"samples": list},
}
"""By kind, what must be in a result."""


def _is_ours(record: Any) -> bool:
    if not isinstance(record, dict) or record.get("kind") not in KINDS or record.get("format") != FORMAT:
        return False
    known: dict[str, Any] = {"on": str, "model": str, "step": (int, type(None)), "settings": dict, "result": dict}
    if not all(isinstance(record.get(key), kinds) for key, kinds in (known | {"unix_time": (int, float)}).items()):
        return False
    return all(isinstance(record["result"].get(key, ...), kinds) for key, kinds in _NEEDED[record["kind"]].items())


def lines(records: Iterable[Evaluation]) -> Iterator[str]:
    """One line each; those on a task of GLUE that differ in the seed only are one."""
    groups: dict[str, list[Evaluation]] = defaultdict(list)
    for record in records:
        settings = {
            key: value for key, value in record["settings"].items() if key != "seed" or record["kind"] != "glue"
        }
        groups[json.dumps([record["step"], record["kind"], record["on"], settings], sort_keys=True)].append(record)
    for group in groups.values():
        step = group[0]["step"]
        at = "" if step is None else f"step {step:>7,}  "
        yield f"{at}{group[0]['kind']:<10}  {group[0]['on']:<12}  {_said(group)}"


def _said(group: list[Evaluation]) -> str:
    record = group[-1]
    result = record["result"]
    if record["kind"] == "perplexity":
        return perplexity_text(result)
    if record["kind"] == "glue":
        return glue_text(group)
    if record["kind"] == "samples":
        count = len(result["samples"])
        return f"{count} sample{'s' * (count != 1)}"
    return ", ".join(
        f"{name} {value:.4f}" for name, value in result["scores"].items() if isinstance(value, int | float)
    )


def perplexity_text(result: Mapping[str, Any]) -> str:
    """In nats per token, with the standard error over rows."""
    se = "" if result["loss_se"] is None else f" +- {result['loss_se']:.4f}"
    bits = result.get("bits_per_byte")
    also = f", {bits:.4f} bits per byte" if isinstance(bits, int | float) else ""
    return f"loss {result['loss']:.4f}{se}, perplexity {result['perplexity']:.2f}{also}, {result['tokens']:,} tokens"


def glue_text(group: list[Evaluation]) -> str:
    """Mean and standard deviation over seeds of every score, in percent."""
    names = list(group[0]["result"]["scores"])
    parts = [f"{name} {spread([r['result']['scores'].get(name) for r in group])}" for name in names]
    rows = group[0]["settings"].get("max_train_rows")
    also = f", {rows:,} training rows" if isinstance(rows, int) else ""
    return f"{', '.join(parts)}  ({len(group)} seed{'s' * (len(group) > 1)}{also})"


def spread(values: list[float | None]) -> str:
    """`66.2 +- 1.3`, in percent; without a deviation for a single value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "n/a"
    return f"{100 * fmean(known):.1f}" + (f" +- {100 * stdev(known):.1f}" if len(known) > 1 else "")
