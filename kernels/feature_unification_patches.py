"""Features arranged for the unification: bordered with zeros, channels innermost, in the order of its softmaxes.

The channel-major list of C*M maps read again as (M, C) puts map o*C + c, which is filter (o*C + c) % M of channel
(o*C + c) // M, into softmax c. The softmaxes go in blocks of M: with c = block * M + n, the M maps of softmax n are of
the channels (o*C) // M + block, and where the filters' numbers run over, of the next one. So a block needs at most M
channels and the M after them, one for each o: entry (block, o) of a position's arranged features is channel
(o*C) // M + block. Where M divides C nothing runs over, and each channel is one entry.

A patch of M channels is then s*s contiguous rows, whatever the strides of the features were; that costs one pass over
them, which are small beside the exponentials. Numbers of float32 are split here, once, into a sum of planes of
16-bit floats: their products on the matrix units are exact, and the planes of a product that matter are added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .feature_unification_config import padded_filters
from .launch import Launch, strides_of

SIZES = (
    "height", "width", "positions", "tiles", "blocks", "channels", "again", "square_rows", "square_columns", "repeats",
)  # fmt: skip
"""Kernel arguments that a kernel must not be specialised on: a new grid or another C compiles nothing."""

PIECE = 16
"""Taps multiplied at once, as many as the matrix units take of 16-bit floats."""

_ROW_BLOCK = 16
_ENTRY_BLOCK = 64


@dataclass(frozen=True)
class Arranged:
    """Features and filters as the kernels read them, contiguous.

    Attributes:
        features: (B, h + s - 1, w + s - 1, planes, blocks of entries, padded filters).
        filters: (planes, padded filters, padded taps).
        taps: (planes, padded taps, padded filters), the same; empty unless asked for.
        channels, kernel_size: C and s.
    """

    features: Tensor
    filters: Tensor
    taps: Tensor
    channels: int
    kernel_size: int


def blocks_of(channels: int, filters: int) -> int:
    """Blocks of softmaxes."""
    return -(-channels // filters)


def padded_taps(kernel_size: int) -> int:
    """Taps of a filter in a tile: a power of two, of whole pieces."""
    return max(PIECE, triton.next_power_of_2(kernel_size * kernel_size))


def allocate(features: Tensor, basis: Tensor, *, planes: int, dtype: torch.dtype, transposed: bool = False) -> Arranged:
    """The memory for arranged features (B, C, h, w) and filters (M, 1, s, s), in so many planes of a dtype.

    `transposed` asks for `Arranged.taps`.
    """
    batch, channels, height, width = features.shape
    filters, _, size, _ = basis.shape
    entries = blocks_of(channels, filters) + (channels % filters != 0)
    columns = padded_filters(filters)
    shape = (batch, height + size - 1, width + size - 1, planes, entries, columns)
    taps = padded_taps(size)
    return Arranged(
        features.new_empty(shape, dtype=dtype),
        features.new_empty((planes, columns, taps), dtype=dtype),
        features.new_empty((planes, taps, columns) if transposed else (0,), dtype=dtype),
        channels,
        size,
    )


@triton.jit
def _store_planes(place, plane_stride, values, mask, PLANES: tl.constexpr):
    """Store numbers, of float32 where there are several planes, as a sum of PLANES numbers of the place's dtype."""
    for plane in tl.static_range(PLANES):
        rounded = values.to(place.dtype.element_ty)
        tl.store(place + plane * plane_stride, rounded, mask=mask)
        if PLANES > 1:
            values -= rounded.to(values.dtype)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_arrange_kernel(
    features, basis, arranged, filters, transposed,
    # (B, C, h, w), (M, s * s), (B, h + s - 1, w + s - 1, PLANES, blocks, COLUMNS), (PLANES, COLUMNS, TAPS),
    # (PLANES, TAPS, COLUMNS)
    height, width, channels, blocks,
    features_image_stride, features_channel_stride, features_row_stride, features_column_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr,
    TRANSPOSED: tl.constexpr, ACROSS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of ACROSS positions of a row; grid: (rows of all images, runs of positions, runs of entries).

    The first program also stores the filters.
    """
    wide = width + SIZE - 1
    high = height + SIZE - 1
    line = tl.program_id(0).to(tl.int64)
    image = line // high
    across = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    column = across - SIZE // 2
    row = line % high - SIZE // 2 + 0 * column
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    filter_ = entry % COLUMNS
    channel = (filter_ * channels) // FILTERS + entry // COLUMNS
    # What is beyond the map is zero, and so are entries that stand for nothing.
    there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    real = (filter_ < FILTERS) & (channel < channels)
    place = features + image * features_image_stride + (row * features_row_stride)[:, None]
    place += (column.to(tl.int64) * features_column_stride)[:, None]
    place += (channel.to(tl.int64) * features_channel_stride)[None, :]
    values = tl.load(place, mask=there[:, None] & real[None, :], other=0.0)  # (ACROSS, ENTRIES)
    count = blocks * COLUMNS
    out = arranged + ((line * wide + across) * PLANES * count)[:, None] + entry[None, :]
    mask = (across < wide)[:, None] & (entry < count)[None, :]
    _store_planes(out, count, values, mask, PLANES)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        number = tl.arange(0, COLUMNS)
        tap = tl.arange(0, TAPS)
        exists = (number < FILTERS)[:, None] & (tap < SIZE * SIZE)[None, :]
        taps = tl.load(basis + (number * SIZE * SIZE)[:, None] + tap[None, :], mask=exists, other=0.0)
        to = filters + (number * TAPS)[:, None] + tap[None, :]
        _store_planes(to, COLUMNS * TAPS, taps, None, PLANES)
        if TRANSPOSED:
            to = transposed + number[:, None] + (tap * COLUMNS)[None, :]
            _store_planes(to, COLUMNS * TAPS, taps, None, PLANES)


def plan_arrange(features: Tensor, basis: Tensor, arranged: Arranged) -> Launch:
    """The launch that fills what `allocate` gave.

    Args:
        features: (B, C, h, w), any strides; of float32 where there are several planes.
        basis: (M, 1, s, s), contiguous, in the same dtype.
        arranged: the memory.
    """
    batch, channels, height, width = features.shape
    _, high, wide, planes, blocks, columns = arranged.features.shape
    return Launch(
        kernel=_feature_unification_arrange_kernel,
        grid=(batch * high, triton.cdiv(wide, _ROW_BLOCK), triton.cdiv(blocks * columns, _ENTRY_BLOCK)),
        arguments={
            "features": features,
            "basis": basis,
            "arranged": arranged.features,
            "filters": arranged.filters,
            "transposed": arranged.taps,
            "height": height,
            "width": width,
            "channels": channels,
            "blocks": blocks,
            **strides_of("features", features, "image channel row column"),
        },
        constants={
            "FILTERS": basis.shape[0],
            "COLUMNS": columns,
            "SIZE": basis.shape[2],
            "TAPS": arranged.filters.shape[2],
            "PLANES": planes,
            "TRANSPOSED": arranged.taps.numel() > 0,
            "ACROSS": _ROW_BLOCK,
            "ENTRIES": _ENTRY_BLOCK,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


@triton.jit
def load_filters(filters, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr,
                 PIECE: tl.constexpr):  # fmt: skip
    """Filters `first` ... `first + ROWS - 1` in pieces of their taps, plane by plane: tuple of (ROWS, PIECE)."""
    place = filters + (first + tl.arange(0, ROWS))[:, None] * TAPS + tl.arange(0, PIECE)[None, :]
    pieces = ()
    for plane in tl.static_range(PLANES):
        for piece in tl.static_range(TAPS // PIECE):
            pieces = pieces + (tl.load(place + plane * COLUMNS * TAPS + piece * PIECE),)
    return pieces


@triton.jit
def patch_corner(image, row, column, height, width, SIZE: tl.constexpr):
    """The number of the first cell of a position's patch among all of the arranged features, int64."""
    return (image * (height + SIZE - 1) + row) * (width + SIZE - 1) + column


@triton.jit
def load_patch(
    arranged, corner, block, width, blocks,
    SIZE: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A position's patch of a block in pieces of its taps, plane by plane: tuple of (PIECE, COLUMNS).

    The taps that fill up are zeros.
    """
    pieces = ()
    for plane in tl.static_range(PLANES):
        for piece in tl.static_range(TAPS // PIECE):
            pieces = pieces + (
                load_piece(arranged, corner, block, width, blocks, plane, piece, SIZE, COLUMNS, PLANES, PIECE),
            )
    return pieces


@triton.jit
def load_piece(
    arranged, corner, block, width, blocks, plane: tl.constexpr, piece: tl.constexpr,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One piece of a plane of a patch, (PIECE, COLUMNS)."""
    tap = piece * PIECE + tl.arange(0, PIECE)
    cell = corner + (tap // SIZE * (width + SIZE - 1) + tap % SIZE)
    place = arranged + ((cell * PLANES + plane) * blocks + block)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if (piece + 1) * PIECE <= SIZE * SIZE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(tap < SIZE * SIZE)[:, None], other=0.0)


@triton.jit
def product_of(left, right, PLANES: tl.constexpr, PRECISION: tl.constexpr):
    """The product of what two tuples of pieces are the planes of, float32; the smallest terms first.

    Of the products of planes those are left out that are below the last one's rounding.
    """
    PIECES: tl.constexpr = len(left) // PLANES
    product = tl.zeros((left[0].shape[0], right[0].shape[1]), tl.float32)
    for order in tl.static_range(PLANES):
        for plane in tl.static_range(PLANES - order):
            for piece in tl.static_range(PIECES):
                product = tl.dot(
                    left[plane * PIECES + piece],
                    right[(PLANES - 1 - order - plane) * PIECES + piece],
                    product,
                    input_precision=PRECISION,
                )
    return product


@triton.jit
def taps_inside(row, column, height, width, HALF: tl.constexpr):
    """How many taps of a filter at a position lie inside the map, float32."""
    down = tl.minimum(row + HALF, height - 1) - tl.maximum(row - HALF, 0) + 1
    across = tl.minimum(column + HALF, width - 1) - tl.maximum(column - HALF, 0) + 1
    return (down * across).to(tl.float32)
