"""What a call allocates at a time, tensor by tensor: on the meta device for sizes that no machine here could hold."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OPERATORS = tuple(
    f"{name}.operator"
    for name in ("feature_distance", "feature_unification", "pixel_encoder", "query_projection", "window_attention")
)
_OF_KERNELS_ALONE = ("pixel_encoder.pair",)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on.

    Attributes:
        live: alive now.
        peak: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._collect()
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Of these, which were made before, nothing counts."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage), 0

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _collect(self) -> None:
        for key, (reference, size) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.live -= size


@contextmanager
def operators_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our operators run as plain functions, so that what happens inside is seen, on the meta device too."""
    with monkeypatch.context() as patch:
        for name in _OPERATORS:
            module = importlib.import_module(f"anyup.ops.{name}")
            patch.setattr(module, "_forward", _opened(module))
            patch.setattr(module, "_backward", module._run_backward)
        for name in _OF_KERNELS_ALONE:
            module = importlib.import_module(f"anyup.ops.{name}")
            patch.setattr(module, "_forward", module._run_forward)
        yield


def _opened(module: Any) -> Callable[..., Any]:
    """An operator's forward pass as a function that autograd differentiates by the operator's own rule."""
    plain = module._run_forward

    class Opened(torch.autograd.Function):
        forward = staticmethod(plain)
        setup_context = staticmethod(module._setup_context)
        backward = staticmethod(module._gradient)

    return lambda *inputs: (Opened.apply if torch.is_grad_enabled() else plain)(*inputs)


class LargestTensor(TorchDispatchMode):
    """Records the most values that any operation's result holds."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # An expanded tensor takes no memory for what it repeats.
                stored = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
                self.largest = max(self.largest, math.prod(stored))
        return result
