"""What a launch of the operations beside the attention does, for each unit: a position of the grid, or a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """What a launch does, for each unit.

    Attributes:
        units: positions of the grid, or pixels.
        exact_operations: of the products as defined, each once.
        operations: of the matrix units: planes, padding and second products included.
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
