"""What the passes of the window attention share: a tile of pixels, the keys it sees, and its logits.

A program owns a small rectangle of output pixels. The keys that its pixels see together are a rectangle of the key
grid, hardly larger than one pixel's window. Most of them are in its core: keys that every pixel of the tile sees.
In the forward pass they have the first numbers, so that only the last blocks of keys hold any that a pixel does not
see, which is decided where the logits are made, by integer bounds.

Tuples travel together, `Keys`, `Values`, `Rectangle` and `TileKeys` under names:
- `sizes`: height, width, grid_rows, grid_columns, int32;
- `rule`: ratio (float32), cell_rows, cell_columns, what the window's kind needs beyond the sizes;
- `part`: first row, first column, height and width of the whole output of which the sizes' pixels are a part, int32;
  None: they are all of it;
- `windows`: row start, row stop, column start, column stop of each pixel, (pixels,) int32 each.

Of a head, `m_i` is a pixel's pivot, which is subtracted from its logits, `l_i` its sum of exponentials, and `inv_l`
what makes an exponential a weight: the inverse sum, in the forward pass over the number of heads too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .products import matmul
from .window_bounds import axis_bounds

# A finite pivot for a row that has seen no key yet: -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.4e38)


class Keys(NamedTuple):
    """An image's keys: where they are, and their strides."""

    pointer: Any
    row_stride: Any
    column_stride: Any
    head_stride: Any
    channel_stride: Any


class Values(NamedTuple):
    """An image's values: where they are, and their strides."""

    pointer: Any
    row_stride: Any
    column_stride: Any
    channel_stride: Any


class Core(NamedTuple):
    """The keys that all pixels of a tile see, int32; `rows` or `columns` is 0 where there is none."""

    row: Any
    column: Any
    rows: Any
    columns: Any


class Rectangle(NamedTuple):
    """Keys that a pixel sees, or the pixels that see any of a tile's keys; int32."""

    first_row: Any
    first_column: Any
    columns: Any
    count: Any


class TileKeys(NamedTuple):
    """The rectangle of keys that a tile's pixels see, and its core; int32."""

    first_row: Any
    first_column: Any
    columns: Any
    count: Any
    core: Any


@triton.jit
def tile_pixels(tile, tile_rows, tile_columns, sizes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's image, first row and first column, and its pixels' rows, columns and existence, (ROWS * COLUMNS,).

    A pixel beyond the image's border repeats the last one, so that nothing it computes is special; it is not stored.
    """
    height, width, _, _ = sizes
    image = tile // (tile_rows * tile_columns)
    within = tile % (tile_rows * tile_columns)
    top = within // tile_columns * ROWS
    left = within % tile_columns * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row = top + pixel // COLUMNS
    column = left + pixel % COLUMNS
    exists = (row < height) & (column < width)
    return image.to(tl.int64), top, left, tl.minimum(row, height - 1), tl.minimum(column, width - 1), exists


@triton.jit
def pixel_windows(row, column, sizes, rule, WINDOW: tl.constexpr, part=None):
    """The window of each pixel: row start and stop, column start and stop, each of the shape of `row`."""
    height, width, grid_rows, grid_columns = sizes
    ratio, cell_rows, cell_columns = rule
    if part is not None:
        first_row, first_column, height, width = part
        row += first_row
        column += first_column
    row_start, row_stop = axis_bounds(row, height, grid_rows, ratio, cell_rows, WINDOW)
    column_start, column_stop = axis_bounds(column, width, grid_columns, ratio, cell_columns, WINDOW)
    return row_start, row_stop, column_start, column_stop


@triton.jit
def tile_keys(top, left, sizes, rule, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, part=None):
    """The rectangle of keys that a tile's pixels see: both bounds of a window grow with the pixel's coordinate."""
    height, width, _, _ = sizes
    bottom = tl.minimum(top + ROWS, height) - 1
    right = tl.minimum(left + COLUMNS, width) - 1
    first_row, core_row_stop, first_column, core_column_stop = pixel_windows(top, left, sizes, rule, WINDOW, part)
    core_row, row_stop, core_column, column_stop = pixel_windows(bottom, right, sizes, rule, WINDOW, part)
    columns = column_stop - first_column
    core_rows = tl.maximum(core_row_stop - core_row, 0)
    core_columns = tl.maximum(core_column_stop - core_column, 0)
    core = Core(core_row, core_column, core_rows, core_columns)
    return TileKeys(first_row, first_column, columns, (row_stop - first_row) * columns, core)


@triton.jit
def core_keys(rectangle):
    """Number of keys that all pixels of the tile see."""
    return rectangle.core.rows * rectangle.core.columns


@triton.jit
def row_block(block, rectangle, BLOCK: tl.constexpr):
    """Rows, columns and existence of the keys of a block, (BLOCK,), row by row; one beyond the end repeats the last.

    So too of the pixels of a block, where the rectangle is of pixels and has no core.
    """
    columns = rectangle.columns
    first = block * BLOCK
    number = tl.minimum(first + tl.arange(0, BLOCK), rectangle.count - 1)
    # One division of integers for the block, and one of floats for each key: numbers below `columns + BLOCK`, exact in
    # float32, half a key away from a whole number of rows.
    down = first // columns
    beyond = number - down * columns
    further = ((beyond.to(tl.float32) + 0.5) * (1.0 / columns.to(tl.float32))).to(tl.int32)
    exists = first + tl.arange(0, BLOCK) < rectangle.count
    return rectangle.first_row + down + further, rectangle.first_column + beyond - further * columns, exists


@triton.jit
def key_block(first, rectangle, BLOCK: tl.constexpr, FEW: tl.constexpr = False):
    """Rows, columns and existence of the keys numbered from `first` on, (BLOCK,); one beyond the end repeats the last.

    The core's columns have the first numbers, row by row from the core's first row on, the rows above the core last;
    then the other columns, in rows of the same order, those left of the core last.
    """
    columns, core = rectangle.columns, rectangle.core
    rows = rectangle.count // columns
    number = first + tl.arange(0, BLOCK)
    exists = number < rectangle.count
    number = tl.minimum(number, rectangle.count - 1)
    beside = number >= rows * core.columns
    sides = columns - core.columns
    number -= tl.where(beside, rows * core.columns, 0)
    length = tl.where(beside, sides, core.columns)
    down, along = _divide(number, length, tl.where(beside, _inverse(sides), _inverse(core.columns)), FEW)
    row = core.row + down
    column = along + tl.where(beside, core.column + core.columns, core.column)
    row -= tl.where(row >= rectangle.first_row + rows, rows, 0)
    column -= tl.where(column >= rectangle.first_column + columns, columns, 0)
    return row, column, exists


@triton.jit
def _inverse(length):
    """What `_divide` by a length takes, a scalar."""
    return tl.full((), 0xFFFFFFFF, tl.uint32) // tl.maximum(length, 1).to(tl.uint32)


@triton.jit
def _divide(number, length, inverse, FEW: tl.constexpr):
    """Quotient and remainder of integers from 0 on; FEW: the number times the length is below 2^30."""
    if FEW:
        # (number + 1/2) / length: half a key away from a whole number, more than the inverse's rounding can move it.
        twice = (2 * number + 1).to(tl.uint32)
        quotient = tl.umulhi(twice, (inverse >> 1) + tl.zeros_like(twice)).to(tl.int32)
        return quotient, number - quotient * length
    else:
        # The product with the inverse, rounded down, is at most 1 below the quotient.
        quotient = tl.umulhi(number.to(tl.uint32), inverse + tl.zeros_like(number).to(tl.uint32)).to(tl.int32)
        remainder = number - quotient * length
        more = remainder >= length
        return quotient + more.to(tl.int32), tl.where(more, remainder - length, remainder)


@triton.jit
def visibility(windows, row, column, exists):
    """+inf where a pixel sees a key and -inf elsewhere, (pixels, keys) float32: what a logit is limited to.

    `exists` None: all keys do, or have rows or columns that no window reaches.
    """
    row_start, row_stop, column_start, column_stop = windows
    # A key that does not exist is before any row. An unsigned difference compares with both ends at once.
    if exists is not None:
        row = tl.where(exists, row, -1)
    beyond_row = (row[None, :] - row_start[:, None]).to(tl.uint32, bitcast=True)
    beyond_column = (column[None, :] - column_start[:, None]).to(tl.uint32, bitcast=True)
    rows = (row_stop - row_start).to(tl.uint32, bitcast=True)
    columns = (column_stop - column_start).to(tl.uint32, bitcast=True)
    return tl.where((beyond_row < rows[:, None]) & (beyond_column < columns[:, None]), float("inf"), float("-inf"))


@triton.jit
def in_shares(matrix, ROW_PARTIALS: tl.constexpr):
    """(pixels, keys) as (pixels, runs, ROW_PARTIALS, 2): a share is what a thread with pairs of keys holds."""
    return tl.reshape(matrix, (matrix.shape[0], matrix.shape[1] // (2 * ROW_PARTIALS), ROW_PARTIALS, 2))


@triton.jit
def of_shares(numbers, WHAT: tl.constexpr):
    """The "max" or "sum" of each share's numbers, (pixels, ROW_PARTIALS)."""
    if WHAT == "max":
        return tl.max(tl.max(numbers, axis=3), axis=1)
    else:
        return tl.sum(tl.sum(numbers, axis=3), axis=1)


@triton.jit
def grid_offsets(row, column, row_stride, column_stride):
    """Where rows and columns of a grid are, int64."""
    return row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride


@triton.jit
def open_queries(
    query, offset, head_stride, channel_stride, HEADS: tl.constexpr, WIDTH: tl.constexpr, LOAD_ONCE: tl.constexpr
):
    """The queries for `head_product`: a tuple of each head's (pixels, WIDTH), or where they are if not kept.

    `offset` is each pixel's, int64.
    """
    place = query + offset[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * channel_stride
    if LOAD_ONCE:
        heads = ()
        for head in tl.static_range(HEADS):
            heads = heads + (tl.load(place + tl.full((), head, tl.int64) * head_stride),)
        return heads
    else:
        return place - head_stride, head_stride


@triton.jit
def open_keys(keys, row, column, HEADS: tl.constexpr, WIDTH: tl.constexpr, LOAD_ONCE: tl.constexpr):
    """The keys of a block for `head_product`: a tuple of each head's (keys, WIDTH), or where they are if not kept.

    All heads' keys are asked for at once, so that they arrive together, where the registers allow it.
    """
    offset = grid_offsets(row, column, keys.row_stride, keys.column_stride)
    place = keys.pointer + offset[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * keys.channel_stride
    if LOAD_ONCE:
        heads = ()
        for head in tl.static_range(HEADS):
            heads = heads + (tl.load(place + tl.full((), head, tl.int64) * keys.head_stride),)
        return heads
    else:
        return place, keys.head_stride


@triton.jit
def head_product(
    queries, near, query_channel_stride, key_channel_stride, head: tl.constexpr, block, opaque_zero,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr, LOAD_ONCE: tl.constexpr,
):  # fmt: skip
    """A head's queries times its keys of a block, (pixels, keys) float32.

    Where they would take all registers queries are not kept: those of float32, split in two for `tf32x3`, and many wide
    heads. They are multiplied in pieces of PIECE channels, which is the width that they were opened with. `opaque_zero`
    keeps the load, the splitting and every address inside the loop over blocks.
    """
    if LOAD_ONCE:
        return matmul(queries[head], tl.trans(near[head]), None, PRECISION)
    else:
        place, head_stride = queries
        mine = place + tl.full((), head + 1, tl.int64) * (head_stride ^ (block * opaque_zero))
        place, head_stride = near
        theirs = place + tl.full((), head, tl.int64) * head_stride
        product = tl.zeros((mine.shape[0], theirs.shape[0]), tl.float32)
        for piece in tl.static_range(WIDTH // PIECE):
            first = tl.full((), piece * PIECE, tl.int64)
            query = tl.load(mine + first * query_channel_stride)
            key = tl.load(theirs + first * key_channel_stride)
            product = matmul(query, tl.trans(key), product, PRECISION)
        return product


@triton.jit
def load_channels(tensor, offset, first, channels, channel_stride, SLICE: tl.constexpr, WHOLE: tl.constexpr):
    """Channels `first` ... `first + SLICE - 1` of rows at `offset` (int64), (rows, SLICE); zeros beyond the last.

    WHOLE says that all slices are whole.
    """
    channel = first + tl.arange(0, SLICE)
    place = tensor + offset[:, None] + channel.to(tl.int64)[None, :] * channel_stride
    if WHOLE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(channel < channels)[None, :], other=0.0)


@triton.jit
def sees_several(windows):
    """1 for a pixel that sees several keys and 0 for one that sees a single key, (pixels,) float32.

    The weight of a single key is constant and its dS zero: this factor makes it so exactly, where the difference of
    two differently rounded products would not.
    """
    row_start, row_stop, column_start, column_stop = windows
    return tl.where((row_stop - row_start) * (column_stop - column_start) > 1, 1.0, 0.0)


@triton.jit
def key_piece(
    near, key_channel_stride, head: tl.constexpr, piece: tl.constexpr, PIECE: tl.constexpr, LOAD_ONCE: tl.constexpr
):
    """PIECE channels of a head's keys of a block, (keys, PIECE); a kept head is one piece."""
    if LOAD_ONCE:
        return near[head]
    else:
        place, head_stride = near
        place += tl.full((), head, tl.int64) * head_stride + tl.full((), piece * PIECE, tl.int64) * key_channel_stride
        return tl.load(place)


@triton.jit
def head_statistics(
    queries, query_channel_stride, keys, rectangle, windows, exponent_scale, opaque_zero,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, LOAD_ONCE: tl.constexpr, ROW_PARTIALS: tl.constexpr,
):  # fmt: skip
    """Each head's pivot, scaled for exp2, and sum of exponentials over the tile's keys: tuples of (PIXELS,).

    Until the end each of ROW_PARTIALS shares of a block's keys has a pivot and a sum of its own: where a share is what
    one thread holds of a product, no thread asks another in the loop.
    """
    m_i = ()
    l_i = ()
    for _head in tl.static_range(HEADS):
        m_i = m_i + (tl.full((PIXELS, ROW_PARTIALS), LOWEST, tl.float32),)
        l_i = l_i + (tl.zeros((PIXELS, ROW_PARTIALS), tl.float32),)
    for block in tl.range(0, tl.cdiv(rectangle.count, BLOCK)):
        row, column, exists = key_block(block * BLOCK, rectangle, BLOCK)
        near = open_keys(keys, row, column, HEADS, PIECE, LOAD_ONCE)
        limit = tl.full((PIXELS, BLOCK), float("inf"), tl.float32)
        if block * BLOCK + BLOCK > core_keys(rectangle):
            limit = visibility(windows, row, column, exists)
        now_m = ()
        now_l = ()
        for head in tl.static_range(HEADS):
            raw = head_product(
                queries, near, query_channel_stride, keys.channel_stride, head, block, opaque_zero,
                WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
            # The smaller of a NaN and a number is the number: what a pixel does not see becomes -inf, NaN included.
            raw = in_shares(tl.minimum(raw, limit), ROW_PARTIALS)
            now = tl.maximum(m_i[head], of_shares(raw, "max") * exponent_scale)
            powers = tl.math.exp2(raw * exponent_scale - now[:, None, :, None])
            now_m = now_m + (now,)
            now_l = now_l + (l_i[head] * tl.math.exp2(m_i[head] - now) + of_shares(powers, "sum"),)
        m_i = now_m
        l_i = now_l
    all_m = ()
    all_l = ()
    for head in tl.static_range(HEADS):
        now = tl.max(m_i[head], axis=1)
        all_m = all_m + (now,)
        all_l = all_l + (tl.sum(l_i[head] * tl.math.exp2(m_i[head] - now[:, None]), axis=1),)
    return all_m, all_l


@triton.jit
def mean_weights(
    queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i, inv_l, opaque_zero,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, LOAD_ONCE: tl.constexpr,
):  # fmt: skip
    """The heads' averaged weights of a block of keys, (PIXELS, BLOCK) float32."""
    row, column, exists = key_block(block * BLOCK, rectangle, BLOCK)
    near = open_keys(keys, row, column, HEADS, PIECE, LOAD_ONCE)
    weights = tl.zeros((PIXELS, BLOCK), tl.float32)
    for head in tl.static_range(HEADS):
        raw = head_product(
            queries, near, query_channel_stride, keys.channel_stride, head, block, opaque_zero,
            WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
        )  # fmt: skip
        weights += tl.math.exp2(raw * exponent_scale - m_i[head][:, None]) * inv_l[head][:, None]
    if block * BLOCK + BLOCK > core_keys(rectangle):
        # Once for all heads; what a pixel does not see may be anything here, infinity and NaN included.
        weights = tl.where(visibility(windows, row, column, exists) > 0, weights, 0.0)
    return weights


@triton.jit
def store_channels(out, product, pixel, exists, first, channels, SLICE: tl.constexpr, WHOLE: tl.constexpr):
    """Write (pixels, SLICE) to the result's channels from `first` on, which nobody here reads: L2 may drop it first."""
    channel = first + tl.arange(0, SLICE)
    place = out + pixel[:, None] * channels + channel[None, :]
    if WHOLE:
        tl.store(place, product, mask=exists[:, None], cache_modifier=".cs")
    else:
        tl.store(place, product, mask=exists[:, None] & (channel < channels)[None, :], cache_modifier=".cs")
