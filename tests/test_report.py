"""The page that launch ends with, and that `report` prints again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from relora_ray import loop
from relora_ray.metrics import MetricsLog
from relora_ray.report import summary
from relora_ray.runs import run_storage
from tests.tiny import run, tiny_config


def lines(text: str, *begin: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(begin)]


def test_updates_that_were_not_made_are_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a loss spoiled, those that a gradient spoiled, and those that the config leaves out."""
    cfg = tiny_config(data, tmp_path, "train.skip_steps=[2]", "checkpoint.save_every_steps=4")
    clip, gradient, now = loop._clip, loop._accumulate_gradients, {"step": 0}

    def accumulate(*args: object) -> tuple[float, bool]:
        now["step"] = args[4]
        loss, wish = gradient(*args)
        return (math.nan if now["step"] in (5, 6) else loss), wish

    monkeypatch.setattr(loop, "_accumulate_gradients", accumulate)
    monkeypatch.setattr(loop, "_clip", lambda *args: math.inf if now["step"] == 9 else clip(*args))
    run(cfg)
    assert lines(summary(run_storage(cfg)), "skipped", "left out") == [
        "skipped   3 of 12 updates, loss or gradient was not finite: 5 to 6, 9",
        "left out  1 of 12 updates, by train.skip_steps, or after going back: 2",
    ]


def test_page_of_a_calm_run_says_nothing_of_that(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    assert lines(summary(run_storage(cfg)), "skipped", "left out") == []


def test_held_out_loss_that_is_not_finite_is_no_reason_to_fail(data: Path, tmp_path: Path) -> None:
    """It is null in the log."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    log = MetricsLog(run_storage(cfg), "0002.0001-1f2e3d4c")
    log.write({"kind": "attempt", "step": 12, "attempt": "0002.0001-1f2e3d4c", "world_size": 1})
    log.write({"kind": "eval", "step": 12, "loss": math.nan, "perplexity": math.inf})
    log.close()
    assert lines(summary(run_storage(cfg)), "after step      12") == ["after step      12      n/a           n/a   end"]
