"""Window attention, backward, of the queries: a tile of pixels looks at its keys again.

With n heads, dP(x, j) = <dO(x), v(j)> / n is every head's; dS_a = P_a (dP - delta_a) with
delta_a(x) = sum_j P_a(x, j) dP(x, j), and dq_a = scale * sum_j dS_a k_a(j). delta_a is each head's own; the usual
<dO, O> would be right only if O did not mix the heads. It is stored for the pass over the keys.

The exponential of a logit minus the saved log-sum-exp carries the rounding of the latter, which grows with the
logits. So the exponentials are added up once more, and their inverse sum, near 1, is stored beside delta.

Where a tile's keys are few its dP are made once and stay in registers (`window_attention_backward_resident.py`). Where
they are many, dP is made for delta and again for dq, a block of keys at a time, and wide heads are shared out among
programs, each of which makes dP.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Launch, size_arguments, strides_of
from .products import LOG2_E, matmul
from .window_attention_backward_resident import resident_gradients, tile_grad_weights
from .window_attention_config import BackwardQueryConfig
from .window_attention_tile import (
    Keys,
    Values,
    grid_offsets,
    head_product,
    key_piece,
    load_channels,
    open_keys,
    open_queries,
    pixel_windows,
    row_block,
    sees_several,
    tile_keys,
    tile_pixels,
    visibility,
)
from .window_bounds import WindowRule


@triton.jit
def _grad_weights(
    grad, grad_offset, grad_channel_stride, values, block, rectangle, channels,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """<dO, v> of a block of keys, (PIXELS, BLOCK) float32."""
    row, column, _ = row_block(block, rectangle, BLOCK)
    near = grid_offsets(row, column, values.row_stride, values.column_stride)
    product = tl.zeros((PIXELS, BLOCK), tl.float32)
    for first in tl.range(0, channels, SLICE):
        outer = load_channels(grad, grad_offset, first, channels, grad_channel_stride, SLICE, WHOLE)
        carried = load_channels(values.pointer, near, first, channels, values.channel_stride, SLICE, WHOLE)
        product = matmul(outer, tl.trans(carried), product, PRECISION)
    return product


@triton.jit
def _add_to_sums(
    l_i, deltas, queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i,
    grad_weights, opaque_zero,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    LOAD_ONCE: tl.constexpr,
):  # fmt: skip
    """Each head's sum of exponentials, and of exponentials times dP, with a block of keys added."""
    row, column, exists = row_block(block, rectangle, BLOCK)
    near = open_keys(keys, row, column, HEADS, PIECE, LOAD_ONCE)
    limit = visibility(windows, row, column, exists)
    new_l = ()
    new_deltas = ()
    for head in tl.static_range(HEADS):
        raw = head_product(
            queries, near, query_channel_stride, keys.channel_stride, head, block, opaque_zero,
            WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
        )  # fmt: skip
        # The smaller of a NaN and a number is the number: what a pixel does not see becomes -inf, NaN included.
        raw = tl.minimum(raw, limit)
        exponentials = tl.math.exp2(raw * exponent_scale - m_i[head][:, None])
        new_l = new_l + (l_i[head] + tl.sum(exponentials, axis=1),)
        new_deltas = new_deltas + (deltas[head] + tl.sum(exponentials * grad_weights, axis=1),)
    return new_l, new_deltas


@triton.jit
def _add_to_gradients(
    gradients, inverses, deltas, queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i,
    grad_weights, opaque_zero,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    LOAD_ONCE: tl.constexpr,
):  # fmt: skip
    """Each head's sum of dS k, with a block of keys added."""
    row, column, exists = row_block(block, rectangle, BLOCK)
    near = open_keys(keys, row, column, HEADS, PIECE, LOAD_ONCE)
    limit = visibility(windows, row, column, exists)
    sums = ()
    for head in tl.static_range(HEADS):
        raw = head_product(
            queries, near, query_channel_stride, keys.channel_stride, head, block, opaque_zero,
            WIDTH=WIDTH, PIECE=PIECE, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
        )  # fmt: skip
        raw = tl.minimum(raw, limit)
        weights = tl.math.exp2(raw * exponent_scale - m_i[head][:, None]) * inverses[head][:, None]
        inner = (weights * (grad_weights - deltas[head][:, None])).to(keys.pointer.dtype.element_ty)
        for piece in tl.static_range(WIDTH // PIECE):
            theirs = key_piece(near, keys.channel_stride, head, piece, PIECE, LOAD_ONCE)
            before = gradients[head * (WIDTH // PIECE) + piece]
            sums = sums + (matmul(inner, theirs, before, PRECISION),)
    return sums


@triton.jit
def _finish_sums(inv_l, delta, l_i, deltas, entry, exists, windows, HEADS: tl.constexpr):
    """Store each head's inverse sum of exponentials and delta; the inverses for dS, and the deltas."""
    several = sees_several(windows)
    inverses = ()
    means = ()
    for head in tl.static_range(HEADS):
        inverse = 1.0 / l_i[head]
        mean = deltas[head] * inverse
        tl.store(inv_l + entry + head, inverse, mask=exists)
        tl.store(delta + entry + head, mean, mask=exists)
        inverses = inverses + (inverse * several,)
        means = means + (mean,)
    return inverses, means


@triton.jit
def _tile_anew(
    opaque_zero, tile_rows, tile_columns, sizes, rule, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr
):
    """The number of each of the program's pixels in (B, H, W), int64, whether it exists, and the windows.

    With `opaque_zero` it looks like another tile: nothing of it waits in registers while a loop runs.
    """
    height, width, _, _ = sizes
    image, _, _, row, column, exists = tile_pixels(
        tl.program_id(0) + opaque_zero, tile_rows, tile_columns, sizes, ROWS, COLUMNS
    )
    return (image * height + row) * width + column, exists, pixel_windows(row, column, sizes, rule, WINDOW)


@triton.jit(do_not_specialize=SIZES)
def _window_attention_backward_query_kernel(
    grad, query, key, value, lse, grad_query, inv_l, delta,
    # (B, H, W, C), (B, H, W, heads, d), (B, h, w, heads, d), (B, h, w, C), (B, H, W, heads); as query; as lse, twice
    height, width, grid_rows, grid_columns, channels, tile_rows, tile_columns, ratio, cell_rows, cell_columns,
    grad_image_stride, grad_row_stride, grad_column_stride, grad_channel_stride,
    query_image_stride, query_row_stride, query_column_stride, query_head_stride, query_channel_stride,
    key_image_stride, key_row_stride, key_column_stride, key_head_stride, key_channel_stride,
    value_image_stride, value_row_stride, value_column_stride, value_channel_stride,
    scale, exponent_scale, opaque_zero,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SLICE: tl.constexpr, RESIDENT_BLOCKS: tl.constexpr, LOAD_ONCE: tl.constexpr, TAIL: tl.constexpr,
    ROW_PARTIALS: tl.constexpr, WHOLE: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS pixels and GROUP heads; grid: (tiles of all images, groups of heads).

    With RESIDENT_BLOCKS no tile sees more than RESIDENT_BLOCKS * BLOCK + TAIL keys; at 0 any number. WHOLE says that
    channel slices divide the channels.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    sizes = (height, width, grid_rows, grid_columns)
    rule = (ratio, cell_rows, cell_columns)
    image, top, left, pixel_row, pixel_column, pixel_exists = tile_pixels(
        tl.program_id(0), tile_rows, tile_columns, sizes, ROWS, COLUMNS
    )
    rectangle = tile_keys(top, left, sizes, rule, ROWS, COLUMNS, WINDOW)
    windows = pixel_windows(pixel_row, pixel_column, sizes, rule, WINDOW)
    first_head = tl.program_id(1).to(tl.int64) * GROUP
    key += image * key_image_stride + first_head * key_head_stride
    keys = Keys(key, key_row_stride, key_column_stride, key_head_stride, key_channel_stride)
    value += image * value_image_stride
    values = Values(value, value_row_stride, value_column_stride, value_channel_stride)
    row64 = pixel_row.to(tl.int64)
    column64 = pixel_column.to(tl.int64)
    grad += image * grad_image_stride
    grad_offset = row64 * grad_row_stride + column64 * grad_column_stride
    query += image * query_image_stride + first_head * query_head_stride
    query_offset = row64 * query_row_stride + column64 * query_column_stride
    # int64, as the image is: the place of a pixel's first head in what has one number for each head.
    entry = ((image * height + pixel_row) * width + pixel_column) * HEADS + first_head
    if RESIDENT_BLOCKS:
        several = sees_several(windows)
        products = tile_grad_weights(
            grad, grad_offset, grad_channel_stride, values, rectangle, channels,
            PIXELS=PIXELS, BLOCK=BLOCK, BLOCKS=RESIDENT_BLOCKS, TAIL=TAIL, SLICE=SLICE, PRECISION=PRECISION,
            WHOLE=WHOLE,
        )  # fmt: skip
        channel = tl.arange(0, WIDTH)
        resident_gradients(
            products, query + query_offset[:, None] + channel.to(tl.int64)[None, :] * query_channel_stride,
            query_head_stride, keys, rectangle, windows, exponent_scale, scale * several, lse,
            grad_query + entry[:, None] * WIDTH + channel[None, :], inv_l, delta, entry, pixel_exists, opaque_zero,
            HEADS=HEADS, GROUP=GROUP, WIDTH=WIDTH, PIXELS=PIXELS, BLOCK=BLOCK, BLOCKS=RESIDENT_BLOCKS, TAIL=TAIL,
            PRECISION=PRECISION, ROW_PARTIALS=ROW_PARTIALS,
            KEPT=tl.float16 if query.dtype.element_ty.primitive_bitwidth == 16 else tl.float32, WAITING=WAITING,
        )  # fmt: skip
    else:
        queries = open_queries(query, query_offset, query_head_stride, query_channel_stride, GROUP, PIECE, LOAD_ONCE)
        m_i = ()
        l_i = ()
        deltas = ()
        gradients = ()  # each head's pieces, (PIXELS, PIECE)
        for head in tl.static_range(GROUP):
            m_i = m_i + (tl.load(lse + entry + head) * LOG2_E,)
            l_i = l_i + (tl.zeros((PIXELS,), tl.float32),)
            deltas = deltas + (tl.zeros((PIXELS,), tl.float32),)
            for _piece in tl.static_range(WIDTH // PIECE):
                gradients = gradients + (tl.zeros((PIXELS, PIECE), tl.float32),)
        blocks = tl.cdiv(rectangle.count, BLOCK)
        for block in tl.range(0, blocks):
            product = _grad_weights(
                grad, grad_offset, grad_channel_stride, values, block, rectangle, channels,
                PIXELS=PIXELS, BLOCK=BLOCK, SLICE=SLICE, PRECISION=PRECISION, WHOLE=WHOLE,
            )  # fmt: skip
            l_i, deltas = _add_to_sums(
                l_i, deltas, queries, query_channel_stride, keys, block, rectangle, windows, exponent_scale, m_i,
                product / HEADS, opaque_zero,
                HEADS=GROUP, WIDTH=WIDTH, PIECE=PIECE, BLOCK=BLOCK, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
        entry, pixel_exists, windows = _tile_anew(
            opaque_zero, tile_rows, tile_columns, sizes, rule, ROWS, COLUMNS, WINDOW
        )
        entry = entry * HEADS + first_head
        inverses, deltas = _finish_sums(inv_l, delta, l_i, deltas, entry, pixel_exists, windows, GROUP)
        for block in tl.range(0, blocks):
            product = _grad_weights(
                grad, grad_offset, grad_channel_stride, values, block, rectangle, channels,
                PIXELS=PIXELS, BLOCK=BLOCK, SLICE=SLICE, PRECISION=PRECISION, WHOLE=WHOLE,
            )  # fmt: skip
            gradients = _add_to_gradients(
                gradients, inverses, deltas, queries, query_channel_stride, keys, block, rectangle, windows,
                exponent_scale, m_i, product / HEADS, opaque_zero,
                HEADS=GROUP, WIDTH=WIDTH, PIECE=PIECE, BLOCK=BLOCK, PRECISION=PRECISION, LOAD_ONCE=LOAD_ONCE,
            )  # fmt: skip
        channel = tl.arange(0, PIECE)
        for head in tl.static_range(GROUP):
            for piece in tl.static_range(WIDTH // PIECE):
                place = grad_query + (entry[:, None] + head) * WIDTH + (piece * PIECE + channel)[None, :]
                tl.store(place, gradients[head * (WIDTH // PIECE) + piece] * scale, mask=pixel_exists[:, None])


def plan_backward_query(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    inv_l: Tensor,
    delta: Tensor,
    *,
    window: WindowRule,
    scale: float,
    precision: str,
    config: BackwardQueryConfig,
) -> Launch:
    """The launch that fills `grad_query` (B, H, W, heads, d), `share` and `delta` (B, H, W, heads).

    Args:
        grad: of the output, (B, H, W, C), any strides, in the value's dtype.
        query, key, value, window, scale, precision: as for the forward pass.
        lse: what the forward pass stored, (B, H, W, heads) float32.
        grad_query, share, delta: contiguous, the latter two float32.
        config: sizes of tiles, warps, stages; its resident blocks, if any, must hold the keys of every tile.
    """
    batch, height, width, heads, head_dim = query.shape
    tiles = (triton.cdiv(height, config.rows), triton.cdiv(width, config.columns))
    group = config.heads or heads
    return Launch(
        kernel=_window_attention_backward_query_kernel,
        grid=(batch * tiles[0] * tiles[1], heads // group),
        arguments={
            "grad": grad,
            "query": query,
            "key": key,
            "value": value,
            "lse": lse,
            "grad_query": grad_query,
            "inv_l": inv_l,
            "delta": delta,
            **size_arguments(query, key, tiles),
            "channels": value.shape[3],
            **window.arguments(),
            **strides_of("grad", grad, "image row column channel"),
            **strides_of("query", query, "image row column head channel"),
            **strides_of("key", key, "image row column head channel"),
            **strides_of("value", value, "image row column channel"),
            "scale": scale,
            "exponent_scale": scale * LOG2_E.value,
            "opaque_zero": 0,
        },
        constants={
            "WINDOW": window.kind,
            "HEADS": heads,
            "GROUP": group,
            "WIDTH": head_dim,
            "PIECE": head_dim if config.load_once else min(config.piece, head_dim),
            "PRECISION": precision,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "BLOCK": config.block_keys,
            "SLICE": config.channel_slice,
            "RESIDENT_BLOCKS": config.resident_blocks,
            "LOAD_ONCE": config.load_once,
            "TAIL": config.tail_keys,
            "ROW_PARTIALS": config.row_partials,
            "WAITING": config.waiting_blocks,
            "WHOLE": value.shape[3] % config.channel_slice == 0,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
