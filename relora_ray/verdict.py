"""Whether another attempt would meet an error again: one table, for all that judge an attempt's end.

    passing    a machine's or the network's doing: another attempt may get further
    follows    another rank is gone, and what became of it says more
    lasting    in the config, the data or the code: it ends the run at once
    unknown    it is tried again, and ends the run when the same error ends `failures.SAME` attempts at one place

Errors of ours say it themselves (`restart_helps`). Of others the first row that fits decides; classes are known by
name, with their bases, so that no library is imported here. What fits no row is unknown: better an attempt too many
than a run of weeks that ends for a sick machine.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from typing import Literal

from relora_ray.errors import RankFailedError, ReloraError, StorageError

Verdict = Literal["passing", "follows", "lasting", "unknown"]

_SHAPES = (
    r"shapes cannot be multiplied|must match (the size|the existing size|except in dimension)|"
    r"is invalid for input of size|doesn't match the broadcast shape|Sizes of tensors must match|"
    r"expected .* to have (the same dtype|\d+ channels)|must have the same dtype|expected scalar type|"
    r"Expected all tensors to be on the same device"
)
_AUTOGRAD = r"does not require grad|modified by an inplace operation|graph a second time|leaf Variable that requires"


@dataclass(frozen=True)
class _Row:
    verdict: Verdict
    classes: tuple[str, ...]
    text: str = ""
    """A pattern that must be found in the message."""
    why: str = ""
    """What to say of it: the reason, and what to do."""


_TABLE = (
    # Of a collective, whatever the class: the rank that is gone is told of by its own agent.
    _Row("follows", ("DistError",)),
    _Row("follows", ("RuntimeError",), r"gloo|NCCL|Connection (closed|reset) by peer"),
    # Memory may be another process's, which ends, or this GPU's, when others are larger. So it is no verdict at the
    # first time; but nothing here takes less at the second, so that three times the same is one.
    _Row(
        "unknown",
        ("OutOfMemoryError",),
        why="Lower train.micro_batch_rows or train.eval_micro_batch_rows, which change no result, or take a GPU with "
        "more memory; see that no other process has some of it.",
    ),
    _Row("unknown", ("MemoryError",), why="See what else takes this machine's memory."),
    _Row("unknown", ("RuntimeError",), r"can't allocate memory", "See what else takes this machine's memory."),
    # Both come of what the run computes at least as often as of a device.
    _Row("unknown", ("AcceleratorError", "RuntimeError"), r"device-side assert|no kernel image"),
    _Row("passing", ("AcceleratorError",)),
    _Row("passing", ("RuntimeError",), r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|CUDA driver|No CUDA GPUs are available"),
    _Row("passing", ("ConnectionError", "TimeoutError", "Timeout", "TransportError", "gaierror", "IncompleteRead")),
    # Ray's: an actor, a machine or the object store is gone. Not RayTaskError, which is also the class of its cause.
    _Row("passing", ("RayActorError", "GetTimeoutError", "NodeDiedError", "ObjectLostError", "RpcError")),
    # A body that broke off may look like this, as may a file that is being written.
    _Row("unknown", ("JSONDecodeError", "UnicodeDecodeError", "EOFError")),
    _Row("lasting", ("ImportError",), why="it is not installed there. Install constraints.txt on every machine"),
    _Row("lasting", ("SafetensorError",), r"deserializ|header", "the file is damaged. Fetch or write it anew"),
    _Row("lasting", ("UnpicklingError", "BadZipFile"), why="the file is damaged, or no weights. Fetch it anew"),
    _Row("lasting", ("RuntimeError",), r"PytorchStreamReader", "the file is damaged. Fetch or write it anew"),
    _Row(
        "lasting",
        ("RuntimeError",),
        r"Expected to have finished reduction|mark a variable ready only once",
        "the loss does not depend on every parameter that is trained, or on one of them twice, which DDP does not "
        "allow. Take another architecture, or train on one worker",
    ),
    _Row("lasting", ("RuntimeError",), r"in loading state_dict", "the weights are another model's"),
    _Row("lasting", ("RuntimeError",), _SHAPES, "tensors do not fit together, whatever machine computes them"),
    _Row("lasting", ("RuntimeError",), _AUTOGRAD, "the model's code is at fault, whatever machine runs it"),
    _Row("lasting", ("RecursionError", "NotImplementedError"), why="the code is at fault, whatever machine runs it"),
    _Row(
        "lasting",
        (
            "TypeError", "ValueError", "LookupError", "AttributeError", "NameError", "AssertionError",
            "ArithmeticError", "SyntaxError", "YAMLError",
        ),
        why="the code, or what it was given, is at fault, whatever machine runs it",
    ),
)  # fmt: skip


def verdict(error: BaseException) -> Verdict:
    """Of an error, wherever it was raised."""
    if isinstance(error, RankFailedError):
        return error.verdict
    if isinstance(error, ReloraError):
        if not error.restart_helps:
            return "lasting"
        return "passing" if isinstance(error, StorageError) else "unknown"
    row = _row(error)
    return row.verdict if row is not None else "unknown"


def in_words(error: BaseException) -> str:
    """What to say of it: class, message, where it was raised, and the reason for the verdict. Errors of ours say all
    in their message."""
    if isinstance(error, RankFailedError):
        return str(error)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, ReloraError):
        return said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    if frames:
        file = "/".join(frames[-1].filename.split("/")[-2:])
        said = f"{said} (in {frames[-1].name}, {file}:{frames[-1].lineno})"
    row = _row(error)
    if row is None or not row.why:
        return said
    return (
        f"{said}. Another attempt would meet it again: {row.why}." if row.verdict == "lasting" else f"{said} {row.why}"
    )


def without_numbers(text: str) -> str:
    """The same for two errors that differ only in numbers, addresses and amounts."""
    return re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{16,}\b|\d+(\.\d+)?( [KMGT]?i?B\b)?", "#", text)


def _row(error: BaseException) -> _Row | None:
    names = {base.__name__ for base in type(error).__mro__}
    return next((row for row in _TABLE if names & set(row.classes) and re.search(row.text, str(error))), None)
