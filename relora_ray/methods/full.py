"""Full-rank training: the baseline, and the warm start of the others."""

from relora_ray.methods.base import Method


class Full(Method):
    """What the architecture freezes stays so."""

    def why_no_adapter(self, step: int) -> str:
        return "trains the weights themselves: there is no frozen base"
