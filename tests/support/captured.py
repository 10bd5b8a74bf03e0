"""A CUDA graph that is made up: a replay makes the call again, into the same tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Graph:
    held_bytes = 1000

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self._call, self.out = call, call()

    def __call__(self) -> Tensor:
        return self.out.copy_(self._call())
