"""The micro-batches of a step for one rank: order says which rows, tokens has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from relora_ray.data.order import Indices, rank_slots, step_rows
from relora_ray.data.tokens import TokenRows
from relora_ray.errors import DataError
from relora_ray.modeling.parallel import World


@dataclass(frozen=True)
class MicroBatch:
    inputs: torch.Tensor
    """Token ids, (rows, seq_len)."""
    targets: torch.Tensor
    """The token after each input, (rows, seq_len)."""
    weights: torch.Tensor
    """1 for a row that counts, 0 for padding, (rows,)."""


class BatchSource:
    """This rank's share of every global batch, as micro-batches of at most `micro_batch_rows` rows.

    Every rank makes equally many micro-batches of equal shape, whatever the world size: where ranks do not
    divide the global batch, a rank short of a row takes one of weight zero.
    """

    def __init__(
        self, rows: TokenRows, world: World, *, global_batch_rows: int, micro_batch_rows: int, seed: int
    ) -> None:
        self._rows, self._world, self._seed = rows, world, seed
        self._global_batch_rows, self._micro_batch_rows = global_batch_rows, micro_batch_rows

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of update `step`."""
        order = step_rows(
            step, num_rows=self._rows.num_rows, global_batch_rows=self._global_batch_rows, seed=self._seed
        )
        return list(self._share(order))

    def first_rows(self, num_rows: int) -> Iterator[MicroBatch]:
        """This rank's share of the first `num_rows` rows, in order: for evaluation."""
        return self._share(np.arange(min(num_rows, self._rows.num_rows), dtype=np.int64))

    def rows_behind(self, first: int, num_rows: int) -> Iterator[MicroBatch]:
        """This rank's share of `num_rows` rows, evenly spaced over those behind the `first` ones: for an evaluation on
        other text than what `first_rows` has. DataError if there are fewer."""
        if (there := self._rows.num_rows - first) < num_rows:
            raise DataError(
                f"{num_rows} rows are wanted behind the first {first} of the validation rows, and there are {there}. "
                f"Hold out more text, or ask for fewer."
            )
        return self._share(first + np.arange(num_rows, dtype=np.int64) * there // num_rows)

    def _share(self, order: Indices) -> Iterator[MicroBatch]:
        slots = rank_slots(len(order), rank=self._world.rank, world_size=self._world.size)
        for start in range(0, len(slots), self._micro_batch_rows):
            taken = slots[start : start + self._micro_batch_rows]
            tokens = torch.from_numpy(self._rows.read(order[np.maximum(taken, 0)])).to(self._world.device)
            weights = torch.from_numpy((taken >= 0).astype(np.float32)).to(self._world.device)
            yield MicroBatch(tokens[:, :-1], tokens[:, 1:], weights)
