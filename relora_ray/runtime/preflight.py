"""Everything about a run that can be refused before anything is spent, and before there is a Ray.

What a model has to do with it needs torch and transformers, whose import takes seconds. A driver has it done by a
process that is forked where they are imported (server.py), and imports Ray meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

import ray

from relora_ray.checkpoint import list_manifests
from relora_ray.config import RunConfig, split_step
from relora_ray.config.file import parse_config, to_yaml
from relora_ray.config.section import Mapping_
from relora_ray.errors import ConfigError
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run, find_architecture
from relora_ray.runs.trackers import check_trackers
from relora_ray.runtime import apart
from relora_ray.runtime.address import cluster_address


def preflight(cfg: RunConfig) -> RunConfig:
    """Check all that can be checked without Ray; returns the config as it will run. Writes nothing. Raises ReloraError.

    Local paths become absolute, because workers run in folders of their own.
    """
    return _check(as_here(cfg))


def preflight_apart(cfg: RunConfig, at: str) -> RunConfig:
    """`preflight`, of which a process of its own does what needs torch. `at`: the address of a server for that, or
    ""."""
    return _ask(as_here(cfg), at)


def begin_preflight(cfg: RunConfig, at: str) -> Future[RunConfig]:
    """The same, while this process goes on. `at`: the address of a server for the other. ConfigError at once for what
    this one can see."""
    cfg, answered = as_here(cfg), Future[RunConfig]()

    def ask() -> None:
        try:
            answered.set_result(_ask(cfg, at))
        except BaseException as error:
            answered.set_exception(error)

    threading.Thread(target=ask, name="relora-ray-preflight", daemon=True).start()  # Ctrl-C does not wait for it
    return answered


def _ask(cfg: RunConfig, at: str) -> RunConfig:
    return parse_config(apart.call(f"{__name__}:checked", to_yaml(cfg), at=at, what="the config could not be checked"))


def checked(config: str) -> str:
    """The config as it will run; both are YAML. Raises ReloraError."""
    return to_yaml(_check(parse_config(config)))


def as_here(cfg: RunConfig) -> RunConfig:
    """With places as they are from anywhere on this machine. ConfigError for those that would go away."""
    _refuse_passing_folders(cfg)
    if not ray.is_initialized():
        cluster_address()
    check_trackers(cfg.tracking)
    return _with_absolute_paths(cfg)


def _refuse_passing_folders(cfg: RunConfig) -> None:
    """ConfigError if a Ray job would store something in its working directory."""
    if not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return
    kinds = {"tensorboard": cfg.tracking.tensorboard, "wandb": cfg.tracking.wandb}
    tracking = {f"tracking.{name}.folder": kind.folder for name, kind in kinds.items() if kind is not None}
    for key, folder in {"storage": cfg.storage, **tracking}.items():
        if "://" not in folder and not os.path.isabs(folder):
            raise ConfigError(
                f"{key}={folder!r} is relative, and a Ray job's working directory is a copy that goes away. Give an "
                f"absolute path{' that all machines share, or a URL' if key == 'storage' else ''}."
            )


def _check(cfg: RunConfig) -> RunConfig:
    for _, check in CHECKS:
        cfg = check(cfg)
    return cfg


def _check_method(cfg: RunConfig) -> RunConfig:
    from relora_ray.methods.base import build_method

    build_method(cfg)
    return cfg


def _check_data(cfg: RunConfig) -> RunConfig:
    from relora_ray.modeling.parallel import World
    from relora_ray.runs.batches import open_batches

    open_batches(cfg, World())
    return cfg


def _check_export(cfg: RunConfig) -> RunConfig:
    from relora_ray.runs.run import check_export

    if cfg.method.exports:
        check_export(cfg)
    return cfg


def _check_init_from(cfg: RunConfig) -> RunConfig:
    from relora_ray.runs.run import bare_model, check_init_from

    if cfg.model.init_from and not list_manifests(run_storage(cfg)):  # else it is not read again
        check_init_from(cfg, bare_model(cfg, device="meta"))
    return cfg


def _check_model(cfg: RunConfig) -> RunConfig:
    from relora_ray.methods.base import build_method
    from relora_ray.runs.run import bare_model, check_embedding
    from relora_ray.runs.trial import try_architecture

    if cfg.model.llama is None:  # LLaMA is known; others are tried out small, and wrapped at their size
        shell = bare_model(cfg, device="meta")
        try_architecture(cfg, find_architecture(cfg))
        check_embedding(cfg, shell)
        build_method(cfg).adapt(shell, cfg.steps)
    return cfg


CHECKS: tuple[tuple[str, Callable[[RunConfig], RunConfig]], ...] = (
    ("config", _check_method),
    ("data", _check_data),
    ("storage", check_run),
    ("model", _check_export),
    ("model", _check_init_from),
    ("model", _check_model),
)
"""In order, each with what it is about. A dry run goes on after one that fails."""


def _with_absolute_paths(cfg: RunConfig) -> RunConfig:
    def absolute(path: str) -> str:
        return path if "://" in path else os.path.abspath(path)

    tracking = cfg.tracking.model_copy(
        update={
            name: kind.model_copy(update={"folder": absolute(kind.folder)})
            for name in ("tensorboard", "wandb")
            if (kind := getattr(cfg.tracking, name)) is not None
        }
    )
    model = cfg.model.model_copy(
        update={
            name: os.path.abspath(value)
            for name in ("huggingface", "init_from")
            if (value := os.path.expanduser(getattr(cfg.model, name)))
            and "://" not in value
            and (os.path.exists(value) or (name == "init_from" and os.path.exists(split_step(value)[0])))
        }
    )
    return cfg.model_copy(
        update={
            "storage": absolute(cfg.storage),
            "model": model,
            "tracking": tracking,
            "data": cfg.data.model_copy(
                update={
                    "path": absolute(cfg.data.path),
                    "validation": Mapping_({name: absolute(path) for name, path in cfg.data.validation.items()}),
                }
            ),
        }
    )
