"""What an attempt's next checkpoint follows: the newest that is committed, and the line behind it."""

from __future__ import annotations

from dataclasses import dataclass

from relora_ray.checkpoint.history import History, read_history
from relora_ray.checkpoint.manifest import Manifest, Part, key_of
from relora_ray.storage import Storage


@dataclass
class Lineage:
    """Ranks hear of a commit at different steps, so it changes only where all have heard of it."""

    attempt: str
    newest: Manifest | None = None
    """The newest checkpoint that all ranks know to be stored."""
    line: tuple[str, ...] = ()
    """Its manifest's path, behind those of the ones before it."""

    def resume(self, manifest: Manifest, line: tuple[str, ...]) -> None:
        self.newest, self.line = manifest, line

    def fork(self, manifest: Manifest, run: str) -> None:
        """Begin with another run's checkpoint: its base is referred to, and its line is not ours."""
        if manifest.base is not None:
            base = manifest.base.model_copy(update={"run": manifest.base.run or run})
            manifest = manifest.model_copy(update={"base": base})
        self.newest = manifest

    def committed(self, manifest: Manifest) -> None:
        self.newest, self.line = manifest, (*manifest.line, manifest.path)

    def base_at(self, boundary: int) -> Part | None:
        """The base that is stored already, if no boundary has changed it since."""
        return self.newest.base if self.newest is not None and self.newest.boundary == boundary else None

    def folder(self, kind: str, step: int) -> str:
        """Of a new part, for the save after `step`: no name is used twice."""
        return f"{kind}/step-{step:08d}-{self.attempt}"

    def steps(self, storage: Storage, history: History | None = None) -> list[int]:
        """Steps of the checkpoints on this attempt's way that are there, ascending."""
        standing = set((history or read_history(storage)).standing)
        return [key[1] for path in self.line if path in standing and (key := key_of(path))]
