"""What a launch of the operations beside the attention does, for each unit: a position of the grid, or a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SPLIT = 3 / 2
"""Products of tf32 that take as long as those of float16 that make one of float32 (`kernels.products.split_matmul`)."""


@dataclass(frozen=True)
class Work:
    """What a launch does, for each unit.

    Attributes:
        units: positions of the grid, or pixels.
        exact_operations: of the products as defined, each once.
        operations: of the matrix units: planes, padding and second products included. Of what is of float32 in tf32's:
            one of float16 is half of one.
        exact_exponentials, exponentials: the same.
        bytes_compulsory: each input once, each output once.
        bytes_asked: what the programs load and store, but for what L1 keeps for them.
        turns: the kernel's loops as `machine_code.Code.weights` takes them.
        bytes_shared: of those asked for, weights and tables that all programs read: the caches hold them.
    """

    units: int
    exact_operations: float
    operations: float
    exact_exponentials: float
    exponentials: float
    bytes_compulsory: float
    bytes_asked: float
    turns: list[Any]
    bytes_shared: float = 0
