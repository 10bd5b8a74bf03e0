"""Configs of the feature unification's kernels: positions of a program, rows of a product, warps.

A config changes the speed and never the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .launch import Target

if TYPE_CHECKING:
    from .feature_unification_patches import Arranged


@dataclass(frozen=True)
class UnificationConfig:
    """A config of the forward pass.

    Attributes:
        positions: the positions of a program, which computes them one by one and stores their results together.
        rows: the softmaxes of a product, one in each row; in turned runs the number of filters.
        num_warps, num_stages: Triton's.
    """

    positions: int
    rows: int
    num_warps: int
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name, least in (("positions", 1), ("rows", 16), ("num_warps", 1)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name}: expected a power of two, at least {least}, got {number}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")

    def tiles(self, positions: int) -> int:
        """The number of programs for an image with `positions` positions."""
        return -(-positions // self.positions)


@dataclass(frozen=True)
class UnificationGradientConfig:
    """A config of the backward pass; the attributes are those of `UnificationConfig`."""

    rows: int
    num_warps: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        UnificationConfig(1, self.rows, self.num_warps, self.num_stages)


MOST_FILTERS = 256
"""A row of a product, all filters of a softmax, stays in registers."""


def forward_configs(arranged: Arranged) -> list[UnificationConfig]:
    """Configs of the forward pass, best first; what comes later asks less of a card.

    They were chosen by `python -m benchmarks.modelled_gpu --kernel feature_unification_forward`: where M divides C none
    spills a register on any target. With classes of outputs none does in half precision, and in float32 at most 8 bytes
    of a thread's are spilled (C = 192 on sm_120, 96 on sm_90, 80 on sm_80 and sm_90). Where filters are turned, a
    product of all of them and what turns it take more than there are on NVIDIA's (up to 350 bytes).
    """
    planes, columns, _ = arranged.filters.shape
    classes, width = arranged.runs.classes, arranged.runs.width
    if arranged.runs.turned:
        return [UnificationConfig(8, columns, num_warps=8 if columns >= 64 else 4, num_stages=1)]
    # The number of positions whose results fill a store of 16 bytes.
    positions = 8 if arranged.features.element_size() == 2 and planes == 1 else 4
    rows = 64 if columns <= 128 else 32
    if classes > 1:
        warps = _warps_of_classes(width)
        return [UnificationConfig(positions, size, warps, num_stages=1) for size in (min(rows, width), 16)]
    return [
        UnificationConfig(positions, min(rows, columns), num_warps=4),
        UnificationConfig(positions, 16, num_warps=4, num_stages=1),
    ]


def backward_configs(arranged: Arranged, *, target: Target, of: str) -> list[UnificationGradientConfig]:
    """Configs of the backward pass for the gradients of "cells" or of "filters", best first.

    Chosen as those of the forward pass: two launches, because one that makes both would spill much in float32. Where M
    divides C the filters' spills 40 bytes of a thread's in float32 on sm_80 and sm_90 and 80 on sm_120, the cells' 16
    in bfloat16 on sm_120; the others spill nothing. With classes of outputs they spill 70 to 870 bytes.
    """
    columns, width = arranged.filters.shape[1], arranged.runs.width
    if arranged.runs.classes > 1:
        rows = min(64 if of == "filters" else 32, width)
        return [UnificationGradientConfig(size, _warps_of_classes(width)) for size in (rows, 16)]
    if of == "filters":
        best = UnificationGradientConfig(min(64, columns), num_warps=4)
    elif target.backend == "hip":
        best = UnificationGradientConfig(16, num_warps=4)
    else:
        best = UnificationGradientConfig(min(32, columns), num_warps=8)
    return [best, UnificationGradientConfig(16, num_warps=4)]


def _warps_of_classes(width: int) -> int:
    """The warps for products with `width` columns: more warps would repeat the same work."""
    return 4 if width >= 64 else 2
