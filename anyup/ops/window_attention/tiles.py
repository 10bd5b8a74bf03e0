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
    return [union for union, _ in axis_unions_and_cores(window, queries, keys, length)]


def axis_unions_and_cores(window: Window, queries: int, keys: int, length: int) -> list[tuple[int, int]]:
    """Along one axis, the keys that any and that all of each run of `length` queries see."""
    start, stop = axis_bounds(window, queries, keys)
    runs = [(first, min(first + length, queries) - 1) for first in range(0, queries, length)]
    return [(stop[last] - start[first], max(0, stop[first] - start[last])) for first, last in runs]
