"""AnyUp, fast: features of any vision encoder at image resolution, exact and frugal."""

from __future__ import annotations

import importlib
from typing import Any

from anyup._version import __version__
from anyup.checkpoints import load, save
from anyup.head import with_head
from anyup.model import AnyUp

__all__ = ["AnyUp", "__version__", "encoders", "load", "save", "visualization", "with_head"]

_ON_DEMAND = ("encoders", "visualization")


def __getattr__(name: str) -> Any:
    """Import what most callers do not need when it is asked for."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"anyup.{name}")
    raise AttributeError(f"module 'anyup' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
