"""Both passes of a training step as CUDA graphs, one for each combination of shapes that comes again and again.

The host then starts a forward and a backward pass with one launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyup.caller_warning import warn
from anyup.capture import Graph, graph_of
from anyup.training.samples import Batch

Passes = Callable[[Batch, float, float], tuple[Tensor, list[Tensor | None]]]
"""Takes a batch on the device and two divisors; returns the terms of the loss and the gradients."""

_TIMES = 3
"""A batch is captured when its shapes come for this time: kernels are compiled by then."""

_MOST = 16
"""The most graphs: each holds its inputs and gradients."""


class PassGraphs:
    """The passes of batches on a device, each by a graph where there is one, else as they are.

    What a call returns is overwritten by the next call.
    """

    def __init__(self, passes: Passes, device: torch.device) -> None:
        self._passes, self._device = passes, device
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Batch, Graph[tuple[Tensor, list[Tensor | None]]]]] = {}
        self._most = _MOST
        self._pool: Any = None

    def __call__(self, batch: Batch, whole: float, augmented: float) -> tuple[Tensor, list[Tensor | None]]:
        """The terms and the gradients of a batch that is not on the device yet."""
        divisors = (whole, augmented)
        key = (batch.layout, divisors)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] < _TIMES or len(self._graphs) >= self._most or not self._capture(key, batch, divisors):
                return self._passes(batch.to(self._device), *divisors)
        own, graph = self._graphs[key]
        own.copy_(batch)
        return graph()

    def _capture(self, key: Hashable, batch: Batch, divisors: tuple[float, float]) -> bool:
        """Capture the passes of batches like this one; False where that cannot be, and no other is captured then."""
        if self._pool is None and self._device.type == "cuda":
            # One pool for all: only one graph is at work at a time, and the optimizer uses its gradients up.
            self._pool = torch.cuda.graph_pool_handle()
        own = batch.copied_to(self._device)
        try:
            self._graphs[key] = own, graph_of(partial(self._passes, own, *divisors), self._device, self._pool)
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            self._most = len(self._graphs)
            warn(f"run.graphs: {error}; other steps run without a graph")
            return False
        return True
