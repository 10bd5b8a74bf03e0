"""How long tests wait for what other threads and processes do: so long that only what hangs is given up."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 1800.0
"""Seconds; a machine may be many times slower than another, and busy."""


def wait_until(condition: Callable[[], object], alive: Callable[[], bool] = lambda: True) -> None:
    """Return when the condition holds; raise AssertionError where whoever works at it is no longer alive."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert alive() or condition(), "it ended before it had come to that"
        assert time.monotonic() < deadline, f"nothing came of it in {PATIENCE:.0f} s"
        time.sleep(0.02)
