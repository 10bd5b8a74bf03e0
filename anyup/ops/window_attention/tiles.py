"""How many keys a tile of pixels sees: what a kernel's config depends on."""

from __future__ import annotations

from functools import lru_cache

from anyup.window import Window, axis_bounds


@lru_cache(maxsize=256)
def most_keys(
    window: Window,
    output_size: tuple[int, int],
    grid_size: tuple[int, int],
    tile: tuple[int, int],
    first: tuple[int, int] = (0, 0),
) -> int:
    """The largest rectangle of keys that a tile (rows, columns) of the output sees; `first` is less than a tile.

    Tiles start at row and column `first`: that of the first pixel of a part, modulo the tile, so that the number is one
    for all parts of an output that are cut along the same lines.
    """
    largest = 1
    for queries, keys, length, origin in zip(output_size, grid_size, tile, first, strict=True):
        largest *= max(axis_unions(window, queries, keys, length, origin))
    return largest


def axis_unions(window: Window, queries: int, keys: int, length: int, first: int = 0) -> list[int]:
    """Along one axis, the keys that each run of `length` queries from the first one on sees together."""
    return [union for union, _ in axis_unions_and_cores(window, queries, keys, length, first)]


def axis_unions_and_cores(
    window: Window, queries: int, keys: int, length: int, first: int = 0
) -> list[tuple[int, int]]:
    """Along one axis, the keys that any and that all of each run of `length` queries see; the last may be shorter."""
    start, stop = axis_bounds(window, queries, keys)
    runs = [(low, min(low + length, queries) - 1) for low in range(first, queries, length)]
    return [(stop[last] - start[first], max(0, stop[first] - start[last])) for first, last in runs]
