"""Sinks of records cannot hurt a run: what raises, hangs or is slow is left behind, and what is lost is said. Threads
are real; one package is installed in a folder and found by its entry point."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config, to_yaml
from relora_ray.errors import ConfigError
from relora_ray.runs import sinks
from relora_ray.runs.metrics import Record
from relora_ray.runs.sinks import About, Feed, Opener, Sink, listening
from relora_ray.runs.trackers import check_trackers, scalars
from relora_ray.runtime.preflight import preflight
from tests.conftest import ROOT
from tests.tiny import TINY, tiny_config

ABOUT = About("id", "tiny", "here", {})


class Kept:
    """Takes records, as `then` lets it."""

    def __init__(self, then: Callable[[Record], object] = lambda record: None) -> None:
        self.taken: list[Record] = []
        self.closed = False
        self._then = then

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self._then(record)
            self.taken.append(record)

    def close(self) -> None:
        self.closed = True


def step(number: int) -> Record:
    return {"kind": "train", "step": number, "loss": 1.0}


def feed(sink: Sink, said: list[str], *, patient: bool = False) -> Feed:
    return Feed(Opener("it", lambda about: sink, patient), lambda: ABOUT, said.append)


def end(fed: Feed, seconds: float = 30.0) -> None:
    fed.end()
    fed.wait(seconds)


@pytest.mark.parametrize("patient", [False, True])
def test_all_records_come_in_order_and_are_the_sinks_own(patient: bool) -> None:
    def change(record: Record) -> None:
        record["loss"] = "changed"

    said: list[str] = []
    sink, record = Kept(change), step(0)
    fed = feed(sink, said, patient=patient)
    fed.tell(record)
    for number in range(1, 2000):
        fed.tell(step(number))
    end(fed)
    assert [r["step"] for r in sink.taken] == list(range(2000))
    assert record == step(0)
    assert sink.closed
    assert said == []


def test_hang_blocks_nobody_and_what_is_lost_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "ROOM", 100)
    said: list[str] = []
    goes_on = threading.Event()
    sink = Kept(lambda record: goes_on.wait())
    fed = feed(sink, said)
    began = time.monotonic()
    for number in range(5000):
        fed.tell(step(number) if number % 1000 else {"kind": "attempt", "step": number})
    end(fed, 0.1)
    assert time.monotonic() - began < 20  # it hangs for ever: this only bounds a test that fails
    assert said == [
        "it does not keep up: 100 records wait, and it is told of fewer steps",
        "it was not told of 5,000 of 5,000 records: it does not answer",
    ]
    goes_on.set()


def test_slow_sink_gets_a_thinner_curve_with_every_attempt_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "ROOM", 100)
    said: list[str] = []
    goes_on = threading.Event()
    sink = Kept(lambda record: goes_on.wait())
    fed = feed(sink, said)
    for number in range(1000):
        fed.tell(step(number) if number % 100 else {"kind": "attempt", "step": number})
    goes_on.set()
    end(fed)
    taken = [record["step"] for record in sink.taken]
    assert taken == sorted(taken)
    assert [record["step"] for record in sink.taken if record["kind"] == "attempt"] == list(range(0, 1000, 100))
    assert 50 < len(taken) <= 102
    assert said[-1] == f"it was not told of {1000 - len(taken)} of 1,000 records"


def test_what_raises_again_and_again_is_left_out_and_told_once() -> None:
    said: list[str] = []
    asked: list[int] = []

    def fail(record: Record) -> None:
        asked.append(record["step"])
        sys.exit("no more") if record["step"] % 2 else 1 / 0

    fed = feed(Kept(fail), said)
    for number in range(50):
        fed.tell(step(number))
    end(fed)
    assert asked == list(range(sinks.MAX_FAILURES))
    assert said == [
        "it: ZeroDivisionError: division by zero; the record is passed over",
        "it is left out from here on: ZeroDivisionError: division by zero",
        "it was not told of 50 of 50 records",
    ]


def test_now_and_then_may_fail() -> None:
    said: list[str] = []

    def fail(record: Record) -> None:
        assert record["step"] % 3, "not this one"

    sink = Kept(fail)
    fed = feed(sink, said)
    for number in range(30):
        fed.tell(step(number))
    end(fed)
    assert [r["step"] for r in sink.taken] == [number for number in range(30) if number % 3]
    assert said == [
        "it: AssertionError: not this one; the record is passed over",
        "it was not told of 10 of 30 records",
    ]


def test_patient_sink_gets_all_when_its_network_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "PAUSES_S", (0.01, 0.01))
    said: list[str] = []
    failures = [ConnectionError("no route"), ConnectionError("no route"), ConnectionError("no route")]
    asked = threading.Event()

    def open_(about: About) -> Sink:
        if len(failures) > 1:
            raise failures.pop()
        return sink

    def fail(record: Record) -> None:
        if failures:
            raise failures.pop()
        asked.set()

    sink = Kept(fail)
    fed = Feed(Opener("it", open_, patient=True), lambda: ABOUT, said.append)
    for number in range(10):
        fed.tell(step(number))
    assert asked.wait(30)
    end(fed)
    assert [r["step"] for r in sink.taken] == list(range(10))
    assert said == ["it: ConnectionError: no route; is tried again, and records wait", "it works again"] * 2


def test_patient_sink_does_not_hold_up_the_end() -> None:
    def never(about: About) -> Sink:
        raise ConnectionError("no route")

    said: list[str] = []
    fed = Feed(Opener("it", never, patient=True), lambda: ABOUT, said.append)
    fed.tell(step(1))
    end(fed)
    assert said[-2:] == [
        "it is left out from here on: ConnectionError: no route",
        "it was not told of 1 of 1 records",
    ]


def test_run_without_a_record_opens_nothing() -> None:
    said: list[str] = []
    fed = Feed(Opener("it", lambda about: 1 / 0), lambda: ABOUT, said.append)
    end(fed)
    assert said == []


def test_numbers_of_a_record() -> None:
    record = {
        "kind": "boundary", "step": 3, "boundary_kind": "merge", "digest": 2**60, "merges": 1, "boundary_s": 0.5,
        "state_bytes": {"weights": 7}, "state_pruned": None, "x": float("inf"), "new_parameters": True,
    }  # fmt: skip
    assert scalars(record) == {
        "boundary/merges": 1.0, "boundary/boundary_s": 0.5, "boundary/state_bytes/weights": 7.0,
        "boundary/new_parameters": 1.0,
    }  # fmt: skip
    assert scalars({"kind": "log", "step": 3, "rank": 1}) == {}


# The config.


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("tracking=[wandb, tensorboard]", ["tensorboard", "wandb"]),
        ("tracking=mlflow", ["mlflow"]),
        ("tracking=[tensorboard, {wandb: {project: mine, offline: true}}]", ["tensorboard", "wandb"]),
        ("tracking={wandb: {project: mine}, mlflow: null}", ["wandb", "mlflow"]),
        ("tracking.wandb.project=mine", ["wandb"]),
        ("tracking=[]", []),
    ],
)
def test_trackers_are_asked_for_by_name_or_with_options(given: str, names: list[str]) -> None:
    cfg = parse_config(TINY, [given])
    assert sorted(cfg.tracking.model_dump()) == sorted(names)
    assert parse_config(to_yaml(cfg)) == cfg
    assert cfg.identity() == parse_config(TINY).identity()
    if "mine" in given:
        assert cfg.settings()["tracking.wandb.project"] == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "tracking=[wandbb]",
            "tracking has 'wandbb', which is none of tensorboard, wandb, mlflow. Did you mean",
        ),
        ("tracking=[wandb, wandb]", "tracking has 'wandb' twice"),
        ("tracking=[[wandb]]", "which is none of tensorboard, wandb, mlflow"),
        ("tracking.wandb.projct=3", "unknown key tracking.wandb.projct=3. Did you mean 'project'?"),
        ("tracking.tensorboard.folder=s3://bucket/boards", "is a URL: files there are appended to"),
        ("tracking.mlflow.uri=mlruns", "is a folder, which MLflow does not write to any more"),
        ("tracking.mlflow.uri=http://me:hunter2@host/", "must not carry credentials"),
    ],
)
def test_wrong_trackers_are_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(TINY, [given])
    assert message in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_package_is_refused_before_anything_is_spent(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else there(n, *rest))
    cfg = tiny_config(data, tmp_path / "runs", f"tracking=[{name}]")
    with pytest.raises(ConfigError, match=rf"tracking.{name} needs {name}.*pip install 'relora-ray\[{name}\]'"):
        preflight(cfg)
    assert not (tmp_path / "runs").exists()


def test_wandb_without_a_login_is_refused_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the console, and no server: the one named here does not exist."""
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    tracking = parse_config(TINY, ["tracking=[wandb]"]).tracking
    with pytest.raises(ConfigError, match=r"nobody is logged in to Weights & Biases here. Set WANDB_API_KEY"):
        check_trackers(tracking)
    check_trackers(parse_config(TINY, ["tracking={wandb: {offline: true}}"]).tracking)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + 40 * "0")
    check_trackers(tracking)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(tracking)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    check_trackers(tracking)


def test_job_does_not_track_into_its_working_directory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"tracking.tensorboard.folder='tensorboard' is relative, and a Ray job's"):
        preflight(tiny_config(data, tmp_path, "tracking=[tensorboard]"))


# A package of somebody else's.


def guide() -> tuple[str, str]:
    """The module and the lines of pyproject.toml that docs/watching.md shows."""
    blocks = re.findall(r"```(python|toml)\n(.*?)```", (ROOT / "docs/watching.md").read_text(), re.DOTALL)
    found = dict(blocks)
    return found["python"], found["toml"]


def test_callback_of_the_guide_is_found_when_it_is_installed(data: Path, tmp_path: Path) -> None:
    module, project = guide()
    assert len(module.splitlines()) <= 14
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "my_alerts.py").write_text(module)
    (source / "pyproject.toml").write_text(project)
    alone = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *alone, "--target", str(site), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_config(data, tmp_path).model_dump(mode="json")))
    script = """
        import sys
        from pathlib import Path
        from relora_ray.config.file import load_config
        from relora_ray.runs.sinks import listening
        from tests.tiny import run
        cfg = load_config("run.yaml")
        with listening(cfg, lambda record: None, say=print) as tell:
            run(cfg, tell)
    """
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = (tmp_path / "tiny.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in told] == ["after step 0", "after step 3", "after step 12", "ended"]
    assert done.stdout == ""


def test_callback_that_cannot_be_imported_is_left_out(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[relora_ray.callbacks]\nbroken = nowhere_at_all:main\n")
    monkeypatch.syspath_prepend(tmp_path)
    said: list[str] = []
    with listening(cfg, lambda record: None, say=said.append) as tell:
        tell(step(1))
    assert said == [
        "callback broken is left out from here on: ModuleNotFoundError: No module named 'nowhere_at_all'",
        "callback broken was not told of 1 of 1 records",
    ]
