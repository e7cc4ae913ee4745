"""What a run's events look like on a console. Streams and the terminal's width are given; events are as loop.py has
them."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from relora_ray.commands.progress import Progress
from tests.tiny import tiny_config

STEP = {"kind": "train", "loss": 5.25, "learning_rate": 1e-3, "tokens_per_s": 12345.0, "left_s": 4000.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(out: io.StringIO, tmp_path: Path, steps: range) -> list[str]:
    """What stands on the screen, one string a line; a moving line once for each of its states."""
    progress = Progress(tiny_config(tmp_path, tmp_path, "train.log_every_steps=4"), out)
    for step in steps:
        progress(STEP | {"step": step})
    progress.close()
    return [line for line in out.getvalue().replace("\r\x1b[K", "\n").split("\n") if line]


@pytest.mark.parametrize("columns", [200, 80, 72, 60, 40, 20, 5, 1])
def test_line_fits_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it wraps, and every step leaves a line behind."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    shown = lines(Terminal(), tmp_path, range(1, 9))
    assert len(shown) == 8
    assert max(map(len, shown)) < max(columns, 2)
    assert all(line.startswith("step  "[: columns - 1]) for line in shown)
    if columns >= 40:
        assert all("loss 5.2500" in line for line in shown), "what one can do without goes first"
    if columns == 200:
        assert shown[-1] == "step  8/12  loss 5.2500  lr 1.00e-03  12.3k tokens/s  cycle 2/3  left 1:06:40"


def test_what_is_no_terminal_gets_whole_lines_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((20, 24)))
    assert lines(io.StringIO(), tmp_path, range(1, 9)) == [
        f"step {step:>2}/12  loss 5.2500  lr 1.00e-03  12.3k tokens/s  cycle {cycle}/3  left 1:06:40"
        for step, cycle in ((4, 1), (8, 2))
    ]


def test_console_that_goes_away_does_not_stop_what_is_shown(tmp_path: Path) -> None:
    """`| head`, or a shell that is closed: the run goes on."""

    class Gone(io.StringIO):
        def write(self, text: str) -> Any:
            raise BrokenPipeError

    assert lines(Gone(), tmp_path, range(1, 9)) == []
