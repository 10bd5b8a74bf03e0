"""How many keys a tile of pixels sees: what a kernel's cut depends on."""

from __future__ import annotations

from functools import lru_cache

from anyup.window import Window, axis_bounds


@lru_cache(maxsize=256)
def most_keys(window: Window, output_size: tuple[int, int], grid_size: tuple[int, int], tile: tuple[int, int]) -> int:
    """The largest rectangle of keys that a tile (rows, columns) of the output sees."""
    largest = 1
    for queries, keys, length in zip(output_size, grid_size, tile, strict=True):
        largest *= max(axis_unions(window, queries, keys, length))
    return largest


def axis_unions(window: Window, queries: int, keys: int, length: int) -> list[int]:
    """Along one axis, the keys that each run of `length` queries sees together; the last run may be shorter."""
    start, stop = axis_bounds(window, queries, keys)
    return [stop[min(first + length, queries) - 1] - start[first] for first in range(0, queries, length)]
