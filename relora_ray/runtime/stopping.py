"""Signals that end a run: its state is stored first.

SIGINT (Ctrl-C), SIGTERM (`ray job stop`, timeout, systemd, Slurm) and SIGHUP (a terminal that is closed; not under
nohup) are all answered so. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from relora_ray.checkpoint import list_manifests
from relora_ray.errors import StoppedError
from relora_ray.runtime.messages import Event, log_event, waiting_event
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)

STOP_S = 600.0
"""At most for the last save. Whoever says stop usually waits less, and then says SIGKILL."""
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


@contextmanager
def storing_at_a_signal(
    store: Callable[[], bool],
    what_is_there: Callable[[bool], str],
    on_event: Callable[[Event], None],
    end: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """At a signal have the state stored, then end the block with StoppedError. Main thread only; elsewhere nothing
    changes.

    `store`: does it, in a thread; whether it could. `what_is_there`: for the error, given that. `end`: called, in a
    thread, if the block is to end at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[signal.Signals] = []
    """The first signal, when it has come."""
    ended, stored = threading.Event(), threading.Event()

    def store_and_end() -> None:
        advice = ". Ctrl-C again ends at once" if told[0] == signal.SIGINT else ""
        on_event(log_event("driver", f"told to stop by {NAMES[told[0]]}: the state is stored first{advice}", "INFO"))
        on_event(waiting_event("the state is stored"))
        try:
            if store():
                stored.set()
        except ray.exceptions.RayError as error:
            logger.warning("the state could not be stored: %s", error)
        finally:
            if not ended.is_set():
                ended.set()
                os.kill(os.getpid(), signal.SIGINT)

    ignored = {number for number in NAMES if signal.getsignal(number) == signal.SIG_IGN}  # by nohup, or a shell's `&`

    def on_signal(number: int, _: Any) -> None:
        if not told and number not in ignored:
            told.append(signal.Signals(number))
            threading.Thread(target=store_and_end, daemon=True).start()
        elif told and number == signal.SIGINT:  # from the thread, or the second one
            if not ended.is_set():
                ended.set()
                threading.Thread(target=end, daemon=True).start()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in NAMES}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray blocks it in what its jobs start
    try:
        yield
    except KeyboardInterrupt:
        if not told:
            raise
        raise StoppedError(
            f"told to stop by {NAMES[told[0]]}: {what_is_there(stored.is_set())}. Run the same command again to "
            f"continue.",
            told[0],
        ) from None
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def store(coordinator: Any) -> bool:
    """Have a run store its state. Whether the state after the next step was stored."""

    def call(name: str, *args: Any) -> bool:
        return bool(ray.get(getattr(coordinator, name).remote(*args), timeout=STOP_S))

    until, stored = time.monotonic() + STOP_S, False
    waiting = call("ask_to_save", None, "the driver was told to stop", False)
    while waiting and not stored and time.monotonic() < until:
        time.sleep(0.2)
        waiting = call("is_asked")
        stored = call("is_stored")  # asked last: it may become so in between
    return stored


def what_is_stored(storage: Storage, stored: bool) -> str:
    """Of a run, for whoever has stopped it. `stored`: the state after its last update is."""
    steps = list_manifests(storage)
    if not steps:
        return "nothing had been trained"
    if stored:
        return f"the state after step {steps[-1]} is stored"
    # It was starting, storage failed, or it was told to end at once.
    return f"the newest checkpoint is that after step {steps[-1]}; what was trained since is not stored"
