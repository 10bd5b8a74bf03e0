"""The cells of adaptive average pooling along an axis, some of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.parallel import on_threads, tile_threads

Index = TypeVar("Index", int, Tensor)


def averaged(pixel_map: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, D) to the means over cells, (B, *size, D), contiguous; a map of that size as it is."""
    if pixel_map.shape[1:3] == size:
        return pixel_map
    with on_threads(tile_threads()):
        return F.adaptive_avg_pool2d(pixel_map.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Cells:
    """The cells `first` to `stop` of an axis of `length` pixels that is pooled to `count` cells.

    Cell c averages the pixels floor(c length / count) to ceil((c + 1) length / count); neighbours may share pixels.
    """

    first: int
    stop: int
    count: int
    length: int

    @property
    def pixels(self) -> slice:
        """The pixels that these cells need."""
        return slice(self._bounds(self.first)[0], self._bounds(self.stop - 1)[1])

    @property
    def shrinks(self) -> bool:
        """Whether there are no more cells than pixels."""
        return self.count <= self.length

    def within(self, cell: int) -> slice:
        """The pixels of one of these cells, counted from the first that these cells need."""
        start, stop = self._bounds(self.first + cell)
        offset = self.pixels.start
        return slice(start - offset, stop - offset)

    def around(self, cells: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """The pixels (n, 2 reach + 1, most) of each of some cells (n,) and those beside it, and each one's weight.

        The weights of a cell that is beyond the axis are zero, as are those that fill up to the largest cell.
        """
        near = cells[:, None] + torch.arange(-reach, reach + 1)
        start, stop = self._bounds(near)
        number = (stop - start)[..., None]
        pixel = start[..., None] + torch.arange(int(number.max()) if number.numel() else 1)
        exists = (pixel < stop[..., None]) & ((near >= 0) & (near < self.count))[..., None]
        return pixel.clamp(0, self.length - 1), exists / number

    def touching(self, pixels: slice) -> range:
        """Those of these cells that average one of these pixels, counted from the axis' first."""
        first = min(max(pixels.start * self.count // self.length, self.first), self.stop)
        while first > self.first and self._bounds(first - 1)[1] > pixels.start:
            first -= 1
        stop = first
        while stop < self.stop and self._bounds(stop)[0] < pixels.stop:
            stop += 1
        return range(first, stop)

    def indicator(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(cells, pixels): 1 where a cell averages one of the pixels that these cells need, 0 elsewhere."""
        start, stop = self._bounds(torch.arange(self.first, self.stop, device=device)[:, None])
        pixel = torch.arange(self.pixels.start, self.pixels.stop, device=device)
        return ((pixel >= start) & (pixel < stop)).to(dtype)

    def mean(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What takes rows (r, pixels, D) to their mean over all rows and over each cell of columns: (cells, D)."""
        if not self.shrinks:  # a cell is one pixel, or two
            start, stop = self._bounds(torch.arange(self.first, self.stop, device=device))
            first, last = start - self.pixels.start, stop - 1 - self.pixels.start

            def gathered(rows: Tensor) -> Tensor:
                line = rows.mean(dim=0)
                return (line.index_select(0, first) + line.index_select(0, last)) / 2

            return gathered
        number = self.sizes(dtype, device)[:, None]
        total = self.total(dtype, device)
        return lambda rows: total(rows.sum(dim=0)) / (number * rows.shape[0])

    def total(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What takes a row, or the sum of several, (pixels, D) to the sums over its cells: (cells, D)."""
        # A product with the cells' indicator: adaptive pooling's own kernel does not vectorise on a CPU.
        indicator = self.indicator(dtype, device)
        return lambda row: indicator @ row

    def sizes(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(cells,): the pixels that each averages."""
        start, stop = self._bounds(torch.arange(self.first, self.stop, device=device))
        return (stop - start).to(dtype)

    def _bounds(self, cell: Index) -> tuple[Index, Index]:
        return cell * self.length // self.count, -((cell + 1) * self.length // -self.count)
