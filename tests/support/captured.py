"""A CUDA graph that is made up: a replay makes the call again, into the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class Graph:
    held_bytes = 1000

    def __init__(self, call: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        self._call, self.out = call, call()

    def __call__(self) -> Any:
        for own, made in zip(tree_leaves(self.out), tree_leaves(self._call()), strict=True):
            own.copy_(made)
        return self.out
