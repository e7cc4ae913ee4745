"""What all commands have in common: how they end, and how they are told of a run.

What a user can cause ends in one message on stderr. A traceback is a bug.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence

from relora_ray.errors import ConfigError, DamagedError, ReloraError, RunFailedError
from relora_ray.location import location_problem, shown
from relora_ray.storage import RETRY_S, Options, Storage, add_options_argument, parse_options

PATIENCE_S = 10.0
"""Commands that only look try for so long, where storage does not answer."""

Main = Callable[[Sequence[str] | None], int | None]

EXIT_CODES = """\
exit codes: 0 done; 1 failed or damaged; 2 refused before anything was spent; 130 interrupted by Ctrl-C;
            141 nobody reads the output any more; 143 told to stop by SIGTERM, 129 by SIGHUP (launch)"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """With the default behind each option that has one and whose help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, default = action.help or "", action.default
        has_none = default is None or default is False or default in ("", (), [], argparse.SUPPRESS)
        if not action.option_strings or has_none or "default" in said:
            return action.help
        return f"{said} (default: {default})".replace("%", "%%") if "%" not in said else action.help


def parser(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    """Of the command `relora-ray NAME`, with examples in its help, each as what stands behind the name."""
    lines = [f"  relora-ray {name} {example}" for example in examples]
    return argparse.ArgumentParser(
        prog=f"relora-ray {name}",
        description=summary,
        epilog="\n".join(["examples:", *lines, "", EXIT_CODES]),
        formatter_class=_Help,
        allow_abbrev=False,
    )


def command(main: Main) -> Callable[..., int]:
    """The main function of a command, given its arguments (None: those of the process): returns the exit code. All
    commands end here."""

    @functools.wraps(main)
    def ended(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if callable(reconfigure := getattr(stream, "reconfigure", None)):
                reconfigure(errors="replace")  # a console that knows no such letter is no reason to fail
        try:
            code = main(argv) or 0
            sys.stdout.flush()
        except ReloraError as error:
            return say(error, 1 if isinstance(error, (DamagedError, RunFailedError)) else 2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            leave_stdout()
            return 141
        except OSError as error:  # of a file that the user named: what a run stores is a StorageError
            return say(ConfigError(_said_of(error)), 2)
        return code

    return ended


def say(error: ReloraError, code: int) -> int:
    """Tell the user, and return the exit code."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return code


def show(text: str) -> None:
    """On stdout, if anybody reads that: what was done is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        leave_stdout()


def leave_stdout() -> None:
    """Nobody reads it: what is still to be written, at the end of the process too, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def place(name: str, url: str, options: Options, *, retry_s: float | None = None) -> Storage:
    """The folder or URL that an argument `name` gives. ConfigError if it cannot be one."""
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) or not url.strip()
    if is_url and (problem := location_problem(url)):
        raise ConfigError(f"{name}={shown(url)} {problem}")
    if not is_url and os.path.isfile(os.path.expanduser(url)):
        raise ConfigError(f"{name}={shown(url)} is a file. Give the folder that it is in.")
    return Storage(url if is_url else _real(url), options, retry_s=RETRY_S if retry_s is None else retry_s)


def _real(path: str) -> str:
    """A folder by its own name, not by a link's: runs know each other by their folders' names, and lie side by side."""
    path = os.path.expanduser(path)
    real = os.path.realpath(path)
    return path if real == os.path.abspath(path) else real


def printable(text: str) -> str:
    """Without what could make a terminal do something: text from storage may be anybody's."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def run_parser(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    """Of a command that looks at a run."""
    found = parser(name, summary, *examples)
    found.add_argument("run", metavar="RUN", help="the run's folder or URL")
    add_options_argument(found)
    return found


def run_of(args: argparse.Namespace) -> Storage:
    """What `run_parser`'s arguments name."""
    return place("RUN", args.run, parse_options(args.storage_option), retry_s=PATIENCE_S)


def at_least_1(text: str) -> int:
    """For argparse: a count."""
    return _at_least(1, text)


def at_least_0(text: str) -> int:
    """For argparse: a step, which counts finished updates."""
    return _at_least(0, text)


def seconds(text: str) -> float:
    """For argparse: a time, 0 or more."""
    if not 0 <= (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return value


def above_0(text: str, what: str = "number") -> float:
    """For argparse: a finite number above 0; `what`: its name in the message."""
    if not 0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what} above 0")
    return value


def share(text: str) -> float:
    """For argparse: above 0, and no more than 1."""
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and no more than 1")
    return value


def _number(text: str) -> float:
    """NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)


def _said_of(error: OSError) -> str:
    files = " to ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {error.strerror or error}." if files else f"{error.strerror or error}."
