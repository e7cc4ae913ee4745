"""The page of runs: what it says, and that it holds together whatever runs hold. The browser's part is in
test_page_in_browser.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from relora_ray import masking
from relora_ray.checkpoint import Rollback
from relora_ray.checkpoint.history import Origin
from relora_ray.commands import report
from relora_ray.config import RunConfig
from relora_ray.runs import metrics
from relora_ray.runs.fork import fork
from relora_ray.runs.places import run_storage
from relora_ray.runs.tally import replay
from relora_ray.study.page import html
from relora_ray.study.page.chart import Figure, thinned
from relora_ray.study.page.contents import Contents, contents
from relora_ray.study.page.facts import Facts, run_facts
from relora_ray.study.page.html import render
from relora_ray.study.page.points import sweep_charts
from relora_ray.study.page.ranking import compare, rank
from relora_ray.study.run_log import NEEDED, RunLog, read_log
from relora_ray.sweep.results import Point, put_point
from tests.sweep.test_results import grid
from tests.tiny import Crash, crash_at, run, tiny_config

MAX_PAGE = 8_000_000


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose first attempt died after update 8 of 12, where its last checkpoint was that of 6."""
    cfg = tiny_config(
        data, tmp_path_factory.mktemp("runs"), "checkpoint.save_every_steps=3", "train.eval_every_steps=2"
    )
    with pytest.raises(Crash):
        run(cfg, crash_at(8, "train"))
    run(cfg)
    return cfg


@pytest.fixture(scope="module")
def log(interrupted: RunConfig) -> RunLog:
    return read_log(run_storage(interrupted))


def made_up(log: RunLog, records: Sequence[dict[str, Any]], **more: Any) -> RunLog:
    """A log with these records in one attempt."""
    return dataclasses.replace(log, attempts=[("0001.0001-aa", list(records))], rollbacks=(), **more)


def with_losses(log: RunLog, losses: dict[int, float], *, seed: int, name: str = "x", **update: Any) -> Facts:
    """A finished run with these held-out losses by step."""
    records = [{"kind": "attempt", "step": 0, "world_size": 1, "unix_time": 100.0}]
    for step, loss in losses.items():
        records += [
            {"kind": "train", "step": step, "loss": loss, "tokens": 1, "step_s": 1.0, "unix_time": 100.0 + step},
            {"kind": "eval", "step": step, "loss": loss, "perplexity": 1.0},
        ]
    cfg = log.cfg.model_copy(update={"seed": seed, "name": name, **update})
    return run_facts(made_up(log, records, cfg=cfg), f"{name}-{seed}")


def figures(page: Contents) -> dict[str, Figure]:
    return {f"{c.title}/{name}": figure for c in page.charts for name, figure in c.variants}


def check(page: Contents) -> str:
    """Every figure is one that plotly takes, and the page is written; its text."""
    for figure in figures(page).values():
        traces = [{k: v for k, v in trace.items() if k != "meta"} for trace in figure["data"]]
        plotly.graph_objects.Figure(data=traces, layout=figure["layout"])  # ValueError for what it does not know
    return render(page)


def test_steps_that_count_are_counted(interrupted: RunConfig, log: RunLog) -> None:
    """Whoever reads the files alone counts 14 updates, of which 12 are the run's."""
    folder = Path(run_storage(interrupted).url)
    lines = [json.loads(line) for path in folder.glob("metrics/*/*.jsonl") for line in path.read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in lines) == 14
    facts = run_facts(log, "tiny")
    assert [point.step for point in facts.places] == list(range(1, 13))
    assert (facts.steps, facts.finished) == (12, True)
    first, second = facts.attempts
    assert (first.from_step, first.to_step, first.lost_steps, second.from_step, second.lost_steps) == (0, 8, 2, 6, 0)
    (interruption,) = facts.interruptions
    assert (interruption.from_step, interruption.steps_lost) == (6, 2)
    assert interruption.lost_s == first.lost_s > 0
    kept = {r["step"]: r["loss"] for r in log.latest("eval")}
    assert {point.step: loss for point, loss in facts.evals} == kept
    assert [(m.point.step, m.kind) for m in facts.marks] == [
        (3, "end of the warm start"), (6, "merge and reset"), (6, "restart"), (9, "merge and reset"),
        (12, "merge and reset"),
    ]  # fmt: skip


def test_times_grow_and_are_those_of_status(interrupted: RunConfig, log: RunLog) -> None:
    facts = run_facts(log, "tiny", dollars_per_hour=36.0)
    for earlier, later in zip(facts.places, facts.places[1:], strict=False):
        assert earlier.seconds < later.seconds
        assert earlier.clock <= later.clock
        assert earlier.dollars <= later.dollars
        assert later.tokens - earlier.tokens == interrupted.tokens_per_step
    assert facts.places[-1].seconds <= facts.useful_s <= facts.passed_s
    paid = sum(a.end - a.begin for a in facts.attempts) / 100
    assert facts.dollars == pytest.approx(paid), "one worker at a cent a second, lost work with it"
    assert facts.evals[0][0].dollars < facts.last.dollars < paid
    assert facts.useful_s == pytest.approx(replay(metrics.read_attempts(run_storage(interrupted)), []).useful_s)


def test_page_of_a_run_has_everything(log: RunLog) -> None:
    page = contents("run tiny", [run_facts(log, "tiny", dollars_per_hour=2.0)])
    assert [chart.title for chart in page.charts] == [
        "Held-out loss", "Training loss", "Learning rate and boundaries", "On the clock", "Memory", "Checkpoints",
        "What merges added",
    ]  # fmt: skip
    drawn = figures(page)
    held_out = drawn["Held-out loss/loss"]["data"][0]
    assert held_out["meta"]["x"].keys() == {"steps", "tokens", "seconds", "dollars"}
    assert held_out["x"] == [0, 2, 3, 4, 6, 8, 10, 12]
    assert held_out["y"] == pytest.approx([record["loss"] for record in log.latest("eval")], rel=1e-6)
    norms = drawn["What merges added/Frobenius norm"]["data"][0]
    assert norms["z"][0] == [record["norms"][0] for record in log.latest("updates")]
    assert norms["y"][0] == "0.self_attn.q_proj"
    assert dict(page.tiles)["updates lost"] == "2"
    text = check(page)
    assert "lost work" in text
    assert len(text) < MAX_PAGE


def test_runs_of_equal_seeds_are_compared(log: RunLog) -> None:
    base = {1: 3.0, 2: 3.1, 3: 2.9}
    better = [
        with_losses(log, {6: 9.0, 12: loss - 0.5 - 0.01 * seed}, seed=seed, name="a") for seed, loss in base.items()
    ]
    worse = [
        with_losses(log, {6: 9.0, 12: loss}, seed=seed, name="b", steps=12, global_batch_rows=6, optimizer=other(log))
        for seed, loss in base.items()
    ]
    rows = rank([*worse, *better])
    assert [row.label for row in rows] == ["a-1 and 2 more", "b-1 and 2 more"]
    found = compare(rows[1], rows[0])
    assert (found.found.num_pairs, found.tokens) == (3, 12 * log.cfg.tokens_per_step)
    assert found.found.mean == pytest.approx(0.52)
    assert "includes zero" not in found.words
    equal = [dataclasses.replace(run, label=f"c{run.label}") for run in worse]
    noisy = [with_losses(log, {12: x}, seed=s, name="d", optimizer=other(log, 0.5)) for s, x in ((1, 2.9), (2, 3.2))]
    against = compare(rank(noisy)[0], rank(equal)[0])
    assert "which includes zero: these seeds do not tell them apart" in against.words
    (alone,) = rank([with_losses(log, {12: 3.3}, seed=2, name="e", optimizer=other(log, 0.7))])
    assert "one pair of runs: no interval" in compare(alone, rank(equal)[0]).words
    (elsewhere,) = rank([with_losses(log, {12: 3.3}, seed=9, name="f")])
    assert "not compared" in compare(elsewhere, rank(equal)[0]).words
    data = log.cfg.data.model_copy(update={"fingerprint": "ab" * 8})
    (other_text,) = rank([with_losses(log, {12: 1.0}, seed=1, name="g", data=data)])
    assert "cannot be compared" in compare(other_text, rank(equal)[0]).words


def other(log: RunLog, learning_rate: float = 0.25) -> Any:
    return log.cfg.optimizer.model_copy(update={"learning_rate": learning_rate})


def test_evaluations_of_other_rows_are_told_apart(data: Path, tmp_path: Path) -> None:
    """How many rows are evaluated may change in a run: the same weights then have another loss."""
    common = ("train.eval_every_steps=2", "train.eval_rows=40")
    calm = tiny_config(data, tmp_path, "name=calm", *common)
    changed = tiny_config(data, tmp_path, "name=changed", *common, "train.stop_after_steps=6")
    run(calm)
    run(changed)
    run(tiny_config(data, tmp_path, "name=changed", "train.eval_every_steps=2", "train.eval_rows=1"))
    facts = [run_facts(read_log(run_storage(cfg)), cfg.name) for cfg in (calm, changed)]
    assert [point.step for point, _ in facts[1].evals] == [8, 10, 12]
    page = contents("two", facts)
    assert "changed: 5 evaluation(s) of another number of held-out rows are left out." in page.warnings
    assert any("losses of those that differ cannot be compared" in warning for warning in page.warnings)
    assert [row.label for row in rank(facts)] in (["calm", "changed"], ["changed", "calm"])


def test_runs_that_begin_elsewhere_are_rows_of_their_own(data: Path, tmp_path: Path) -> None:
    """The page's rows hold runs that differ in the seed alone."""
    plain = {"method": {"kind": "full"}, "schedule": {"kind": "cosine"}}
    for name in ("one", "two"):
        run(tiny_config(data, tmp_path, f"name={name}", "steps=3", **plain))
    found = []
    for name, begins in {"scratch": [], **{n: [f"model.init_from={tmp_path}/{n}"] for n in ("one", "two")}}.items():
        cfg = tiny_config(data, tmp_path, f"name=from-{name}", "steps=3", *begins, **plain)
        run(cfg)
        found.append(run_facts(read_log(run_storage(cfg)), name))
    assert len(rank(found)) == 3
    origins = [Origin(parent="parent", step=step) for step in (3, 6)]
    forks = [dataclasses.replace(found[0], log=dataclasses.replace(found[0].log, origin=o)) for o in (None, *origins)]
    assert len(rank(forks)) == 3


def test_seconds_and_dollars_of_a_fork_go_on_from_its_parents(data: Path, tmp_path: Path) -> None:
    """As its tokens do: a comparison would take a warm start that points share for free."""
    run(tiny_config(data, tmp_path, "name=warm", "train.stop_after_steps=3"))
    cfg = tiny_config(data, tmp_path, "name=point", "method.lora_rank=2")
    fork(cfg, "warm", 3)
    run(cfg)
    warm, point = (read_log(run_storage(cfg).sibling(name)) for name in ("warm", "point"))
    facts = run_facts(point, "point", dollars_per_hour=3600.0)
    before = facts.before
    assert before is not None
    whole = run_facts(warm, "warm", dollars_per_hour=3600.0)
    assert before.seconds == whole.places[-1].seconds > 0
    assert before.dollars == whole.places[-1].dollars
    alone = run_facts(dataclasses.replace(point, parent=None), "point", dollars_per_hour=3600.0)
    assert facts.seconds == alone.seconds + before.seconds
    assert facts.places[0].seconds == alone.places[0].seconds + before.seconds
    assert facts.dollars is not None
    assert facts.dollars == pytest.approx((alone.dollars or 0.0) + (before.dollars or 0.0))
    assert facts.goodput == alone.goodput
    assert "its seconds and dollars are not counted" in "\n".join(contents("one", [alone]).lead)
    run_storage(cfg).sibling("warm").put("fork.json", b'{"parent": "point", "step": 0}')  # by somebody: they go round
    round_and_round = read_log(run_storage(cfg)).parent
    assert round_and_round is not None
    assert round_and_round.parent is None


def test_odd_runs_break_nothing(log: RunLog) -> None:
    """No attempt, no step, no held-out loss, nothing finite, records of others, a clock that was wrong."""
    attempt = {"kind": "attempt", "step": 0, "world_size": 2, "attempt": "0001.0001-aa"}
    train = {"kind": "train", "step": 1, "loss": None, "tokens": 5}
    odd: dict[str, list[dict[str, Any]]] = {
        "nothing": [],
        "no step": [attempt],
        "no attempt": [train],
        "sets": [
            attempt,
            {"kind": "eval", "step": 1, "loss": 3.0, "perplexity": 20.1, "name": "old", "eval_s": 1.0},
            {"kind": "eval", "step": 1, "loss": None, "perplexity": None, "name": "</script>"},
        ],
        "null": [attempt, train, {"kind": "eval", "step": 1, "loss": None, "perplexity": None}],
        "clock": [attempt | {"unix_time": 1e300}, train | {"unix_time": -1e300, "tokens_per_s": 3.0}],
        "types": [
            attempt | {"state_bytes": {"weights": "many"}, "num_parameters": "x"},
            train | {"learning_rate": "high", "step_s": -5, "unix_time": True},
            {"kind": "checkpoint", "step": 1, "delta_bytes": 1, "base_bytes": 2, "base_is_new": True, "save_s": "x"},
            {"kind": "updates", "step": 1, "layers": [3, "a"], "norms": ["x"], "effective_ranks": []},
            {"kind": "updates", "step": 2, "layers": [], "norms": [], "effective_ranks": [], "singular_values": 4},
        ],
    }
    facts = [run_facts(made_up(log, records), name) for name, records in odd.items()]
    for one in facts:
        check(contents(one.label, [one]))
    check(contents("all", [*facts, run_facts(log, "tiny")]))
    check(contents("none", []))


def test_damaged_records_are_left_out(interrupted: RunConfig, tmp_path: Path) -> None:
    storage = run_storage(interrupted)
    whole = [(n, list(r)) for n, r in metrics.read_attempts(storage)]
    assert read_log(storage).attempts == [(n, [r for r in rs if r["kind"] in NEEDED]) for n, rs in whole]
    folder = storage.child("metrics").child(whole[0][0])
    before = folder.get("00000.jsonl")
    try:
        folder.put("00000.jsonl", before + b'{"kind": "eval", "step": 2, "loss": "x", "perplexity": 1}\n')
        assert len(read_log(storage).kinds["eval"]) == len(log_of(whole, "eval"))
        assert "after step       2" in report.summary(storage)
    finally:
        folder.put("00000.jsonl", before)


def log_of(attempts: Sequence[tuple[str, list[dict[str, Any]]]], kind: str) -> list[dict[str, Any]]:
    return [record for _, records in attempts for record in records if record["kind"] == kind]


def test_text_from_runs_is_escaped_and_holds_no_secret(log: RunLog) -> None:
    masking.remember("hunter2hunter2")
    evil = "</script><script>hacked=1</script><img src=x onerror=hacked=1> key hunter2hunter2"
    records = [record | {"cause": evil} for record in log.attempts[1][1]]
    restart = {"attempt": log.attempts[1][0], "change": evil, "cause": evil, "steps_lost": 1, "down_s": 1.0}
    odd = dataclasses.replace(
        log, attempts=[log.attempts[0], (log.attempts[1][0], records)], restarts=[restart],
        rollbacks=[Rollback(number=1, to_step=3, skip_from=3, skip_until=4, why=evil, unix_time=1.0)],
        cfg=log.cfg.model_copy(update={"name": evil}),
    )  # fmt: skip
    runs = [run_facts(odd, evil), run_facts(log, "tiny")]
    text = check(contents(evil, runs, problems=[evil]))
    assert "hunter2" not in text
    assert "<img" not in text
    # Of the page's own, and those in plotly's code.
    assert re.findall(r"<script>hacked|<script[^>]*>hacked", text) == []
    assert text.count("&lt;/script&gt;&lt;script&gt;hacked=1") > 5


def test_a_long_run_is_drawn_with_fewer_points_and_says_so(log: RunLog) -> None:
    records: list[dict[str, Any]] = [{"kind": "attempt", "step": 0, "world_size": 8, "unix_time": 1e9}]
    for step in range(1, 200_001):
        records.append(
            {
                "kind": "train", "step": step, "loss": 9.0 if step == 123_457 else 3.0 + math.sin(step) / 10,
                "learning_rate": 1e-3 * (step % 5000), "tokens": step, "tokens_per_s": 1e5, "step_s": 1.0,
                "unix_time": 1e9 + step,
            }
        )  # fmt: skip
        if step % 5000 == 0:
            updates = {"layers": [f"model.layers.{n}.mlp.up_proj" for n in range(224)], "norms": [1.2345] * 224}
            records.append({"kind": "updates", "step": step, "effective_ranks": [33.333] * 224, **updates})
    log = made_up(log, records, cfg=log.cfg.model_copy(update={"steps": 200_000}))
    page = contents("long", [run_facts(log, "long")])
    losses = figures(page)["Training loss/loss"]["data"][0]["y"]
    assert max(losses) == 9.0, "no spike is lost"
    assert len(losses) <= 2000
    assert "200,000 updates are drawn as 2,000 points" in page.charts[0].note
    assert len(check(page)) < 6_000_000
    facts = run_facts(log, "one")
    many = [
        dataclasses.replace(facts, label=f"run {n}", train=facts.train[:4000], places=facts.places[:4000])
        for n in range(60)
    ]
    page = contents("many", many)
    assert len(render(page)) < MAX_PAGE
    assert "Curves of the best 50 of 60 runs are drawn; all are in the table." in page.warnings


def test_thinning_keeps_ends_and_extremes() -> None:
    values: list[float | None] = [float(n % 7) for n in range(1000)]
    values[501], values[777], values[100] = 50.0, -50.0, None
    kept = thinned(values, 40)
    assert len(kept) <= 40
    assert {0, 501, 777, 999} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(values, 1000) == list(range(1000))
    assert thinned([None] * 100, 10) == [0, 99]


def test_sweep_has_its_charts(log: RunLog) -> None:
    points = grid(lambda rank, every: 3.0 - 0.1 * rank / 32 + 0.01 * every)
    charts = {chart.title: chart for chart in sweep_charts(points)}
    assert list(charts) == ["Parallel coordinates", "Two keys at a time", "What a lower loss costs", "What matters"]
    ((_, cells),) = charts["Two keys at a time"].variants
    assert (len(cells["data"][0]["z"]), len(cells["data"][0]["z"][0])) in ((2, 3), (3, 2))
    check(contents("sweep", [], points=points))
    check(contents("sweep", [run_facts(log, "tiny")], points=points))
    assert sweep_charts(points[:1]) == []
    drawn = [
        dataclasses.replace(p, settings={"optimizer.learning_rate": 10.0 ** -(n + 1), "seed_": n / 7})
        for n, p in enumerate(points * 3)
    ]
    check(contents("ranges", [], points=drawn))
    check(contents("failed", [], points=[Point(0, {"a": 1}, "failed", "no machine"), Point(1, {}, "diverged")]))


def test_command_takes_runs_folders_and_sweeps(
    interrupted: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_storage(interrupted)
    monkeypatch.chdir(tmp_path)
    reads = []
    read = metrics.read_attempts
    monkeypatch.setattr(metrics, "read_attempts", lambda storage: reads.append(storage.url) or read(storage))
    assert report.main([one.url, "--html", "--picture", "one.svg", "--dollars-per-hour", "2"]) == 0
    assert reads == [one.url], "the log is read once"
    said = capsys.readouterr().out
    assert "after step      12" in said
    assert "report.html" in said
    assert "dollars" in Path("report.html").read_text()
    assert report.main([one.parent().url]) == 0, "a folder that holds runs"
    assert "after step      12" in capsys.readouterr().out
    assert report.main([one.url, one.url]) == 0, "the same twice is one"
    (one.parent().child("notes")).put("x.txt", b"no run")
    one.parent().put("file.txt", b"no run")
    (one.parent().child("broken")).put("config.yaml", b"name: [")
    assert report.main([one.parent().url, "--html", "all.html"]) == 0
    said = capsys.readouterr().out
    assert "broken is left out" in said
    assert "notes" not in said
    one.parent().put("sweep.yaml", b"began: 1.0\n")
    for point in grid(lambda rank, every: 3.0 - 0.1 * rank):
        put_point(one.parent(), point)
    assert report.main([one.parent().url, "--html", "sweep.html"]) == 0
    assert "method.lora_rank" in capsys.readouterr().out
    assert "Parallel coordinates" in Path("sweep.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--html", "page.txt"], "--html 'page.txt' is no .html or .htm file"),
        (["--against", "nobody"], "--against 'nobody' is none of these runs: tiny"),
        (["--html", "/proc/nowhere/x.html"], "/proc/nowhere/x.html"),
        (["--picture", "x.jpg"], "is no .png or .svg file"),
    ],
)
def test_mistakes_are_said(
    args: list[str], said: str, interrupted: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([run_storage(interrupted).url, *args]) == 2
    assert said in capsys.readouterr().err


def test_prices_that_are_none(interrupted: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for price in ("0", "-1", "nan", "two"):
        with pytest.raises(SystemExit):
            report.main([run_storage(interrupted).url, f"--dollars-per-hour={price}"])
        assert "is no number of dollars above 0" in capsys.readouterr().err


def test_without_plotly_the_extra_is_named(
    interrupted: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(html, "find_spec", lambda name: None if name == "plotly" else found(name))
    assert report.main([run_storage(interrupted).url, "--html", "x.html"]) == 2
    assert "pip install 'relora-ray[report]'" in capsys.readouterr().err
    assert report.main([run_storage(interrupted).url]) == 0
