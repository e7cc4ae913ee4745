"""What to say of ranks whose weights should be equal and are not. Without torch: the coordinator asks, too."""

from __future__ import annotations

from collections.abc import Sequence


def disagreement(digests: Sequence[int]) -> str:
    """What to say of the ranks' digests: which of them are odd, or "" if all are equal."""
    size = len(digests)
    majority = max(set(digests), key=lambda d: (digests.count(d), -digests.index(d)))
    odd = [rank for rank, d in enumerate(digests) if d != majority]
    if not odd:
        return ""
    who = f"rank(s) {odd} hold other values than the other {size - len(odd)} of {size} ranks"
    if 2 * digests.count(majority) <= size:
        who = f"the {size} ranks hold different values, and none has a majority"
    return (
        f"{who}. Replicas must be equal: suspect a machine's memory, or processors of different kinds (their rounding "
        f"differs). Nothing was saved from this state; the last checkpoint is good."
    )
