"""How much arithmetic a run does, as far as its config tells."""

from __future__ import annotations

from relora_ray.config import RunConfig
from relora_ray.config.planned import value_at
from relora_ray.config.sizes import LLAMA_LINEARS
from relora_ray.methods.lowrank.config import LoraConfig
from relora_ray.modeling.flops import linear_flops, llama_flops, peak_flops


def flops_per_token(cfg: RunConfig, step: int) -> float | None:
    """Of an update after `step`, forward and backward, without what is computed a second time to save memory. None
    where nobody has counted: architectures of `model.huggingface`, and methods but full, lora, relora and galore."""
    llama, method = cfg.model.llama, cfg.method
    if llama is None or method.kind not in ("full", "lora", "relora", "galore"):
        return None
    wrapped, rank, dropout = frozenset[str](), 0, 0.0
    if isinstance(method, LoraConfig) and step >= method.warm_start_steps:
        names = LLAMA_LINEARS if method.target_modules == "all-linear" else method.target_modules
        wrapped = frozenset(names) - set(method.leave_out)
        rank, dropout = value_at(method.lora_rank, step), method.dropout

    def of_linear(name: str, i: int, o: int) -> float:
        counted = linear_flops(i, o, rank, cfg.tokens_per_step)
        return counted["full" if name not in wrapped else "factored" if dropout else "effective"]

    return llama_flops(llama, cfg.model.llama_vocab_size, cfg.data.seq_len, of_linear)


def peak_of(cfg: RunConfig, device_name: str) -> float | None:
    """What the device does at most in a second, in the run's precision; None if that is not known."""
    return peak_flops(device_name) if cfg.train.precision == "bf16" else None
