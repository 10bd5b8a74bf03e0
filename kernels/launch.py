"""A kernel with everything it is launched with: what runs it, compiles it ahead of time and counts its work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (
    "height", "width", "grid_rows", "grid_columns", "tile_rows", "tile_columns", "cell_rows", "cell_columns", "again",
    "images",
)  # fmt: skip
"""Kernel arguments that a kernel must not be specialised on: a new image size compiles nothing."""


PART = ("part_row", "part_column", "whole_height", "whole_width")
"""Kernel arguments that say where in a larger output the pixels lie; all None where they are the whole output."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis.
        arguments: tensors and numbers by name.
        constants: the kernel's `tl.constexpr` arguments by name.
        options: `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    def __call__(self) -> None:
        """Launch it on its tensors' device, where there is anything to do."""
        if not all(self.grid):
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        # Triton launches on torch's current device, whatever device the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            # Explicit, because Triton 3.10 changes the default.
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options, enable_fp_fusion=True)


def strides_of(name: str, tensor: Tensor, axes: str) -> dict[str, int]:
    """The strides of a tensor's axes as kernel arguments: `name_axis_stride`, the axes separated by spaces."""
    return {f"{name}_{axis}_stride": stride for axis, stride in zip(axes.split(), tensor.stride(), strict=True)}


def part_arguments(part: tuple[int, int, int, int] | None) -> dict[str, int | None]:
    """First row and column of a part of an output and the whole output's size, as kernel arguments."""
    return dict(zip(PART, part or (None,) * 4, strict=True))


def size_arguments(query: Tensor, key: Tensor, tiles: tuple[int, int]) -> dict[str, int]:
    """The sizes of the output (B, H, W, ...), of the key grid (B, h, w, ...) and of the grid of tiles."""
    sizes = (*query.shape[1:3], *key.shape[1:3], *tiles)
    return dict(zip(SIZES, sizes, strict=False))
