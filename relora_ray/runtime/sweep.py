"""Train a sweep's points: Ray Tune runs them, each is runs like any other, and their records are in storage.

Tune's own state is not kept. At every start Tune is asked anew, and a point that has a record answers from it: nothing
is trained twice, a run that was interrupted goes on from its newest checkpoint, and a decision once taken stands.

A point's trial is a process on the head's machine that takes no CPU of its own, so that it never holds what its workers
need; no more trials run at a time than the config says.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from relora_ray.checkpoint import list_manifests
from relora_ray.checkpoint.history import pin
from relora_ray.checkpoint.owner import owning
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import RunConfig
from relora_ray.config.file import to_yaml
from relora_ray.errors import (
    ConfigError,
    DamagedError,
    DivergedError,
    ReloraError,
    RunBusyError,
    RunFailedError,
    StoppedError,
)
from relora_ray.runs.forkable import fixed_keys, may_differ, warm_start_digest
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import begin, is_run, read_config
from relora_ray.runtime import apart, driver
from relora_ray.runtime.mailbox import Mailbox
from relora_ray.runtime.messages import waiting_event
from relora_ray.runtime.own_ray import OwnRay
from relora_ray.runtime.preflight import preflight_apart
from relora_ray.runtime.stopping import storing_at_a_signal
from relora_ray.runtime.under_way import UnderWay, telling
from relora_ray.storage import Storage
from relora_ray.sweep.dimension import Settings, is_rows
from relora_ray.sweep.population import replacements
from relora_ray.sweep.results import (
    Point,
    held_out_loss,
    measured,
    point_from_json,
    put_point,
    read_point,
    read_points,
    spent,
)
from relora_ray.sweep.space import WARM, Sweep, run_name, text
from relora_ray.sweep.tpe import import_optuna, suggest

logger = logging.getLogger(__name__)

SWEEP = "sweep.yaml"
GENERATIONS = "generations"
"""Folder of who was replaced in a population, one object per decision, so that none is taken by half."""
BUSY_S = 2.0
"""Between two looks at a warm start that another trial is training."""
WAIT_S = 0.5
"""How long a look for messages waits for one."""
HEAD = {"CPU": 0.0, "node:__internal_head__": 0.001}
"""What a trial takes itself: a place on the head's machine, which is no spot machine."""
HAND_ON = ("attempt", "train", "eval", "restart", "log")
"""Kinds of a run's events that the sweep's console shows."""

Told = Callable[[str, dict[str, Any]], None]
"""Called with a run's name and its event, or "" and a point's record."""


def check_sweep(sweep: Sweep, at: str = "") -> tuple[Sweep, Storage]:
    """See what can be seen without Ray, as `preflight` does for a run. Returns the sweep with absolute paths, as
    trials run in folders of their own, and its folder. Raises ReloraError. `at`: the address of a server that forks
    processes on this machine, or ""; see server.py."""
    if sweep.spec.search == "tpe":
        import_optuna()
    first, *_ = [_preflight(sweep, settings, at) for settings in _one_of_each(sweep)]
    model = {n: v for n in ("huggingface", "init_from") if (v := getattr(first.model, n))}
    base = sweep.base | {
        "storage": first.storage.rpartition("/")[0],
        "data": sweep.base["data"]
        | {"path": first.data.path, "fingerprint": first.data.fingerprint}
        | {
            name: dict(value)
            for name in ("validation", "validation_fingerprints")
            if (value := getattr(first.data, name))
        },
    }
    folder = sweep_storage(first)
    if not _has_rows_of_models(sweep):
        base["model"] = sweep.base["model"] | model
        if first.model.fingerprint and "model.huggingface" not in sweep.spec.space and not _goes_by_place(folder):
            base["model"] |= {"fingerprint": first.model.fingerprint}
    else:
        base |= _absolute_model(sweep.base)
    sweep = dataclasses.replace(sweep, base=base)
    _refuse_impossible_forks(sweep)
    if folder.exists(SWEEP):
        _refuse_another(folder, sweep)
    return sweep, folder


def _one_of_each(sweep: Sweep) -> list[Settings]:
    """One point of every combination of rows: they may have other models, and methods that other models suit."""
    found = {json.dumps({n: r.name for n, r in sweep.spec.rows(s).items()}): s for s in reversed(sweep.possible_points)}
    return list(reversed(found.values()))


def _has_rows_of_models(sweep: Sweep) -> bool:
    rows = (row for dimension in sweep.spec.space.values() if is_rows(dimension) for row in dimension)
    return any(key.startswith("model.") for row in rows for key in (*row.set, *row.space))


def _preflight(sweep: Sweep, settings: Settings, at: str) -> RunConfig:
    """Raises ReloraError, behind the names of the point's rows."""
    try:
        return preflight_apart(sweep.config(0, settings, sweep.spec.seeds[0]), at)
    except ReloraError as error:
        named = " with ".join(f"sweep.space.{name} row {row.name!r}" for name, row in sweep.spec.rows(settings).items())
        if not named or str(error).startswith("sweep.space."):
            raise
        raise type(error)(f"{named}: {error}") from error


def _absolute_model(base: dict[str, Any]) -> dict[str, Any]:
    """The model's places, which trials look for from folders of their own."""
    model = base.get("model")
    if not isinstance(model, dict):
        return {}
    places = {n: os.path.abspath(v) for n in ("huggingface", "init_from") if (v := model.get(n)) and os.path.exists(v)}
    return {"model": model | places}


def _goes_by_place(folder: Storage) -> bool:
    """Whether the sweep was begun by a version that knew an architecture by its place."""
    return folder.exists(SWEEP) and "model.huggingface" in yaml.safe_load(folder.get(SWEEP))["identity"]


def _refuse_impossible_forks(sweep: Sweep) -> None:
    if sweep.spec.population is None:
        return
    if fixed := fixed_keys(sweep.first_run, sweep.spec.space):
        raise ConfigError(
            f"sweep.population forks points with other settings, and no fork may change {', '.join(fixed)}. Remove "
            f"that from sweep.space, or sweep.population. A fork may change {', '.join(may_differ(sweep.first_run))}."
        )
    for number, settings in enumerate(sweep.possible_points):
        cfg = sweep.config(number, settings, sweep.spec.seeds[0])
        for _, step in sweep.stops[:-1]:
            if step not in cfg.method.boundaries(cfg.steps):
                raise ConfigError(
                    f"sweep.population compares points after {step} updates, and {text(settings)} has no boundary "
                    f"there, so that nothing can be forked. With method.compat=reference merges come an update later "
                    f"than cycles end: remove one of the two."
                )


def run_sweep(sweep: Sweep, *, on_event: Told, own_ray: OwnRay | None = None, server: str = "") -> list[Point]:
    """Train all points of a checked sweep that are not trained yet; all records, by number. Raises ReloraError.
    `own_ray` and `server` as for a run; see driver.py."""
    first = sweep.first_run
    folder = sweep_storage(first)
    driver.refuse_dead_cluster()
    on_event("", waiting_event("the sweep's folder, and Ray"))
    with _owning(folder), driver.connected(first.model_copy(update={"cluster": sweep.cluster}), own_ray):
        began = _claim(folder, sweep)
        points = {point.number: point for point in read_points(folder)}
        shared = _claim_warm_starts(sweep)
        on_event("", waiting_event("Ray Tune, and the first trial"))
        under_way = UnderWay(folder)

        def hear(run: str, event: dict[str, Any]) -> None:
            if not under_way.hear(run, event):
                on_event(run, event)

        with (
            _listening(hear) as queue,
            storing_at_a_signal(
                under_way.store, under_way.what_is_there, lambda event: on_event("", event), under_way.end
            ),
        ):
            _tune(sweep, folder, points, began, _Trainer(sweep, shared, queue, server))
    return read_points(folder)


@contextmanager
def _owning(folder: Storage) -> Iterator[None]:
    """Own the sweep; if another driver takes it over, this one ends as by Ctrl-C, with the reason."""
    with owning(folder) as hold:
        hold.when_lost(lambda reason: os.kill(os.getpid(), signal.SIGINT))
        try:
            yield
        except (KeyboardInterrupt, StoppedError):
            if not hold.lost:
                raise
            raise RunBusyError(hold.lost) from None


def sweep_storage(run: RunConfig) -> Storage:
    """The sweep's folder, from any of its runs' configs."""
    return Storage(run.storage, run.storage_options, retry_s=run.storage_retry_s)


_OPERATIONAL = ("trials", "concurrent", "max_tokens", "max_hours", "max_gpu_hours")
"""Settings that decide no result; of a population `trials` does, as its points are numbered by it."""


def _decisive(sweep: Sweep) -> dict[str, Any]:
    """All that decides a sweep's results."""
    first, spec = sweep.first_run, sweep.spec
    exclude = set(_OPERATIONAL) - ({"trials"} if spec.population else set())
    mine = {
        "sweep": spec.model_dump(mode="json", exclude=exclude),
        "stops": [step for _, step in sweep.stops],
        "eval_rows": first.train.eval_rows,
        "identity": {k: v for k, v in first.identity().items() if k not in spec.space},
    }
    return dict(json.loads(json.dumps(mine)))


def _claim(folder: Storage, sweep: Sweep) -> float:
    """Tie the folder to this sweep; when it first began, in Unix time. ConfigError if the folder is another's."""
    if not folder.exists(SWEEP):
        folder.put(SWEEP, yaml.safe_dump(_decisive(sweep) | {"began": time.time()}, sort_keys=False).encode())
    return _refuse_another(folder, sweep)


def _refuse_another(folder: Storage, sweep: Sweep) -> float:
    try:
        known = yaml.safe_load(folder.get(SWEEP))
        began = float(known.pop("began"))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder.url}/{SWEEP} does not say which sweep this is. Restore it.") from error
    # Points are numbered by the order of the space's keys: compared as text, in which order counts.
    if json.dumps(known) != json.dumps(_decisive(sweep)):
        raise ConfigError(
            f"{folder.url} holds another sweep than this config: {SWEEP} there says which. Only settings that decide "
            f"no result may change, and the order of sweep.space is none. Set another name to start a new sweep."
        )
    return began


def _claim_warm_starts(sweep: Sweep) -> set[str]:
    """Digests of the warm starts that several points share; each has its run's folder after this, so that trials that
    begin at the same time agree on its config."""
    if not sweep.spec.share_warm_start:
        return set()
    count: Counter[str] = Counter()
    claimed = set()
    for settings in sweep.possible_points:
        for seed in sweep.spec.seeds:
            cfg = sweep.config(0, settings, seed)
            digest = warm_start_digest(cfg)
            count[digest] += 1
            if digest and count[digest] == 2:
                warm = _warm_config(cfg, digest)
                if not list_manifests(run_storage(warm)):
                    begin(warm, claim(run_storage(warm)))
                claimed.add(digest)
    return claimed


def _warm_config(cfg: RunConfig, digest: str) -> RunConfig:
    """Of the run that trains the warm start of `cfg`, and ends there."""
    train = cfg.train.model_copy(update={"stop_after_steps": cfg.warm_start_steps})
    warm = cfg.model_copy(update={"name": f"{WARM}{digest}", "train": train})
    storage = run_storage(warm)
    if not is_run(storage):
        return warm
    known = read_config(storage)  # another point's: all that the warm start depends on is the same
    return known.model_copy(update={name: getattr(warm, name) for name in ("train", "cluster", "checkpoint", "data")})


class _Trainer:
    """What a trial's process does."""

    def __init__(self, sweep: Sweep, shared: set[str], queue: Mailbox, server: str = "") -> None:
        """`server`: the address of one on this machine that its runs' processes may be forked from, or ""."""
        self._sweep, self._shared, self._queue, self._server = sweep, shared, queue, server

    def train(self, number: int, until: int) -> Iterator[tuple[int, float]]:
        """Bring a point from rung to rung, up to rung number `until`: yields the rung's number and the loss there, when
        the record is stored. What it has come to before is given from the record."""
        sweep = self._sweep
        folder = sweep_storage(sweep.first_run)
        point = read_point(folder, number)
        if point.state == "failed":
            point.state, point.why = "begun", ""
        state = point.state
        for rung, step in sweep.stops:
            if step <= point.forked_at:
                continue
            if step in point.losses:
                yield rung, point.loss_at(step)
                continue
            if state in ("halved", "replaced", "diverged") or rung > until:
                return
            try:
                losses = {seed: self._train_run(point, seed, step) for seed in sweep.spec.seeds}
            except Exception as error:
                why = str(error) if isinstance(error, ReloraError) else f"{type(error).__name__}: {error}"
                diverged = isinstance(error, DivergedError) or "NonFiniteError" in why or "DivergedError" in why
                if not isinstance(error, ReloraError):
                    logger.exception("point %d", number)
                point.state, point.why = "diverged" if diverged else "failed", why
                self._record(folder, point)
                return
            point.losses[step] = losses
            point.state = "done" if step == sweep.stops[-1][1] else "begun"
            self._record(folder, point)
            yield rung, point.loss_at(step)

    def _train_run(self, point: Point, seed: int, step: int) -> float:
        """One run up to `step`; its held-out loss there."""
        cfg = self._sweep.config(point.number, point.settings, seed)
        digest = warm_start_digest(cfg)
        if point.parent is not None:
            self._fork(cfg, run_name(point.parent, seed), point.forked_at)
        elif digest in self._shared and not list_manifests(run_storage(cfg)):
            warm = _warm_config(cfg, digest)
            self._train_warm_start(warm, point)
            self._fork(cfg, warm.name, cfg.warm_start_steps)
        stop = None if step == cfg.steps else step
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"stop_after_steps": stop})})
        cfg = preflight_apart(cfg, self._server)
        self._say_begin(cfg, point)
        self._run(cfg, lambda storage: False)
        storage = run_storage(cfg)
        point.runs[seed] = measured(cfg, storage)
        loss = held_out_loss(storage, step)
        if loss is None:
            raise DivergedError(f"the held-out loss after {step} updates is not finite.")
        return loss

    def _train_warm_start(self, warm: RunConfig, point: Point) -> None:
        def is_done(storage: Storage) -> bool:
            return warm.warm_start_steps in list_manifests(storage)

        if not is_done(run_storage(warm)):
            self._say_begin(warm, point)
            self._run(preflight_apart(warm, self._server), is_done)

    def _fork(self, cfg: RunConfig, parent: str, step: int) -> None:
        apart.call(
            "relora_ray.runs.fork:fork_yaml", to_yaml(cfg), parent, step,
            at=self._server, what=f"{cfg.name} could not be forked from {parent}",
        )  # fmt: skip

    def _run(self, cfg: RunConfig, is_done: Callable[[Storage], bool]) -> None:
        """Train unless `is_done`, asked again while another process trains it: another trial, if it is a warm start, or
        what is left of a trial of a killed sweep."""
        while not is_done(run_storage(cfg)):
            try:
                with telling(self._queue, cfg.name) as tell:
                    driver.run(cfg, on_event=self._teller(cfg), server=self._server, on_coordinator=tell)
            except RunBusyError:
                time.sleep(BUSY_S)
            else:
                return

    def _say_begin(self, cfg: RunConfig, point: Point) -> None:
        event = {"kind": "begin", "number": point.number, "settings": point.settings, "seed": cfg.seed}
        self._queue.put((cfg.name, event))

    def _teller(self, cfg: RunConfig) -> driver.OnEvent:
        def tell(event: dict[str, Any]) -> None:
            due = event["kind"] != "train" or event["step"] % cfg.train.log_every_steps == 0
            if event["kind"] in HAND_ON and due:
                self._queue.put((cfg.name, event))

        return tell

    def _record(self, folder: Storage, point: Point) -> None:
        put_point(folder, point)
        self._queue.put(("", json.loads(point.to_json())))


def _trial(config: dict[str, Any], trainer: _Trainer) -> None:
    """The function that Tune runs in a process of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for rung, loss in trainer.train(config["number"], config["until"]):
        tune.report({"rung": rung, "loss": loss})


TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # or it prints a box about itself, whatever its verbosity
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Ctrl-C ends it as if all were well
}
"""Tune's environment; what is set already stays."""


def _tune(sweep: Sweep, folder: Storage, points: dict[int, Point], began: float, trainer: _Trainer) -> None:
    with tempfile.TemporaryDirectory(prefix="relora-ray-sweep-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, trainer=trainer), tune.PlacementGroupFactory([HEAD])),
            tune_config=tune.TuneConfig(
                search_alg=(_Generations if sweep.spec.population else _Points)(sweep, folder, points, began),
                scheduler=_scheduler(sweep, folder, points),
                num_samples=-1,
                max_concurrent_trials=sweep.spec.concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, failure_config=tune.FailureConfig(max_failures=3)
            ),
        )
        for name, value in TUNE.items():
            os.environ.setdefault(name, value)
        try:
            results = tuner.fit()
        except tune.TuneError as error:  # of what was raised beside it, such as a record that cannot be stored
            why = str(error).strip().splitlines()[-1]
            raise RunFailedError(f"Ray Tune gave up: {why} Run the same command again to continue.") from error
    for result in results:
        if result.error is not None and result.config is not None:  # its process was lost again and again
            point = read_point(folder, result.config["number"])
            point.state, point.why = "failed", f"its trial ended with an error of its own: {result.error}"
            put_point(folder, point)


class _Points(Searcher):
    """Tells Tune which point is next."""

    def __init__(self, sweep: Sweep, folder: Storage, points: dict[int, Point], began: float) -> None:
        super().__init__(metric="loss", mode="min")
        self._spec, self._folder, self._points, self._began = sweep.spec, folder, points, began
        self._listed, self._next, self._last = sweep.points, 0, len(sweep.rungs)

    def suggest(self, trial_id: str) -> Any:
        number, is_new = self._next, self._next not in self._points
        if number >= (self._spec.trials or len(self._listed)) or (is_new and self._is_spent()):
            return Searcher.FINISHED
        if is_new:
            chosen = self._listed[number] if self._listed else suggest(self._spec, number, read_points(self._folder))
            if chosen is None:
                return Searcher.FINISHED
            self._points[number] = Point(number, chosen)
            put_point(self._folder, self._points[number])  # a restart must not choose another
        self._next += 1
        return {"number": number, "settings": self._points[number].settings, "until": self._last}

    def _is_spent(self) -> bool:
        spec = self._spec
        if spec.max_hours and time.time() - self._began > spec.max_hours * 3600:
            return True
        tokens, gpu_s = spent(read_points(self._folder))
        return bool(spec.max_tokens and tokens >= spec.max_tokens) or bool(
            spec.max_gpu_hours and gpu_s >= spec.max_gpu_hours * 3600
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its records")


class _Generations(_Points):
    """Tells Tune which point of a population is next, and to which rung. Who is replaced is decided when all have come
    to a rung, from their records; a decision that is recorded stands."""

    def __init__(self, sweep: Sweep, folder: Storage, points: dict[int, Point], began: float) -> None:
        super().__init__(sweep, folder, points, began)
        self._seeds, self._stops = sweep.spec.seeds, sweep.stops
        self._members = list(range(len(self._listed)))
        self._generation, self._waiting, self._under_way = 0, list(self._members), set[str]()
        for number in self._members:
            self._add(Point(number, self._listed[number]))

    def _add(self, point: Point) -> None:
        if point.number not in self._points:
            self._points[point.number] = point
            put_point(self._folder, point)

    def suggest(self, trial_id: str) -> Any:
        if not self._waiting and not self._under_way:
            if self._generation == len(self._stops) - 1:
                return Searcher.FINISHED
            if not self._folder.exists(self._decision) and self._is_spent():
                return Searcher.FINISHED
            self._replace()
        if not self._waiting:
            return None  # until those that are under way have ended
        number = self._waiting.pop(0)
        self._under_way.add(trial_id)
        point = self._points[number]
        return {"number": number, "settings": point.settings, "until": self._stops[self._generation][0]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._under_way.discard(trial_id)

    @property
    def _decision(self) -> str:
        return f"{GENERATIONS}/{self._generation:04d}.json"

    def _replace(self) -> None:
        step = self._stops[self._generation][1]
        members = [read_point(self._folder, number) for number in self._members]
        if not self._folder.exists(self._decision):
            decided = replacements(self._spec, members, self._generation, step)
            self._folder.put(
                self._decision, json.dumps({n: child.to_json().decode() for n, child in decided.items()}).encode()
            )
        stored = json.loads(self._folder.get(self._decision))
        for position, child in ((int(n), point_from_json(record)) for n, record in stored.items()):
            assert child.parent is not None
            for seed in self._seeds:  # before the parent goes on, and prunes what is to be forked
                name = run_name(child.number, seed)
                if not list_manifests(self._folder.child(name)):  # once forked it has let go of the rest
                    pin(self._folder.child(run_name(child.parent, seed)), name, step)
            self._add(child)
            if members[position].state in ("begun", "failed"):
                members[position].state = "replaced"
                put_point(self._folder, members[position])
            self._members[position] = child.number
        self._generation, self._waiting = self._generation + 1, list(self._members)


def _scheduler(sweep: Sweep, folder: Storage, points: dict[int, Point]) -> TrialScheduler:
    halving = sweep.spec.halving
    if halving is None:
        return FIFOScheduler()
    return _Halving(
        dict(sweep.stops), folder, points, time_attr="rung", metric="loss", mode="min", max_t=len(sweep.rungs),
        grace_period=halving.first_rung, reduction_factor=halving.factor,
    )  # fmt: skip


class _Halving(AsyncHyperBandScheduler):
    """ASHA whose decisions are recorded, and stand when the sweep is started again."""

    def __init__(self, stops: dict[int, int], folder: Storage, points: dict[int, Point], **settings: Any) -> None:
        super().__init__(**settings)
        self._stops, self._folder, self._before = stops, folder, dict(points)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        number, step = trial.config["number"], self._stops[result["rung"]]
        before = self._before.get(number)
        if step == max(self._stops.values()) or (before is not None and before.last_rung > step):
            return TrialScheduler.CONTINUE  # it ends by itself, or has gone on before
        if before is not None and before.last_rung == step and before.state == "halved":
            return TrialScheduler.STOP
        if before is not None and before.passed >= step:
            return TrialScheduler.CONTINUE
        point = read_point(self._folder, number)
        if decision == TrialScheduler.STOP:
            point.state = "halved"
        else:
            point.passed = step
        put_point(self._folder, point)
        return decision


@contextmanager
def _listening(on_event: Told) -> Iterator[Mailbox]:
    """A mailbox whose messages are handed to `on_event`, in a thread, until the block ends."""
    mailbox, ended = Mailbox(), threading.Event()

    def listen() -> None:
        while True:
            last = ended.is_set()  # asked first: what was put before the end is taken still
            taken = mailbox.take(WAIT_S)
            for run, event in taken:
                on_event(run, event)
            if last and not taken:
                return

    thread = threading.Thread(target=listen, name="relora-ray-sweep-events", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        ended.set()
        thread.join()
        mailbox.close()
