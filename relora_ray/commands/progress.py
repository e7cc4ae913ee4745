"""A run's events as lines on a console: a status line that moves on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, TextIO

from relora_ray.config import RunConfig
from relora_ray.sweep.space import Sweep, text

TICK_S = 1.0
"""So often a terminal shows for how long something has been waited for. Elsewhere it is said after so long, and each
time that it has taken twice as long."""
GOES_ON = ("waiting", "log", "restart", "checkpoint", "checkpoint_missed")
"""Events that do not end what is waited for."""


class Progress:
    """Call it with each event, from any thread; `close` ends the moving line."""

    def __init__(self, cfg: RunConfig, out: TextIO, *, says_waits: bool = True) -> None:
        """`says_waits`: whether to show what is waited for."""
        self._cfg, self._out = cfg, out
        self._moving = out.isatty()
        self._line_open = False
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, daemon=True) if says_waits else None
        self._awaited, self._since, self._say_at = "", 0.0, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        show = getattr(self, f"_on_{event['kind']}", None)
        if show is not None:
            with self._lock, self._as_long_as_it_is_read():
                if event["kind"] not in GOES_ON:
                    self._awaited = ""
                show(event)

    def waits_for(self, what: str) -> None:
        """Show this, and for how long, until there is another event."""
        self({"kind": "waiting", "what": what})

    def close(self) -> None:
        self._over.set()
        with self._lock, self._as_long_as_it_is_read():
            self._close()

    def _on_waiting(self, e: dict[str, Any]) -> None:
        if self._ticker is None or e["what"] == self._awaited:
            return
        self._awaited, self._since, self._say_at = e["what"], time.monotonic(), TICK_S
        if not self._ticker.is_alive() and not self._over.is_set():
            self._ticker.start()
        self._tick()

    def _tick_on(self) -> None:
        while not self._over.wait(TICK_S / 4):
            with self._lock, self._as_long_as_it_is_read():
                self._tick()

    def _tick(self) -> None:
        if not self._awaited:
            return
        lasted_s = time.monotonic() - self._since
        text = f"{self._awaited}: {lasted_s:.0f} s"
        if self._moving:
            self._move(text[: max(shutil.get_terminal_size().columns - 1, 1)])
        elif lasted_s >= self._say_at:
            self._say_at *= 2
            self._print(f"-- {text}")

    def _move(self, text: str) -> None:
        """Show this in place of the moving line that there is."""
        self._out.write(f"\r\x1b[K{text}")
        self._out.flush()
        self._line_open = True

    @contextlib.contextmanager
    def _as_long_as_it_is_read(self) -> Iterator[None]:
        """A run does not end because nobody reads its console any more."""
        try:
            yield
        except BrokenPipeError:
            self._out, self._moving, self._line_open = io.StringIO(), False, False

    def _close(self) -> None:
        if self._line_open:
            self._out.write("\n")
            self._line_open = False
        self._out.flush()

    def _print(self, text: str) -> None:
        if self._line_open:
            self._out.write("\r\x1b[K")
            self._line_open = False
        self._out.write(text + "\n")
        self._out.flush()

    def _on_attempt(self, e: dict[str, Any]) -> None:
        begin = f"resuming after step {e['step']:,}" if e["step"] else "starting"
        self._print(
            f"attempt {e['attempt']}: {begin}, {e['world_size']} worker(s) on {e['device']}, "
            f"{e['num_parameters'] / 1e6:.2f} M parameters, {e['num_trainable'] / 1e6:.2f} M trained"
        )
        self.waits_for("the first update" if e["step"] else "the held-out loss at the start, and the first update")

    def _on_train(self, e: dict[str, Any]) -> None:
        due = e["step"] % self._cfg.train.log_every_steps == 0 or e["step"] == self._cfg.last_step
        fields = {
            "step": f"step {e['step']:>{len(str(self._cfg.steps))}}/{self._cfg.steps}",
            "loss": f"loss {_number(e['loss'])}",
            "lr": f"lr {e['learning_rate']:.2e}",
            "rate": f"{_rate(e['tokens_per_s'])} tokens/s",
            "cycle": self._cycle(e),
            "left": f"left {_clock(e['left_s'])}",
        }
        # A line that wraps could not be taken back.
        text = _fitting(fields, shutil.get_terminal_size().columns - 1) if self._moving else "  ".join(fields.values())
        if due:
            self._print(text)
        elif self._moving:
            self._move(text)

    def _cycle(self, e: dict[str, Any]) -> str:
        cfg = self._cfg
        if e["step"] <= cfg.warm_start_steps:
            return "warm start"
        if not cfg.merges:
            return str(cfg.method.kind)
        return f"cycle {bisect_left(cfg.merges, e['step']) + 1}/{len(cfg.merges)}"

    def _on_boundary(self, e: dict[str, Any]) -> None:
        if e["boundary_kind"] == "switch":
            self._print(
                f"-- step {e['step']:,}: warm start done, {e['num_layers']} layers wrapped, "
                f"{e['num_trainable'] / 1e6:.2f} M parameters trained from here on"
            )
        elif e["boundary_kind"] != "merge":
            self._print(
                f"-- step {e['step']:,}: {e['boundary_kind']}, {e['num_layers']} layers, "
                f"{e['num_trainable'] / 1e6:.2f} M parameters trained from here on"
            )
        else:
            trained = f", {e['num_trainable'] / 1e6:.2f} M parameters trained from here on"
            self._print(
                f"-- step {e['step']:,}: merge {e['merges']} of {e['num_layers']} layers, adapters redrawn, "
                f"{e['state_pruned']:.0%} of their moments pruned, {e['boundary_s'] * 1000:.0f} ms"
                f"{trained if e['new_parameters'] else ''}"
            )

    def _on_eval(self, e: dict[str, Any]) -> None:
        of = f" on {e['name']}" if e.get("name") else ""
        self._print(f"-- step {e['step']:,}: held-out loss{of} {e['loss']:.4f}, perplexity {e['perplexity']:.2f}")

    def _on_checkpoint(self, e: dict[str, Any]) -> None:
        base = f", base {e['base_bytes'] / 1e6:.1f} MB" if e["base_is_new"] else ""
        seconds = f"{e['save_s']:.2f} s, of which training waited {e['blocked_s']:.2f}"
        self._print(f"-- step {e['step']:,}: saved, delta {e['delta_bytes'] / 1e6:.1f} MB{base}, {seconds}")

    def _on_checkpoint_missed(self, e: dict[str, Any]) -> None:
        self._print(f"-- step {e['step']:,}: not saved: {e['why']}")

    def _on_restart(self, e: dict[str, Any]) -> None:
        if e["change"] != "start":
            self._print(
                f"-- step {e['from_step']:,}: training again on {e['world_size']} worker(s) after {e['down_s']:.1f} s, "
                f"{e['steps_lost']} step(s) are done again"
            )

    def _on_log(self, e: dict[str, Any]) -> None:
        where = e["rank"] if isinstance(e["rank"], str) else f"rank {e['rank']}"
        self._print(f"-- {e['level'].lower()} ({where}): {e['message']}")


class SweepProgress:
    """A sweep's events as lines: those of its runs behind their names, and what points come to; and what is waited for
    until the first has begun."""

    def __init__(self, sweep: Sweep, out: TextIO, *, says_waits: bool = True) -> None:
        self._sweep, self._out = sweep, out
        self._runs: dict[str, Progress] = {}
        self._start = Progress(sweep.first_run, out, says_waits=says_waits)

    def waits_for(self, what: str) -> None:
        self._start.waits_for(what)

    def close(self) -> None:
        self._start.close()

    def __call__(self, run: str, event: dict[str, Any]) -> None:
        if not run and event.get("kind") in ("waiting", "log"):
            self._start(event)
            return
        self._start.close()
        if not run:
            self._on_point(event)
        elif event["kind"] == "begin":
            cfg = self._sweep.config(event["number"], event["settings"], event["seed"])
            self._runs[run] = Progress(cfg, _Behind(f"  {run} | ", self._out), says_waits=False)
        elif run in self._runs:
            self._runs[run](event)

    def _on_point(self, record: dict[str, Any]) -> None:
        from relora_ray.sweep.results import point_from_json  # torch's import must not hold up a bad config's refusal

        point = point_from_json(json.dumps(record).encode())
        said = point.why
        if point.losses and not said:
            said = f"loss {point.loss():.4f} after {point.last_rung:,} updates"
        with contextlib.suppress(BrokenPipeError):
            self._out.write(f"point {point.number} ({text(point.settings)}) {point.state}: {said}\n")
            self._out.flush()


class _Behind(io.StringIO):
    """Writes whole lines to another stream, each behind a prefix."""

    def __init__(self, prefix: str, out: TextIO) -> None:
        super().__init__()
        self._prefix, self._out = prefix, out

    def write(self, lines: str) -> int:
        return self._out.write("".join(f"{self._prefix}{line}" for line in lines.splitlines(keepends=True)))

    def flush(self) -> None:
        self._out.flush()


def _fitting(fields: dict[str, str], width: int) -> str:
    """A line of these, without those that can best be done without where they do not all fit."""
    kept = dict(fields)
    for name in ("lr", "cycle", "rate", "left"):
        if len("  ".join(kept.values())) <= width:
            break
        del kept[name]
    return "  ".join(kept.values())[: max(width, 1)]


def _number(loss: float | None) -> str:
    return "  n/a " if loss is None else f"{loss:.4f}"


def _rate(per_s: float) -> str:
    return f"{per_s / 1000:.1f}k" if per_s >= 1000 else f"{per_s:.0f}"


def _clock(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes:02d}:{left:02d}"
