"""Window attention, backward, of the keys and values: a tile of keys walks the pixels that see it.

dk_a(j) = scale * sum_x dS_a(x, j) q_a(x) and dv(j) = sum_x P(x, j) dO(x) are sums over pixels. A program owns a
rectangle of keys and adds up alone what belongs to them, in a fixed order: no atomics, the same bits in each run. On a
small grid several programs share the pixels that see it, each with a partial sum, so that there are programs enough.

With one partial sum, a kernel's result is the gradient; with more, it is these sums, (partials, ...).
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
def _window_attention_backward_key_kernel(
    grad, query, key, value, lse, inv_l, delta, grad_key,
    # (B, H, W, C), (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), (B, H, W, heads) thrice; (partials, *key)
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    grad_image_stride, grad_row_stride, grad_column_stride, grad_channel_stride,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_image_stride, value_row_stride, value_column_stride, value_channel_stride,
    scale, exponent_scale, images, opaque_zero,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
    SLICE: tl.constexpr, LOAD_ONCE: tl.constexpr, TALL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS keys, a share of its pixels and GROUP heads.

    Grid: (tiles of all images, PARTIALS, groups of heads).
    """
    KEYS: tl.constexpr = ROWS * COLUMNS
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    image, top, left, key_row, key_column, rectangle = tile_of_keys(
        tl.program_id(0), tile_rows, tile_columns, sizes, rule, ROWS, COLUMNS, WINDOW
    )
    row64 = key_row.to(tl.int64)
    column64 = key_column.to(tl.int64)
    first_head = tl.program_id(2).to(tl.int64) * GROUP
    keys = open_queries(
        key + image * key_image_stride + first_head * key_head_stride,
        row64 * key_row_stride + column64 * key_column_stride,
        key_head_stride, key_channel_stride, GROUP, PIECE, LOAD_ONCE,
    )  # fmt: skip
    value += image * value_image_stride
    value_offset = row64 * value_row_stride + column64 * value_column_stride
    query += image * query_image_stride + first_head * query_head_stride
    grad += image * grad_image_stride
    gradients = ()  # each head's pieces, (KEYS, PIECE), the other way round where TALL
    for _piece in tl.static_range(GROUP * (WIDTH // PIECE)):
        gradients = gradients + (tl.zeros((PIECE, KEYS) if TALL else (KEYS, PIECE), tl.float32),)
    head_channel = tl.arange(0, PIECE).to(tl.int64)
    for block in tl.range(tl.program_id(1), tl.cdiv(rectangle.count, PIXELS), PARTIALS):
        row, column, exists = row_block(block, rectangle, PIXELS)
        windows, limit = visible(row, column, exists, sizes, rule, top, left, ROWS=ROWS, COLUMNS=COLUMNS, WINDOW=WINDOW)
        grad_offset = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
        product = tl.zeros((PIXELS, KEYS), tl.float32)
        for first in tl.range(0, channels, SLICE):
            outer = load_channels(grad, grad_offset, first, channels, grad_channel_stride, SLICE, WHOLE)
            carried = load_channels(value, value_offset, first, channels, value_channel_stride, SLICE, WHOLE)
            product = matmul(outer, tl.trans(carried), product, PRECISION)
        product = product / HEADS
        several = sees_several(windows)
        entry = ((image * height + row) * width + column) * HEADS + first_head
        query_place = query + head_channel[None, :] * query_channel_stride
        query_place += (row.to(tl.int64) * query_row_stride + column.to(tl.int64) * query_column_stride)[:, None]
        updated = ()
        for head in tl.static_range(GROUP):
            place = query_place + tl.full((), head, tl.int64) * query_head_stride  # (PIXELS, PIECE)
            weights = exponentials_of_head(
                keys, key_channel_stride, place, query_channel_stride, limit, lse, entry, head, exponent_scale, block,
                opaque_zero,
                WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
            several_share = tl.load(inv_l + entry + head) * several
            mean = tl.load(delta + entry + head)
            inner = weights * several_share[:, None] * (product - mean[:, None])
            inner = inner.to(query.dtype.element_ty)
            for piece in tl.static_range(WIDTH // PIECE):
                mine = tl.load(place + tl.full((), piece * PIECE, tl.int64) * query_channel_stride)
                before = gradients[head * (WIDTH // PIECE) + piece]
                if TALL:
                    now = matmul(tl.trans(mine), inner, before, PRECISION)
                else:
                    now = matmul(tl.trans(inner), mine, before, PRECISION)
                updated = updated + (now,)
        gradients = updated
    entry, key_exists = key_entries(
        tile_rows, tile_columns, grid_rows, grid_columns, images, opaque_zero, ROWS, COLUMNS
    )
    entry = entry * HEADS + first_head
    for head in tl.static_range(GROUP):
        for piece in tl.static_range(WIDTH // PIECE):
            place = grad_key + (entry[:, None] + head) * WIDTH + (piece * PIECE + head_channel)[None, :]
            gradient = gradients[head * (WIDTH // PIECE) + piece] * scale
            tl.store(place, tl.trans(gradient) if TALL else gradient, mask=key_exists[:, None])


@triton.jit(do_not_specialize=SIZES)
def _window_attention_backward_value_kernel(
    grad, query, key, lse, inv_l, grad_value,
    # (B, H, W, C), (B, H, W, heads, d), (B, h, w, heads, d), (B, H, W, heads) twice; (partials, B, h, w, C)
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    grad_image_stride, grad_row_stride, grad_column_stride, grad_channel_stride,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    exponent_scale, images, opaque_zero,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, LOAD_ONCE: tl.constexpr, TALL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS keys, a share of its pixels and SLICES channel slices.

    Grid: (tiles of all images, PARTIALS, runs of SLICES channel slices).
    """
    KEYS: tl.constexpr = ROWS * COLUMNS
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    image, top, left, key_row, key_column, rectangle = tile_of_keys(
        tl.program_id(0), tile_rows, tile_columns, sizes, rule, ROWS, COLUMNS, WINDOW
    )
    keys = open_queries(
        key + image * key_image_stride,
        key_row.to(tl.int64) * key_row_stride + key_column.to(tl.int64) * key_column_stride,
        key_head_stride, key_channel_stride, HEADS, PIECE, LOAD_ONCE,
    )  # fmt: skip
    head_channel = tl.arange(0, PIECE).to(tl.int64)
    query += image * query_image_stride
    grad += image * grad_image_stride
    first = tl.program_id(2) * (SLICES * SLICE)
    sums = ()  # SLICES x (KEYS, SLICE), the other way round where TALL
    for _slice in tl.static_range(SLICES):
        sums = sums + (tl.zeros((SLICE, KEYS) if TALL else (KEYS, SLICE), tl.float32),)
    for block in tl.range(tl.program_id(1), tl.cdiv(rectangle.count, PIXELS), PARTIALS):
        row, column, exists = row_block(block, rectangle, PIXELS)
        _, limit = visible(row, column, exists, sizes, rule, top, left, ROWS=ROWS, COLUMNS=COLUMNS, WINDOW=WINDOW)
        entry = ((image * height + row) * width + column) * HEADS
        query_place = query + head_channel[None, :] * query_channel_stride
        query_place += (row.to(tl.int64) * query_row_stride + column.to(tl.int64) * query_column_stride)[:, None]
        weights = tl.zeros((PIXELS, KEYS), tl.float32)
        for head in tl.static_range(HEADS):
            place = query_place + tl.full((), head, tl.int64) * query_head_stride  # (PIXELS, PIECE)
            exponentials = exponentials_of_head(
                keys, key_channel_stride, place, query_channel_stride, limit, lse, entry, head, exponent_scale, block,
                opaque_zero,
                WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
            weights += exponentials * tl.load(inv_l + entry + head)[:, None]
        inverses = (weights / HEADS).to(grad.dtype.element_ty)
        grad_offset = row.to(tl.int64) * grad_row_stride + column.to(tl.int64) * grad_column_stride
        updated = ()
        for piece in tl.static_range(SLICES):
            outer = load_channels(grad, grad_offset, first + piece * SLICE, channels, grad_channel_stride, SLICE, WHOLE)
            if TALL:
                now = matmul(tl.trans(outer), inverses, sums[piece], PRECISION)
            else:
                now = matmul(tl.trans(inverses), outer, sums[piece], PRECISION)
            updated = updated + (now,)
        sums = updated
    entry, key_exists = key_entries(
        tile_rows, tile_columns, grid_rows, grid_columns, images, opaque_zero, ROWS, COLUMNS
    )
    first = (tl.program_id(2) + opaque_zero) * (SLICES * SLICE)
    for piece in tl.static_range(SLICES):
        channel = first + piece * SLICE + tl.arange(0, SLICE)
        place = grad_value + entry[:, None] * channels + channel[None, :]
        total = tl.trans(sums[piece]) if TALL else sums[piece]
        tl.store(place, total, mask=key_exists[:, None] & (channel < channels)[None, :])


def plan_backward_key(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    inv_l: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    *,
    window: WindowRule,
    scale: float,
    precision: str,
    config: BackwardGridConfig,
) -> Launch:
    """The launch that fills `grad_key`, (partials, B, h, w, heads, d), contiguous.

    `share` and `delta` are what the pass over the queries stored; the other arguments are as for that pass.
    """
    tiles = tiles_of(key, config)
    group = config.heads or query.shape[3]
    return Launch(
        kernel=_window_attention_backward_key_kernel,
        grid=(key.shape[0] * tiles[0] * tiles[1], grad_key.shape[0], query.shape[3] // group),
        arguments={
            "grad": grad,
            "query": query,
            "key": key,
            "value": value,
            "lse": lse,
            "inv_l": inv_l,
            "delta": delta,
            "grad_key": grad_key,
            **common_arguments(grad, query, key, window, tiles),
            "channels": value.shape[3],
            **strides_of("value", value, "image row column channel"),
            "scale": scale,
            "exponent_scale": scale * LOG2_E.value,
        },
        constants={
            **common_constants(query, window, precision, config, grad_key.shape[0]),
            "GROUP": group,
            "WHOLE": value.shape[3] % config.channel_slice == 0,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def plan_backward_value(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    inv_l: Tensor,
    grad_value: Tensor,
    *,
    window: WindowRule,
    scale: float,
    precision: str,
    config: BackwardGridConfig,
) -> Launch:
    """The launch that fills `grad_value`, (partials, B, h, w, C), contiguous; arguments as for the other passes."""
    tiles = tiles_of(key, config)
    channels = grad_value.shape[4]
    return Launch(
        kernel=_window_attention_backward_value_kernel,
        grid=(
            key.shape[0] * tiles[0] * tiles[1],
            grad_value.shape[0],
            triton.cdiv(channels, config.channel_slice * config.slices),
        ),
        arguments={
            "grad": grad,
            "query": query,
            "key": key,
            "lse": lse,
            "inv_l": inv_l,
            "grad_value": grad_value,
            **common_arguments(grad, query, key, window, tiles),
            "channels": channels,
            "exponent_scale": scale * LOG2_E.value,
        },
        constants={
            **common_constants(query, window, precision, config, grad_value.shape[0]),
            "SLICES": config.slices,
            "WHOLE": channels % (config.channel_slice * config.slices) == 0,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
