"""What the backward passes of keys and values share: a tile of keys, the pixels that see it, and its weights.

A program owns a rectangle of keys and walks the pixels that see any of them, block by block. These pixels are a
rectangle too, because both bounds of a window grow with the coordinate; it is found by bisection.

A tile's keys play the part that a tile's pixels have in the other passes: they may be kept in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import size_arguments, strides_of
from .products import LOG2_E, matmul
from .window_attention_config import BackwardGridConfig
from .window_attention_tile import Rectangle, pixel_windows, tile_pixels, visibility
from .window_bounds import WindowRule, axis_queries


@triton.jit
def tile_of_keys(
    tile, tile_rows, tile_columns, sizes, rule, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr
):
    """A tile's image, first row and first column, its keys' rows and columns, and the `Rectangle` of who sees any."""
    height, width, grid_rows, grid_columns = sizes
    ratio, cell_rows, cell_columns = rule
    grid = (grid_rows, grid_columns, 0, 0)
    image, top, left, row, column, _ = tile_pixels(tile, tile_rows, tile_columns, grid, ROWS, COLUMNS)
    bottom = tl.minimum(top + ROWS, grid_rows) - 1
    right = tl.minimum(left + COLUMNS, grid_columns) - 1
    first_row, last_row = axis_queries(top, bottom, height, grid_rows, ratio, cell_rows, WINDOW)
    first_column, last_column = axis_queries(left, right, width, grid_columns, ratio, cell_columns, WINDOW)
    columns = last_column - first_column
    seen_by = Rectangle(first_row, first_column, columns, (last_row - first_row) * columns)
    return image, top, left, row, column, seen_by


@triton.jit
def visible(row, column, exists, sizes, rule, top, left, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             WINDOW: tl.constexpr):  # fmt: skip
    """The windows of a block's pixels, empty where there is none, and `visibility` of a tile's keys.

    The keys' rows and columns are made here of the tile's first, so that none waits in a register; a key beyond the
    grid has one that no window reaches.
    """
    row_start, row_stop, column_start, column_stop = pixel_windows(row, column, sizes, rule, WINDOW)
    windows = (row_start, tl.where(exists, row_stop, row_start), column_start, column_stop)
    key = tl.arange(0, ROWS * COLUMNS)
    return windows, visibility(windows, top + key // COLUMNS, left + key % COLUMNS, None)


@triton.jit
def exponentials_of_head(
    keys, key_channel_stride, query_place, query_channel_stride, limit, lse, entry, head: tl.constexpr,
    exponent_scale, block, opaque_zero, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
    LOAD_ONCE: tl.constexpr,
):  # fmt: skip
    """exp(scaled logit - log-sum-exp), (pixels, keys); times the pixel's share they are the head's weights.

    `query_place`, (pixels, PIECE), is the head's own. Keys that are not kept are loaded as `head_product` does.
    """
    if LOAD_ONCE:
        raw = matmul(tl.load(query_place), tl.trans(keys[head]), None, PRECISION)
    else:
        place, head_stride = keys
        place += tl.full((), head + 1, tl.int64) * (head_stride ^ (block * opaque_zero))
        raw = tl.zeros(limit.shape, tl.float32)
        for piece in tl.static_range(WIDTH // PIECE):
            first = tl.full((), piece * PIECE, tl.int64)
            mine = tl.load(query_place + first * query_channel_stride)
            theirs = tl.load(place + first * key_channel_stride)
            raw = matmul(mine, tl.trans(theirs), raw, PRECISION)
    base = tl.load(lse + entry + head) * LOG2_E
    # The smaller of a NaN and a number is the number: what a pixel does not see becomes -inf, NaN included.
    return tl.math.exp2(tl.minimum(raw, limit) * exponent_scale - base[:, None])


@triton.jit
def key_entries(tile_rows, tile_columns, grid_rows, grid_columns, images, opaque_zero, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """Where the program's keys are in partial sums (partials, B, h, w), int64, and whether they exist, (KEYS,) each.

    With `opaque_zero` they are computed anew: where the tile is does not wait in a register for the end of the loop
    over pixels.
    """
    grid = (grid_rows, grid_columns, 0, 0)
    image, _, _, row, column, exists = tile_pixels(
        tl.program_id(0) + opaque_zero, tile_rows, tile_columns, grid, ROWS, COLUMNS
    )
    partial = tl.program_id(1).to(tl.int64)
    return ((partial * images + image) * grid_rows + row) * grid_columns + column, exists


def tiles_of(key: Tensor, config: BackwardGridConfig) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return triton.cdiv(key.shape[1], config.rows), triton.cdiv(key.shape[2], config.columns)


def common_arguments(
    grad: Tensor, query: Tensor, key: Tensor, window: WindowRule, tiles: tuple[int, int]
) -> dict[str, float]:
    """Arguments that all the kernels of a tile of keys take."""
    return {
        **size_arguments(query, key, tiles),
        **window.arguments(),
        **strides_of("grad", grad, "image row column channel"),
        **strides_of("query", query, "image row column head channel"),
        **strides_of("key", key, "image row column head channel"),
        "images": key.shape[0],
        "opaque_zero": 0,
    }


def common_constants(
    query: Tensor, window: WindowRule, precision: str, config: BackwardGridConfig, partials: int
) -> dict[str, object]:
    """Constants that all of them take."""
    return {
        "WINDOW": window.kind,
        "HEADS": query.shape[3],
        "WIDTH": query.shape[4],
        "PRECISION": precision,
        "PARTIALS": partials,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "PIXELS": config.block_pixels,
        "SLICE": config.channel_slice,
        "PIECE": query.shape[4] if config.load_once else min(config.piece, query.shape[4]),
        "LOAD_ONCE": config.load_once,
        "TALL": config.tall,
    }
