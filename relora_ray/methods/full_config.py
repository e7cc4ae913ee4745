"""The section of full-rank training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from relora_ray.config.method import MethodConfig


class FullConfig(MethodConfig):
    kind: Literal["full"] = "full"
    """Full-rank training: every weight is trained."""
    implementation = "relora_ray.methods.full:Full"
    tiny: ClassVar[Mapping[str, Any]] = {}
