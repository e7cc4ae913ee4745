"""Several named sets of held-out text: evaluated beside the run's own rows, and read by nobody who asks for those."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from relora_ray.checkpoint import read_history
from relora_ray.commands.progress import Progress
from relora_ray.commands.report import summary
from relora_ray.config import RunConfig
from relora_ray.data.prepare import Request, prepare
from relora_ray.errors import ConfigError, DataError
from relora_ray.loop import identity_digest
from relora_ray.runs import metrics
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run
from relora_ray.runs.tally import read_tally, replay
from relora_ray.runs.trackers import scalars
from relora_ray.runtime.preflight import preflight
from relora_ray.study.ablations import identity
from relora_ray.study.live import Live
from relora_ray.study.page.contents import contents
from relora_ray.study.page.facts import run_facts
from relora_ray.study.picture import draw_run
from relora_ray.study.run_log import read_log
from relora_ray.sweep.results import held_out_loss
from tests.conftest import TOKENIZER
from tests.tiny import run, run_on, state_digest, tiny_config


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other text than the run's, by the same tokenizer."""
    folder = tmp_path_factory.mktemp("books")
    chapters = [f"Chapter {n}. It was the best of times, it was the {n}th of times." for n in range(300)]
    (folder / "books.txt").write_text("\n\n".join(chapters))
    return prepared(folder / "books.txt", folder / "data", TOKENIZER)


def prepared(text: Path, out: Path, tokenizer: Path) -> str:
    """A fifth of its paragraphs is held out."""
    prepare(
        Request(
            sources=(str(text),),
            out=str(out),
            tokenizer=str(tokenizer),
            document_separator=r"\s*",
            validation_fraction=0.2,
            num_workers=1,
        ),
        quiet=True,
    )
    return str(out)


@pytest.fixture
def named(data: Path, tmp_path: Path, books: str) -> RunConfig:
    return tiny_config(
        data, tmp_path, f"data.validation.books={books}", f"data.validation.self={data}", "train.eval_every_steps=4"
    )


def losses_by_step(cfg: RunConfig, series: str) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in metrics.read(run_storage(cfg), series)}


def test_sets_are_evaluated_whenever_the_run_is_and_change_nothing(
    named: RunConfig, cfg: RunConfig, tmp_path: Path
) -> None:
    state, records = run(named)
    own, books, same = (losses_by_step(named, series) for series in ("eval", "eval/books", "eval/self"))
    assert own.keys() == books.keys() == {0, 3, 4, 8, 12}
    assert same == own  # the same rows
    assert all(abs(books[step] - own[step]) > 1e-3 for step in own)
    without, _ = run(cfg.model_copy(update={"name": "without"}))
    assert state_digest(state) == state_digest(without)
    prints = {r["name"]: r["data_fingerprint"] for r in records if r["kind"] == "eval" and "name" in r}
    assert prints == check_run(named).data.validation_fingerprints
    assert len(set(prints.values())) == 2


def test_readers_of_evaluations_go_on_with_the_runs_own_rows(named: RunConfig, tmp_path: Path) -> None:
    _, records = run(named)
    storage, own = run_storage(named), losses_by_step(named, "eval")
    assert held_out_loss(storage, 12) == own[12]
    table = summary(storage)
    held_out, _, rest = table.partition("    on books")
    assert held_out.count("after step") == 5
    assert f"{losses_by_step(named, 'eval/books')[12]:.4f}" in rest.splitlines()[0]
    assert f"{own[12]:.4f}" in rest.splitlines()[1]
    log = read_log(storage)
    draw_run(log, tmp_path / "run.svg")
    facts = run_facts(log, "run")
    assert {point.step: loss for point, loss in facts.evals} == own
    assert {point.step: loss for point, loss in facts.named_evals["books"]} == losses_by_step(named, "eval/books")
    assert "loss on books" in [name for chart in contents("run", [facts]).charts for name, _ in chart.variants]
    assert Live(storage).look().eval_loss == own[12]
    shown = [scalars(r) for r in records if r["kind"] == "eval"]
    assert [s["eval/loss"] for s in shown if "eval/loss" in s] == list(own.values())
    assert [s["eval/books/loss"] for s in shown if "eval/books/loss" in s] == [
        *losses_by_step(named, "eval/books").values()
    ]
    # Every evaluation takes its time, and one per step and set counts: also from the log of two attempts that overlap.
    evals = [r for r in records if r["kind"] == "eval"]
    tally = read_tally(storage, read_history(storage).head)
    spent = sum(r.get("step_s", r.get("boundary_s", r.get("eval_s", r.get("blocked_s", 0.0)))) for r in records)
    assert tally.useful_s == pytest.approx(spent, rel=1e-6)
    assert facts.useful_s == pytest.approx(spent, rel=1e-6)
    twice = replay([("0001.0001-a", records), ("0002.0001-b", [dict(records[0], step=12), *evals[-3:]])], [])
    assert twice.useful_s == pytest.approx(spent, rel=1e-6)


def test_console_says_which_set(named: RunConfig) -> None:
    out = io.StringIO()
    run(named, Progress(named, out))
    last = [line for line in out.getvalue().splitlines() if line.startswith("-- step 12: held-out")]
    assert [" ".join(line.split()[5:7]) for line in last[1:]] == ["on books", "on self"]
    assert last[0] == last[2].replace(" on self", "")


def test_numbers_are_the_same_on_several_ranks(named: RunConfig) -> None:
    run(named)
    two = named.model_copy(update={"name": "two"})
    run_on(2, two)
    for series in ("eval", "eval/books"):
        assert losses_by_step(two, series) == pytest.approx(losses_by_step(named, series), rel=1e-5)


def test_sets_come_and_go_and_a_name_is_of_one_text(named: RunConfig, data: Path, books: str, tmp_path: Path) -> None:
    first = named.model_copy(update={"train": named.train.model_copy(update={"stop_after_steps": 6})})
    run(first)
    only = tiny_config(data, tmp_path, f"data.validation.more={books}", f"data.validation.self={data}")
    assert identity_digest(only, "f") == identity_digest(named, "f")
    run(only)
    assert losses_by_step(named, "eval/more").keys() == {12}
    assert losses_by_step(named, "eval/books").keys() == {0, 3, 4, 6}
    with pytest.raises(DataError, match=r"validation.books=.* has fingerprint .* but the run knows .* by this name"):
        check_run(tiny_config(data, tmp_path, f"data.validation.books={data}"))


def test_tables_of_runs_know_a_result_with_any_sets(data: Path, tmp_path: Path, books: str, cfg: RunConfig) -> None:
    assert identity(tiny_config(data, tmp_path, f"data.validation.books={books}")) == identity(cfg)


def test_other_tokens_and_missing_data_are_refused(data: Path, tmp_path: Path, books: str) -> None:
    from relora_ray.data.tokenizer import train_tokenizer

    train_tokenizer(["another text " * 50], vocab_size=300, out=str(tmp_path / "tokenizer"))
    (tmp_path / "a.txt").write_text("\n\n".join(f"another text, the {n}th" for n in range(99)))
    other = prepared(tmp_path / "a.txt", tmp_path / "other", tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"data.validation.x=.* was prepared with another tokenizer"):
        preflight(tiny_config(data, tmp_path, f"data.validation.x={other}"))
    with pytest.raises(DataError, match=r"nowhere' has no index.json"):
        preflight(tiny_config(data, tmp_path, f"data.validation.x={tmp_path}/nowhere"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.validation={a b: data}", r"data.validation=.* has the name 'a b'"),
        ("data.validation={a: 's3://b/x*'}", r"data.validation.a='s3://b/x\*' has a \*"),
        ("data.validation_fingerprints.a=ffff", r"data.validation_fingerprints.a has no effect"),
        ("data.validation=books", r"data.validation='books'"),
    ],
)
def test_malformed_sets_are_refused(data: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(data, tmp_path, override)


def test_paths_become_absolute_for_workers(
    data: Path, tmp_path: Path, books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(books).parent)
    cfg: Any = preflight(tiny_config(data, tmp_path, "data.validation.books=data"))
    assert cfg.data.validation == {"books": books}
