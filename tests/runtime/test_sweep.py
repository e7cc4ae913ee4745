"""Sweeps on a real Ray: a killed one goes on; and ASHA's decisions, on Ray's own scheduler without a cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.tune.schedulers import TrialScheduler

from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.checkpoint.manifest import pinned_steps
from relora_ray.errors import ConfigError
from relora_ray.metrics import read_all
from relora_ray.runtime.sweep import _claim, _Generations, _Halving, _Points
from relora_ray.storage import Storage
from relora_ray.sweep.results import Point, put_point, read_point, read_points
from tests.sweep.test_results import point
from tests.sweep.test_space import sweep
from tests.tiny import TINY, run, tiny_config

ROOT = Path(__file__).parent.parent.parent


def test_killed_sweep_goes_on_and_comes_to_the_same(data: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver in the second point. What was trained is not trained again, and the losses are those of
    runs that trained their warm start themselves and were left alone."""
    space = {"method.lora_rank": [2, 8]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"steps": 303, "sweep": {"space": space}}))
    length = ("steps=303", "method.merge_every_steps=100", "train.log_every_steps=1", "checkpoint.save_every_steps=20")
    command = [
        sys.executable, "-m", "relora_ray.launch", str(path), f"storage={tmp_path}", f"data.path={data}", *length,
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdout is not None
    said = ""
    for line in first.stdout:
        said += line
        if line.startswith("  0001-seed1 | step 100/"):
            break
    first.kill()
    assert first.wait() == -signal.SIGKILL, said[-3000:]
    folder = Storage(f"{tmp_path}/tiny")
    assert [p.state for p in read_points(folder)] == ["done", "begun"]
    before = folder.child("0000-seed1").list("metrics")
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-3000:]
    assert folder.child("0000-seed1").list("metrics") == before, "it was done"
    assert [a["step"] for a in read_all(folder.child("warm-" + warm(folder)), "attempt")] == [0], "trained once"
    resumed = read_all(folder.child("0001-seed1"), "attempt")[-1]["step"]
    assert 3 < resumed < 303
    points = read_points(folder)
    assert [p.state for p in points] == ["done", "done"]
    for number, rank in enumerate(space["method.lora_rank"]):
        _, records = run(
            tiny_config(data, tmp_path / "alone", *length, f"method.lora_rank={rank}", "seed=1", f"name=r{rank}")
        )
        expected = {r["step"]: r["loss"] for r in records if r["kind"] == "eval"}
        assert points[number].losses == {303: {1: expected[303]}}
        base = read_manifest(folder.child(f"000{number}-seed1"), 3).base
        assert base is not None
        assert base.run.startswith("warm-")
    assert "2 points (2 done)" in second.stdout
    assert "0.5% saved" in second.stdout, second.stdout[-2000:]
    again = subprocess.run([*command, "optimizer.learning_rate=1"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "holds a run of another config" in again.stderr


def warm(folder: Storage) -> str:
    (name,) = {path.split("/")[0] for path in folder.list() if path.startswith("warm-")}
    return name.removeprefix("warm-")


class Tuned:
    """ASHA over made-up points: two rungs before the end, half goes on."""

    def __init__(self, folder: Storage, known: dict[int, Point]) -> None:
        self._folder = folder
        self._scheduler = _Halving(
            {1: 15, 2: 27, 4: 51}, folder, known, time_attr="rung", metric="loss", mode="min", max_t=4, grace_period=1,
            reduction_factor=2,
        )  # fmt: skip
        self._trials: dict[int, Any] = {}

    def report(self, number: int, rung: int, loss: float) -> bool:
        """Whether the point goes on. Its record is as its trial leaves it."""
        if number not in self._trials:
            self._trials[number] = SimpleNamespace(trial_id=str(number), config={"number": number}, stub=False)
            self._scheduler.on_trial_add(None, self._trials[number])  # type: ignore[arg-type]
        if number not in {p.number for p in read_points(self._folder)}:
            put_point(self._folder, point(number, loss, state="begun", step={1: 15, 2: 27, 4: 51}[rung]))
        decision = self._scheduler.on_trial_result(None, self._trials[number], {"rung": rung, "loss": loss})
        return decision == TrialScheduler.CONTINUE


def test_points_that_are_behind_are_halved_and_stay_so(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    tuned = Tuned(folder, {})
    went_on = [tuned.report(n, 1, loss) for n, loss in enumerate((2.0, 3.0, 1.0, 2.5))]
    assert went_on == [True, False, True, False]
    assert [read_point(folder, n).state for n in range(4)] == ["begun", "halved", "begun", "halved"]
    # Started again with other points first: whoever went on goes on, whoever was ended stays so.
    known = {p.number: p for p in read_points(folder)}
    known[0].losses[27] = {1: 1.9}
    again = Tuned(folder, known)
    assert not again.report(1, 1, 3.0), "the first to come would go on"
    assert again.report(2, 1, 1.0)
    assert again.report(0, 1, 2.0), "it has, though it is behind now"


def test_last_rung_ends_nobody(tmp_path: Path) -> None:
    tuned = Tuned(Storage(str(tmp_path)), {})
    assert tuned.report(0, 4, 9.0)
    assert read_point(Storage(str(tmp_path)), 0).state == "begun", "its trial says that it is done"


def test_no_point_begins_when_the_budget_is_spent(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    spec = sweep(tmp_path, max_tokens=2000)
    points = _Points(spec, folder, {}, began=0.0)
    assert points.suggest("a") == {"number": 0, "settings": spec.points[0], "until": 1}
    put_point(folder, point(0, 2.0))  # 2 runs of 1296 tokens
    assert points.suggest("b") == "FINISHED"
    # What has begun is brought to its end all the same.
    going = _Points(spec, folder, {0: point(0, 2.0), 1: Point(1, spec.points[1])}, began=0.0)
    assert [going.suggest(x) if x == "c" else going.suggest(x)["number"] for x in "abc"] == [0, 1, "FINISHED"]
    hours = _Points(sweep(tmp_path, max_hours=1.0), folder, {}, began=0.0)
    assert hours.suggest("a") == "FINISHED"


def test_population_goes_from_rung_to_rung(tmp_path: Path) -> None:
    """All come to a rung before anybody is replaced; after a restart the decision stands."""
    folder = Storage(str(tmp_path))
    space = {"method.lora_rank": [2, 4, 8, 16]}
    spec = sweep(tmp_path, "method.merge_every_steps=3", space=space, population={}, seeds=[1])

    def play(searcher: _Generations) -> list[list[tuple[int, int]]]:
        """By generation: the points that are trained, and to which rung."""
        generations: list[list[tuple[int, int]]] = [[]]
        for turn in range(100):
            asked = searcher.suggest(str(turn))
            if asked == "FINISHED":
                return generations
            number, until = asked["number"], asked["until"]
            if generations[-1] and generations[-1][0][1] != until:
                generations.append([])
            generations[-1].append((number, until))
            record = read_point(folder, number)
            if (step := dict(spec.stops)[until]) not in record.losses:
                record.losses[step] = {1: 1.0 + number / 10}
                put_point(folder, record)
            searcher.on_trial_complete(str(turn))
        raise AssertionError("it never ends")

    first = play(_Generations(spec, folder, {}, began=0.0))
    assert [[number for number, _ in generation] for generation in first] == [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, 2, 11]]
    assert read_point(folder, 3).state == read_point(folder, 7).state == "replaced"
    child = read_point(folder, 7)
    assert (child.parent, child.forked_at) == (0, 6)
    assert pinned_steps(folder.child("0000-seed1")) == {6, 9}
    waiting = _Generations(spec, folder, {p.number: p for p in read_points(folder)}, began=0.0)
    assert [waiting.suggest(str(n))["number"] for n in range(4)] == [0, 1, 2, 3]
    assert waiting.suggest("4") is None, "they are under way"
    known = {p.number: p for p in read_points(folder)}
    assert play(_Generations(spec, folder, known, began=0.0)) == first


def test_folder_belongs_to_one_sweep(data: Path, tmp_path: Path) -> None:
    folder = Storage(f"{tmp_path}/tiny")
    spec = sweep(tmp_path, f"data.path={data}")
    first = spec.config(0, spec.points[0], 1)
    began = _claim(folder, spec, first)
    slower = sweep(tmp_path, f"data.path={data}", "train.log_every_steps=3", "cluster.workers=2", concurrent=2)
    assert _claim(folder, slower, slower.config(0, slower.points[0], 1)) == began
    other = sweep(tmp_path, f"data.path={data}", seeds=[2])
    with pytest.raises(ConfigError, match=r"holds another sweep than this config: sweep.yaml there says which"):
        _claim(folder, other, other.config(0, other.points[0], 2))
    assert list_manifests(folder) == []
