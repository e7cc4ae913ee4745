"""What every implementation of ReLoRA must keep, as checks that can be run on any of them.

    python -m relora_ray.conformance                                    # this one
    python -m relora_ray.conformance --implementation my.module:MyReLoRA

Someone's own implementation joins by a subclass of `Implementation` (implementation.py) that says how it wraps, merges,
resets and trains; ours.py is one of about 200 lines. What it leaves out is reported as not offered. layer_checks.py
looks at single layers and optimizer state, run_checks.py at whole runs: real text, real ranks, a crash in every phase.
"""

from relora_ray.conformance.implementation import Implementation, LayerView, NotOffered, Spec, Trace
from relora_ray.conformance.suite import CHECKS, Check, Result, run_suite

__all__ = ["CHECKS", "Check", "Implementation", "LayerView", "NotOffered", "Result", "Spec", "Trace", "run_suite"]
