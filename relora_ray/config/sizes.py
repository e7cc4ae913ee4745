"""The LLaMA sizes of the ReLoRA reference, as data.

Source: Guitaricet/relora at 176f376, `configs/llama_*.json`. Kept apart from `model.py` because the config
checks ranks against layer shapes in well under a second, so before torch is imported.
"""

import math
import re
from typing import NamedTuple

DEFAULT_VOCAB_SIZE = 32100
"""T5's vocabulary, the reference's default."""


class LlamaSize(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 1024


LLAMA_SIZES: dict[str, LlamaSize] = {
    "9m": LlamaSize(128, 352, 4, 4),
    "20m": LlamaSize(256, 688, 4, 4),
    "35m": LlamaSize(384, 1024, 6, 8),
    "60m": LlamaSize(512, 1376, 8, 8),
    "130m": LlamaSize(768, 2048, 12, 12),
    "250m": LlamaSize(768, 2560, 24, 16),
    "350m": LlamaSize(1024, 2736, 24, 16),
    "1b": LlamaSize(2048, 5461, 24, 32),
    "3b": LlamaSize(2560, 6848, 32, 32),
    "7b": LlamaSize(4096, 11008, 32, 32, 2048),
}

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last path segments of the linear layers in a LLaMA block."""


def nearest_size(name: str) -> str:
    """The question "Did you mean '130m'?" for 125m, a space before it: the size that is next. Nothing for no number."""
    number = _parameters(name.strip().lower())
    if not number:
        return ""
    close = min(LLAMA_SIZES, key=lambda size: abs(math.log(_parameters(size) / number)))
    return f" Did you mean {close!r}?"


def _parameters(name: str) -> float:
    """`1.3b` -> 1.3e9; 0 for what is no size."""
    match = re.search(r"(\d+(?:\.\d+)?)[ _-]?([kmbg]?)\b", name)
    return float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "": 1.0}[match[2]] if match else 0.0
