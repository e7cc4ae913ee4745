"""The section `method` of LoRA-FA. No torch here: a config is checked in half a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from relora_ray.config.method import OnBlocks


class LoraFaConfig(OnBlocks):
    kind: Literal["lora_fa"] = "lora_fa"
    """LoRA-FA (Zhang et al. 2023): as LoRA, with A frozen as it was drawn."""
    implementation = "lora_fa.method:LoraFa"
    tiny: ClassVar[Mapping[str, Any]] = {"rank": 4, "alpha": 8}
    rank: int = Field(64, gt=0)
    """Inner dimension."""
    alpha: float = Field(64.0, gt=0)
    """B A is scaled by alpha / rank."""
