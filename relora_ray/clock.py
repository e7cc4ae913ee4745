"""Time, in one place: the code that decides who owns a run and what is kept asks
here, so that a simulation can drive it."""

from __future__ import annotations

import time

monotonic = time.monotonic
"""Seconds since some moment."""
now = time.time
"""Seconds since 1970."""
sleep = time.sleep
