"""Feature unification, forward: out(o) = mean over c of softmax over o of z(o, c), all channels' filtered maps.

With the channel-major list of maps read again as (M, C), softmax c = block * M + n at one position runs over M maps.
Their logits are a matrix product of the M filters and a patch of M channels (see `feature_unification_patches.py`),
a row for each softmax: so C*M logits exist for no longer than their exponentials take, a block at a time. Where M does
not divide C, map o*C + c is not filter n but filter (n + o*C) % M: a product's columns are turned against each
other, which a gather within the tile undoes.

The division by the taps inside the map is a factor of the exponent. What binds is the number of exponentials, C*M for
each position: logits are scaled, limited and added up in as few instructions as there can be, and over the rows only
once, at the end of a position.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import UnificationConfig
from .feature_unification_patches import (
    PIECE,
    SIZES,
    Arranged,
    blocks_of,
    load_filters,
    load_patch,
    patch_corner,
    product_of,
    taps_inside,
)
from .launch import Launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_rows(logits, exponent_scale, exists, FILTERS: tl.constexpr):
    """exp(logits - the row's largest), (ROWS, COLUMNS), and 1 / their sums, (ROWS,); zeros for rows that do not exist.

    The columns beyond FILTERS have no weight.
    """
    if FILTERS < logits.shape[1]:
        logits = tl.where((tl.arange(0, logits.shape[1]) < FILTERS)[None, :], logits, float("-inf"))
    largest = tl.max(logits, axis=1) * exponent_scale
    powers = tl.math.exp2(logits * exponent_scale - largest[:, None])
    return powers, tl.where(exists, 1.0 / tl.sum(powers, axis=1), 0.0)


@triton.jit
def turned_logits(before, after, channels, FILTERS: tl.constexpr):
    """Logits with softmaxes in rows, from products with filters in rows: with a block's channels and the next ones."""
    row = tl.arange(0, before.shape[0])
    # The filter of each column's first softmax.
    shift = (tl.arange(0, before.shape[1]) * channels) % FILTERS
    turn = row[:, None] + shift[None, :]
    turn = tl.where(turn >= FILTERS, turn - FILTERS, turn)
    turn = tl.minimum(turn, before.shape[0] - 1)  # of rows that stand for nothing
    return tl.gather(tl.where(row[:, None] >= shift[None, :], before, after), turn, axis=0)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_forward_kernel(
    arranged, filters, out,
    # (B, h + s - 1, w + s - 1, PLANES, blocks of entries, COLUMNS), (PLANES, COLUMNS, TAPS), (B, M, h, w)
    height, width, positions, tiles, channels, blocks, again, out_filter_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr, WHOLE: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """POSITIONS positions of an image; grid: the runs of positions of all images.

    `again` is a 0 that the compiler knows nothing of, or it would keep for all blocks what turns the first.
    TURNED says that FILTERS do not divide the channels, WHOLE that POSITIONS divide an image's positions.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * POSITIONS
    softmax = tl.arange(0, ROWS)
    sums = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    entries = blocks + TURNED
    if ROWS >= FILTERS:
        kept = load_filters(filters, 0, ROWS, COLUMNS, TAPS, PLANES, PIECE)
    for number in tl.range(0, POSITIONS):
        position = tl.minimum(first + number, positions - 1)
        row = position // width
        column = position % width
        corner = patch_corner(image, row, column, height, width, SIZE)
        exponent_scale = LOG2_E / taps_inside(row, column, height, width, SIZE // 2)
        if TURNED:
            sum_ = tl.zeros((COLUMNS,), tl.float32)
            for block in tl.range(0, blocks):
                # Made again for each block: kept from the last one, it would take the registers of a whole product.
                near = load_patch(arranged, corner, block, width, entries, SIZE, TAPS, COLUMNS, PLANES, PIECE)
                before = product_of(kept, near, PLANES, PRECISION)
                near = load_patch(arranged, corner, block + 1, width, entries, SIZE, TAPS, COLUMNS, PLANES, PIECE)
                after = product_of(kept, near, PLANES, PRECISION)
                logits = turned_logits(before, after, channels ^ (block * again), FILTERS)
                exists = softmax < tl.minimum(channels - block * FILTERS, FILTERS)
                powers, share = softmax_rows(logits, exponent_scale, exists, FILTERS)
                sum_ += tl.sum(powers * share[:, None], axis=0)
        else:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for block in tl.range(0, blocks):
                near = load_patch(arranged, corner, block, width, entries, SIZE, TAPS, COLUMNS, PLANES, PIECE)
                if ROWS >= FILTERS:
                    logits = product_of(kept, near, PLANES, PRECISION)
                    powers, share = softmax_rows(logits, exponent_scale, softmax < FILTERS, FILTERS)
                    total += powers * share[:, None]
                else:
                    for part in tl.range(0, (FILTERS + ROWS - 1) // ROWS):
                        some = load_filters(filters, part * ROWS, ROWS, COLUMNS, TAPS, PLANES, PIECE)
                        logits = product_of(some, near, PLANES, PRECISION)
                        powers, share = softmax_rows(logits, exponent_scale, softmax + part * ROWS < FILTERS, FILTERS)
                        total += powers * share[:, None]
            sum_ = tl.sum(total, axis=0)
        mine = (tl.arange(0, POSITIONS) == number)[:, None]
        sums += tl.where(mine, sum_[None, :], 0.0)
    position = first + tl.arange(0, POSITIONS)
    filter_ = tl.arange(0, COLUMNS)
    place = out + image * FILTERS * out_filter_stride
    place = place + position[:, None] + filter_.to(tl.int64)[None, :] * out_filter_stride
    exists = (filter_ < FILTERS)[None, :]
    if not WHOLE:
        exists = exists & (position < positions)[:, None]
    tl.store(place, sums / channels, mask=exists)


def plan_forward(arranged: Arranged, out: Tensor, *, precision: str, config: UnificationConfig) -> Launch:
    """The launch that fills `out` (B, M, h, w), contiguous, in any floating dtype.

    Args:
        arranged: what `feature_unification_patches.plan_arrange` fills.
        out: the result.
        precision: of products of float32, where there is one plane of it; Triton's `input_precision`.
        config: how to cut the work.
    """
    batch, filters, height, width = out.shape
    planes, columns, taps = arranged.filters.shape
    tiles = triton.cdiv(height * width, config.positions)
    turned = arranged.channels % filters != 0
    return Launch(
        kernel=_feature_unification_forward_kernel,
        grid=(batch * tiles,),
        arguments={
            "arranged": arranged.features,
            "filters": arranged.filters,
            "out": out,
            "height": height,
            "width": width,
            "positions": height * width,
            "tiles": tiles,
            "channels": arranged.channels,
            "blocks": blocks_of(arranged.channels, filters),
            "again": 0,
            "out_filter_stride": height * width,
        },
        constants={
            "FILTERS": filters,
            "COLUMNS": columns,
            "SIZE": arranged.kernel_size,
            "TAPS": taps,
            "PLANES": planes,
            "POSITIONS": config.positions,
            "ROWS": columns if turned else min(config.rows, columns),
            "TURNED": turned,
            "WHOLE": height * width % config.positions == 0,
            "PIECE": PIECE,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
