"""Warnings to whoever calls this package."""

from __future__ import annotations

import sys
import warnings

_PASSED_THROUGH = {"anyup", "torch"}


def warn(text: str) -> None:
    """Give a UserWarning that shows the line of the first caller outside this package and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
