"""The section of SLTrain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from relora_ray.config.method import OnBlocks

if TYPE_CHECKING:
    from relora_ray.config.run import RunConfig


class SltrainConfig(OnBlocks):
    kind: Literal["sltrain"] = "sltrain"
    """SLTrain (Han et al. 2024): each matrix in the blocks is a product of low rank and a sparse matrix with fixed
    random positions, from the start to the end."""
    implementation = "relora_ray.methods.sparse.sltrain:Sltrain"
    tiny: ClassVar[Mapping[str, Any]] = {"rank": 4, "alpha": 8, "density": 0.1}
    rank: int = Field(128, gt=0)
    """Inner dimension of the product. Published: 128 at 60m, 256 at 130m and 350m, 512 at 1b."""
    alpha: float = Field(32.0, gt=0)
    """The product is scaled by alpha / rank; the sparse part is not. Published: 32 at 60m, 16 at 130m and 350m, 8 at
    1b."""
    density: float = Field(0.03, gt=0, le=1)
    """Share of the entries that the sparse matrix has."""

    def problems(self, cfg: RunConfig) -> list[str]:
        found = super().problems(cfg)
        if cfg.model.init_from:
            found.append(
                f"model.init_from={cfg.model.init_from!r} with method.kind=sltrain: a dense matrix is no sum of a "
                f"product of low rank and a sparse matrix: weights cannot be taken over. Remove model.init_from."
            )
        return found
