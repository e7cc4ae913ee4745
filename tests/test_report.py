"""The page that launch ends with, and that `report` prints again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from relora_ray import loop
from relora_ray.commands.report import summary
from relora_ray.runs.metrics import MetricsLog
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run
from relora_ray.study.picture import draw_run
from relora_ray.study.plots import pyplot
from relora_ray.study.run_log import read_log
from tests.commands import command
from tests.tiny import Crash, crash_at, run, tiny_config


def lines(text: str, *begin: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(begin)]


def test_updates_that_were_not_made_are_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a loss spoiled, those that a gradient spoiled, and those that the config leaves out."""
    cfg = tiny_config(data, tmp_path, "train.skip_steps=[2]", "checkpoint.save_every_steps=4")
    clip, gradient, now = torch.nn.utils.clip_grad_norm_, loop._accumulate_gradients, {"step": 0}

    def accumulate(*args: object) -> tuple[float, bool]:
        now["step"] = args[4]
        loss, wish = gradient(*args)
        return (math.nan if now["step"] in (5, 6) else loss), wish

    monkeypatch.setattr(loop, "_accumulate_gradients", accumulate)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: math.inf if now["step"] == 9 else clip(*args))
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


def test_picture_of_a_run_shows_what_counts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of an attempt that was given up are drawn once, boundaries and the restart are marked."""
    cfg = tiny_config(data, tmp_path)
    with pytest.raises(Crash):
        run(cfg, crash_at(7, "train"))
    run(cfg)
    drawn: list[Any] = []
    plt = pyplot()
    monkeypatch.setattr(plt, "close", drawn.append)
    draw_run(read_log(run_storage(cfg)), tmp_path / "run.svg")
    assert (tmp_path / "run.svg").read_text().startswith("<?xml")
    losses, rates = drawn[0].axes
    training, held_out = losses.lines[:2]
    assert list(training.get_xdata()) == list(rates.lines[0].get_xdata()) == list(range(1, 13))
    assert list(held_out.get_xdata()) == [0, 3, 12]
    assert sorted(line.get_xdata()[0] for line in losses.lines[2:]) == [3, 6, 6, 9, 12]
    shown = [text.get_text() for text in losses.get_legend().get_texts()]
    assert shown == ["training", "held-out text", "end of the warm start", "merge", "restart"]


def test_picture_needs_a_known_kind_of_file_and_steps(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    check_run(cfg)
    run(cfg)
    done = command("relora_ray", "report", run_storage(cfg).url, "--picture", tmp_path / "run.jpg")
    assert done.returncode == 2
    assert "is no .png or .svg file" in done.stderr
    done = command("relora_ray", "report", run_storage(cfg).url, "--picture", tmp_path / "run.png")
    assert (done.returncode, (tmp_path / "run.png").read_bytes()[:4]) == (0, b"\x89PNG")
