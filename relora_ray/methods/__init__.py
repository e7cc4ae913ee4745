"""How weights are trained. `build_method` is the registry; base.py has the interface."""

from relora_ray.config import FullConfig, LoraConfig, ReloraConfig, RunConfig
from relora_ray.methods.base import BoundaryReport, Method
from relora_ray.methods.full import Full
from relora_ray.methods.lora import Lora
from relora_ray.methods.relora import Relora

METHODS: dict[type, type[Method]] = {FullConfig: Full, LoraConfig: Lora, ReloraConfig: Relora}


def build_method(cfg: RunConfig) -> Method:
    return METHODS[type(cfg.method)](cfg)


__all__ = ["METHODS", "BoundaryReport", "Method", "build_method"]
