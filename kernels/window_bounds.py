"""The window rules of `anyup/window.py`, inside a kernel.

A pixel's window is a row range times a column range, and each depends on one coordinate and two sizes, so a kernel
makes them from the sizes alone: no table is copied from the host, no mask is read. Tests hold these functions equal
to `anyup/window.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

EVERY_KEY = tl.constexpr(0)
RATIO = tl.constexpr(1)
CELL = tl.constexpr(2)


@dataclass(frozen=True)
class WindowRule:
    """A window on given sizes, as kernels take it.

    Attributes:
        kind: EVERY_KEY, RATIO or CELL.
        ratio: of the ratio window, positive.
        cell_rows, cell_columns: keys in a cell window, along each axis.
    """

    kind: int
    ratio: float = 0.0
    cell_rows: int = 0
    cell_columns: int = 0

    def arguments(self) -> dict[str, float]:
        """The kernel arguments that say it, beside the constant WINDOW."""
        return {"ratio": self.ratio, "cell_rows": self.cell_rows, "cell_columns": self.cell_columns}


@triton.jit
def axis_bounds(query, queries, keys, ratio, cell_size, WINDOW: tl.constexpr):
    """First key (inclusive) and last key (exclusive) along one axis, of `query` among `queries`, any shape, int32.

    `ratio` is for the ratio window, float32; `cell_size` is the cell window's number of keys, made on the host.
    """
    if WINDOW == RATIO:
        # float32, operation by operation as published. The quotient must be IEEE's: Triton's `/` is not, and a
        # product with the reciprocal gives other windows at a tenth of the shapes.
        position = tl.div_rn(query.to(tl.float32) + 0.5, (query * 0 + queries).to(tl.float32))
        low = tl.minimum(tl.maximum(position - ratio, 0.0), 1.0) * keys.to(tl.float32)
        high = tl.minimum(tl.maximum(position + ratio, 0.0), 1.0) * keys.to(tl.float32)
        start = tl.minimum(tl.floor(low).to(tl.int32), keys - 1)
        stop = tl.maximum(tl.ceil(high).to(tl.int32), start + 1)
    elif WINDOW == CELL:
        cell = ((2 * query + 1) * keys) // (2 * queries)
        start = tl.minimum(tl.maximum(cell - cell_size // 2, 0), keys - cell_size)
        stop = start + cell_size
    else:
        start = query * 0
        stop = start + keys
    return start, stop


@triton.jit
def axis_queries(first_key, last_key, queries, keys, ratio, cell_size, WINDOW: tl.constexpr):
    """The queries along one axis whose windows hold any of the keys `first_key` to `last_key` (inclusive), scalars.

    First query (inclusive) and last query (exclusive), by bisection: both bounds of a window grow with the query.
    Where features are finer than pixels a key may be in nobody's window: the range is empty.
    """
    low = queries * 0
    high = queries
    while low < high:
        middle = (low + high) // 2
        _, stop = axis_bounds(middle, queries, keys, ratio, cell_size, WINDOW)
        sees = stop > first_key
        high = tl.where(sees, middle, high)
        low = tl.where(sees, low, middle + 1)
    first = low
    high = queries
    while low < high:
        middle = (low + high) // 2
        start, _ = axis_bounds(middle, queries, keys, ratio, cell_size, WINDOW)
        beyond = start > last_key
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, middle + 1)
    return first, low
