"""Features arranged for the unification: bordered with zeros, channels innermost, in the order of its softmaxes.

The channel-major list of C*M maps read again as (M, C) puts map o*C + c, which is filter (o*C + c) % M of channel
(o*C + c) // M, into softmax c. The softmaxes go in blocks of M: with c = block * M + n, the M maps of softmax n are of
the channels (o*C) // M + block, and where the filters' numbers run over, of the next one. So a block needs at most M
channels and the M after them, one for each o: entry (block, o) of a position's arranged features is channel
(o*C) // M + block. Where M divides C nothing runs over, and each channel is one entry.

A patch of M channels is then s*s contiguous rows, whatever the strides of the features were; that costs one
pass over them, which are small beside the exponentials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import padded_filters
from .launch import Launch, strides_of

SIZES = ("height", "width", "positions", "tiles", "blocks", "channels")
"""Kernel arguments that a kernel must not be specialised on: a new grid or another C compiles nothing."""

_ROW_BLOCK = 16
_ENTRY_BLOCK = 64


def blocks_of(channels: int, filters: int) -> int:
    """Blocks of softmaxes."""
    return -(-channels // filters)


def arranged_shape(features: Tensor, filters: int, kernel_size: int) -> tuple[int, ...]:
    """(B, h + s - 1, w + s - 1, blocks of entries, padded filters)."""
    batch, channels, height, width = features.shape
    entries = blocks_of(channels, filters) + (channels % filters != 0)
    return batch, height + kernel_size - 1, width + kernel_size - 1, entries, padded_filters(filters)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_arrange_kernel(
    features, arranged,
    # (B, C, h, w), (B, h + s - 1, w + s - 1, blocks, COLUMNS)
    height, width, channels, blocks,
    features_image_stride, features_channel_stride, features_row_stride, features_column_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, ACROSS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of ACROSS positions of a row; grid: (rows of all images, runs of positions, runs of entries)."""
    wide = width + 2 * HALF
    high = height + 2 * HALF
    line = tl.program_id(0).to(tl.int64)
    image = line // high
    row = line % high - HALF
    across = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    column = across - HALF
    rows = row + 0 * across
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    filter_ = entry % COLUMNS
    channel = (filter_ * channels) // FILTERS + entry // COLUMNS
    # Entries that stand for nothing, and what is beyond the map, are zeros.
    there = (rows >= 0) & (rows < height) & (column >= 0) & (column < width)
    real = (filter_ < FILTERS) & (channel < channels)
    place = features + image * features_image_stride + row * features_row_stride
    place += (column.to(tl.int64) * features_column_stride)[:, None]
    place += (channel.to(tl.int64) * features_channel_stride)[None, :]
    values = tl.load(place, mask=there[:, None] & real[None, :], other=0.0)  # (ACROSS, ENTRIES)
    count = blocks * COLUMNS
    out = arranged + ((line * wide + across) * count)[:, None] + entry[None, :]
    tl.store(out, values, mask=(across < wide)[:, None] & (entry < count)[None, :])


def plan_arrange(features: Tensor, arranged: Tensor, *, filters: int, kernel_size: int) -> Launch:
    """The launch that fills `arranged`, contiguous, of `arranged_shape`, from `features` (B, C, h, w) of any strides."""
    batch, channels, height, width = features.shape
    _, high, wide, blocks, columns = arranged.shape
    return Launch(
        kernel=_feature_unification_arrange_kernel,
        grid=(batch * high, triton.cdiv(wide, _ROW_BLOCK), triton.cdiv(blocks * columns, _ENTRY_BLOCK)),
        arguments={
            "features": features,
            "arranged": arranged,
            "height": height,
            "width": width,
            "channels": channels,
            "blocks": blocks,
            **strides_of("features", features, "image channel row column"),
        },
        constants={
            "FILTERS": filters,
            "COLUMNS": columns,
            "HALF": kernel_size // 2,
            "ACROSS": _ROW_BLOCK,
            "ENTRIES": _ENTRY_BLOCK,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def arrange(features: Tensor, *, filters: int, kernel_size: int) -> Tensor:
    """Features (B, C, h, w) arranged for the kernels, in their dtype."""
    arranged = torch.empty(
        arranged_shape(features, filters, kernel_size), dtype=features.dtype, device=features.device
    )
    plan_arrange(features, arranged, filters=filters, kernel_size=kernel_size)()
    return arranged


@triton.jit
def load_filters(basis, first, filters, ROWS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr):
    """Filters `first` ... `first + ROWS - 1` of a contiguous basis, (ROWS, TAPS); zeros beyond the last and its taps."""
    row = first + tl.arange(0, ROWS)
    tap = tl.arange(0, TAPS)
    place = basis + row[:, None] * (SIZE * SIZE) + tap[None, :]
    return tl.load(place, mask=(row < filters)[:, None] & (tap < SIZE * SIZE)[None, :], other=0.0)


@triton.jit
def patch_place(arranged, image, row, column, height, width, blocks, SIZE: tl.constexpr, TAPS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """Where a position's patch of block 0 is, (TAPS, COLUMNS)."""
    wide = width + SIZE - 1
    corner = (image * (height + SIZE - 1) + row) * wide + column  # int64, as the image is
    tap = tl.arange(0, TAPS)
    step = tap // SIZE * wide + tap % SIZE
    cells = (corner + step.to(tl.int64)) * blocks * COLUMNS
    return arranged + cells[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_patch(place, block, SIZE: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr):
    """A position's patch of a block, (TAPS, COLUMNS); zeros for the taps that fill up."""
    if SIZE * SIZE == TAPS:
        return tl.load(place + block * COLUMNS)
    else:
        return tl.load(place + block * COLUMNS, mask=(tl.arange(0, TAPS) < SIZE * SIZE)[:, None], other=0.0)


@triton.jit
def taps_inside(row, column, height, width, HALF: tl.constexpr):
    """How many taps of a filter at a position lie inside the map, float32."""
    down = tl.minimum(row + HALF, height - 1) - tl.maximum(row - HALF, 0) + 1
    across = tl.minimum(column + HALF, width - 1) - tl.maximum(column - HALF, 0) + 1
    return (down * across).to(tl.float32)
