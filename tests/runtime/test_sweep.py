"""Sweeps on a real Ray: a killed one goes on; and ASHA's decisions, on Ray's own scheduler without a cluster."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler

from relora_ray.checkpoint import list_manifests, read_manifest
from relora_ray.checkpoint.history import read_pins
from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError, DivergedError, RunBusyError, RunFailedError, StorageError
from relora_ray.runs.metrics import read_all
from relora_ray.runtime import sweep as module
from relora_ray.runtime.sweep import (
    _claim,
    _Generations,
    _Halving,
    _listening,
    _Points,
    _refuse_impossible_forks,
    _Trainer,
    _tune,
    check_sweep,
)
from relora_ray.storage import Storage
from relora_ray.sweep.results import Point, put_point, read_point, read_points
from relora_ray.sweep.space import Sweep, load_sweep
from tests.sweep.test_results import point
from tests.sweep.test_results import point as made_up
from tests.sweep.test_space import sweep
from tests.tiny import TINY, run, tiny_config

ROOT = Path(__file__).parent.parent.parent
RANKS = {"method.lora_rank": [2, 8]}
Play = Callable[[Sweep], list[Point]]


def test_killed_sweep_goes_on_and_comes_to_the_same(data: Path, tmp_path: Path) -> None:
    """SIGTERM of the driver in the second point. Its state is stored, what was trained is not trained again, and the
    losses are those of runs that trained their warm start themselves and were left alone."""
    space = {"method.lora_rank": [2, 8]}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"steps": 603, "sweep": {"space": space}}))
    length = ("steps=603", "method.merge_every_steps=200", "train.log_every_steps=1", "checkpoint.save_every_steps=20")
    command = [
        sys.executable, "-m", "relora_ray.launch", str(path), f"storage={tmp_path}", f"data.path={data}", *length,
    ]  # fmt: skip

    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert first.stdout is not None
    said = ""
    for line in first.stdout:
        said += line
        if line.startswith("  0001-seed1 | step  60/"):
            break
    else:
        raise AssertionError(said[-3000:])
    first.terminate()
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 143, said[-3000:]  # and nothing holds its output open: `communicate` has returned
    assert "told to stop by SIGTERM: 0001-seed1 is stored after step " in said, said[-3000:]
    assert "what it has trained since" not in said
    folder = Storage(f"{tmp_path}/tiny")
    assert [p.state for p in read_points(folder)] == ["done", "begun"]
    before = folder.child("0000-seed1").list("metrics")
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-3000:]
    assert folder.child("0000-seed1").list("metrics") == before, "it was done"
    assert [a["step"] for a in read_all(folder.child("warm-" + warm(folder)), "attempt")] == [0], "trained once"
    begun = [a["step"] for a in read_all(folder.child("0001-seed1"), "attempt")]
    assert begun[0] == 3 < begun[1] < 603, "it went on where the one before had stored"
    points = read_points(folder)
    assert [p.state for p in points] == ["done", "done"]
    for number, rank in enumerate(space["method.lora_rank"]):
        _, records = run(
            tiny_config(data, tmp_path / "alone", *length, f"method.lora_rank={rank}", "seed=1", f"name=r{rank}")
        )
        expected = {r["step"]: r["loss"] for r in records if r["kind"] == "eval"}
        assert points[number].losses == {603: {1: expected[603]}}
        base = read_manifest(folder.child(f"000{number}-seed1"), 3).base
        assert base is not None
        assert base.run.startswith("warm-")
    assert "2 points (2 done)" in second.stdout
    assert "0.2% saved" in second.stdout, second.stdout[-2000:]
    with pytest.raises(ConfigError, match="holds a run of another config"):
        check_sweep(load_sweep(str(path), [*command[4:], "optimizer.learning_rate=1"]))


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
            self._scheduler.on_trial_add(None, self._trials[number])
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


def test_who_went_on_before_goes_on_though_it_would_be_behind_now(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path))
    tuned = Tuned(folder, {})
    assert tuned.report(0, 1, 3.0), "the first to come"
    assert tuned.report(1, 1, 1.0)
    known = {p.number: p for p in read_points(folder)}
    assert known[0].passed == 15
    again = Tuned(folder, known)
    assert again.report(1, 1, 1.0)
    assert again.report(0, 1, 3.0)
    assert read_point(folder, 0).state == "begun"


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


def test_population_goes_from_rung_to_rung(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All come to a rung before anybody is replaced; after a restart the decision stands. Real runs and forks, whose
    losses are made up; a run keeps one checkpoint, so that what was forked is gone when it is decided again."""
    monkeypatch.setattr(module.driver, "run", lambda cfg, **_: run(cfg))
    folder = Storage(f"{tmp_path}/tiny")
    space = {"method.lora_rank": [2, 4, 8, 16]}
    overrides = (f"storage={tmp_path}", f"data.path={data}", "method.merge_every_steps=3", "checkpoint.keep_last=1")
    spec = sweep(tmp_path, *overrides, space=space, population={}, seeds=[1])
    trainer = _Trainer(spec, set(), Silent())

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
            if (step := dict(spec.stops)[until]) not in read_point(folder, number).losses:
                assert [rung for rung, _ in trainer.train(number, until)][-1] == until
                record = read_point(folder, number)
                record.losses[step] = {1: 1.0 + number / 10}
                put_point(folder, record)
            searcher.on_trial_complete(str(turn))
        raise AssertionError("it never ends")

    first = play(_Generations(spec, folder, {}, began=0.0))
    assert [[number for number, _ in generation] for generation in first] == [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, 2, 11]]
    assert read_point(folder, 3).state == read_point(folder, 7).state == "replaced"
    child = read_point(folder, 7)
    assert (child.parent, child.forked_at) == (0, 6)
    pinned = {name for pin in read_pins(folder.child("0000-seed1")).values() for name in pin.folders}
    assert {int(name.split("-")[1]) for name in pinned if name.startswith("base/")} == {6, 9}
    # Killed when only the decision was stored; what is known of its members has changed since.
    folder.delete("points/0007.json")
    put_point(folder, dataclasses.replace(read_point(folder, 3), state="begun"))
    put_point(folder, dataclasses.replace(read_point(folder, 0), losses={6: {1: 9.0}, 9: {1: 1.0}, 12: {1: 1.0}}))
    spent_budget = dataclasses.replace(spec, spec=spec.spec.model_copy(update={"max_tokens": 1}))
    known = {p.number: p for p in read_points(folder)}
    assert play(_Generations(spent_budget, folder, known, began=0.0)) == first, "it was decided before"
    child = read_point(folder, 7)
    assert (child.parent, child.forked_at) == (0, 6)
    assert read_point(folder, 3).state == "replaced"
    waiting = _Generations(spec, folder, {p.number: p for p in read_points(folder)}, began=0.0)
    assert [waiting.suggest(str(n))["number"] for n in range(4)] == [0, 1, 2, 3]
    assert waiting.suggest("4") is None, "they are under way"
    known = {p.number: p for p in read_points(folder)}
    assert play(_Generations(spec, folder, known, began=0.0)) == first


def test_folder_belongs_to_one_sweep(data: Path, tmp_path: Path) -> None:
    folder = Storage(f"{tmp_path}/tiny")
    spec = sweep(tmp_path, f"data.path={data}")
    began = _claim(folder, spec)
    slower = sweep(tmp_path, f"data.path={data}", "train.log_every_steps=3", "cluster.workers=2", concurrent=2)
    assert _claim(folder, slower) == began
    turned = {"method.merge_every_steps": [3, 9], "method.lora_rank": [2, 8]}  # its points have other numbers
    for other in (
        sweep(tmp_path, f"data.path={data}", seeds=[2]),
        sweep(tmp_path, f"data.path={data}", space=turned),
        sweep(tmp_path, f"data.path={data}", "train.eval_rows=4"),
        sweep(tmp_path, f"data.path={data}", "optimizer.learning_rate=1"),
    ):
        with pytest.raises(ConfigError, match=r"holds another sweep than this config: sweep.yaml there says which"):
            _claim(folder, other)
    assert list_manifests(folder) == []


def test_population_belongs_to_its_size(data: Path, tmp_path: Path) -> None:
    """Points are numbered by it; of another search `trials` may grow."""

    def made(trials: int, **spec: object) -> Sweep:
        space = {"method.lora_rank": [2, 4, 8, 16]}
        overrides = (f"data.path={data}", "method.merge_every_steps=3")
        return sweep(tmp_path, *overrides, space=space, search="random", trials=trials, **spec)

    plain, population = Storage(f"{tmp_path}/plain"), Storage(f"{tmp_path}/population")
    assert _claim(plain, made(2)) == _claim(plain, made(3))
    _claim(population, made(2, population={}))
    with pytest.raises(ConfigError, match="holds another sweep"):
        _claim(population, made(3, population={}))


def test_fork_where_there_is_no_boundary_is_refused_first(data: Path, tmp_path: Path) -> None:
    """The published code merges an update after the cycle's end."""
    method = {
        "compat": "reference", "reset": {"kind": "zero", "adam_step": "keep"}, "merge_every_steps": 3
    }  # fmt: skip
    spec = sweep(tmp_path, f"data.path={data}", f"storage={tmp_path}", "method.merge_every_steps=3",
                 space={"method.lora_rank": [2, 8]}, population={})  # fmt: skip
    _refuse_impossible_forks(spec)
    changed = {"method": spec.base["method"] | method, "optimizer": {"learning_rate": 0.01}}
    late = dataclasses.replace(spec, base=spec.base | changed)
    with pytest.raises(ConfigError, match=r"compares points after 6 updates, and lora_rank=2 has no boundary"):
        _refuse_impossible_forks(late)


def test_population_over_what_no_fork_may_change_is_refused_first(data: Path, tmp_path: Path) -> None:
    space = {"method.lora_rank": [2, 8], "method.frozen_weights": ["fp32", "bf16"], "train.micro_batch_rows": [1, 2]}
    spec = sweep(
        tmp_path, f"data.path={data}", f"storage={tmp_path}", "method.merge_every_steps=3", space=space, population={}
    )
    with pytest.raises(ConfigError, match=r"no fork may change method\.frozen_weights\. Remove"):
        check_sweep(spec)
    assert not (tmp_path / "tiny").exists()


class Silent:
    def put(self, _: object) -> None:
        pass


def test_record_answers_with_every_rungs_own_loss(tmp_path: Path) -> None:
    """What halving compares at a rung after a restart is what it compared there before."""
    spec = sweep(tmp_path, f"storage={tmp_path}", "method.merge_every_steps=3", halving={}, space=RANKS)
    folder = Storage(f"{tmp_path}/tiny")
    known = point(0, 1.0, step=6)
    known.losses |= {9: {1: 0.75}, 12: {1: 0.5}}
    put_point(folder, known)
    trainer = _Trainer(spec, set(), Silent())
    assert list(trainer.train(0, 3)) == [(1, known.loss_at(6)), (2, 0.75), (3, 0.5)]


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (DivergedError("it grows"), "diverged", "it grows"),
        (RunFailedError("rank 0: NonFiniteError: 3 updates in a row"), "diverged", "rank 0: NonFiniteError"),
        (OSError("no such host"), "failed", "OSError: no such host"),
    ],
)
def test_point_that_ends_is_recorded_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str, why: str
) -> None:
    def fail(*_: object) -> float:
        raise error

    monkeypatch.setattr(_Trainer, "_train_run", fail)
    spec = sweep(tmp_path, f"storage={tmp_path}")
    folder = Storage(f"{tmp_path}/tiny")
    put_point(folder, Point(0, spec.points[0]))
    assert list(_Trainer(spec, set(), Silent()).train(0, 1)) == []
    found = read_point(folder, 0)
    assert found.state == state
    assert found.why.startswith(why)


def test_loss_that_is_not_finite_is_divergence(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that another process still trains is waited for."""
    tries = []

    def train(cfg: RunConfig, **_: object) -> None:
        tries.append(cfg.name)
        if len(tries) == 1:
            raise RunBusyError("another driver trains it")
        run(cfg)

    monkeypatch.setattr(module.driver, "run", train)
    monkeypatch.setattr(module, "BUSY_S", 0.0)
    spec = sweep(tmp_path, f"storage={tmp_path}", f"data.path={data}", seeds=[1])
    folder = Storage(f"{tmp_path}/tiny")
    for number in (0, 1):
        put_point(folder, Point(number, spec.points[number]))
    trainer = _Trainer(spec, set(), Silent())
    assert [rung for rung, _ in trainer.train(0, 1)] == [1]
    assert tries == ["0000-seed1"] * 2
    monkeypatch.setattr(module, "held_out_loss", lambda *_: None)
    assert list(trainer.train(1, 1)) == []
    assert read_point(folder, 1).state == "diverged"


class Formula(_Trainer):
    """Comes to losses without training: the best rank is 8, and longer is better."""

    def _train_run(self, point: Point, seed: int, step: int) -> float:
        point.runs[seed] = made_up(0, 0.0).runs[1]
        return abs(float(point.settings["method.lora_rank"]) - 8) + 10 / step


@pytest.fixture(scope="module")
def tune_alone() -> Iterator[Play]:
    """Plays sweeps on a real Ray and its real Tune, with made-up losses."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

    def play(spec: Sweep) -> list[Point]:
        folder = Storage(f"{spec.storage}")
        known = {p.number: p for p in read_points(folder)}
        with _listening(lambda *_: None) as queue:
            _tune(spec, folder, known, time.time(), Formula(spec, set(), queue))
        return read_points(folder)

    yield play
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_halving_on_rays_tune(tune_alone: Play, tmp_path: Path) -> None:
    spec = sweep(tmp_path, f"storage={tmp_path}", "method.merge_every_steps=3", halving={}, seeds=[1],
                 space={"method.lora_rank": [8, 2, 32, 16, 7, 4]})  # fmt: skip
    found = tune_alone(spec)
    # Ranks 2, 32 and 16 are worse than half of those before them; 7 and 4 are so at the next rung, where only 8 was.
    assert [p.state for p in found] == ["done", "halved", "halved", "halved", "halved", "halved"]
    assert [p.last_rung for p in found] == [12, 6, 6, 6, 9, 9]
    assert tune_alone(spec) == found, "nothing is tried again, and nobody is judged otherwise"


def test_population_on_rays_tune(tune_alone: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pin", lambda *_: None)  # there are no runs
    spec = sweep(tmp_path, f"storage={tmp_path}", "method.merge_every_steps=3", population={}, seeds=[1],
                 space={"method.lora_rank": [2, 4, 16, 32]})  # fmt: skip
    found = tune_alone(spec)
    assert [p.number for p in found] == [0, 1, 2, 3, 7, 11]
    assert found[3].state == "replaced"
    assert found[4].parent == 1, "rank 4 is the nearest to 8"
    assert tune_alone(spec) == found


def test_tpe_on_rays_tune(tune_alone: Play, tmp_path: Path) -> None:
    spec = sweep(tmp_path, f"storage={tmp_path}", seeds=[1], space={"method.lora_rank": [2, 4, 8, 16, 32]},
                 search="tpe", trials=4)  # fmt: skip
    assert [p.state for p in tune_alone(spec)] == ["done"] * 4
    more = dataclasses.replace(spec, spec=spec.spec.model_copy(update={"trials": 60}))
    assert sorted(p.settings["method.lora_rank"] for p in tune_alone(more)) == [2, 4, 8, 16, 32], "there are no more"


def test_record_that_cannot_be_stored_ends_the_sweep_with_its_reason(
    tune_alone: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Storage, record: Point) -> None:
        if record.passed:
            raise StorageError("the disk is full.")
        put_point(folder, record)

    monkeypatch.setattr(module, "put_point", fail)
    spec = sweep(tmp_path, f"storage={tmp_path}", "method.merge_every_steps=3", halving={}, seeds=[1], space=RANKS)
    with pytest.raises(RunFailedError, match=r"the disk is full\. Run the same command again"):
        tune_alone(spec)
