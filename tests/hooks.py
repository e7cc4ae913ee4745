"""What a Ray worker of a test's job does first (worker_process_setup_hook): it sees to it that agents start the test's
own function in place of `trainer.train`. Every worker imports this, and many never become an agent: nothing heavy here.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AGENT = "relora_ray.runtime.agent"
PACE_S = 0.05


def slow_down() -> None:
    """Steps take PACE_S more, in which they use no processor, as machines come and go on the same one."""
    sys.meta_path.insert(0, _Agents("tests.hooks:train_slowly"))


def have_faults() -> None:
    sys.meta_path.insert(0, _Agents("tests.faults:train_with_faults"))


class _Agents(MetaPathFinder):
    """When the agent is imported, it is told what to start."""

    def __init__(self, train: str) -> None:
        self._train = train

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AGENT:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.TRAIN = self._train  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module
        return spec


def train_slowly(*args: Any) -> None:
    """In a process that trains."""
    from relora_ray import loop
    from relora_ray.runtime import trainer

    def multiplier(*args: Any) -> float:  # asked for once a step
        time.sleep(PACE_S)
        return float(lr_multiplier(*args))

    lr_multiplier, loop.lr_multiplier = loop.lr_multiplier, multiplier
    trainer.train(*args)
