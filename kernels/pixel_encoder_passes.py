"""The pixel encoder: half blocks y = W silu(gn(x)) over a map, each normalisation known before the map is read.

x0 = P p, x1 = x0 + W2 silu(n2(y1)), y1 = W1 silu(n1(x0)), x2 = x1 + W4 silu(n4(y2)), y2 = W3 silu(n3(x1)), p a pixel of
the input. A normalisation's statistics are over the whole map, so the map is read once for each; between two of them
everything is pixelwise. Of x0, y1, x1, y2 only x1 is stored, the others are made again in each pass: a map in half
precision costs 256 bytes a pixel to read, a product 2 * 128 * 128 operations, less than that on a matrix unit. The
passes, and their bytes a pixel in half precision at D = 128, for an input of 3 channels (of 128 channels):

    statistics of x0       read p                6 (256)
    statistics of y1       read p                6 (256)
    x1 and its statistics  read p, write x1    262 (512)
    statistics of y2       read x1             256
    x2                     read and write      512, or read x1 and write the small grid: 256

One map is alive beside the input: x2 replaces x1 where it is. In float32 x0 waits in x1's place for the residual, and a
map is read again for it: registers do not hold both. A pass leaves mean and squared deviation of each channel
over each of its tiles; `pixel_encoder_statistics.py` joins them. The last product commutes with the pooling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig, padded
from .products import matmul

SIZES = (
    "count",
    "tiles",
    "width",
    "height",
    "again",
    "cells_high",
    "cells_wide",
    "image_stride",
    "pixel_stride",
    "channel_stride",
)


class HalfBlock(NamedTuple):
    """y = weight silu(norm(x))."""

    norm: Tensor  # (B, 3, D padded) float32: centre, scale and shift of each channel
    weight: Tensor  # (D, D)


class Source(NamedTuple):
    """What a pass reads: a contiguous map (B, n, D), or an input (B, n, Cin) of any strides and what projects it."""

    pixels: Tensor
    projection: Tensor | None  # (D, Cin); of a map None, or the identity, see `map_source`


def map_source(pixels: Tensor) -> Source:
    """A contiguous map (B, n, D) as a source.

    In half precision a product with the identity, which is exact, brings it into the layout that the other products'
    results have. Otherwise the compiler moves the change of layout to the front and lets several warps activate the
    same pixels: two to three times the instructions.
    """
    if pixels.element_size() > 2:
        return Source(pixels, None)
    return Source(pixels, torch.eye(pixels.shape[2], dtype=pixels.dtype, device=pixels.device))


@triton.jit
def load_matrix(weight, row, rows: tl.constexpr, columns: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns from FIRST of some rows of a contiguous (rows, columns) matrix, zero beyond it, transposed."""
    column = FIRST + tl.arange(0, COLUMNS)
    exists = (row < rows)[None, :] & (column < columns)[:, None]
    return tl.load(weight + row[None, :] * columns + column[:, None], mask=exists, other=0.0)


@triton.jit
def partner_of(channel, CHANNELS: tl.constexpr):
    """The channel that rotate_half brings to a channel."""
    return tl.where(channel < CHANNELS // 2, channel + CHANNELS // 2, channel - CHANNELS // 2)


@triton.jit
def multiplied(totals, x, weight, rows: tl.constexpr, columns: tl.constexpr, NUMBER: tl.constexpr,
               DIM: tl.constexpr, PIECE: tl.constexpr, PARTNERS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`totals`, pieces (n, PIECE) of a product, and what piece NUMBER of the other factor, x, adds to each.

    The weight is a contiguous (rows, columns) matrix; of its transpose only a piece's rows and columns are in
    registers, where a product of float32 takes them apart into two numbers each. PARTNERS: its rows in their
    partners' places.
    """
    WIDTH: tl.constexpr = x.shape[1]
    updated = ()
    for outer in tl.static_range(DIM // PIECE):
        row = outer * PIECE + tl.arange(0, PIECE)
        if PARTNERS:
            row = tl.where(row < rows, partner_of(row, rows), row)
        matrix = load_matrix(weight, row, rows, columns, NUMBER * WIDTH, WIDTH)
        updated = updated + (matmul(x, matrix, None if NUMBER == 0 else totals[outer], PRECISION),)
    return updated


@triton.jit
def activated(x, norm, dtype: tl.constexpr, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """silu of piece NUMBER of pixels, (n, PIECE), in float32, normalised by centre, scale and shift (3, DIM)."""
    channel = NUMBER * x.shape[1] + tl.arange(0, x.shape[1])
    center, scale, shift = tl.load(norm + channel), tl.load(norm + DIM + channel), tl.load(norm + 2 * DIM + channel)
    normed = (x - center[None, :]) * scale[None, :] + shift[None, :]
    return (normed / (1.0 + tl.exp(-normed))).to(dtype)


@triton.jit
def half_block(
    x, norm, weight, dtype: tl.constexpr, CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr,
    PARTNERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight silu(norm(x)) of pixels, both in pieces (n, PIECE), in float32."""
    totals = ()
    for number in tl.static_range(len(x)):
        active = activated(x[number], norm, dtype, number, DIM)
        totals = multiplied(totals, active, weight, CHANNELS, CHANNELS, number, DIM, PIECE, PARTNERS, PRECISION)
    return totals


@triton.jit
def half_block_of_map(
    pixels, number, exists, norm, weight,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`half_block` of pixels of a contiguous map, each piece of them loaded when it is needed."""
    totals = ()
    for piece in tl.static_range(DIM // PIECE):
        x = load_piece(pixels, number, exists, CHANNELS, piece, PIECE)
        active = activated(x.to(tl.float32), norm, x.dtype, piece, DIM)
        totals = multiplied(totals, active, weight, CHANNELS, CHANNELS, piece, DIM, PIECE, False, PRECISION)
    return totals


@triton.jit
def load_piece(pixels, number, exists, CHANNELS: tl.constexpr, NUMBER: tl.constexpr, PIECE: tl.constexpr):
    """A piece of pixels of a contiguous map, (n, PIECE), as it is stored; zero where none exist."""
    channel = NUMBER * PIECE + tl.arange(0, PIECE)
    place = pixels + number.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return tl.load(place, mask=exists[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def load_map(pixels, number, exists, CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr):
    """Pixels of a contiguous map in pieces (n, PIECE), as they are stored; zero where none exist."""
    pieces = ()
    for piece in tl.static_range(DIM // PIECE):
        pieces = pieces + (load_piece(pixels, number, exists, CHANNELS, piece, PIECE),)
    return pieces


@triton.jit
def store_map(out, y, number, exists, CHANNELS: tl.constexpr):
    """The inverse of `load_map`."""
    for piece in tl.static_range(len(y)):
        channel = piece * y[0].shape[1] + tl.arange(0, y[0].shape[1])
        place = out + number.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        mask = exists[:, None] & (channel < CHANNELS)[None, :]
        tl.store(place, y[piece].to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_pixels(
    pixels, projection, number, exists, pixel_stride, channel_stride,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x0 of an input's pixels (with INPUT_DIM), or a map's, in pieces (n, PIECE) float32; zero where none exist."""
    if INPUT_DIM > 0:
        WIDTH: tl.constexpr = min(INPUT_DIM, PIECE)
        totals = ()
        for piece in tl.static_range(INPUT_DIM // WIDTH):
            channel = piece * WIDTH + tl.arange(0, WIDTH)
            place = pixels + number.to(tl.int64)[:, None] * pixel_stride
            place = place + channel[None, :].to(tl.int64) * channel_stride
            values = tl.load(place, mask=exists[:, None] & (channel < INPUTS)[None, :], other=0.0)
            totals = multiplied(totals, values, projection, CHANNELS, INPUTS, piece, DIM, PIECE, False, PRECISION)
        return totals
    else:
        pieces = ()
        stored = load_map(pixels, number, exists, CHANNELS, DIM, PIECE)
        for piece in tl.static_range(DIM // PIECE):
            pieces = pieces + (stored[piece].to(tl.float32),)
        return pieces


@triton.jit
def sum_of(x, y):
    """The sums of two tuples of pieces, in float32."""
    pieces = ()
    for piece in tl.static_range(len(x)):
        pieces = pieces + (x[piece].to(tl.float32) + y[piece],)
    return pieces


@triton.jit
def partners(
    x, y, norm, pixels, weight, number, exists, CHANNELS: tl.constexpr,
    DIM: tl.constexpr, PIECE: tl.constexpr, SWAPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rotate_half(y) of pixels y in pieces, the sum of those of a map and of weight silu(norm(x)).

    SWAPS: half the channels are whole pieces, which change places. Else it is made as y is, with the map's channels and
    the rows of the weight in the order that it asks for: nothing changes places between threads.
    """
    pieces = ()
    if SWAPS:
        HALF: tl.constexpr = len(y) // 2
        for piece in tl.static_range(HALF):
            pieces = pieces + (-y[HALF + piece],)
        for piece in tl.static_range(HALF):
            pieces = pieces + (y[piece],)
    else:
        others = half_block(x, norm, weight, pixels.dtype.element_ty, CHANNELS, DIM, PIECE, True, PRECISION)
        for piece in tl.static_range(len(y)):
            channel = piece * PIECE + tl.arange(0, PIECE)
            place = pixels + number.to(tl.int64)[:, None] * CHANNELS + partner_of(channel, CHANNELS)[None, :]
            mask = exists[:, None] & (channel < CHANNELS)[None, :]
            other = others[piece] + tl.load(place, mask=mask, other=0.0).to(tl.float32)
            pieces = pieces + (tl.where((channel < CHANNELS // 2)[None, :], -other, other),)
    return pieces


@triton.jit
def rotated(y, others, tables, number, width, height, DIM: tl.constexpr):
    """y cos(angle) + rotate_half(y) sin(angle), in pieces. The angle is the sum of a row's and a column's."""
    pieces = ()
    for piece in tl.static_range(len(y)):
        channel = piece * y[0].shape[1] + tl.arange(0, y[0].shape[1])
        down = tables + (number // width)[:, None] * (2 * DIM) + channel[None, :]
        across = tables + (height + number % width)[:, None] * (2 * DIM) + channel[None, :]
        row_cos, row_sin = tl.load(down), tl.load(down + DIM)
        column_cos, column_sin = tl.load(across), tl.load(across + DIM)
        turned = y[piece] * (row_cos * column_cos - row_sin * column_sin)
        pieces = pieces + (turned + others[piece] * (row_sin * column_cos + row_cos * column_sin),)
    return pieces


@triton.jit
def store_part(part, y, exists, existing, DIM: tl.constexpr):
    """Mean and summed squared deviation of each channel over a tile's pixels, (2, DIM), in two passes over them."""
    for piece in tl.static_range(len(y)):
        channel = piece * y[0].shape[1] + tl.arange(0, y[0].shape[1])
        mean = tl.sum(tl.where(exists[:, None], y[piece], 0.0), axis=0) / existing
        deviation = tl.where(exists[:, None], y[piece] - mean[None, :], 0.0)
        tl.store(part + channel, mean)
        tl.store(part + DIM + channel, tl.sum(deviation * deviation, axis=0))


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pass_kernel(
    pixels, projection, norm1, weight1, norm2, weight2, tables, out, parts,
    # input or map, (D, Cin), (B, 3, DIM), (D, D), (B, 3, DIM), (D, D), (H + W, 2, DIM), (B, n, D), (B, tiles, 2, DIM)
    count, tiles, width, height, again, image_stride, pixel_stride, channel_stride,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, HALVES: tl.constexpr,
    PIXELS: tl.constexpr, MEASURES: tl.constexpr, STORES: tl.constexpr, ROTATES: tl.constexpr, SWAPS: tl.constexpr,
    FETCHES: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of an image through HALVES half blocks, with the residual after two; grid: the tiles of all images.

    MEASURES: leave the tile's statistics in `parts`. STORES: put the result into `out`, ROTATES: rotated.
    FETCHES: x is loaded a piece at a time and does not wait in registers for the residual: it is loaded again, and what
    was projected is stored for that in `out`. `again` is a 0 that the compiler knows nothing of, or it would load once.
    A width is a constant of the code: as a number, it would take registers for all the places in the weights.
    """
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    number = tile * PIXELS + tl.arange(0, PIXELS)
    exists = number < count
    dtype: tl.constexpr = pixels.dtype.element_ty
    result = out + image * count * CHANNELS
    mine = pixels + image * (image_stride if INPUT_DIM > 0 else count * CHANNELS)
    if FETCHES and INPUT_DIM == 0:
        first = half_block_of_map(
            mine, number, exists, norm1 + image * 3 * DIM, weight1, CHANNELS, DIM, PIECE, PRECISION
        )  # fmt: skip
    else:
        x = load_pixels(
            mine, projection, number, exists, pixel_stride, channel_stride, CHANNELS, INPUTS,
            DIM, INPUT_DIM, PIECE, PRECISION,
        )  # fmt: skip
        if FETCHES and HALVES > 1:
            store_map(result, x, number, exists, CHANNELS)
        if HALVES > 0:
            first = half_block(x, norm1 + image * 3 * DIM, weight1, dtype, CHANNELS, DIM, PIECE, False, PRECISION)
    if HALVES > 1:
        norm2 += image * 3 * DIM
        y = half_block(first, norm2, weight2, dtype, CHANNELS, DIM, PIECE, False, PRECISION)
        if FETCHES:
            if INPUT_DIM > 0:
                tl.debug_barrier()  # other threads have stored it
            stored = result if INPUT_DIM > 0 else mine
            x = load_map(stored + again, number, exists, CHANNELS, DIM, PIECE)
        y = sum_of(x, y)
        if ROTATES:
            others = partners(
                first, y, norm2, mine, weight2, number, exists, CHANNELS, DIM, PIECE, SWAPS, PRECISION
            )  # fmt: skip
            # Past an image's last pixel the tables end.
            y = rotated(y, others, tables, tl.minimum(number, count - 1), width, height, DIM)
    elif HALVES > 0:
        y = first
    else:
        y = x
    if MEASURES:
        existing = tl.minimum(count - tile * PIXELS, PIXELS).to(tl.float32)
        store_part(parts + (image * tiles + tile) * 2 * DIM, y, exists, existing, DIM)
    if STORES:
        if (ROTATES and not SWAPS) or (FETCHES and HALVES > 1):
            tl.debug_barrier()  # other threads have read what is replaced, as partners or for the residual
        store_map(result, y, number, exists, CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_angles_kernel(frequencies, tables, height, width, channels, DIM: tl.constexpr):
    """Cosines and sines (2, DIM) of a row's or a column's angles, coordinates from 0 to 1 times (2, D); grid: H + W."""
    number = tl.program_id(0)
    channel = tl.arange(0, DIM)
    if number < height:
        coordinate = tl.div_rn(number.to(tl.float32), tl.maximum(height - 1, 1).to(tl.float32))
    else:
        coordinate = tl.div_rn((number - height).to(tl.float32), tl.maximum(width - 1, 1).to(tl.float32))
    axis = tl.where(number < height, 0, channels)
    angle = coordinate * tl.load(frequencies + axis + channel, mask=channel < channels, other=0.0).to(tl.float32)
    place = tables + number * (2 * DIM) + channel
    tl.store(place, tl.cos(angle))
    tl.store(place + DIM, tl.sin(angle))


@triton.jit
def _cell(program, width, height, cells_high, cells_wide):
    """A program's image (int64) and cell, and the cell's first row and column, its rows and columns."""
    cells = cells_high * cells_wide
    image, cell = (program // cells).to(tl.int64), program % cells
    row, column = cell // cells_wide, cell % cells_wide
    top, left = row * height // cells_high, column * width // cells_wide
    rows = ((row + 1) * height + cells_high - 1) // cells_high - top
    columns = ((column + 1) * width + cells_wide - 1) // cells_wide - left
    return image, cell, top, left, rows, columns


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pool_kernel(
    pixels, projection, norm1, weight1, norm2, out,
    # (B, n, D), (D, D), (B, 3, DIM), (D, D), (B, 3, DIM), (B, cells, 2, DIM) float32
    count, width, height, cells_high, cells_wide, again,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, PIXELS: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The means over one cell of x and of silu(norm2(weight1 silu(norm1(x)))); grid: the cells of all images.

    The cells are those of adaptive average pooling, floor(i H / h) to ceil((i + 1) H / h). `again` is a 0 that the
    compiler knows nothing of, or it would keep the weight, taken apart, from pixels to pixels.
    """
    image, cell, top, left, rows, columns = _cell(tl.program_id(0), width, height, cells_high, cells_wide)
    dtype: tl.constexpr = pixels.dtype.element_ty
    norm1 += image * 3 * DIM
    norm2 += image * 3 * DIM
    mine = pixels + image * count * CHANNELS
    sums = ()
    for _piece in tl.static_range(2 * (DIM // PIECE)):
        sums = sums + (tl.zeros((PIECE,), tl.float32),)
    for first in tl.range(0, rows * columns, PIXELS):
        index = first + tl.arange(0, PIXELS)
        exists = index < rows * columns
        number = (top + index // columns) * width + left + index % columns
        updated = ()
        y = ()
        if INPUT_DIM > 0:
            x = load_pixels(
                mine, projection, number, exists, CHANNELS, 1, CHANNELS, CHANNELS, DIM, INPUT_DIM, PIECE, PRECISION
            )
            for piece in tl.static_range(DIM // PIECE):
                updated = updated + (sums[piece] + tl.sum(x[piece], axis=0),)
            y = half_block(x, norm1, weight1, dtype, CHANNELS, DIM, PIECE, False, PRECISION)
        else:
            weight = weight1 + first * again
            for piece in tl.static_range(DIM // PIECE):
                x = load_piece(mine, number, exists, CHANNELS, piece, PIECE)
                updated = updated + (sums[piece] + tl.sum(x, axis=0),)
                active = activated(x, norm1 + first * again, dtype, piece, DIM)
                y = multiplied(y, active, weight, CHANNELS, CHANNELS, piece, DIM, PIECE, False, PRECISION)
        for piece in tl.static_range(DIM // PIECE):
            active = activated(y[piece], norm2 + first * again, tl.float32, piece, DIM)
            more = tl.sum(tl.where(exists[:, None], active, 0.0), axis=0)
            updated = updated + (sums[DIM // PIECE + piece] + more,)
        sums = updated
    if dtype == tl.float32:
        # Registers are short: worked out anew because of `again`, so that nothing of it waits for the loop's end.
        image, cell, _, _, rows, columns = _cell(tl.program_id(0) + again, width, height, cells_high, cells_wide)
    pixels_of_cell = (rows * columns).to(tl.float32)
    place = out + (image * cells_high * cells_wide + cell) * 2 * DIM + tl.arange(0, PIECE)
    for piece in tl.static_range(2 * (DIM // PIECE)):
        tl.store(place + piece * PIECE, sums[piece] / pixels_of_cell)


def plan_pass(
    source: Source,
    halves: tuple[HalfBlock, ...],
    *,
    parts: Tensor | None,
    out: Tensor | None,
    tables: Tensor | None = None,
    size: tuple[int, int],
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch of one pass over the pixels of maps of `size` (H, W).

    Args:
        source: what is read, of the dtype that is worked and stored in.
        halves: none, one or two half blocks; two make a block, with its residual.
        parts: (B, tiles, 2, D padded) float32, takes the statistics of the result, as many tiles as the config makes.
        out: (B, n, D), contiguous, takes the result; it may be the map that is read.
        tables: (H + W, 2, D padded) of `plan_angles`: rotate what is stored; after two half blocks of a map.
        precision: of products of float32; Triton's `input_precision`.
        config: how to cut the work.
    """
    pixels, projection = source
    batch, count, _ = pixels.shape
    channels = (pixels if projection is None else projection).shape[2 if projection is None else 0]
    dim = padded(channels)
    piece = min(config.piece, dim)
    inputs = 0 if projection is None else pixels.shape[2]
    nothing = pixels  # for pointers that are not followed
    weights: list[Tensor] = []
    for number in range(2):
        weights += halves[number] if number < len(halves) else (nothing, nothing)
    tiles = triton.cdiv(count, config.pixels)
    waits = len(halves) > 0 if projection is None else len(halves) > 1 and out is not None
    return Launch(
        kernel=_pixel_encoder_pass_kernel,
        grid=(batch * tiles,),
        arguments={
            "pixels": pixels,
            "projection": nothing if projection is None else projection,
            **dict(zip(("norm1", "weight1", "norm2", "weight2"), weights, strict=True)),
            "tables": nothing if tables is None else tables,
            "out": nothing if out is None else out,
            "parts": nothing if parts is None else parts,
            "count": count,
            "tiles": tiles,
            "width": size[1],
            "height": size[0],
            "again": 0,
            **dict(zip(("image_stride", "pixel_stride", "channel_stride"), pixels.stride(), strict=True)),
        },
        constants={
            "CHANNELS": channels,
            "INPUTS": inputs,
            "DIM": dim,
            "INPUT_DIM": padded(inputs) if inputs else 0,
            "HALVES": len(halves),
            "PIXELS": config.pixels,
            "PIECE": piece,
            "MEASURES": parts is not None,
            "STORES": out is not None,
            "ROTATES": tables is not None,
            "SWAPS": tables is not None and channels == dim and piece <= dim // 2,
            "FETCHES": waits and pixels.element_size() > 2,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def plan_pool(
    source: Source,
    half: HalfBlock,
    norm: Tensor,
    out: Tensor,
    *,
    size: tuple[int, int],
    cells: tuple[int, int],
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch that fills `out` (B, cells, 2, D padded) with the means over cells of maps (B, n, D) of `size`.

    Args:
        source: x, a map.
        half: of the last block's first half.
        norm: of the second, (B, 3, D padded).
        out: float32: means of x, and of the second half's activations, which its weight is still to be applied to.
        size, cells: (H, W) of the map and (h, w) of the pooled one.
    """
    pixels, projection = source
    batch, count, channels = pixels.shape
    return Launch(
        kernel=_pixel_encoder_pool_kernel,
        grid=(batch * cells[0] * cells[1],),
        arguments={
            "pixels": pixels,
            "projection": pixels if projection is None else projection,
            "norm1": half.norm,
            "weight1": half.weight,
            "norm2": norm,
            "out": out,
            "count": count,
            "width": size[1],
            "height": size[0],
            "cells_high": cells[0],
            "cells_wide": cells[1],
            "again": 0,
        },
        constants={
            "CHANNELS": channels,
            "DIM": padded(channels),
            "INPUT_DIM": 0 if projection is None else padded(channels),
            "PIXELS": config.pixels,
            "PIECE": min(config.piece, padded(channels)),
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def plan_angles(frequencies: Tensor, tables: Tensor, *, size: tuple[int, int]) -> Launch:
    """The launch that fills `tables` (H + W, 2, D padded) float32 for `frequencies` (2, D), contiguous."""
    return Launch(
        kernel=_pixel_encoder_angles_kernel,
        grid=(sum(size),),
        arguments={
            "frequencies": frequencies,
            "tables": tables,
            "height": size[0],
            "width": size[1],
            "channels": frequencies.shape[1],
        },
        constants={"DIM": padded(frequencies.shape[1])},
        options={"num_warps": 1, "num_stages": 1},
    )


def allocate_parts(batch: int, count: int, channels: int, config: EncoderConfig, device: torch.device) -> Tensor:
    """Room for the statistics of each tile: (B, tiles, 2, D padded)."""
    tiles = triton.cdiv(count, config.pixels)
    return torch.empty(batch, tiles, 2, padded(channels), dtype=torch.float32, device=device)
