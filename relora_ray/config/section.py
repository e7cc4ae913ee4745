"""What sections of a config are made of: their base class, types of fields, and how a broken rule is worded."""

from __future__ import annotations

import difflib
import json
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from relora_ray.config.planned import read_plan
from relora_ray.location import location_problem, secret_in_url, shown
from relora_ray.masking import LITERAL_OPTIONS, REFERENCE, must_be_reference


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def rule(text: str) -> PydanticCustomError:
    """A broken rule of one field; its key and value are put in front."""
    return PydanticCustomError("field_rule", "{text}", {"text": text})


def _location(value: str) -> str:
    """A folder or URL as it will be used: `~` expanded; one that is not plain (location.py), or unexpanded, refused."""
    if problem := location_problem(value):
        raise rule(problem)
    if "$" in value:
        raise rule("has a $: environment variables are not expanded here. Write the path out.")
    return os.path.expanduser(value)


Location = Annotated[str, AfterValidator(_location)]


class Mapping_(dict[str, Any]):
    """A config is frozen, and so may be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def _storage_options(value: dict[str, Any]) -> dict[str, Any]:
    """Options as given; what may be a secret among them must be the name of an environment variable."""
    for dotted, option in flatten(value).items():
        if isinstance(option, str) and REFERENCE.fullmatch(option):
            continue
        if must_be_reference(dotted, option):
            variable = re.sub(r"[^A-Z0-9_]", "_", dotted.rpartition(".")[2].upper())
            raise _secret_option(
                f"{dotted} must not be written out: the config is stored and shown, and this is no option that is "
                f"known to hold no secret.{nearest(dotted, sorted(LITERAL_OPTIONS), 0.8)} If it is what you mean, name "
                f"an environment variable that holds it, such as {dotted}: $STORAGE_{variable}."
            )
        if isinstance(option, str) and (problem := secret_in_url(option)):
            raise _secret_option(f"{dotted}={shown(option)} {problem}")
    return Mapping_(value)


def _secret_option(text: str) -> PydanticCustomError:
    """A broken rule of one option, complete but for the section in front: its value must not be shown."""
    return PydanticCustomError("secret_option", "{text}", {"text": text})


Options = Annotated[dict[str, Any], AfterValidator(_storage_options)]


def _plan(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return read_plan(value)
    except ValueError as error:
        raise rule(str(error)) from error


Planned = Annotated[Annotated[int, Field(gt=0)] | dict[int, int], BeforeValidator(_plan), AfterValidator(_plan)]
"""A number above 0, or a plan of them."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nearest(name: str, known: list[str], cutoff: float = 0.5) -> str:
    """The question "Did you mean 'x'?", a space before it, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
