"""The section of GaLore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from relora_ray.config.method import OnBlocks


class GaloreConfig(OnBlocks):
    kind: Literal["galore"] = "galore"
    """GaLore (Zhao et al. 2024): every weight is trained; of the matrices in the blocks Adam sees the gradient's
    projection on its leading singular vectors, so that its moments are of low rank."""
    implementation = "relora_ray.methods.projected.galore:Galore"
    tiny: ClassVar[Mapping[str, Any]] = {"rank": 4, "refresh_every_steps": 3}
    rank: int = Field(128, gt=0)
    """Dimension of the projection. Published: 128 at 60m, 256 at 130m and 350m, 512 at 1b."""
    refresh_every_steps: int = Field(200, gt=0)
    """The basis is taken anew from the gradient at a parameter's updates 0, and every so many later; moments are
    carried over as they are."""
    alpha: float = Field(0.25, gt=0)
    """Steps of projected matrices are scaled by this; all else moves at the plain rate."""
