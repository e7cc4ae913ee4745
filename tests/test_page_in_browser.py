"""The page in a real browser: what is drawn is what was recorded, nothing is asked of anybody, nothing foreign runs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relora_ray.commands.watch import Watch, pages
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from relora_ray.study.page.contents import contents
from relora_ray.study.page.facts import Facts, run_facts
from relora_ray.study.page.html import render
from relora_ray.study.run_log import read_log
from relora_ray.study.serve import Page, Server
from tests.browser import Tab, browser, find_browser
from tests.sweep.test_results import grid
from tests.tiny import Crash, crash_at, run, tiny_config

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    """Of ReLoRA, interrupted once, and of full training."""
    folder = tmp_path_factory.mktemp("runs")
    relora = tiny_config(data, folder, "train.eval_every_steps=3")
    full = tiny_config(data, folder, "name=full", method={"kind": "full"}, schedule={"kind": "cosine"})
    with pytest.raises(Crash):
        run(relora, crash_at(8, "train"))
    for cfg in (relora, full):
        run(cfg)
    return [run_facts(read_log(run_storage(cfg)), cfg.name, dollars_per_hour=3.0) for cfg in (relora, full)]


@pytest.fixture(scope="module")
def one(runs: list[Facts], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(render(contents("run tiny", runs[:1])), tmp_path_factory.mktemp("page"))


def written(text: str, folder: Path) -> str:
    """Its URL."""
    (folder / "report.html").write_text(text)
    return (folder / "report.html").as_uri()


def assert_at_peace(tab: Tab, page: str) -> None:
    assert tab.complaints == []
    assert tab.requests == [page]


def drawn(tab: Tab, title: str, trace: int, axis: str) -> list[float]:
    """What plotly has drawn in the chart below this heading that is not hidden."""
    shown = "[...document.querySelectorAll('section.chart:not([hidden])')]"
    section = f"{shown}.find(s => s.querySelector('h2').textContent === {title!r})"
    found = tab.js(f"{section}.querySelector('.plot').data[{trace}].{axis}")
    assert isinstance(found, list)
    return found


def test_what_is_drawn_is_what_was_recorded(tab: Tab, one: str, runs: list[Facts]) -> None:
    tab.open(one)
    train = runs[0].log.latest("train")
    assert drawn(tab, "Training loss", 0, "x") == list(range(1, 13))
    assert drawn(tab, "Training loss", 0, "y") == pytest.approx([r["loss"] for r in train], rel=1e-6)
    assert drawn(tab, "Held-out loss", 0, "x") == [0, 3, 6, 9, 12]
    assert drawn(tab, "Held-out loss", 0, "y") == pytest.approx([loss for _, loss in runs[0].evals], rel=1e-6)
    rates = drawn(tab, "Learning rate and boundaries", 0, "y")
    assert rates == pytest.approx([r["learning_rate"] for r in train], rel=1e-6)
    for name in ("tokens", "seconds", "dollars"):
        tab.choose("#x", name)
        expected = [getattr(point, name) for point, _ in runs[0].evals]
        assert drawn(tab, "Held-out loss", 0, "x") == pytest.approx(expected, rel=1e-6)
        assert len(drawn(tab, "Training loss", 0, "x")) == 12
    buttons = tab.js("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert set(buttons) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}, (
        "none uploads"
    )
    tab.choose("select.variant", "1")
    assert drawn(tab, "Held-out loss", 0, "y")[0] > 1000, "perplexity"
    assert_at_peace(tab, one)


def test_light_and_dark(tab: Tab, one: str) -> None:
    def colours() -> tuple[str, str]:
        text = "document.querySelector('.plot .xtick text')"
        return tab.js("getComputedStyle(document.body).backgroundColor"), tab.js(f"getComputedStyle({text}).fill")

    tab.open(one, scheme="light")
    light = colours()
    tab.choose("#theme", "dark")
    dark = colours()
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] == "rgb(20, 23, 27)"
    assert light[1] != dark[1]
    tab.open(one, scheme="dark")
    assert colours() == dark
    tab.choose("#theme", "light")
    assert colours() == light
    assert_at_peace(tab, one)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(tab: Tab, one: str, width: int, tmp_path: Path) -> None:
    tab.open(one, width=width)
    assert tab.js("document.documentElement.scrollWidth") <= width
    widths = tab.js("[...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().right)")
    assert max(widths) <= width
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_can_be_hidden_and_looked_at(tab: Tab, runs: list[Facts], tmp_path: Path) -> None:
    page = written(render(contents("two", runs)), tmp_path)
    tab.open(page)
    names = tab.js("[...document.querySelectorAll('button.run')].map(b => b.textContent)")
    assert sorted(names) == ["full", "tiny"]
    visible = "document.getElementById('chart-0').data.map(t => t.visible)"
    assert tab.js(visible) == [True, True]
    tab.js("document.querySelector('button.run').click()")
    assert tab.js(visible) == [False, True]
    tab.choose("#run", str(names.index("tiny")))
    assert drawn(tab, "What merges added", 0, "x") == ["6", "9", "12"]
    tab.choose("#run", str(names.index("full")))
    titles = "[...document.querySelectorAll('section.chart:not([hidden]) h2')].map(h => h.textContent)"
    assert "What merges added" not in tab.js(titles)
    assert_at_peace(tab, page)


def test_nothing_foreign_runs(tab: Tab, runs: list[Facts], tmp_path: Path) -> None:
    """By escaping; and if that had failed, by the page's policy."""
    restart = {"attempt": runs[0].attempts[1].name, "change": EVIL, "cause": EVIL, "steps_lost": 1, "down_s": 1.0}
    log = dataclasses.replace(
        runs[0].log, restarts=[restart], cfg=runs[0].log.cfg.model_copy(update={"name": EVIL})
    )  # fmt: skip
    text = render(contents(EVIL, [run_facts(log, EVIL), runs[1]], problems=[EVIL]))
    page = written(text, tmp_path)
    tab.open(page)
    assert tab.js("document.title") == EVIL
    assert tab.js("typeof window.hacked") == "undefined"
    assert_at_peace(tab, page)
    (tmp_path / "unescaped").mkdir()
    broken = written(text.replace("<main>", f"<main>{EVIL.removeprefix('</script>')}", 1), tmp_path / "unescaped")
    tab.open(broken)
    assert tab.js("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in said for said in tab.complaints)


def test_sweep_is_drawn(tab: Tab, tmp_path: Path) -> None:
    page = written(render(contents("sweep", [], points=grid(lambda rank, every: 3 - rank / 99 + every / 9))), tmp_path)
    tab.open(page)
    assert tab.js("document.querySelectorAll('.plot .parcoords').length") > 0
    cells = drawn(tab, "Two keys at a time", 0, "z")
    assert sorted(map(len, cells)) in ([2, 2, 2], [3, 3])
    assert_at_peace(tab, page)


@contextmanager
def served(pages: dict[str, Page]) -> Iterator[str]:
    with Server(pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def test_report_is_drawn_as_watch_serves_it(tab: Tab, runs: list[Facts]) -> None:
    """Under the server's policy besides the page's own."""
    with served(pages(Watch(Storage(runs[0].log.url)), 60.0)) as url:
        tab.tell("Page.navigate", url=url)
        tab.wait("document.querySelector('a') !== null")
        report = tab.js("document.querySelector('a').href")
        assert report == f"{url}report"
        tab.open(report)
        assert drawn(tab, "Training loss", 0, "x") == list(range(1, 13))
        assert_at_peace(tab, report)


def test_sweep_is_drawn_as_it_is_served(tab: Tab) -> None:
    """Plotly compiles what it draws of one, which a policy may forbid."""
    page = render(contents("sweep", [], points=grid(lambda rank, every: 3 - rank / 99 + every / 9)))
    with served({"/": Page(lambda: page, every_s=60.0, still=True, scripts=True)}) as url:
        tab.open(url)
        assert tab.js("document.querySelectorAll('.plot .parcoords').length") > 0
        assert_at_peace(tab, url)
