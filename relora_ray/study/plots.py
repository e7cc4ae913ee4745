"""matplotlib, which only the commands that draw need."""

from __future__ import annotations

from typing import Any

from relora_ray.errors import ConfigError


def pyplot() -> Any:
    """matplotlib.pyplot without a screen. ConfigError if it is not installed: call it before anything is spent."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("this command draws a plot and needs matplotlib: pip install 'relora-ray[plot]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
