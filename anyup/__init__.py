"""AnyUp, fast: features of any vision encoder at image resolution, exact and frugal."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyup._version import __version__

if TYPE_CHECKING:
    from anyup import distributed, encoders, visualization
    from anyup.checkpoints import load, save
    from anyup.head import with_head
    from anyup.limited_memory import plan
    from anyup.model import AnyUp

__all__ = ["AnyUp", "__version__", "distributed", "encoders", "load", "plan", "save", "visualization", "with_head"]

_MODULES = {
    "AnyUp": "model",
    "load": "checkpoints",
    "save": "checkpoints",
    "with_head": "head",
    "plan": "limited_memory",
}
_SUBMODULES = ("distributed", "encoders", "ray", "visualization")
_OPERATIONS = ("feature_unification", "pixel_encoder", "query_projection", "window_attention")


def _is_command() -> bool:
    """Whether the process is the command `anyup`, whose `--help` does not wait for torch."""
    if sys.argv[:1] == ["-m"]:  # of `python -m MODULE`, while it is looked for
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        return module.partition(".")[0] == "anyup"
    return Path(*sys.argv[:1]).stem == "anyup"


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name in _SUBMODULES:
        return importlib.import_module(f"anyup.{name}")
    if name in _MODULES:
        return getattr(importlib.import_module(f"anyup.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'anyup' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if not _is_command():
    # Torch knows the operators from now on: a program that was exported needs nothing else to be loaded and run.
    for _name in _OPERATIONS:
        importlib.import_module(f"anyup.ops.{_name}")
