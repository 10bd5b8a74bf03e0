"""How many keys a tile of pixels sees, on which a kernel's config depends."""

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

    Tiles start at row and column `first`: the first pixel of a part, modulo the tile. So parts whose tiles lie on the
    same lines of the output have the same number.
    """
    largest = 1
    for queries, keys, length, origin in zip(output_size, grid_size, tile, first, strict=True):
        largest *= max(axis_unions(window, queries, keys, length, origin))
    return largest


def axis_unions(window: Window, queries: int, keys: int, length: int, first: int = 0) -> list[int]:
    """Along one axis, the size of the union of the windows of each run of `length` queries, from query `first` on."""
    return [union for union, _ in axis_unions_and_cores(window, queries, keys, length, first)]


def axis_unions_and_cores(
    window: Window, queries: int, keys: int, length: int, first: int = 0
) -> list[tuple[int, int]]:
    """Along one axis, for each run of `length` queries: the keys that any of them sees, and the keys that all see.

    The last run may be shorter.
    """
    start, stop = axis_bounds(window, queries, keys)
    runs = [(low, min(low + length, queries) - 1) for low in range(first, queries, length)]
    return [(stop[last] - start[first], max(0, stop[first] - start[last])) for first, last in runs]
