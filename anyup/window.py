"""The window rules: which key rows (or columns) a row (or column) of the output attends to.

A window is the product of a row range and a column range, and each range depends on one coordinate alone, so
two small integer tables describe it completely and no query-by-key mask is needed anywhere.
Tests compare every other computation of these bounds (that of the kernels) with this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RatioWindow:
    """The published window: keys within `ratio` of the query's position, as a fraction of the grid.

    `ratio <= 0` means every key.
    """

    ratio: float

    kind = "ratio"

    def bounds(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """First key (inclusive) and last key (exclusive) of each query along one axis.

        Returns two int64 CPU tensors of shape (queries,), with 0 <= start < stop <= keys.
        """
        if self.ratio <= 0:
            return _every_key(queries, keys)
        # float32 in exactly this order of operations: the published weights were trained with these roundings,
        # and float64 gives other windows on 7 to 10 % of axes at ratio 0.1.
        position = (torch.arange(queries, dtype=torch.float32, device="cpu") + 0.5) / queries
        ratio = torch.tensor(self.ratio, dtype=torch.float32, device="cpu")
        start = torch.floor((position - ratio).clamp(0, 1) * keys).long()
        stop = torch.ceil((position + ratio).clamp(0, 1) * keys).long()
        # At a tiny ratio a range can be empty, or start at the end of the grid.
        start = start.clamp(max=keys - 1)
        return start, torch.maximum(stop, start + 1)


@dataclass(frozen=True)
class CellWindow:
    """The window around the key cell that a query lies in (the published `use_natten=True`).

    Its size is odd, at least 3 and at most the grid; it is shifted, not cut, at the border.
    A ratio outside (0, 0.5) means every key.
    """

    ratio: float

    kind = "cell"

    def size(self, keys: int) -> int:
        """The number of keys in each query's range, along an axis of `keys` keys."""
        if not 0 < self.ratio < 0.5:
            return keys
        size = max(round(2 * self.ratio * keys), 3)
        return min(size + 1 if size % 2 == 0 else size, keys)

    def bounds(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """First key (inclusive) and last key (exclusive) of each query along one axis.

        Returns two int64 CPU tensors of shape (queries,), with 0 <= start < stop <= keys.
        """
        if not 0 < self.ratio < 0.5:
            return _every_key(queries, keys)
        size = self.size(keys)
        cell = ((2 * torch.arange(queries, device="cpu") + 1) * keys) // (2 * queries)
        start = (cell - size // 2).clamp(0, keys - size)
        return start, start + size


Window = RatioWindow | CellWindow | None
"""A window; None means every key."""

WINDOW_KINDS = ("ratio", "cell")


def check_ratio(ratio: Any) -> float:
    """A `window_ratio` as a float; raises a TypeError or ValueError unless it is a finite number."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"window_ratio: expected a number, got {ratio!r}")
    if not math.isfinite(ratio):
        raise ValueError(f"window_ratio: expected a finite number, got {ratio}")
    return float(ratio)


def make_window(kind: str, ratio: float) -> Window:
    """The window of a kind ("ratio", "cell" or "none"), as operator schemas and constructors name it."""
    if kind == "none":
        return None
    if kind not in WINDOW_KINDS:
        raise ValueError(f"window: expected one of {WINDOW_KINDS}, got {kind!r}")
    return RatioWindow(ratio) if kind == "ratio" else CellWindow(ratio)


def describe_window(window: Window) -> tuple[str, float]:
    """The inverse of `make_window`: (kind, ratio)."""
    return ("none", 0.0) if window is None else (window.kind, window.ratio)


def check_window(window: Window) -> None:
    """Raise a TypeError or ValueError unless `window` is a window with a finite ratio."""
    if window is None:
        return
    if not isinstance(window, (RatioWindow, CellWindow)):
        raise TypeError(f"window: expected RatioWindow, CellWindow or None, got {type(window).__name__}")
    if not -math.inf < window.ratio < math.inf:  # math.isfinite would stop a tracer whose ratio is symbolic
        raise ValueError(f"window: expected a finite ratio, got {window.ratio}")


class Part(NamedTuple):
    """Where a rectangle of pixels lies in a map: its first row and column, and the size of the whole map."""

    top: int
    left: int
    height: int
    width: int

    def check(self, rows: int, columns: int) -> None:
        """Raise a ValueError unless a rectangle of this size lies inside the map."""
        inside = self.top + rows <= self.height and self.left + columns <= self.width
        if min(self.top, self.left) < 0 or not inside:
            raise ValueError(
                f"part: expected {rows} x {columns} pixels at ({self.top}, {self.left}) to lie inside "
                f"{self.height} x {self.width}"
            )


def part_bounds(window: Window, queries: int, keys: int, first: int, total: int) -> tuple[tuple[int, ...], ...]:
    """The bounds of `queries` pixels, from pixel `first` on, of an axis with `total` pixels."""
    start, stop = axis_bounds(window, total, keys)
    return start[first : first + queries], stop[first : first + queries]


@lru_cache(maxsize=256)
def axis_bounds(window: Window, queries: int, keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`window.bounds` as two tuples of Python integers, cached by window and sizes."""
    start, stop = _every_key(queries, keys) if window is None else window.bounds(queries, keys)
    return tuple(start.tolist()), tuple(stop.tolist())


def _every_key(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    start = torch.zeros(queries, dtype=torch.long, device="cpu")
    return start, torch.full_like(start, keys)
