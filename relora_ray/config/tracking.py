"""Where the curves of a run also go: the section `tracking`. What is told there is in runs/trackers.py.

tracking: [tensorboard, wandb]
tracking: {tensorboard: {folder: /data/boards}, mlflow: {uri: "http://mlflow:5000"}}
"""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from relora_ray.config.section import Location, Section, nearest, rule
from relora_ray.location import secret_in_url


class TensorboardConfig(Section):
    folder: Location = "tensorboard"
    """A folder on the driver's machine. Event files go to a folder of the run's name in it."""

    @field_validator("folder")
    @classmethod
    def _check(cls, value: str) -> str:
        return _local(value)


class WandbConfig(Section):
    project: str = "relora_ray"
    """The project that runs are put in."""
    entity: str = ""
    """A team or user at Weights & Biases; empty: the key's own."""
    folder: Location = "."
    """A folder on the driver's machine, in which W&B makes its folder `wandb`."""
    offline: bool = False
    """Only write to the folder; `wandb sync` brings it up later. WANDB_MODE=offline says the same."""

    @field_validator("folder")
    @classmethod
    def _check(cls, value: str) -> str:
        return _local(value)


class MlflowConfig(Section):
    uri: str = ""
    """A server, or a database such as sqlite:////data/mlflow.db. Empty: MLFLOW_TRACKING_URI, or else mlflow.db in the
    current folder. Names and passwords are MLflow's own variables, such as MLFLOW_TRACKING_TOKEN."""
    experiment: str = "relora_ray"
    """The experiment that runs are put in."""

    @field_validator("uri")
    @classmethod
    def _check(cls, value: str) -> str:
        if problem := secret_in_url(value):
            raise rule(problem)
        if value and ("://" not in value or value.startswith("file://")) and not value.startswith("databricks"):
            raise rule(
                "is a folder, which MLflow does not write to any more. Give a server, or a database such as "
                "sqlite:////data/mlflow.db."
            )
        return value


class TrackingConfig(Section):
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_names(cls, raw: Any) -> Any:
        """A list of names, some of them with options, is a mapping; a name without options has the defaults."""
        if isinstance(raw, str):
            raw = [raw]
        if isinstance(raw, list):
            named: dict[Any, Any] = {}
            for item in raw:
                for name, options in (item if isinstance(item, dict) else {str(item): None}).items():
                    if name in named:
                        raise ValueError(f"tracking has {name!r} twice. Keep one.")
                    if name not in cls.model_fields:
                        known = list(cls.model_fields)
                        raise ValueError(
                            f"tracking has {name!r}, which is none of {', '.join(known)}.{nearest(str(name), known)}"
                        )
                    named[name] = options
            raw = named
        if isinstance(raw, dict):
            return {name: {} if options is None else options for name, options in raw.items()}
        return raw

    @model_serializer(mode="wrap")
    def _without_the_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what is asked for: null would ask for it when the config is read again."""
        return {name: options for name, options in handler(self).items() if options is not None}


def _local(folder: str) -> str:
    if "://" in folder:
        raise rule("is a URL: files there are appended to, which object stores cannot do. Give a folder.")
    return folder
