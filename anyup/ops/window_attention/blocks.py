"""The window in FlexAttention's form: which blocks of keys a tile of pixels visits, and which of them it sees in part.

Pixels and keys are numbered tile by tile, so that the 128 queries of a block are a rectangle of neighbouring pixels and
the 64 keys of a block a square of the grid. A window is a rectangle of the grid: with keys numbered row by row a block
would be a strip as wide as the grid, most of it outside. For each tile, at 448 from 32, 1024 from 64 and 2048 from 128,
square blocks of 64 hold 173, 392 and 1008 keys, squares of 128 keys 255, 513 and 1230, and strips of 128 keys 320, 904
and 3274, where a pixel's own window holds 49, 169 and 637.

Everything is computed from the two tables of each axis; no tensor here has queries times keys values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from anyup.window import Part, Window, part_bounds

QUERY_TILE = (8, 16)
"""Rows and columns of a tile of pixels: 128 queries, which every block size of FlexAttention's kernels divides."""

KEY_BLOCK = (8, 8)
"""Rows and columns of a block of keys."""

_CPU = torch.device("cpu")

QUERIES = QUERY_TILE[0] * QUERY_TILE[1]
KEYS = KEY_BLOCK[0] * KEY_BLOCK[1]


@dataclass(frozen=True)
class Axis:
    """One axis of the output, cut into tiles, against the same axis of the grid, cut into blocks.

    The last tile is padded with queries beyond the axis. They have the range of the last query, so that the tile visits
    no further block for them.

    Attributes:
        start, stop: each query's range of keys, (tiles, queries in a tile) int32.
        visited: which blocks hold a key that some query of a tile may see, (tiles, blocks) bool.
        full: which blocks hold only keys that every query of a tile sees, (tiles, blocks) bool.
        position: each key's position, -1 for those that pad the last block, (blocks, keys in a block) int32.
    """

    start: Tensor
    stop: Tensor
    visited: Tensor
    full: Tensor
    position: Tensor

    @property
    def tiles(self) -> int:
        return self.visited.shape[0]

    @property
    def blocks(self) -> int:
        return self.visited.shape[1]


@dataclass(frozen=True)
class Blocks:
    """The blocks that each tile of a rectangle of tiles visits. T tiles, K blocks in the whole grid.

    Attributes:
        bounds: first row, last row (exclusive), first column and last column of each query, (4, T, QUERIES) int32.
        partial_count, full_count: how many blocks a tile visits in part and as a whole, (T,) int32.
        partial_index, full_index: the numbers of these blocks, the first `count` of each row, (T, K) int32.
    """

    bounds: Tensor
    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor


@dataclass(frozen=True)
class Tiling:
    """An output cut into tiles of pixels, and the grid cut into blocks of keys."""

    rows: Axis
    columns: Axis

    def rectangles(self, most_tiles: int) -> Iterator[tuple[slice, slice]]:
        """Rectangles of tiles (rows of tiles, columns of tiles) of one size, at least 2 and about `most_tiles` each.

        The last rectangles overlap the ones before, so that all have the same size.
        """
        rows, columns = self.rows.tiles, self.columns.tiles
        most = max(2, most_tiles)
        wide = min(columns, most)
        high = min(rows, max(1, most // columns))
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                top, left = min(row, rows - high), min(column, columns - wide)
                yield slice(top, top + high), slice(left, left + wide)

    def blocks(self, rows: slice, columns: slice) -> Blocks:
        """The blocks that a rectangle of tiles visits."""

        def both(of_rows: Tensor, of_columns: Tensor) -> Tensor:
            """(tiles, K): whether the condition holds for a block's rows and for its columns."""
            return (of_rows[rows, None, :, None] & of_columns[None, columns, None, :]).flatten(2).flatten(0, 1)

        full = both(self.rows.full, self.columns.full)
        partial = both(self.rows.visited, self.columns.visited) & ~full
        shape = (rows.stop - rows.start, columns.stop - columns.start, *QUERY_TILE)
        bounds = [table[rows, None, :, None].expand(shape) for table in (self.rows.start, self.rows.stop)]
        bounds += [table[None, columns, None, :].expand(shape) for table in (self.columns.start, self.columns.stop)]
        return Blocks(torch.stack(bounds).flatten(3).flatten(1, 2), *_listed(partial), *_listed(full))

    def positions(self) -> Tensor:
        """Row and column of each key, block by block, (2, K, KEYS) int32; -1 where a block reaches beyond the grid."""
        shape = (self.rows.blocks, self.columns.blocks, *KEY_BLOCK)
        rows = self.rows.position[:, None, :, None].expand(shape)
        columns = self.columns.position[None, :, None, :].expand(shape)
        return torch.stack((rows, columns)).flatten(3).flatten(1, 2)


@lru_cache(maxsize=64)
def blocks_of(
    window: Window,
    output_size: tuple[int, int],
    grid_size: tuple[int, int],
    part: Part | None = None,
    device: torch.device = _CPU,
) -> Tiling:
    """The tiling of an output (H, W), or a part of one, and a grid (h, w), its tables on a device.

    Each has at least two tiles or blocks, because torch.compile would specialise the kernel on a single one.
    """
    first, whole = ((0, 0), output_size) if part is None else (part[:2], part[2:])
    tiles = [-(-size // tile) for size, tile in zip(output_size, QUERY_TILE, strict=True)]
    blocks = [-(-size // block) for size, block in zip(grid_size, KEY_BLOCK, strict=True)]
    for counts in (tiles, blocks):
        counts[0] = max(counts[0], 2 if counts[1] == 1 else 1)
    with torch.inference_mode(False):  # later calls outside inference mode use the tables too
        return Tiling(
            *(
                _axis(
                    part_bounds(window, output_size[n], grid_size[n], first[n], whole[n]),
                    grid_size[n],
                    (tiles[n], QUERY_TILE[n]),
                    (blocks[n], KEY_BLOCK[n]),
                    device,
                )
                for n in range(2)
            )
        )


def _axis(
    bounds: tuple[tuple[int, ...], ...],
    keys: int,
    tiles: tuple[int, int],
    blocks: tuple[int, int],
    device: torch.device,
) -> Axis:
    """The axis of queries with `bounds` in `tiles` (count, length) against `keys` in `blocks` (count, length)."""
    last = torch.arange(tiles[0] * tiles[1], device="cpu").clamp(max=len(bounds[0]) - 1)
    start, stop = (torch.tensor(bound, device="cpu", dtype=torch.int32)[last].view(tiles) for bound in bounds)
    position = torch.arange(blocks[0] * blocks[1], device="cpu", dtype=torch.int32).view(blocks)
    first, end = position[:, 0], position[:, -1] + 1
    visited = (first < stop.amax(1, keepdim=True)) & (end > start.amin(1, keepdim=True))
    full = (first >= start.amax(1, keepdim=True)) & (end <= stop.amin(1, keepdim=True))
    tables = (start, stop, visited, full, torch.where(position < keys, position, -1))
    return Axis(*(table.to(device) for table in tables))


def _listed(which: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) bool -> the number of true entries of each row, and all positions with the true ones first; both int32."""
    order = torch.argsort(which.to(torch.int8), dim=1, descending=True, stable=True)
    return which.sum(dim=1, dtype=torch.int32), order.int()
