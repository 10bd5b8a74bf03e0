"""Window attention, forward, where a tile's keys are few: all its averaged weights stay in registers.

Heads go by one after the other. The exponentials of one head wait in registers, in as few bits as the values allow,
until the sum that divides them is known; so each logit is made once. The keys are cut into blocks of a power of two,
but for the product with the values the blocks' weights stand side by side in few long runs.

What a pixel does not see is found once for all heads and kept as bits. It takes no time where every pixel of the tile
sees every key of a block, which is most blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import LOG2_E, matmul
from .window_attention_tile import LOWEST, core_keys, grid_offsets, in_shares, key_block, of_shares, visibility


@triton.jit
def resident_weights(
    query_place, query_head_stride, keys, rectangle, windows, exponent_scale, lse_place, pixel_exists, opaque_zero,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    TAIL: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, ROW_PARTIALS: tl.constexpr,
    SAVE_LSE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The averaged weights of a tile's keys: BLOCKS x (PIXELS, BLOCK) and, unless TAIL is 0, (PIXELS, TAIL).

    The logits of GROUP blocks are in registers at once. KEPT is the dtype of exponentials and weights. `lse_place` is
    where a pixel's first log-sum-exp is stored, with SAVE_LSE.
    """
    ALL_BLOCKS: tl.constexpr = BLOCKS + (TAIL > 0)
    GROUPS: tl.constexpr = (ALL_BLOCKS + GROUP - 1) // GROUP
    core = core_keys(rectangle)
    places = ()
    seen = ()
    weights = ()
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
        zeros = tl.zeros((PIXELS, BLOCK if block < BLOCKS else TAIL), KEPT)
        seen = seen + (bits,)
        weights = weights + (in_shares(zeros, ROW_PARTIALS),)
    for head in tl.range(0, HEADS):
        head64 = tl.zeros((), tl.int64) + head
        query = tl.load(query_place + head64 * query_head_stride)
        powers = ()
        pivots = ()
        totals = ()
        for group in tl.static_range(GROUPS):
            logits = ()
            pivot = tl.full((PIXELS, ROW_PARTIALS), LOWEST, tl.float32)
            for block in tl.static_range(group * GROUP, min(ALL_BLOCKS, group * GROUP + GROUP)):
                key = tl.load(places[block] + head64 * keys.head_stride)
                raw = in_shares(matmul(query, tl.trans(key), None, PRECISION), ROW_PARTIALS)
                if block * BLOCK + (BLOCK if block < BLOCKS else TAIL) > core:
                    # The zero keeps the compiler from taking the bits apart before the loop, a register each.
                    raw = cut_off(raw, seen[block] ^ (head * opaque_zero))
                pivot = tl.maximum(pivot, of_shares(raw, "max") * exponent_scale)
                logits = logits + (raw,)
            l_i = tl.zeros((PIXELS, ROW_PARTIALS), tl.float32)
            for block in tl.static_range(len(logits)):
                power = tl.math.exp2(logits[block] * exponent_scale - pivot[:, None, :, None])
                l_i += of_shares(power, "sum")
                powers = powers + (power.to(KEPT),)
            pivots = pivots + (pivot,)
            totals = totals + (l_i,)
        m_i = tl.max(pivots[0], axis=1)
        for group in tl.static_range(1, GROUPS):
            m_i = tl.maximum(m_i, tl.max(pivots[group], axis=1))
        sums = tl.zeros((PIXELS, ROW_PARTIALS), tl.float32)
        ratios = ()
        for group in tl.static_range(GROUPS):
            ratios = ratios + (tl.math.exp2(pivots[group] - m_i[:, None]),)
            sums += totals[group] * ratios[group]
        l_i = tl.sum(sums, axis=1)
        if SAVE_LSE:
            tl.store(lse_place + head, (m_i + tl.math.log2(l_i)) / LOG2_E, mask=pixel_exists)
        inv_l = 1.0 / (l_i * HEADS)
        updated = ()
        for block in tl.static_range(ALL_BLOCKS):
            factor = (ratios[block // GROUP] * inv_l[:, None]).to(KEPT)
            updated = updated + (weights[block] + powers[block] * factor[:, None, :, None],)
        weights = updated
    matrices = ()
    for block in tl.static_range(ALL_BLOCKS):
        matrices = matrices + (tl.reshape(weights[block], (PIXELS, BLOCK if block < BLOCKS else TAIL)),)
    return matrices


@triton.jit
def _bit(RUNS: tl.constexpr):
    """The number of each key of a thread's share, as `in_shares` has them."""
    return (2 * tl.arange(0, RUNS)[:, None] + tl.arange(0, 2)[None, :])[None, :, None, :]


@triton.jit
def seen_keys(first, core, rectangle, windows, PIXELS: tl.constexpr, BLOCK: tl.constexpr, ROW_PARTIALS: tl.constexpr):
    """The keys from number `first` on that a pixel sees, bits in (PIXELS, ROW_PARTIALS), unless all are in the core."""
    bits = tl.zeros((PIXELS, ROW_PARTIALS), tl.int32)
    if first + BLOCK > core:
        row, column, exists = key_block(first, rectangle, BLOCK, True)
        sees = in_shares(tl.where(visibility(windows, row, column, exists) > 0, 1, 0), ROW_PARTIALS)
        bits = of_shares(sees << _bit(BLOCK // (2 * ROW_PARTIALS)), "sum")
    return bits


@triton.jit
def cut_off(logits, seen):
    """Logits in shares, -inf where a pixel does not see a key, whatever was there, NaN included."""
    return tl.where(((seen[:, None, :, None] >> _bit(logits.shape[1])) & 1) > 0, logits, float("-inf"))


@triton.jit
def side_by_side(blocks, BLOCKS: tl.constexpr):
    """BLOCKS matrices of a shape in runs of a power of two, the shortest first; what follows them stays."""
    runs = ()
    level = blocks
    for power in tl.static_range(4):
        if (BLOCKS >> power) & 1:
            runs = runs + (level[(BLOCKS >> power) - 1],)
        above = ()
        for pair in tl.static_range((BLOCKS >> power) // 2):
            both = tl.permute(tl.join(level[2 * pair], level[2 * pair + 1]), (0, 2, 1))
            above = above + (tl.reshape(both, (both.shape[0], 2 * both.shape[2])),)
        level = above
    for block in tl.static_range(BLOCKS, len(blocks)):
        runs = runs + (blocks[block],)
    return runs


@triton.jit
def run_offsets(
    rectangle, row_stride, column_stride, opaque_zero, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr
):
    """Where the keys of each run that `side_by_side` makes are in a grid, int64.

    Without the zero the compiler would find rows and columns together with the keys' and keep them in registers.
    """
    offsets = ()
    for power in tl.static_range(4):
        if (BLOCKS >> power) & 1:
            first = ((BLOCKS >> power) - 1 << power) * BLOCK
            row, column, _ = key_block(first + opaque_zero, rectangle, BLOCK << power, True)
            offsets = offsets + (grid_offsets(row, column, row_stride, column_stride),)
    if TAIL:
        row, column, _ = key_block(BLOCKS * BLOCK + opaque_zero, rectangle, TAIL, True)
        offsets = offsets + (grid_offsets(row, column, row_stride, column_stride),)
    return offsets
