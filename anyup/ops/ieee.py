"""Full float32 products, whatever precision torch's settings ask for; the references compute with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextlib.contextmanager
def ieee() -> Iterator[None]:
    """Within the block products and convolutions of float32 have full precision, on every device.

    Torch's settings hold for the whole process. The first block to be entered sets them and the last to be left
    restores them, so that blocks of several threads may overlap. Meanwhile all threads compute with full precision.
    """
    global _inside
    backends = torch.backends
    settings = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)  # type: ignore[attr-defined]
    with _lock:
        if not _inside:
            _before[:] = [setting.fp32_precision for setting in settings]
            for setting in settings:
                setting.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for setting, precision in zip(settings, _before, strict=True):
                    setting.fp32_precision = precision


def in_ieee(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run within `ieee`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ieee():
            return function(*args, **kwargs)

    return run
