"""Window attention, forward, where a tile's keys are many: its averaged weights are made once and kept in memory.

What `window_attention_forward.py` computes, but the weights of a tile, too many for registers, go to memory that a
program has to itself, and come back from the L2 cache for each run of channel slices. So logits and exponentials are
made twice, for the sums and for the weights, however many channels there are, and what is left are products, whose
operands are fetched ahead. No more programs run than a card has room for, each of them tile after tile, so that the
memory is theirs and not the tiles'.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import PART, SIZES
from .products import LOG2_E, matmul
from .window_attention_tile import (
    Keys,
    grid_offsets,
    head_statistics,
    key_block,
    load_channels,
    mean_weights,
    open_queries,
    pixel_windows,
    store_channels,
    tile_keys,
    tile_pixels,
)


@triton.jit(do_not_specialize=(*SIZES, *PART, "tiles", "most_blocks"))
def _window_attention_kept_kernel(
    query, key, value, out, lse, kept,
    # (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), (B, H, W, C), (B, H, W, heads),
    # (programs, most_blocks, ROWS * COLUMNS, BLOCK)
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_image_stride, value_row_stride, value_column_stride, value_channel_stride,
    exponent_scale, opaque_zero, tiles, most_blocks,
    part_row, part_column, whole_height, whole_width,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, LOAD_ONCE: tl.constexpr, ROW_PARTIALS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS x COLUMNS pixels, all channels, one after the other; grid: as many programs as run at a time.

    No tile sees more than most_blocks * BLOCK keys. SLICES channel slices are worked on at once. WHOLE says that these
    divide the channels.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    position = None
    if part_row is not None:
        position = (part_row, part_column, whole_height, whole_width)
    matrix = tl.arange(0, PIXELS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    kept += tl.program_id(0).to(tl.int64) * most_blocks * (PIXELS * BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left, pixel_row, pixel_column, pixel_exists = tile_pixels(
            tile, tile_rows, tile_columns, sizes, ROWS, COLUMNS
        )
        rectangle = tile_keys(top, left, sizes, rule, ROWS, COLUMNS, WINDOW, position)
        windows = pixel_windows(pixel_row, pixel_column, sizes, rule, WINDOW, position)
        keys = Keys(
            key + image * key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride
        )
        values = value + image * value_image_stride
        offset = image * query_image_stride
        offset += pixel_row.to(tl.int64) * query_row_stride + pixel_column.to(tl.int64) * query_column_stride
        pixel = (image * height + pixel_row) * width + pixel_column  # int64, as the image is
        queries = open_queries(query, offset, query_head_stride, query_channel_stride, HEADS, PIECE, LOAD_ONCE)
        m_i, l_i = head_statistics(
            queries, query_channel_stride, keys, rectangle, windows, exponent_scale, opaque_zero,
            HEADS=HEADS, WIDTH=WIDTH, PIECE=PIECE, PIXELS=PIXELS, BLOCK=BLOCK, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            ROW_PARTIALS=ROW_PARTIALS,
        )  # fmt: skip
        inv_l = ()
        for head in tl.static_range(HEADS):
            if SAVE_LSE:
                place = lse + pixel * HEADS + head
                tl.store(place, (m_i[head] + tl.math.log2(l_i[head])) / LOG2_E, mask=pixel_exists)
            inv_l = inv_l + (1.0 / (l_i[head] * HEADS),)
        blocks = tl.cdiv(rectangle.count, BLOCK)
        # What one thread writes others read: after all have read the last tile's weights, after all have written these.
        tl.debug_barrier()
        for block in tl.range(0, blocks):
            averaged = mean_weights(
                queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i, inv_l, opaque_zero,
                HEADS=HEADS, WIDTH=WIDTH, PIECE=PIECE, PIXELS=PIXELS, BLOCK=BLOCK, PRECISION=PRECISION,
                LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
            tl.store(kept + block * (PIXELS * BLOCK) + matrix, averaged)
        tl.debug_barrier()
        for first in tl.range(0, channels, SLICE * SLICES):
            products = ()  # SLICES x (PIXELS, SLICE)
            for _slice in tl.static_range(SLICES):
                products = products + (tl.zeros((PIXELS, SLICE), tl.float32),)
            for block in tl.range(0, blocks):
                averaged = tl.load(kept + block * (PIXELS * BLOCK) + matrix)
                row, column, _ = key_block(block * BLOCK, rectangle, BLOCK)
                near = grid_offsets(row, column, value_row_stride, value_column_stride)
                updated = ()
                for piece in tl.static_range(SLICES):
                    carried = load_channels(
                        values, near, first + piece * SLICE, channels, value_channel_stride, SLICE, WHOLE
                    )
                    updated = updated + (matmul(averaged, carried, products[piece], PRECISION),)
                products = updated
            for piece in tl.static_range(SLICES):
                store_channels(out, products[piece], pixel, pixel_exists, first + piece * SLICE, channels, SLICE, WHOLE)
