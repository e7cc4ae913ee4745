"""Seeds for random draws, keyed by what the draw is for.

Every random number of a run comes from `key(seed, tag, ...)` and never from a generator that lives across
steps, so a draw is the same on every rank, at any world size, and after any resume, with nothing to save.
"""

import hashlib


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit seed, a pure function of its arguments: `key(7, "lora_A", 3, "layers.0.q_proj")`.

    Stable across Python versions and machines (BLAKE2b of a canonical text). Distinct argument lists
    give distinct texts, because strings are quoted and integers are not. TypeError for anything else, whose text may
    differ from process to process.
    """
    if wrong := next((part for part in (seed, *parts) if not isinstance(part, int | str)), None):
        raise TypeError(f"a draw is keyed by whole numbers and texts, and {wrong!r} is neither")
    text = ",".join(repr(int(p)) if isinstance(p, int) else repr(str(p)) for p in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
