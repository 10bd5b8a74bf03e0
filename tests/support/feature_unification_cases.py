"""Feature unifications that several test files run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    grid: tuple[int, int]
    channels: int
    filters: int = 16
    kernel_size: int = 5
    batch: int = 1


SHAPES = {
    "square": Shape((8, 8), 24),
    "odd, batch 2": Shape((7, 5), 10, batch=2),
    "empty batch": Shape((7, 5), 10, batch=0),
    "several tiles": Shape((40, 48), 40),
    "a tile and a position": Shape((17, 241), 16),
    "channels a multiple of the filters": Shape((6, 6), 48),
    "one channel": Shape((6, 5), 1),
    "seven channels": Shape((6, 5), 7),
    "many channels": Shape((3, 3), 1537, filters=128),
    "one position": Shape((1, 1), 9),
    "one row": Shape((1, 11), 9),
    "one column": Shape((11, 1), 9),
    "smaller than the filter": Shape((2, 3), 5, kernel_size=7),
    "one tap": Shape((5, 4), 6, kernel_size=1),
    "one filter": Shape((5, 4), 6, filters=1),
    "default filters": Shape((5, 9), 10, filters=128),
}


def tensors_of(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape.batch, shape.channels, *shape.grid, generator=generator)
    basis = torch.randn(shape.filters, 1, shape.kernel_size, shape.kernel_size, generator=generator)
    return {"features": features.to(dtype), "basis": basis.to(dtype)}
