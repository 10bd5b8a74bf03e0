"""What the passes of the window attention share: a tile of pixels, the keys it sees, and its logits.

A program owns a small rectangle of output pixels. The keys that its pixels see together are a rectangle of the key
grid, hardly larger than one pixel's window; they are numbered row by row and worked on in blocks. Which of them a
pixel does not see is decided where the logits are made, by integer bounds.

Tuples travel together:
- `sizes`: height, width, grid_rows, grid_columns, int32;
- `rule`: ratio (float32), cell_rows, cell_columns, what the window's kind needs beyond the sizes;
- `rectangle`: first row, first column, columns and number of keys of a tile, int32;
- `windows`: row start, row stop, column start, column stop of each pixel, (pixels,) int32 each;
- `keys`: the pointer to an image's keys and its row, column, head and channel strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_bounds import axis_bounds

LOG2_E = tl.constexpr(1.4426950408889634)


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
def pixel_windows(row, column, sizes, rule, WINDOW: tl.constexpr):
    """The window of each pixel: row start and stop, column start and stop, each of the shape of `row`."""
    height, width, grid_rows, grid_columns = sizes
    ratio, cell_rows, cell_columns = rule
    row_start, row_stop = axis_bounds(row, height, grid_rows, ratio, cell_rows, WINDOW)
    column_start, column_stop = axis_bounds(column, width, grid_columns, ratio, cell_columns, WINDOW)
    return row_start, row_stop, column_start, column_stop


@triton.jit
def tile_keys(top, left, sizes, rule, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr):
    """The rectangle of keys that a tile's pixels see: both bounds of a window grow with the pixel's coordinate."""
    height, width, _, _ = sizes
    bottom = tl.minimum(top + ROWS, height) - 1
    right = tl.minimum(left + COLUMNS, width) - 1
    first_row, _, first_column, _ = pixel_windows(top, left, sizes, rule, WINDOW)
    _, last_row, _, last_column = pixel_windows(bottom, right, sizes, rule, WINDOW)
    columns = last_column - first_column
    return first_row, first_column, columns, (last_row - first_row) * columns


@triton.jit
def key_block(block, rectangle, BLOCK: tl.constexpr):
    """Rows, columns and existence of the keys of a block, (BLOCK,)."""
    first_row, first_column, columns, count = rectangle
    number = block * BLOCK + tl.arange(0, BLOCK)
    # One division of integers for the block, and one of floats for each key: numbers below `columns + BLOCK`, exact in
    # float32, half a key away from a whole number of rows.
    down = (block * BLOCK) // columns
    beyond = number - down * columns
    further = ((beyond.to(tl.float32) + 0.5) * (1.0 / columns.to(tl.float32))).to(tl.int32)
    return first_row + down + further, first_column + beyond - further * columns, number < count


@triton.jit
def visibility(windows, row, column, exists):
    """+inf where a pixel sees a key and -inf elsewhere, (pixels, keys) float32: what a logit is limited to."""
    row_start, row_stop, column_start, column_stop = windows
    # A key that does not exist is before any row. An unsigned difference compares with both ends at once.
    row = tl.where(exists, row, -1)
    beyond_row = (row[None, :] - row_start[:, None]).to(tl.uint32, bitcast=True)
    beyond_column = (column[None, :] - column_start[:, None]).to(tl.uint32, bitcast=True)
    rows = (row_stop - row_start).to(tl.uint32, bitcast=True)
    columns = (column_stop - column_start).to(tl.uint32, bitcast=True)
    return tl.where((beyond_row < rows[:, None]) & (beyond_column < columns[:, None]), float("inf"), float("-inf"))


@triton.jit
def open_queries(
    query, offset, head_stride, channel_stride, HEADS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr
):
    """The queries for `head_product`: a tuple of each head's (pixels, WIDTH), or where they are if not kept.

    `offset` is each pixel's, int64.
    """
    place = query + offset[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * channel_stride
    if KEEP:
        heads = ()
        for head in tl.static_range(HEADS):
            heads = heads + (tl.load(place + tl.full((), head, tl.int64) * head_stride),)
        return heads
    else:
        return place - head_stride, head_stride


@triton.jit
def open_keys(keys, row, column, exists, HEADS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """The keys of a block for `head_product`: a tuple of each head's (keys, WIDTH), or where they are if not kept.

    All heads' keys are asked for at once, so that they arrive together, where the registers allow it.
    """
    key, row_stride, column_stride, head_stride, channel_stride = keys
    offset = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    place = key + offset[:, None] + tl.arange(0, WIDTH).to(tl.int64)[None, :] * channel_stride
    if KEEP:
        heads = ()
        for head in tl.static_range(HEADS):
            mine = place + tl.full((), head, tl.int64) * head_stride
            heads = heads + (tl.load(mine, mask=exists[:, None], other=0.0),)
        return heads
    else:
        return place, head_stride


@triton.jit
def head_product(
    queries, near, query_channel_stride, key_channel_stride, head: tl.constexpr, exists, block, again,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A head's queries times its keys of a block, (pixels, keys) float32.

    Where they would take all registers queries are not kept: those of float32, split in two for `tf32x3`, and many wide
    heads. They are multiplied in pieces of PIECE channels, which is the width that they were opened with. `again` is a
    0 that the compiler knows nothing of, or it would move the load, the splitting and every address out of the loop
    over blocks; an exclusive or, because a sum would be taken apart and half of it moved.
    """
    if KEEP:
        return tl.dot(queries[head], tl.trans(near[head]), input_precision=PRECISION)
    else:
        place, head_stride = queries
        mine = place + tl.full((), head + 1, tl.int64) * (head_stride ^ (block * again))
        place, head_stride = near
        theirs = place + tl.full((), head, tl.int64) * head_stride
        product = tl.zeros((mine.shape[0], theirs.shape[0]), tl.float32)
        for piece in tl.static_range(WIDTH // PIECE):
            first = tl.full((), piece * PIECE, tl.int64)
            query = tl.load(mine + first * query_channel_stride)
            key = tl.load(theirs + first * key_channel_stride, mask=exists[:, None], other=0.0)
            product = tl.dot(query, tl.trans(key), product, input_precision=PRECISION)
        return product


@triton.jit
def load_channels(tensor, offset, exists, first, channels, channel_stride, SLICE: tl.constexpr):
    """Channels `first` ... `first + SLICE - 1` of rows at `offset` (int64), (rows, SLICE); zeros elsewhere."""
    channel = first + tl.arange(0, SLICE)
    place = tensor + offset[:, None] + channel.to(tl.int64)[None, :] * channel_stride
    return tl.load(place, mask=exists[:, None] & (channel < channels)[None, :], other=0.0)


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
    near, key_channel_stride, head: tl.constexpr, piece: tl.constexpr, exists, PIECE: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """PIECE channels of a head's keys of a block, (keys, PIECE); a kept head is one piece."""
    if KEEP:
        return near[head]
    else:
        place, head_stride = near
        place += tl.full((), head, tl.int64) * head_stride + tl.full((), piece * PIECE, tl.int64) * key_channel_stride
        return tl.load(place, mask=exists[:, None], other=0.0)
