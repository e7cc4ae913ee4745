"""What every implementation of ReLoRA must keep, as checks that can be run on any of them.

    python -m relora_ray.conformance                                    # this one
    python -m relora_ray.conformance --implementation my.module:MyReLoRA

Someone's own implementation joins by a subclass of `Implementation` (implementation.py) that says how it wraps, merges,
resets and trains; ours.py is one of about 200 lines. What it leaves out is reported as not offered. layer_checks.py
looks at single layers and optimizer state, run_checks.py at whole runs: real text, real ranks, a crash in every phase.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora_ray.conformance.implementation import Implementation, LayerView, NotOffered, Spec, Trace
    from relora_ray.conformance.suite import CHECKS, Check, Result, run_suite

__all__ = ["CHECKS", "Check", "Implementation", "LayerView", "NotOffered", "Result", "Spec", "Trace", "run_suite"]
_OF_THE_SUITE = ("CHECKS", "Check", "Result", "run_suite")


def __getattr__(name: str) -> Any:
    """What is exported, when it is asked for: the command's --help must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'suite' if name in _OF_THE_SUITE else 'implementation'}"), name)
