"""Window attention, backward, of the queries, where a tile's keys are few: its <dO, v> stay in registers.

They are every head's, and the dear product: over all channels of the values. Heads go by one after the other. Of one
head the exponentials of the first blocks wait in registers until the sums that make its delta are known; where there is
no room for all, those of the other blocks are made again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import LOG2_E, matmul
from .window_attention_resident import cut_off, seen_keys
from .window_attention_tile import core_keys, grid_offsets, in_shares, key_block, load_channels, of_shares


@triton.jit
def tile_grad_weights(
    grad, grad_offset, grad_channel_stride, values, rectangle, channels,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """<dO, v> of all keys of a tile: BLOCKS x (PIXELS, BLOCK) and, unless TAIL is 0, (PIXELS, TAIL)."""
    ALL_BLOCKS: tl.constexpr = BLOCKS + (TAIL > 0)
    near = ()
    products = ()
    for block in tl.static_range(ALL_BLOCKS):
        row, column, _ = key_block(block * BLOCK, rectangle, BLOCK if block < BLOCKS else TAIL, True)
        near = near + (grid_offsets(row, column, values.row_stride, values.column_stride),)
        products = products + (tl.zeros((PIXELS, BLOCK if block < BLOCKS else TAIL), tl.float32),)
    for first in tl.range(0, channels, SLICE):
        outer = load_channels(grad, grad_offset, first, channels, grad_channel_stride, SLICE, WHOLE)
        updated = ()
        for block in tl.static_range(ALL_BLOCKS):
            carried = load_channels(values.pointer, near[block], first, channels, values.channel_stride, SLICE, WHOLE)
            updated = updated + (matmul(outer, tl.trans(carried), products[block], PRECISION),)
        products = updated
    return products


@triton.jit
def resident_gradients(
    grad_weights, query_place, query_head_stride, keys, rectangle, windows, exponent_scale, row_scale,
    lse, grad_query_place, inv_l, delta, entry, pixel_exists, opaque_zero,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, ROW_PARTIALS: tl.constexpr, KEPT: tl.constexpr,
    WAITING: tl.constexpr,
):  # fmt: skip
    """Stores each head's gradient, inverse sum of exponentials and delta.

    `grad_weights` are HEADS times dP. The gradient's rows are scaled by `row_scale`, 0 for a pixel that sees a
    single key. KEPT is the dtype of exponentials that wait, those of the first WAITING blocks.
    """
    ALL_BLOCKS: tl.constexpr = BLOCKS + (TAIL > 0)
    core = core_keys(rectangle)
    places = ()
    seen = ()
    for block in tl.static_range(ALL_BLOCKS):
        row, column, _ = key_block(block * BLOCK, rectangle, BLOCK if block < BLOCKS else TAIL, True)
        place = keys.pointer + grid_offsets(row, column, keys.row_stride, keys.column_stride)[:, None]
        places = places + (place + tl.arange(0, WIDTH).to(tl.int64)[None, :] * keys.channel_stride,)
    for block in tl.static_range(ALL_BLOCKS):
        # Without the zero the compiler would chain the branches, because a block beyond the core is followed by such.
        bits = seen_keys(
            block * BLOCK, core + opaque_zero * (block + 1), rectangle, windows,
            PIXELS, BLOCK if block < BLOCKS else TAIL, ROW_PARTIALS,
        )  # fmt: skip
        seen = seen + (bits,)
    heads = tl.math.log2(tl.full((), HEADS, tl.float32))
    for head in tl.range(0, GROUP):
        head64 = tl.zeros((), tl.int64) + head
        query = tl.load(query_place + head64 * query_head_stride)
        # Exponentials are divided by the number of heads here, not <dO, v>, for which the compiler would keep both.
        m_i = tl.load(lse + entry + head) * LOG2_E + heads
        l_i = tl.zeros((PIXELS, ROW_PARTIALS), tl.float32)
        mean = tl.zeros((PIXELS, ROW_PARTIALS), tl.float32)
        powers = ()
        for block in tl.static_range(ALL_BLOCKS):
            key = tl.load(places[block] + head64 * keys.head_stride)
            raw = in_shares(matmul(query, tl.trans(key), None, PRECISION), ROW_PARTIALS)
            if block * BLOCK + (BLOCK if block < BLOCKS else TAIL) > core:
                # The zero keeps the compiler from taking the bits apart before the loop, a register each.
                raw = cut_off(raw, seen[block] ^ (head * opaque_zero))
            kept, l_i, mean = _add(raw, grad_weights[block], l_i, mean, exponent_scale, m_i, ROW_PARTIALS, KEPT)
            if block < WAITING:
                powers = powers + (kept,)
        inverse = 1.0 / (tl.sum(l_i, axis=1) * HEADS)
        means = tl.sum(mean, axis=1) * inverse  # delta
        tl.store(inv_l + entry + head, inverse, mask=pixel_exists)
        tl.store(delta + entry + head, means, mask=pixel_exists)
        product = tl.zeros((PIXELS, WIDTH), tl.float32)
        for block in tl.static_range(ALL_BLOCKS):
            if block < WAITING:
                key = tl.load(places[block] + head64 * keys.head_stride)
                power = unpacked(powers[block]) if KEPT == tl.float16 else powers[block]
            else:
                # Without the zeros the compiler would keep the logits or the branch's outcome.
                key = tl.load(places[block] + head64 * keys.head_stride + 16 * opaque_zero)
                raw = in_shares(matmul(query, tl.trans(key), None, PRECISION), ROW_PARTIALS)
                if block * BLOCK + (BLOCK if block < BLOCKS else TAIL) > core + opaque_zero:
                    raw = cut_off(raw, seen[block] ^ (head * opaque_zero))
                power = tl.math.exp2(raw * exponent_scale - m_i[:, None, None, None])
            power = tl.reshape(power, grad_weights[block].shape)
            inner = power * (grad_weights[block] - (means * HEADS)[:, None])
            product = matmul(inner.to(key.dtype), key, product, PRECISION)
        product = product * (inverse * row_scale)[:, None]
        tl.store(grad_query_place + head * WIDTH, product, mask=pixel_exists[:, None])


@triton.jit
def _add(raw, grad_weights, l_i, mean, exponent_scale, m_i, ROW_PARTIALS: tl.constexpr, KEPT: tl.constexpr):
    """Exponentials of logits, and each share's sum of them and of them times <dO, v> with these added."""
    power = tl.math.exp2(raw * exponent_scale - m_i[:, None, None, None])
    l_i += of_shares(power, "sum")
    mean += of_shares(power * in_shares(grad_weights, ROW_PARTIALS), "sum")
    return packed(power) if KEPT == tl.float16 else power, l_i, mean


@triton.jit
def packed(numbers):
    """Pairs of numbers along the last axis as float16 in an int32: apart they would take a register each."""
    low, high = tl.split(numbers.to(tl.float16).to(tl.int16, bitcast=True))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def unpacked(words):
    """What `packed` was given, float32."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high).to(tl.float32)
