"""Errors that a user or an operator can cause.

Each message says what happened, the value, the rule and the fix. Bugs of our own are `assert`s.
"""

from __future__ import annotations

from typing import Literal


def first_words(error: BaseException) -> str:
    """What an error of a library says first, in one line: with the next line if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class ReloraError(Exception):
    """Base of every error below."""

    restart_helps = False
    """Whether the same attempt, started again from the last checkpoint, may get further. If not, the driver stops
    the run instead of using up its failures. Of errors that are not ours verdict.py says it."""
    rank: int | None = None
    """On which rank it was met, where all ranks raise it."""


class ConfigError(ReloraError):
    """A config, override or run folder that does not fit."""


class DataError(ReloraError):
    """Missing, damaged or unsuitable training data or tokenizer."""


class StorageError(ReloraError):
    """An object could not be read or written. `restart_helps` unless the cause stays, such as a full disk."""

    restart_helps = True
    missing = False
    """There is no such object."""
    exists = False
    """There is one already, and there must not be."""


class NotSavedError(StorageError):
    """Checkpoints could not be stored for longer than the config allows; the run ends where it could resume."""

    restart_helps = False


class CheckpointError(ReloraError):
    """A checkpoint that is missing, does not fit the model, or may not be written."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are gone or not those that were stored: the one reason to fall back to an older."""


class SupersededError(CheckpointError):
    """Another driver owns the run by now."""


class ExportError(ReloraError):
    """A trained model that was written as a Hugging Face folder does not load as what it was."""


class NotMergeableError(ConfigError):
    """A method's model has no dense weights, or none at this point; the text says why."""


class DivergedError(ReloraError):
    """The loss exploded, and the run may not go back (again)."""


class NonFiniteError(DivergedError):
    """Too many steps in a row with a loss or gradient that is not finite."""


class RolledBackError(ReloraError):
    """The run diverged, and its next attempt goes on from an earlier checkpoint: see rollback.py."""

    restart_helps = True


class RanksDisagreeError(ReloraError):
    """Replicas that must be equal are not: silent corruption, or a bug."""

    restart_helps = True


class RankFailedError(ReloraError):
    """An error that is none of ours, told on: that of one rank to all, say. With what verdict.py said of it."""

    verdict: Literal["passing", "follows", "lasting", "unknown"] = "unknown"


class RunBusyError(ReloraError):
    """Another driver trains the run."""


class StoppedError(ReloraError):
    """The driver was told to stop, by a signal."""

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal


class RunFailedError(ReloraError):
    """The run ended without reaching its last step."""
