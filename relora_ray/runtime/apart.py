"""Have a process that has imported torch call a function, while this one goes without. See server.py."""

from __future__ import annotations

import importlib
import multiprocessing
from multiprocessing.connection import Connection

from relora_ray import errors
from relora_ray.errors import ReloraError, RunFailedError
from relora_ray.runtime import prefork, server


def call(target: str, *args: str | int, at: str, what: str) -> str:
    """What the function "module:name" returns for these; it is called in a process of its own.

    `at`: the address of a server that is asked first, or "". `what`: for messages, as in "... the config could not be
    checked". The ReloraError that it raises is raised here; RunFailedError for all else.
    """
    ours, theirs = multiprocessing.Pipe()
    with ours:
        child = server.spawn(theirs, f"{__name__}:answer", target, args, first=at)
        try:
            _, name, said = ours.recv()
        except EOFError:
            raise RunFailedError(
                f"{what}: the process for that ended with code {child.wait()} before it had said anything. If that is "
                f"-9, the machine may have run out of memory."
            ) from None
        finally:
            child.kill()
    if name == prefork.RAISED:
        raise RunFailedError(f"{what}: {said[0]}")
    if name:
        found: type[ReloraError] = getattr(errors, name)
        raise found(said)
    return str(said)


def answer(pipe: Connection, target: str, args: tuple[str | int, ...]) -> None:
    """What that process does: sends (0, "", what the function returned), or (0, class of a ReloraError, its text)."""
    module, _, name = target.partition(":")
    try:
        said = "", getattr(importlib.import_module(module), name)(*args)
    except ReloraError as error:
        said = type(error).__name__, str(error)
    pipe.send((0, *said))
