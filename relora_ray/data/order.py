"""Which rows a step reads: a pure function of (seed, epoch, step), independent of world size.

Positions run through one endless sequence, epoch after epoch; step s takes positions s*G .. (s+1)*G - 1, and
rank r of n takes every n-th of them. Each epoch is its own pseudo-random permutation, computed entry by
entry: nothing is stored, a resume costs nothing, and the order does not depend on a library's generator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from relora_ray.keyed import key

_ROUNDS = 8

Indices = npt.NDArray[np.int64]


def step_rows(step: int, *, num_rows: int, global_batch_rows: int, seed: int) -> Indices:
    """Rows of update `step`, shape (global_batch_rows,). A batch may straddle two epochs."""
    assert num_rows > 0
    positions = np.arange(global_batch_rows, dtype=np.int64) + step * global_batch_rows
    epochs = positions // num_rows
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(positions[here] % num_rows, num_rows, key(seed, "epoch", int(epoch)))
    return rows


def rank_slots(global_rows: int, *, rank: int, world_size: int) -> Indices:
    """Slots of the global batch that `rank` takes: its stride, padded with -1 so that all ranks have equally
    many. A slot of -1 is a row of weight zero."""
    per_rank = -(-global_rows // world_size)
    slots = np.arange(per_rank, dtype=np.int64) * world_size + rank
    return np.where(slots < global_rows, slots, -1)


def permute(indices: Indices, size: int, seed: int) -> Indices:
    """Images of `indices` under a keyed permutation of range(size).

    A Feistel network over ceil(log2(size)) bits with cycle walking (Black and Rogaway 2002): an index that
    leaves range(size) goes through the network again until it is back inside, fewer than two passes on
    average. O(1) memory at any size.
    """
    bits = max(2, (size - 1).bit_length())
    left, right = bits // 2, bits - bits // 2
    keys = [key(seed, "round", i) for i in range(_ROUNDS)]
    out = _network(indices.astype(np.uint64), left, right, keys)
    while (outside := out >= size).any():
        out[outside] = _network(out[outside], left, right, keys)
    return out.astype(np.int64)


def _network(x: npt.NDArray[np.uint64], left: int, right: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    for round_key in keys:  # an even number of rounds: the two widths are back in place at the end
        high, low = x >> np.uint64(right), x & np.uint64((1 << right) - 1)
        mixed = high ^ (_mix(low ^ np.uint64(round_key)) & np.uint64((1 << left) - 1))
        x = (low << np.uint64(left)) | mixed
        left, right = right, left
    return x


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
