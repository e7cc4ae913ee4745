"""The architecture of a model at a tiny width: what it is tried out with before anything is spent.

A forward and backward pass of a model says more about an architecture than its code does: whether it looks ahead, which
of its layers are called, what it adds to the loss. At full size that takes a machine; at tiny width, a second.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers

_DRAWN = 0.02
MOST_LAYERS = 4
"""So many blocks at most, of every kind if there is room."""
VOCABULARY, POSITIONS = 128, 512

_SIZES: tuple[tuple[str, int], ...] = (
    # Regular expressions of names; the first that fits decides. Nothing becomes larger than it was.
    (r".*vocab_size.*|codebook_size", VOCABULARY),
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions", POSITIONS),
    (r".*num_key_value_heads.*|num_kv_heads|num_query_groups|linear_num_key_heads", 2),
    (r".*mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r".*num_.*heads|.*attention_heads|n_heads?|linear_num_value_heads", 4),
    (r".*num_experts_per_tok(en)?|moe_k|moe_topk|num_selected_experts|moe_top_k", 2),
    (r".*n_routed_experts|.*num_(local_)?experts|zero_expert_num", 4),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|o_groups", 1),
    (r"qk_head_dim|index_head_dim", 16),
    (r"rotary_dim", 4),
    (r".*head_dim.*|.*head_size|d_head|dim_head|kv_channels|mamba_d_head|mamba_headdim", 8),
    (r".*lora_rank|.*_rank|mamba_d_state|state_size|ssm_state_size", 4),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|feed_forward_size).*|n_inner|d_ff|dff|dim_ff", 64),
    (r"d_inner|mamba_d_ssm", 64),
    (r".*hidden_size|d_model|n_embd|dim|emb_dim|.*embedding_(size|dim)|word_embed_proj_dim|lru_width", 32),
    (r".*(chunk_size|block_size|sliding_window|window_size|chunk_length|index_topk)", 16),
    (r"query_pre_attn_scalar", 8),
    (r"(attn|expert)_layer_period", 2),
    (r"(attn|expert)_layer_offset", 1),
)
_DEPTHS = re.compile(
    r"num_(hidden_)?layers|n_layers?|(encoder|decoder)_layers|num_(encoder|decoder)_layers|num_blocks|depth"
)


def small_config(
    config: transformers.PretrainedConfig, *, most_layers: int | None = MOST_LAYERS
) -> transformers.PretrainedConfig:
    """The same architecture at a tiny width and depth, without dropout and cache; with all of its blocks if
    `most_layers` is None. Raises what the library raises where that is no config of it."""
    given = config.to_dict()
    small = {
        name: value if most_layers is None and _DEPTHS.fullmatch(name) else _smaller(name, value)
        for name, value in given.items()
    }
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(value := small.get(name), dict):
            small[name] = _fewer_frequencies(value, given, small)
    for name in ("num_key_value_heads", "num_kv_heads"):  # a head of keys for each of queries stays so
        if (heads := given.get("num_attention_heads")) is not None and heads == given.get(name):
            small[name] = small["num_attention_heads"]
    if most_layers is not None:
        small |= _fewer_layers(given, most_layers)
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PretrainedConfig):
            small[name] = small_config(inner, most_layers=most_layers)
    quirks = {} if most_layers is None else _FEW_LAYERS.get(config.model_type, {})
    return type(config)(**small | _QUIRKS.get(config.model_type, {}) | quirks | {"use_cache": False})


def is_dropout(name: str, value: Any) -> bool:
    """Whether a setting of an architecture is a share of activations or weights that is left out by chance."""
    is_share = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    return is_share and re.search(r"(dropout|pdrop|(^|_)drop)(_?(rate|prob|p|ratio|probability))?$", name) is not None


def _fewer_layers(given: dict[str, Any], most_layers: int) -> dict[str, Any]:
    """Settings that have a value for each block."""
    depth = next((value for name, value in given.items() if _DEPTHS.fullmatch(name) and isinstance(value, int)), 0)
    by_layer = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == depth > 0}
    kept = _layers_to_keep([tuple(map(str, kinds)) for kinds in zip(*by_layer.values(), strict=True)], most_layers)
    fewer: dict[str, Any] = {name: [value[n] for n in kept] for name, value in by_layer.items()}
    if isinstance(only := given.get("per_layer_config"), dict):
        fewer["per_layer_config"] = {n: only[n] for n in only if int(n) < most_layers}
    return fewer


def _fewer_frequencies(rope: dict[str, Any], given: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings. LongRoPE's lists have a factor for each frequency; a narrower head has fewer."""
    fewer = dict(rope)
    for key, value in rope.items():
        if isinstance(value, dict):  # of one kind of layer
            fewer[key] = _fewer_frequencies(value, given, small)
        elif isinstance(value, list) and key.endswith("_factor"):
            fewer[key] = value[: len(value) * _rotated(small) // _rotated(given)]
    return fewer


def _rotated(config: dict[str, Any]) -> int:
    """Width of a head, or of what is rotated of it."""
    width = config.get("qk_rope_head_dim") or config.get("head_dim")
    return int(width or config["hidden_size"] // config["num_attention_heads"])


def _layers_to_keep(kinds: list[tuple[str, ...]], most: int) -> list[int]:
    """Blocks of every kind, if there is room, else the first ones."""
    firsts = [n for n, kind in enumerate(kinds) if kind not in kinds[:n]][:most]
    others = [n for n in range(len(kinds)) if n not in firsts]
    return sorted(firsts + others[: most - len(firsts)])


def _smaller(name: str, value: Any) -> Any:
    if is_dropout(name, value):
        return 0.0
    if name == "initializer_range" and isinstance(value, float) and 0 < value < _DRAWN:
        return _DRAWN  # what looks ahead shows in logits that depend on what was read
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _DEPTHS.fullmatch(name):
        return min(value, MOST_LAYERS)
    if name.endswith(("_token_id", "_token_index")):
        return min(value, VOCABULARY - 1)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return value


@torch.no_grad()
def pad_moves_others(config: transformers.PretrainedConfig) -> bool:
    """Whether another pad_token_id changes how tokens are read that are no padding, as in RoBERTa, whose positions
    begin behind it. False for what has no tiny form."""
    try:
        models = []
        for pad in (1, 9):
            small = small_config(config)
            for part in {id(small): small, id(small.get_text_config()): small.get_text_config()}.values():
                part.pad_token_id = pad
            with torch.random.fork_rng(devices=[]):
                models.append(transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval())
        models[1].load_state_dict(models[0].state_dict())
        ids = torch.arange(16, 32)[None]
        one, other = (model(input_ids=ids).logits for model in models)
        return not torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    except Exception:  # whatever a class says that cannot be made so
        return False


_BLOCKS = ["mamba", "hybrid", "mamba", "hybrid"]

_QUIRKS: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}
_FEW_LAYERS: dict[str, dict[str, Any]] = {
    "zamba": {"layers_block_type": _BLOCKS},
    "zamba2": {"layers_block_type": _BLOCKS, "hybrid_layer_ids": [1, 3]},
}
