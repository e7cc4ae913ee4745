"""TensorBoard, Weights & Biases and MLflow, as sinks of records: see sinks.py. Each is imported when it is opened.

A run that goes on continues its curve. Steps that are done again, as an attempt began at an earlier checkpoint, count
anew. TensorBoard forgets what it had from there on (purge_step). The other two cannot forget: there the later entry of
a step is the one that counts, and W&B's rows name their attempt.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import math
import netrc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from relora_ray.config import flatten
from relora_ray.config.tracking import MlflowConfig, TensorboardConfig, TrackingConfig, WandbConfig
from relora_ray.errors import ConfigError
from relora_ray.runs.metrics import Record, series
from relora_ray.runs.sinks import About, Opener, Sink

PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""By tracker, which is the extra's name too, what must be installed."""
SHOWN = ("train", "eval", "boundary", "checkpoint", "attempt", "restart", "end")
"""Kinds of records whose numbers are shown."""
NOT_SHOWN = ("step", "from_step", "digest", "unix_time", "left_s")
ID_TAG = "relora_ray.id"
MLFLOW_AT_ONCE = 1000
"""Metrics in a request; params may be 100."""
FINISH_S = 20.0
"""W&B may take so long at the end to bring up what is left."""


def trackers(cfg: TrackingConfig) -> list[Opener]:
    made: dict[str, Callable[[Any, About], Sink]] = {"tensorboard": Tensorboard, "wandb": Wandb, "mlflow": Mlflow}
    return [Opener(name, _opener(made[name], options), patient=True) for name, options in _wanted(cfg)]


def check_trackers(cfg: TrackingConfig) -> None:
    """ConfigError if one cannot be used here."""
    for name, _ in _wanted(cfg):
        missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"tracking.{name} needs {' and '.join(missing)}, which this Python does not have: "
                f"pip install 'relora-ray[{name}]', or leave it out of tracking."
            )
    if cfg.wandb is not None and not cfg.wandb.offline and os.environ.get("WANDB_MODE", "online") == "online":
        _check_wandb_key()


def scalars(record: Record) -> dict[str, float]:
    """`{"kind": "train", "step": 3, "loss": 2.5}` -> `{"train/loss": 2.5}`; of the set `books` of data.validation
    `eval/books/loss`. What is no finite number is left out."""
    if record["kind"] not in SHOWN:
        return {}
    return {
        f"{series(record)}/{name.replace('.', '/')}": float(value)
        for name, value in flatten(record).items()
        if isinstance(value, int | float) and name not in NOT_SHOWN and math.isfinite(value)
    }


def step_of(record: Record) -> int | None:
    """To which its numbers belong; None: to none."""
    step = record.get("from_step" if record["kind"] == "restart" else "step")
    return step if isinstance(step, int) else None


class Tensorboard:
    """Each attempt has an event file, which says from which step on it takes the place of those before."""

    def __init__(self, cfg: TensorboardConfig, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._new, self._folder, self._about = SummaryWriter, f"{cfg.folder}/{about.name}", about
        self._writer: Any = None
        self._held: list[tuple[int, dict[str, float]]] = []
        """Of an attempt of which it is not known yet with which step it begins."""

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["kind"] == "attempt":
                self._close()
            elif record["kind"] in ("train", "eval", "end") and self._writer is None:
                self._open(None if record["kind"] == "end" else record["step"])
            if (step := step_of(record)) is not None:
                self._held.append((step, scalars(record)))
            if self._writer is not None:
                self._write()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._close()

    def _open(self, first_step: int | None) -> None:
        self._writer = self._new(self._folder, purge_step=first_step)
        if first_step == 0:
            self._writer.add_text("config", f"```\n{yaml.safe_dump(dict(self._about.config), sort_keys=False)}```", 0)

    def _write(self) -> None:
        for step, numbers in self._held:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        self._held = []

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class Wandb:
    """One row a record, over an axis `step`: W&B's own counter only rises, and a step may be done again."""

    def __init__(self, cfg: WandbConfig, about: About) -> None:
        import wandb

        wandb.setup().ensure_service()
        atexit.register(self._end_service)  # before W&B's own, as it comes later
        self._done = False
        os.makedirs(cfg.folder, exist_ok=True)
        offline = cfg.offline or os.environ.get("WANDB_MODE") == "offline"
        self._run = wandb.init(
            project=cfg.project,
            entity=cfg.entity or None,
            id=about.id,
            name=about.name,
            dir=cfg.folder,
            config=dict(about.config),
            resume=None if offline else "allow",
            mode="offline" if offline else None,
            reinit="create_new",
            # Only what is told here: no console, code, environment or figures of this machine.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
                disable_job_creation=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
                finish_timeout=FINISH_S,
            ),
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._attempt, self._finished = "", False

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["kind"] == "attempt":
                self._attempt, self._finished = record["attempt"], False
            self._finished = self._finished or record["kind"] == "end"
            if (step := step_of(record)) is not None and (numbers := scalars(record)):
                self._run.log({"step": step, "attempt": self._attempt, **numbers})

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._finished else 1)
        self._done = True

    def _end_service(self) -> None:
        """What W&B could not bring up in its time is in its folder, for `wandb sync`. At the end of the process it
        would wait for its service, which tries on for as long as no server answers."""
        if not self._done:
            for pid in _children("wandb-core"):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


class Mlflow:
    """The run is found by a tag, as ids are the server's to give. Of several entries of a step the latest counts."""

    def __init__(self, cfg: MlflowConfig, about: About) -> None:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # a new database tells of its tables
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=cfg.uri or None)
        experiment = self._client.get_experiment_by_name(cfg.experiment)
        number = self._client.create_experiment(cfg.experiment) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([number], f"tags.`{ID_TAG}` = '{about.id}'", max_results=1)
        self._id = known[0].info.run_id if known else self._create(number, about)
        self._client.update_run(self._id, status="RUNNING")
        self._finished = False
        self._batch: Sequence[Record] = ()
        self._num_sent = 0
        """Of its numbers: a batch of which a part has failed comes again."""

    def _create(self, experiment: str, about: About) -> str:
        from mlflow.entities import Param

        tags = {ID_TAG: about.id, "relora_ray.url": about.url}
        run = self._client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in about.config.items()]
        for some in _in_parts(params, 100):
            self._client.log_batch(run, params=some)
        return str(run)

    def add(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now_ms, metrics = int(time.time() * 1000), []
        for record in records:
            self._finished = record["kind"] == "end" or (self._finished and record["kind"] != "attempt")
            if (step := step_of(record)) is not None:
                metrics += [Metric(name, value, now_ms, step) for name, value in scalars(record).items()]
        if records is not self._batch:
            self._batch, self._num_sent = records, 0
        for some in _in_parts(metrics[self._num_sent :], MLFLOW_AT_ONCE):
            self._client.log_batch(self._id, metrics=some)
            self._num_sent += len(some)

    def close(self) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if self._finished else "KILLED")


def _wanted(cfg: TrackingConfig) -> list[tuple[str, Any]]:
    return [(name, options) for name in PACKAGES if (options := getattr(cfg, name)) is not None]


def _opener(tracker: Callable[[Any, About], Sink], options: Any) -> Callable[[About], Sink]:
    return lambda about: tracker(options, about)


def _in_parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _children(command: str) -> list[int]:
    """Processes that this one has started, where /proc says it, by the name of their command."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids = path.read_text().split()
            found += [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == command]
    return found


def _check_wandb_key() -> None:
    """ConfigError if nobody is logged in: W&B would ask on the console. No server is asked: that may be out of reach
    for the moment, and a key that is wrong is told when the run is opened there."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    import wandb

    settings = wandb.setup().settings
    if not settings.api_key and not _is_in_netrc(settings.base_url):
        raise ConfigError(
            "tracking.wandb: nobody is logged in to Weights & Biases here. Set WANDB_API_KEY or call `wandb login`, or "
            "write to a folder only, with tracking.wandb.offline=true."
        )


def _is_in_netrc(url: str) -> bool:
    """Whether `wandb login` has left a key for this server, or for W&B's own, which has two names."""
    given = os.environ.get("NETRC")
    files = [Path(given)] if given else [Path.home() / name for name in (".netrc", "_netrc")]
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        hosts = {host for file in files if file.exists() for host in netrc.netrc(file).hosts}
        return bool(hosts & {str(urlsplit(url).hostname), "api.wandb.ai"})
    return False
