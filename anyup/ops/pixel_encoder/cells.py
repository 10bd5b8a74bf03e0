"""The cells of adaptive average pooling along an axis, some of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def mean(self, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What takes rows (r, pixels, D) to their mean over all rows and over each cell of columns: (cells, D)."""
        cells = [self.within(cell) for cell in range(self.stop - self.first)]
        if not self.shrinks:  # a cell is one pixel, or two
            first = torch.tensor([cell.start for cell in cells], device=device)
            last = torch.tensor([cell.stop - 1 for cell in cells], device=device)

            def gathered(rows: Tensor) -> Tensor:
                line = rows.mean(dim=0)
                return (line.index_select(0, first) + line.index_select(0, last)) / 2

            return gathered
        # Row sums and a product with the cells' indicator: adaptive pooling's own kernel does not vectorise on a CPU.
        column = torch.arange(self.pixels.stop - self.pixels.start, device=device)
        start, stop = (
            torch.tensor(bounds, device=device)[:, None]
            for bounds in zip(*((cell.start, cell.stop) for cell in cells), strict=True)
        )
        indicator = ((column >= start) & (column < stop)).to(dtype)
        number = indicator.sum(dim=1, keepdim=True)
        return lambda rows: (indicator @ rows.sum(dim=0)) / (number * rows.shape[0])

    def _bounds(self, cell: int) -> tuple[int, int]:
        return cell * self.length // self.count, -((cell + 1) * self.length // -self.count)
