"""The published implementation from somebody's checkout of wimmerth/anyup, beside ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from anyup import AnyUp

_PACKAGE = "anyup"
_SHARED = ("input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "window_ratio", "num_heads", "lfu_dim")


class PublishedCode:
    """The class `AnyUp` of a checkout.

    Args:
        checkout: the folder that holds its package `anyup`.

    Raises ValueError, before anything of it runs, where the folder is no such checkout, and ImportError where its
    code does not import here.
    """

    def __init__(self, checkout: str | Path) -> None:
        folder = Path(checkout).resolve()
        if not (folder / _PACKAGE / "model.py").is_file():
            raise ValueError(f"published: expected a checkout of wimmerth/anyup (with anyup/model.py), got {checkout}")
        if folder == Path(__file__).resolve().parents[2]:
            raise ValueError(f"published: expected a checkout of wimmerth/anyup, {checkout} is this package itself")
        with _in_place_of_ours(folder):
            module = importlib.import_module(f"{_PACKAGE}.model")
            found = getattr(module, "AnyUp", None)
        if not isinstance(found, type):
            raise ValueError(f"published: expected a class AnyUp in {folder / _PACKAGE / 'model.py'}, found none")
        self._class: Any = found

    def with_weights_of(self, model: AnyUp, *, natten: bool = False) -> nn.Module:
        """A published model with the arguments and weights of one of ours, in eval mode, its device and its dtype."""
        arguments = {name: model.config[name] for name in _SHARED}
        if natten:
            arguments["use_natten"] = True
        made: nn.Module = self._class(**arguments)
        made.load_state_dict(model.state_dict())
        return made.to(model.rope.freqs).eval()


def has_natten() -> bool:
    """Whether the published code's second variant can run."""
    return find_spec("natten") is not None


@contextmanager
def _in_place_of_ours(folder: Path) -> Iterator[None]:
    """Import packages called `anyup` from this folder, and put ours back afterwards."""

    def taken() -> dict[str, Any]:
        return {n: m for n, m in sys.modules.items() if n == _PACKAGE or n.startswith(_PACKAGE + ".")}

    ours = taken()
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(ours)
