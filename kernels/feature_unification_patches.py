"""The features' arrangement for the unification: a border of zeros, and channels innermost, in the order of softmaxes.

The channel-major list of C*M maps is reinterpreted as (M, C). So map o*C + c belongs to softmax c and output o. It is
filter (o*C + c) % M of channel (o*C + c) // M. Let g = gcd(C, M). A *run* is g consecutive softmaxes. A *class* is the
g outputs o with the same k = (o*C % M) / g; there are M / g classes.

For run r (softmaxes r*g ... r*g + g - 1) and the outputs of class k, let q = r + k. The filters are the g filters from
(q % (M/g)) * g on, and the channels are (o*C) // M + q // (M/g). So the logits are a matrix product of g filters and a
patch of g channels. Entry (e, o) of a position's arranged features is channel (o*C) // M + e. The outputs are in the
order of their classes: column k*g + j is output o_k + j * M/g, where o_k is the class's first output. If M divides C,
there is one class, and each channel is one entry.

This needs M to be a power of two and g to be at least 16. For any other C a run has M softmaxes although M does not
divide C: the filters' numbers pass M within a product and begin at 0 again. Such a run is called *turned*, and
`turned_logits` puts its results in order.

In this arrangement a patch of M channels is s*s contiguous rows, whatever the strides of the features were. It costs
one pass over the features, which is little beside the exponentials. Float32 numbers are split here, once, into a sum of
planes of 16-bit floats. The products of two planes are exact on the matrix units, and those that matter are added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, strides_of
from .products import padded
from .weight_arrangement import arrange_weight, arrangement

SIZES = (
    "height", "width", "positions", "tiles", "runs", "entries", "first_step", "channels", "opaque_zero", "square_rows",
    "square_columns", "repeats",
)  # fmt: skip
"""Kernel arguments that kernels are not specialised on, so that a new grid or another C compiles no new kernel."""

PIECE = 16
"""Taps of one product: the depth that the matrix units take of 16-bit floats."""

_LEAST_RUN = 16
"""The fewest softmaxes of a run: the rows that the matrix units take."""

_ROW_BLOCK = 16
_ENTRY_BLOCK = 64


@dataclass(frozen=True)
class Runs:
    """The division of C channels and M filters into runs of softmaxes and classes of outputs (see the module).

    Attributes:
        filters: M.
        length: the number of softmaxes of a run.
        number: the number of runs.
        entries: the number of blocks of M entries that a position has.
        first_step: the first output of class k is k * first_step % classes.
        turned: whether the filters' numbers pass M within a run.
    """

    filters: int
    length: int
    number: int
    entries: int
    first_step: int
    turned: bool

    @property
    def classes(self) -> int:
        """The number of classes of outputs."""
        return self.filters // self.length

    @property
    def width(self) -> int:
        """The number of columns of a class in a tile."""
        return padded(self.length)

    @property
    def columns(self) -> int:
        """The number of columns of all classes."""
        return self.classes * self.width


def runs_of(channels: int, filters: int) -> Runs:
    """The division of `channels` channels and `filters` filters."""
    length = math.gcd(channels, filters)
    if filters & (filters - 1) or length < _LEAST_RUN:
        length = filters
    classes, number = filters // length, -(-channels // length)
    if channels % length:
        return Runs(filters, length, number, number + 1, 0, turned=True)
    first_step = pow(channels // length, -1, classes) if classes > 1 else 0
    return Runs(filters, length, number, (number + classes - 2) // classes + 1, first_step, turned=False)


@dataclass(frozen=True)
class Arranged:
    """Features and filters in the arrangement that the kernels read, contiguous.

    Attributes:
        features: (B, h + s - 1, w + s - 1, planes, blocks of entries, columns).
        filters: (planes, columns, padded taps).
        taps: (planes, padded taps, columns), the transposed filters; empty unless requested.
        runs: the division into runs and classes.
        channels, kernel_size: C and s.
    """

    features: Tensor
    filters: Tensor
    taps: Tensor
    runs: Runs
    channels: int
    kernel_size: int


def padded_taps(kernel_size: int) -> int:
    """The number of taps of a filter in a tile: a power of two, and a multiple of `PIECE`."""
    return max(PIECE, triton.next_power_of_2(kernel_size * kernel_size))


def allocate(features: Tensor, basis: Tensor, *, planes: int, dtype: torch.dtype, transposed: bool = False) -> Arranged:
    """Allocate the arrangement of features (B, C, h, w) and filters (M, 1, s, s), in `planes` planes of `dtype`.

    `transposed` allocates `Arranged.taps` too.
    """
    batch, channels, height, width = features.shape
    filters, _, size, _ = basis.shape
    runs = runs_of(channels, filters)
    shape = (batch, height + size - 1, width + size - 1, planes, runs.entries, runs.columns)
    taps = padded_taps(size)
    return Arranged(
        features.new_empty(shape, dtype=dtype),
        features.new_empty((planes, runs.columns, taps), dtype=dtype),
        features.new_empty((planes, taps, runs.columns) if transposed else (0,), dtype=dtype),
        runs,
        channels,
        size,
    )


@triton.jit
def output_of(column, first_step, WIDTH: tl.constexpr, CLASSES: tl.constexpr):
    """The output that a column of all classes stands for."""
    if CLASSES == 1:
        return column
    else:
        return (column // WIDTH * first_step) % CLASSES + column % WIDTH * CLASSES


@triton.jit
def _store_planes(place, plane_stride, values, mask, PLANES: tl.constexpr):
    """Store `values` as a sum of PLANES numbers of the dtype of `place`; several planes need float32 values."""
    for plane in tl.static_range(PLANES):
        rounded = values.to(place.dtype.element_ty)
        tl.store(place + plane * plane_stride, rounded, mask=mask)
        if PLANES > 1:
            values -= rounded.to(values.dtype)


@triton.jit(do_not_specialize=SIZES)
def _feature_unification_arrange_kernel(
    features, basis, arranged, filters, transposed, copied, weight, arranged_weight,
    # (B, C, h, w), (M, s * s), (B, h + s - 1, w + s - 1, PLANES, entries, COLUMNS), (PLANES, COLUMNS, TAPS),
    # (PLANES, TAPS, COLUMNS), (B, h, w, C), (OUTPUTS, INPUTS, WEIGHT_TAPS), (WEIGHT_TAPS, INPUTS, OUTPUTS)
    height, width, channels, entries, first_step,
    features_image_stride, features_channel_stride, features_row_stride, features_column_stride,
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr, PLANES: tl.constexpr,
    WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, NORMALIZES: tl.constexpr, COPIES: tl.constexpr,
    ACROSS: tl.constexpr, ENTRIES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    WEIGHT_TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of ACROSS positions of a row; grid: (rows of all images, runs of positions, runs of entries).

    NORMALIZES: features are divided by the norm of their position, in float32. COPIES: they are copied as they are,
    channels innermost, by the programs of the first entries. The first program also stores the filters. OUTPUTS: the
    programs share the arranging of a convolution's weight.
    """
    wide = width + SIZE - 1
    high = height + SIZE - 1
    line = tl.program_id(0).to(tl.int64)
    image = line // high
    across = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    column = across - SIZE // 2
    row = line % high - SIZE // 2 + 0 * column
    entry = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    output = output_of(entry % COLUMNS, first_step, WIDTH, COLUMNS // WIDTH)
    channel = (output * channels) // FILTERS + entry // COLUMNS
    # Positions beyond the map are zero, and so are entries that pad the last block.
    there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    real = (output < FILTERS) & (channel < channels)
    position = features + image * features_image_stride + (row * features_row_stride)[:, None]
    position += (column.to(tl.int64) * features_column_stride)[:, None]
    place = position + (channel.to(tl.int64) * features_channel_stride)[None, :]
    values = tl.load(place, mask=there[:, None] & real[None, :], other=0.0)  # (ACROSS, ENTRIES)
    if NORMALIZES:
        squares = tl.zeros((ACROSS, ENTRIES), tl.float32)
        to_copy = tl.where(tl.program_id(2) == 0, channels, 0)
        for first in tl.range(0, channels, ENTRIES):
            channel = first + tl.arange(0, ENTRIES)
            mask = there[:, None] & (channel < channels)[None, :]
            some = tl.load(position + (channel.to(tl.int64) * features_channel_stride)[None, :], mask=mask, other=0.0)
            if COPIES:
                to = copied + (((image * height + row) * width + column) * channels)[:, None] + channel[None, :]
                tl.store(to, some, mask=there[:, None] & (channel < to_copy)[None, :])
            some = some.to(tl.float32)
            squares += some * some
        norm = tl.sqrt_rn(tl.sum(squares, axis=1))
        values = tl.div_rn(values.to(tl.float32), tl.maximum(norm, 1e-12)[:, None] + tl.zeros_like(squares))
    count = entries * COLUMNS
    out = arranged + ((line * wide + across) * PLANES * count)[:, None] + entry[None, :]
    mask = (across < wide)[:, None] & (entry < count)[None, :]
    _store_planes(out, count, values, mask, PLANES)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        number = tl.arange(0, COLUMNS)
        tap = tl.arange(0, TAPS)
        exists = (number < FILTERS)[:, None] & (tap < SIZE * SIZE)[None, :]
        taps = tl.load(basis + (number * SIZE * SIZE)[:, None] + tap[None, :], mask=exists, other=0.0)
        if NORMALIZES:
            taps = taps.to(tl.float32)
        to = filters + (number * TAPS)[:, None] + tap[None, :]
        _store_planes(to, COLUMNS * TAPS, taps, None, PLANES)
        if TRANSPOSED:
            to = transposed + number[:, None] + (tap * COLUMNS)[None, :]
            _store_planes(to, COLUMNS * TAPS, taps, None, PLANES)
    if OUTPUTS > 0:
        arrange_weight(weight, arranged_weight, OUTPUTS, INPUTS, WEIGHT_TAPS, BLOCK)


def plan_arrange(
    features: Tensor,
    basis: Tensor,
    arranged: Arranged,
    *,
    normalizes: bool = False,
    copied: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Launch:
    """The launch that fills an arrangement of `allocate`.

    Args:
        features: (B, C, h, w), any strides; of float32 where there are several planes, unless they are normalised.
        basis: (M, 1, s, s), contiguous, in the same dtype, or any where the features are normalised.
        arranged: the arrangement to fill.
        normalizes: divide a position's features by their Euclidean norm, or by 1e-12 where that is less.
        copied: (B, h, w, C), contiguous, to which the unnormalised features are copied; with `normalizes` only.
        weights: a convolution's weight and its arrangement, which the launch takes along (`arrangement`).
    """
    assert normalizes or copied is None
    batch, channels, height, width = features.shape
    _, high, wide, planes, entries, columns = arranged.features.shape
    copy, of_copy = arrangement(weights, arranged.features)
    return Launch(
        kernel=_feature_unification_arrange_kernel,
        grid=(batch * high, triton.cdiv(wide, _ROW_BLOCK), triton.cdiv(entries * columns, _ENTRY_BLOCK)),
        arguments={
            "features": features,
            "basis": basis,
            "arranged": arranged.features,
            "filters": arranged.filters,
            "transposed": arranged.taps,
            "copied": arranged.features if copied is None else copied,
            **copy,
            "height": height,
            "width": width,
            "channels": channels,
            "entries": entries,
            "first_step": arranged.runs.first_step,
            **strides_of("features", features, "image channel row column"),
        },
        constants={
            "FILTERS": basis.shape[0],
            "COLUMNS": columns,
            "SIZE": basis.shape[2],
            "TAPS": arranged.filters.shape[2],
            "PLANES": planes,
            "WIDTH": arranged.runs.width,
            "TRANSPOSED": arranged.taps.numel() > 0,
            "NORMALIZES": normalizes,
            "COPIES": copied is not None,
            "ACROSS": _ROW_BLOCK,
            "ENTRIES": _ENTRY_BLOCK,
            **of_copy,
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
    arranged, corner, entry, width, entries, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """WIDTH columns from FIRST of a position's patch in pieces of its taps, plane by plane: tuple of (PIECE, WIDTH).

    Padding taps are zeros.
    """
    pieces = ()
    for plane in tl.static_range(PLANES):
        for piece in tl.static_range(TAPS // PIECE):
            pieces = pieces + (
                load_piece(
                    arranged, corner, entry, width, entries, plane, piece, FIRST, WIDTH, SIZE, COLUMNS, PLANES, PIECE
                ),
            )
    return pieces


@triton.jit
def load_piece(
    arranged, corner, entry, width, entries, plane: tl.constexpr, piece: tl.constexpr, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One piece of a plane of a patch, (PIECE, WIDTH)."""
    tap = piece * PIECE + tl.arange(0, PIECE)
    cell = corner + (tap // SIZE * (width + SIZE - 1) + tap % SIZE)
    place = arranged + ((cell * PLANES + plane) * entries + entry)[:, None] * COLUMNS
    place = place + (FIRST + tl.arange(0, WIDTH))[None, :]
    if (piece + 1) * PIECE <= SIZE * SIZE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(tap < SIZE * SIZE)[:, None], other=0.0)


@triton.jit
def product_of(left, right, PLANES: tl.constexpr, PRECISION: tl.constexpr):
    """The product, in float32, of two factors that are given as tuples of pieces of their planes.

    Products of planes are added from the smallest on; those below the rounding of the result are left out.
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
