"""What `watch` shows of real runs and of logs written by hand, in terminals of all widths and over HTTP; and how little
it reads. Real terminals are pseudo-terminals."""

from __future__ import annotations

import http.client
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relora_ray.commands.watch import Watch, main, pages
from relora_ray.config.file import to_yaml
from relora_ray.errors import StorageError
from relora_ray.modeling.flops import peak_flops
from relora_ray.runs.metrics import LogTail, MetricsLog
from relora_ray.runs.speed import flops_per_token
from relora_ray.runs.tally import Tally
from relora_ray.storage import Storage
from relora_ray.study.live import Live
from relora_ray.study.page import html
from relora_ray.study.screen import spark
from relora_ray.study.serve import Page, Server
from tests.conftest import ROOT
from tests.test_status import put_life, put_manifest, put_metrics, put_page, requests  # noqa: F401
from tests.test_tally import attempt, begin, name, train
from tests.tiny import Crash, crash_at, run, tiny_config

NOW = 10_000.0


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one that has ended, one stopped in the middle, one stopped before its first update."""
    folder = tmp_path_factory.mktemp("runs")
    run(tiny_config(data, folder, "name=done"))
    for run_name, step, kind in (("half", 7, "train"), ("new", 0, "eval")):
        with pytest.raises(Crash):
            run(tiny_config(data, folder, f"name={run_name}"), crash_at(step, kind))
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run of 12 steps that has not begun."""
    storage = Storage(f"{tmp_path}/tiny")
    storage.put("config.yaml", to_yaml(tiny_config(tmp_path, tmp_path)).encode())
    return storage


def shown(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_frame_fits_the_terminal(
    columns: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for place in (folder, folder / "done", folder / "half", folder / "new"):
        lines = shown(capsys, place).splitlines()
        assert max(map(len, lines)) <= columns


def test_run_that_has_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, folder / "done", "--peak-tflops", "1e-3").split())
    assert text.startswith(f"done (relora) {folder}/done")
    for words in (
        "driver finished", "step 12 of 12 loss 6.9", "held out 7.0", "after 12", "boundary 4 of 4 workers 1 on cpu",
        "on each worker: weights 610.4 KB", "saved step 12,", "0 steps after it are not", "GFLOP/s a worker, ",
        "% of 1 GFLOP/s",
    ):  # fmt: skip
        assert words in text


def test_run_that_is_stopped_in_the_middle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown(capsys, folder / "half").split())
    for words in ("no driver; the launch command", "step 7 of 12 loss 7.", "boundary 2 of 4, the next after step 9",
                  "saved step 6,", "1 steps after it are not", "58.3%"):  # fmt: skip
        assert words in text
    assert " left" not in text


def test_table_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    head, *rows = shown(capsys, folder).splitlines()
    assert " ".join(head.split()) == "run now step loss curve held out tokens/s left saved workers"
    assert [row.split()[0] for row in rows] == ["done", "half", "new"]
    assert re.search(r"finished +12/12 +6\.9", rows[0])
    assert re.search(r"no driver +7/12", rows[1])


def test_files_beside_runs_are_passed_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a sweep's folder has them."""
    notes = folder / "README.md"
    notes.write_text("notes")
    try:
        text = shown(capsys, str(folder))
    finally:
        notes.unlink()
    assert "done" in text
    assert "README" not in text


def test_run_that_cannot_be_read_is_a_row_and_others_are_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            to = tmp_path / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    watch = Watch(Storage(str(tmp_path)))
    for path in (tmp_path / "half/setup").rglob("config.yaml"):
        path.write_text("?")
    rows = dict(watch.look())
    assert isinstance(rows["half"], str)
    assert "is not the one that the run's checkpoints were made with" in rows["half"]
    assert not isinstance(rows["done"], str)
    page = pages(watch, 1.0)["/"].text()
    assert "is not the one that" in page
    assert "12 of 12" in page


def test_single_run_stays_on_show_while_storage_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(Storage(str(folder / "half")))
    before = watch.look()

    def fail(self: Storage, *args: Any) -> Any:
        raise StorageError("no route to the bucket")

    monkeypatch.setattr(Storage, "list", fail)
    after = watch.look()
    assert [found for _, found in after] == [before[0][1], "not as it is now: no route to the bucket"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{}/notes"], "is no run, and there is none in it"),
        (["{}/done", "--host", "0.0.0.0"], "--host 0.0.0.0 has no effect without --serve"),
        (["{}/done", "--once", "--serve"], "--once and --serve exclude each other"),
        (["--serve", "{}/done"], "is no port, 0 to 65535. RUN goes in front of --serve"),
        (["{}/done", "--every", "0"], "'0' is less than 0.2 seconds"),
        (["{}/done", "--peak-tflops", "-1"], "'-1' is no number above 0"),
        (["{}/done", "--serve", "1", "--host", "203.0.113.7"], "nothing can listen at 203.0.113.7:1"),
    ],
)
def test_wrong_arguments(args: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([arg.format(folder) for arg in args])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


# Runs as they are while they are trained: written by hand.


def test_log_is_newer_than_the_page_of_progress(storage: Storage) -> None:
    tally = Tally()
    for event in (begin(1), attempt(1, 0)):
        tally.add(event, NOW - 20)
    put_page(storage, tally)
    put_life(storage, 1.0)
    put_manifest(storage, 2, name(1))
    live = Live(storage)
    assert (live.look(NOW).waits_for, live.look(NOW).step) == ("first step", 2)
    log = MetricsLog(storage, name(1))
    for record in (attempt(1, 0), *(train(step, step_s=4.0) for step in range(1, 6))):
        log.write(record)
    assert log.flush().result()
    view = live.look(NOW)
    assert (view.step, view.unsaved, view.waits_for) == (5, 3, "")
    assert (view.next_boundary, view.next_boundary_s, view.left_s) == (6, 4.0, 28.0)
    log.write(train(6, loss=None))
    log.close()
    view = live.look(NOW)
    assert (view.step, view.loss, len(view.losses)) == (6, None, 5)


def test_what_an_attempt_went_back_from_is_not_shown(storage: Storage) -> None:
    put_metrics(storage, name(1), attempt(1, 0), *(train(step, loss=9.0) for step in range(1, 9)))
    put_metrics(storage, name(2), attempt(2, 4), train(5, loss=2.0))
    view = Live(storage).look(NOW)
    assert view.step == 5
    assert view.losses == [9.0] * 4 + [2.0]


def test_waiting_for_machines(storage: Storage) -> None:
    tally = Tally()
    tally.begin_term(1, NOW - 70)
    put_page(storage, tally)
    put_life(storage, 1.0)
    view = Live(storage).look(NOW)
    assert (view.waits_for, view.waits_s) == ("machines", 70.0)


def test_damaged_log_is_passed_over(storage: Storage) -> None:
    lines = [
        b'\xff\xfe{"kind": "train"}',
        b"[1]",
        b'{"kind": "train", "step": "x"}',
        b'{"kind": "train"}',
        b'{"kind": "train", "step": 3, "loss": "much", "step_s": []}',
        b'{"kind": "eval", "step": 3, "loss": null}',
        b'{"kind": "attempt", "step": 0, "state_bytes": 7, "world_size": "two"}',
        b'{"kind": "boundary", "step": 0, "state_bytes": {"weights": "x"}}',
    ]
    storage.put(f"metrics/{name(1)}/00000.jsonl", b"\n".join(lines) + b"\n")
    view = Live(storage).look(NOW)
    assert (view.step, view.loss) == (3, None)


def test_only_what_is_new_is_read(storage: Storage, requests: list[str]) -> None:  # noqa: F811
    put_metrics(storage, name(1), attempt(1, 0), *(train(step) for step in range(1, 9)))
    log = MetricsLog(storage, name(2), segment_bytes=100)
    tail = LogTail(storage)
    log.write(attempt(2, 4))
    for step in range(5, 12):
        log.write(train(step), flush=True)
        log.flush().result()
    first = dict(tail.look())
    assert [r["step"] for r in first[name(2)]] == [4, 5, 6, 7, 8, 9, 10, 11]
    assert len(list(storage.list("metrics"))) > 3
    requests.clear()
    assert tail.look() == []
    assert len(requests) == 2  # a list, and how long the newest is
    log.write(train(12), flush=True)
    log.close()
    requests.clear()
    assert [r["step"] for r in dict(tail.look())[name(2)]] == [12]
    assert len(requests) <= 5


def test_a_look_costs_a_handful_of_requests_however_long_the_run_is(
    storage: Storage,
    requests: list[str],  # noqa: F811
) -> None:
    tally = Tally()
    for number in range(1, 201):
        put_metrics(storage, name(number), attempt(number, 0), train(1))
        tally.add(attempt(number, 0), NOW)
    put_page(storage, tally)
    put_life(storage, 1.0)
    live = Live(storage)
    requests.clear()
    live.look(NOW)
    assert len(requests) < 50
    requests.clear()
    live.look(NOW)
    assert len(requests) <= 12


def test_texts_of_storage_do_nothing_to_terminal_or_page(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "<script>alert(1)</script>\x1b[31m[bold]"
    tally = Tally()
    tally.add(begin(1) | {"cause": bad}, NOW)
    tally.add({"kind": "lost", "attempt": name(1), "cause": bad}, NOW)
    put_page(storage, tally)
    put_metrics(storage, name(1), attempt(1, 0) | {"device": bad, "state_bytes": {bad: 7}})
    text = shown(capsys, storage.url)
    assert "\x1b" not in text
    assert "[bold]" in text.replace("\n", "")
    watch = Watch(storage)
    page = pages(watch, 1.0)["/"].text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_spark() -> None:
    assert spark([3, 2, 1], 10) == "█▅▁"
    assert spark(list(range(100)), 4, ascii_only=True) == "_-*%"
    assert spark([1.0, 1.0], 10) == "▁▁"
    assert spark([], 10) == spark([1.0], 0) == ""


def test_flops_are_counted_by_what_is_trained(data: Path, tmp_path: Path) -> None:
    cfg = tiny_config(data, tmp_path)
    attention, head = 2 * 6 * 24 * 32, 6 * 32 * 2048
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    full = flops_per_token(cfg, 0)
    assert full == 6 * weights + attention + head
    adapters = flops_per_token(cfg, 3)
    assert adapters is not None
    assert 4 * weights + attention + head < adapters < full
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("cpu") is None


# Terminals.


def in_terminal(term: str, *args: str | Path, until: bytes, times: int) -> tuple[bytes, int]:
    """What `watch` writes to a terminal of 60 columns until it has shown that so often, and its exit code after
    Ctrl-C."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": term, "COLUMNS": "60", "LINES": "30", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "relora_ray", "watch", *map(str, args), "--every", "0.2"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    out = b""
    try:
        while out.count(until) < times:
            ready, _, _ = select.select([leader], [], [], 120)
            assert ready, out
            out += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    finally:
        process.kill()
        os.close(leader)
    return out, code


def test_dumb_terminal_gets_frames_and_no_codes(folder: Path) -> None:
    out, code = in_terminal("dumb", folder / "done", until=b"12 of 12", times=2)
    assert b"\x1b" not in out
    assert code == 0


def test_terminal_is_drawn_in_place_until_ctrl_c(folder: Path) -> None:
    out, code = in_terminal("xterm-256color", folder, until=b"finished", times=2)
    assert b"\x1b[1A" in out or b"\x1b[2K" in out
    assert b"Traceback" not in out
    assert code == 0


# In a browser.


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(pages(Watch(Storage(str(folder))), 0.2)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for header, value in headers.items():
        connection.putheader(header, value)
    connection.endheaders()
    return connection.getresponse()


def test_page_has_all_runs_and_loads_nothing_else(server: Server) -> None:
    answer = ask(server)
    page = answer.read().decode()
    assert answer.status == 200
    assert re.findall(r"<h2>(\w+)", page) == ["done", "half", "new"]
    assert "<polyline" in page
    assert re.findall(r"<script|src=|https?://|href=.*?>", page) == ['href="/report">']
    assert answer.getheader("Refresh") == "1"
    assert "default-src 'none'" in str(answer.getheader("Content-Security-Policy"))
    assert answer.getheader("Cache-Control") == "no-store"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8400", 200), ("localhost:1", 200), ("localhost", 200), ("[::1]:8400", 200), ("10.1.2.3", 200),
        ("evil.example", 403), ("evil.example:8400", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_names_of_others_are_refused(host: str, status: int, server: Server) -> None:
    assert ask(server, Host=host).status == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/etc/passwd", 404), ("GET", "/../x", 404), ("GET", "/?x", 200), ("HEAD", "/", 200), ("POST", "/", 501)],
)
def test_there_is_nothing_else_and_nothing_to_change(method: str, path: str, status: int, server: Server) -> None:
    answer = ask(server, path, method)
    assert answer.status == status
    if method == "HEAD":
        assert answer.read() == b""


def test_page_is_made_once_for_many_who_ask() -> None:
    made: list[int] = []

    def render() -> str:
        made.append(1)
        return f"{len(made)}"

    page = Page(render, every_s=3600.0)
    assert [page.text() for _ in range(5)] == ["1"] * 5


def test_report_is_served_and_stays_until_it_is_asked_for_again(server: Server) -> None:
    answer = ask(server, "/report")
    page = answer.read().decode()
    assert answer.status == 200
    assert answer.getheader("Refresh") is None
    assert set(re.findall(r'data-run="\d+" aria-pressed="true"><i [^>]*></i>(\w+)', page)) == {"done", "half", "new"}


def test_report_needs_plotly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "find_spec", lambda _: None)
    answer = ask(server, "/report")
    assert answer.status == 503
    assert "pip install 'relora-ray[report]'" in answer.read().decode()


def test_server_says_what_it_exposes_to_others(folder: Path) -> None:
    command = [sys.executable, "-m", "relora_ray", "watch", str(folder), "--serve", "0", "--host", "0.0.0.0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert line.startswith("watching at http://0.0.0.0:")
    assert "everybody who reaches this machine" in error
    assert process.returncode == 0
