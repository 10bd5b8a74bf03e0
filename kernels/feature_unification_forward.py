"""Feature unification, forward: out(o) = mean over c of softmax over o of z(o, c), z the maps of all filters and channels.

With the channel-major list of maps read again as (M, C), softmax c = block * M + n at one position runs over M maps.
Their logits are a matrix product of the M filters and a patch of M channels (see `feature_unification_patches.py`),
a row for each softmax: so C*M logits exist for no longer than their exponentials take, a block at a time. Where M does
not divide C, map o*C + c is not filter n but filter (n + o*C) % M: a product's columns are turned against each
other, which a gather within the tile undoes.

The division by the taps inside the map is a factor of the exponent. What binds is the number of exponentials, C*M for
each position; so logits are scaled, limited and added up in as few instructions as there can be.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import UnificationConfig
from .feature_unification_patches import SIZES, blocks_of, load_filters, load_patch, patch_place, taps_inside
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
def turned_logits(before, after, shift, turn, COLUMNS: tl.constexpr):
    """Logits of softmaxes in rows, from the products of filters in rows with a block's channels and with the next ones.

    `shift`, (COLUMNS,), is the filter of each column's first softmax; `turn`, (ROWS, COLUMNS), each row's filter.
    """
    row = tl.arange(0, before.shape[0])
    return tl.gather(tl.where(row[:, None] >= shift[None, :], before, after), turn, axis=0)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_forward_kernel(
    arranged, basis, out,
    # (B, h + s - 1, w + s - 1, blocks of entries, COLUMNS), (M, s * s), (B, M, h, w)
    height, width, positions, tiles, channels, blocks, out_filter_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr, POSITIONS: tl.constexpr,
    ROWS: tl.constexpr, TURNED: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """POSITIONS positions of an image; grid: the runs of positions of all images.

    TURNED says that FILTERS do not divide the channels, WHOLE that POSITIONS divide an image's positions.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * POSITIONS
    filters = ()  # (ROWS, TAPS) each
    for part in tl.static_range((FILTERS + ROWS - 1) // ROWS):
        filters = filters + (load_filters(basis, part * ROWS, FILTERS, ROWS, SIZE, TAPS),)
    softmax = tl.arange(0, ROWS)
    if TURNED:
        shift = (tl.arange(0, COLUMNS) * channels) % FILTERS
        turn = softmax[:, None] + shift[None, :]
        turn = tl.where(turn >= FILTERS, turn - FILTERS, turn)
        turn = tl.minimum(turn, ROWS - 1)  # of rows that stand for nothing
    sums = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for number in tl.range(0, POSITIONS):
        position = tl.minimum(first + number, positions - 1)
        row = position // width
        column = position % width
        place = patch_place(
            arranged, image, row, column, height, width, blocks + TURNED, SIZE, TAPS, COLUMNS
        )
        exponent_scale = LOG2_E / taps_inside(row, column, height, width, SIZE // 2)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        if TURNED:
            before = tl.dot(filters[0], load_patch(place, 0, SIZE, TAPS, COLUMNS), input_precision=PRECISION)
            for block in tl.range(0, blocks):
                near = load_patch(place, block + 1, SIZE, TAPS, COLUMNS)
                after = tl.dot(filters[0], near, input_precision=PRECISION)
                logits = turned_logits(before, after, shift, turn, COLUMNS)
                exists = softmax < tl.minimum(channels - block * FILTERS, FILTERS)
                powers, share = softmax_rows(logits, exponent_scale, exists, FILTERS)
                total += powers * share[:, None]
                before = after
        else:
            for block in tl.range(0, blocks):
                near = load_patch(place, block, SIZE, TAPS, COLUMNS)
                for part in tl.static_range(len(filters)):
                    logits = tl.dot(filters[part], near, input_precision=PRECISION)
                    powers, share = softmax_rows(logits, exponent_scale, softmax + part * ROWS < FILTERS, FILTERS)
                    total += powers * share[:, None]
        mine = (tl.arange(0, POSITIONS) == number)[:, None]
        sums = tl.where(mine, tl.sum(total, axis=0)[None, :], sums)
    position = first + tl.arange(0, POSITIONS)
    filter_ = tl.arange(0, COLUMNS)
    result = sums / channels
    place = out + image * FILTERS * out_filter_stride
    place = place + position[:, None] + filter_.to(tl.int64)[None, :] * out_filter_stride
    exists = (filter_ < FILTERS)[None, :]
    if not WHOLE:
        exists = exists & (position < positions)[:, None]
    tl.store(place, result, mask=exists)


def plan_forward(
    arranged: Tensor, basis: Tensor, out: Tensor, *, channels: int, precision: str, config: UnificationConfig
) -> Launch:
    """The launch that fills `out` (B, M, h, w), contiguous.

    Args:
        arranged: the features as `feature_unification_patches.arrange` gives them.
        basis: (M, 1, s, s), contiguous, in the same dtype.
        out: in any floating dtype.
        channels: C.
        precision: of products of float32, Triton's `input_precision`.
        config: how to cut the work.
    """
    batch, filters, height, width = out.shape
    size, columns = basis.shape[2], arranged.shape[4]
    tiles = triton.cdiv(height * width, config.positions)
    turned = channels % filters != 0
    return Launch(
        kernel=_feature_unification_forward_kernel,
        grid=(batch * tiles,),
        arguments={
            "arranged": arranged,
            "basis": basis,
            "out": out,
            "height": height,
            "width": width,
            "positions": height * width,
            "tiles": tiles,
            "channels": channels,
            "blocks": blocks_of(channels, filters),
            "out_filter_stride": height * width,
        },
        constants={
            "FILTERS": filters,
            "COLUMNS": columns,
            "SIZE": size,
            "TAPS": max(16, triton.next_power_of_2(size * size)),
            "POSITIONS": config.positions,
            "ROWS": columns if turned else min(config.rows, columns),
            "TURNED": turned,
            "WHOLE": height * width % config.positions == 0,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
