"""Window attention of single pixels, forward: each program has one point, and the keys of that point's window alone.

Points share no keys, so there is no tile for the matrix units: one query and its window are products of a vector with
a matrix, as fast as the keys and values arrive. So products are sums in float32, in any dtype. The logits are made
twice, for the sums of exponentials and for the weights; the second time the keys come from the caches. Nothing is
stored but the result.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Launch, strides_of
from .products import LOG2_E
from .window_attention_tile import (
    LOWEST,
    Keys,
    Rectangle,
    grid_offsets,
    load_channels,
    open_keys,
    pixel_windows,
    row_block,
)
from .window_bounds import WindowRule


class PointsConfig(NamedTuple):
    """A config: changes speed and never a result.

    Attributes:
        block_keys: keys at a time.
        channel_slice: the most channels of a program; each slice makes the logits anew.
        num_warps: Triton's.
    """

    block_keys: int
    channel_slice: int
    num_warps: int


CONFIGS = (PointsConfig(16, 512, 4), PointsConfig(16, 128, 4))
"""Best first; what comes later asks less of a card."""


@triton.jit
def _logits(queries, near, exists, exponent_scale, HEADS: tl.constexpr):
    """Each head's logits of a block of keys, scaled for exp2, -inf beyond the last key: a tuple of (BLOCK,)."""
    logits = ()
    for head in tl.static_range(HEADS):
        product = tl.sum(near[head].to(tl.float32) * queries[head][None, :], axis=1)
        logits = logits + (tl.where(exists, product * exponent_scale, float("-inf")),)
    return logits


@triton.jit(do_not_specialize=SIZES)
def _window_attention_points_kernel(
    query, key, value, pixels, out,
    # (N, heads, d), (h, w, heads, d), (h, w, C), (N, 2) rows and columns, (N, C)
    height, width, grid_rows, grid_columns, channels, ratio, cell_rows, cell_columns,
    query_point_stride, query_head_stride, query_channel_stride,
    key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_row_stride, value_column_stride, value_channel_stride,
    exponent_scale,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """SLICE channels of one point; grid: the points, and the slices. WHOLE says that SLICE divides the channels."""
    point = tl.program_id(0).to(tl.int64)
    row, column = tl.load(pixels + 2 * point), tl.load(pixels + 2 * point + 1)
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    first_row, row_stop, first_column, column_stop = pixel_windows(row, column, sizes, rule, WINDOW)
    columns = column_stop - first_column
    count = (row_stop - first_row) * columns
    window = Rectangle(first_row, first_column, columns, count)
    keys = Keys(key, key_row_stride, key_column_stride, key_head_stride, key_channel_stride)
    place = query + point * query_point_stride + tl.arange(0, WIDTH).to(tl.int64) * query_channel_stride
    queries = ()
    m_i = ()
    l_i = ()
    for head in tl.static_range(HEADS):
        queries = queries + (tl.load(place + tl.full((), head, tl.int64) * query_head_stride).to(tl.float32),)
        # Each place of a block has a pivot and a sum of its own until the end: no thread asks another in the loop.
        m_i = m_i + (tl.full((BLOCK,), LOWEST, tl.float32),)
        l_i = l_i + (tl.zeros((BLOCK,), tl.float32),)
    for block in tl.range(0, tl.cdiv(count, BLOCK)):
        key_row, key_column, exists = row_block(block, window, BLOCK)
        near = open_keys(keys, key_row, key_column, HEADS, WIDTH, True)
        logits = _logits(queries, near, exists, exponent_scale, HEADS)
        now_m = ()
        now_l = ()
        for head in tl.static_range(HEADS):
            now = tl.maximum(m_i[head], logits[head])
            now_m = now_m + (now,)
            now_l = now_l + (l_i[head] * tl.math.exp2(m_i[head] - now) + tl.math.exp2(logits[head] - now),)
        m_i = now_m
        l_i = now_l
    pivots = ()
    inv_l = ()
    for head in tl.static_range(HEADS):
        pivot = tl.max(m_i[head], axis=0)
        pivots = pivots + (pivot,)
        inv_l = inv_l + (1.0 / (tl.sum(l_i[head] * tl.math.exp2(m_i[head] - pivot), axis=0) * HEADS),)
    first = tl.program_id(1) * SLICE
    products = tl.zeros((BLOCK, SLICE), tl.float32)  # summed over the places of a block at the end
    for block in tl.range(0, tl.cdiv(count, BLOCK)):
        key_row, key_column, exists = row_block(block, window, BLOCK)
        near = open_keys(keys, key_row, key_column, HEADS, WIDTH, True)
        logits = _logits(queries, near, exists, exponent_scale, HEADS)
        weights = tl.zeros((BLOCK,), tl.float32)
        for head in tl.static_range(HEADS):
            weights += tl.math.exp2(logits[head] - pivots[head]) * inv_l[head]
        offset = grid_offsets(key_row, key_column, value_row_stride, value_column_stride)
        values = load_channels(value, offset, first, channels, value_channel_stride, SLICE, WHOLE)
        # A place beyond the last key repeats that key: its weight is 0, its value may be infinite.
        products += tl.where(exists[:, None], weights[:, None] * values.to(tl.float32), 0.0)
    channel = first + tl.arange(0, SLICE)
    tl.store(out + point * channels + channel, tl.sum(products, axis=0), mask=channel < channels)


def plan_points(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pixels: Tensor,
    out: Tensor,
    *,
    size: tuple[int, int],
    window: WindowRule,
    scale: float,
    config: PointsConfig,
) -> Launch:
    """The launch that fills `out` (N, C), contiguous.

    Args:
        query, key, value: (N, heads, d), (h, w, heads, d), (h, w, C), any strides.
        pixels: (N, 2) int32, contiguous: each point's row and column.
        out: the result.
        size: (H, W) of the output that the points are pixels of.
        window: the rule of the window for these sizes.
        scale: of the logits.
        config: sizes of blocks and slices, warps.
    """
    points, heads, head_dim = query.shape
    channels = value.shape[2]
    taken = min(config.channel_slice, triton.next_power_of_2(channels))
    return Launch(
        kernel=_window_attention_points_kernel,
        grid=(points, triton.cdiv(channels, taken)),
        arguments={
            "query": query,
            "key": key,
            "value": value,
            "pixels": pixels,
            "out": out,
            "height": size[0],
            "width": size[1],
            "grid_rows": key.shape[0],
            "grid_columns": key.shape[1],
            "channels": channels,
            **window.arguments(),
            **strides_of("query", query, "point head channel"),
            **strides_of("key", key, "row column head channel"),
            **strides_of("value", value, "row column channel"),
            "exponent_scale": scale * LOG2_E.value,
        },
        constants={
            "WINDOW": window.kind,
            "HEADS": heads,
            "WIDTH": head_dim,
            "BLOCK": config.block_keys,
            "SLICE": taken,
            "WHOLE": channels % taken == 0,
        },
        options={"num_warps": config.num_warps, "num_stages": 1},
    )
