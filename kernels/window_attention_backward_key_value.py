"""Window attention, backward, of keys and values at once: a tile of keys walks the pixels that see it a single time.

The kernels of `window_attention_backward_grid` each make the weights and fetch the output's gradient, the largest
tensor there is. Here both are made and fetched once: a block of pixels makes its weights, multiplies each slice of
channels of the gradient with the values, for dP, and with the weights, for dv, and has with dP what dk takes. It needs
the registers for the sums of all channels of a tile's keys, so this is for few heads, half precision and not too many
channels (`kernels.config.backward_key_value_configs`).

Sums are in a fixed order; with one partial sum the results are the gradients, with more these sums, (partials, ...).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Launch, strides_of
from .products import LOG2_E, matmul
from .window_attention_config import BackwardGridConfig
from .window_attention_keys_tile import (
    common_arguments,
    common_constants,
    exponentials_of_head,
    key_entries,
    tile_of_keys,
    tiles_of,
    visible,
)
from .window_attention_tile import load_channels, open_queries, row_block, sees_several
from .window_bounds import WindowRule


@triton.jit(do_not_specialize=SIZES)
def _window_attention_backward_key_value_kernel(
    grad, query, key, value, lse, inv_l, delta, grad_key, grad_value,
    # (B, H, W, C), (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), (B, H, W, heads) thrice;
    # (partials, *key) and (partials, *value)
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    grad_image_stride, grad_row_stride, grad_column_stride, grad_channel_stride,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_image_stride, value_row_stride, value_column_stride, value_channel_stride,
    scale, exponent_scale, images, opaque_zero,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, LOAD_ONCE: tl.constexpr, TALL: tl.constexpr, REFETCH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS keys and a share of its pixels, all heads and all channels.

    Grid: (tiles of all images, PARTIALS).
    """
    KEYS: tl.constexpr = ROWS * COLUMNS
    PIECES: tl.constexpr = WIDTH // PIECE
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    image, top, left, key_row, key_column, rectangle = tile_of_keys(
        tl.program_id(0), tile_rows, tile_columns, sizes, rule, ROWS, COLUMNS, WINDOW
    )
    row64 = key_row.to(tl.int64)
    column64 = key_column.to(tl.int64)
    keys = open_queries(
        key + image * key_image_stride, row64 * key_row_stride + column64 * key_column_stride,
        key_head_stride, key_channel_stride, HEADS, PIECE, LOAD_ONCE,
    )  # fmt: skip
    value += image * value_image_stride
    value_offset = row64 * value_row_stride + column64 * value_column_stride
    query += image * query_image_stride
    grad += image * grad_image_stride
    key_sums = ()  # each head's pieces, (KEYS, PIECE), the other way round where TALL
    for _piece in tl.static_range(HEADS * PIECES):
        key_sums = key_sums + (tl.zeros((PIECE, KEYS) if TALL else (KEYS, PIECE), tl.float32),)
    value_sums = ()  # SLICES x (SLICE, KEYS): as (KEYS, SLICE) all warps would take all weights
    for _slice in tl.static_range(SLICES):
        value_sums = value_sums + (tl.zeros((SLICE, KEYS), tl.float32),)
    head_channel = tl.arange(0, PIECE).to(tl.int64)
    for block in tl.range(tl.program_id(1), tl.cdiv(rectangle.count, PIXELS), PARTIALS):
        row, column, exists = row_block(block, rectangle, PIXELS)
        windows, limit = visible(row, column, exists, sizes, rule, top, left, ROWS=ROWS, COLUMNS=COLUMNS, WINDOW=WINDOW)
        several = sees_several(windows)
        entry = ((image * height + row) * width + column) * HEADS
        query_place = query + head_channel[None, :] * query_channel_stride
        query_place += (row.to(tl.int64) * query_row_stride + column.to(tl.int64) * query_column_stride)[:, None]
        total = tl.zeros((PIXELS, KEYS), tl.float32)
        weights = ()
        for head in tl.static_range(HEADS):
            place = query_place + tl.full((), head, tl.int64) * query_head_stride  # (PIXELS, PIECE)
            exponentials = exponentials_of_head(
                keys, key_channel_stride, place, query_channel_stride, limit, lse, entry, head, exponent_scale, block,
                opaque_zero,
                WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
            weights = weights + (exponentials * tl.load(inv_l + entry + head)[:, None],)
            total += weights[head]
        mean_weights = (total / HEADS).to(grad.dtype.element_ty)

        grad_offset = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
        product = tl.zeros((PIXELS, KEYS), tl.float32)
        updated = ()
        for piece in tl.static_range(SLICES):
            outer = load_channels(grad, grad_offset, piece * SLICE, channels, grad_channel_stride, SLICE, WHOLE)
            # Values that the compiler knows to be the same for each block would all wait in registers.
            first = piece * SLICE + block * opaque_zero
            carried = load_channels(value, value_offset, first, channels, value_channel_stride, SLICE, WHOLE)
            updated = updated + (matmul(tl.trans(outer), mean_weights, value_sums[piece], PRECISION),)
            product = matmul(outer, tl.trans(carried), product, PRECISION)
        value_sums = updated
        product = product * (several * (1.0 / HEADS))[:, None]

        if REFETCH:  # places that the compiler takes for others, or the queries of all heads would have waited
            row, column, exists = row_block(block + block * opaque_zero, rectangle, PIXELS)
            query_place = query + head_channel[None, :] * query_channel_stride
            query_place += (row.to(tl.int64) * query_row_stride + column.to(tl.int64) * query_column_stride)[:, None]
            entry = ((image * height + row) * width + column) * HEADS
        updated = ()
        for head in tl.static_range(HEADS):
            place = query_place + tl.full((), head, tl.int64) * query_head_stride
            mean = tl.load(delta + entry + head) * several
            inner = (weights[head] * (product - mean[:, None])).to(query.dtype.element_ty)
            for piece in tl.static_range(PIECES):
                mine = tl.load(place + tl.full((), piece * PIECE, tl.int64) * query_channel_stride)
                before = key_sums[head * PIECES + piece]
                if TALL:
                    now = matmul(tl.trans(mine), inner, before, PRECISION)
                else:
                    now = matmul(tl.trans(inner), mine, before, PRECISION)
                updated = updated + (now,)
        key_sums = updated

    entry, key_exists = key_entries(
        tile_rows, tile_columns, grid_rows, grid_columns, images, opaque_zero, ROWS, COLUMNS
    )
    for head in tl.static_range(HEADS):
        for piece in tl.static_range(PIECES):
            place = grad_key + (entry[:, None] * HEADS + head) * WIDTH + (piece * PIECE + head_channel)[None, :]
            gradient = key_sums[head * PIECES + piece] * scale
            tl.store(place, tl.trans(gradient) if TALL else gradient, mask=key_exists[:, None])
    for piece in tl.static_range(SLICES):
        channel = piece * SLICE + tl.arange(0, SLICE)
        place = grad_value + entry[:, None] * channels + channel[None, :]
        tl.store(place, tl.trans(value_sums[piece]), mask=key_exists[:, None] & (channel < channels)[None, :])


def plan_backward_key_value(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    inv_l: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    window: WindowRule,
    scale: float,
    precision: str,
    config: BackwardGridConfig,
) -> Launch:
    """The launch that fills `grad_key`, (partials, B, h, w, heads, d), and `grad_value`, (partials, B, h, w, C).

    Both are contiguous. `inv_l` and `delta` are what the pass over the queries stored; the other arguments are as for
    that pass. All channels and all heads are a program's: the config's `slices` and `heads` are not looked at.
    """
    tiles = tiles_of(key, config)
    channels = value.shape[3]
    return Launch(
        kernel=_window_attention_backward_key_value_kernel,
        grid=(key.shape[0] * tiles[0] * tiles[1], grad_key.shape[0], 1),
        arguments={
            "grad": grad,
            "query": query,
            "key": key,
            "value": value,
            "lse": lse,
            "inv_l": inv_l,
            "delta": delta,
            "grad_key": grad_key,
            "grad_value": grad_value,
            **common_arguments(grad, query, key, window, tiles),
            "channels": channels,
            **strides_of("value", value, "image row column channel"),
            "scale": scale,
            "exponent_scale": scale * LOG2_E.value,
        },
        constants={
            **common_constants(query, window, precision, config, grad_key.shape[0]),
            "SLICES": triton.cdiv(channels, config.channel_slice),
            "REFETCH": config.refetch,
            "WHOLE": channels % config.channel_slice == 0,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
