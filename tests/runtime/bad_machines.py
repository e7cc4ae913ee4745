"""Of a module of its own: whoever has a handle of the actor imports it."""

from __future__ import annotations

from pathlib import Path

from relora_ray.runtime.coordinator import Coordinator


class NamesBadMachines(Coordinator):
    """Those whose ids are in a file beside the run."""

    def bad_nodes(self) -> list[str]:
        named = Path(self._storage.url).parent / "bad"
        return named.read_text().split() if named.exists() else []
