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

One map is alive beside the input: x2 replaces x1 where it is. A pass leaves mean and squared deviation of each channel
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

SIZES = (
    "count",
    "tiles",
    "width",
    "height",
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
def load_matrix(weight, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of a contiguous (rows, columns) matrix, zero beyond it: (COLUMNS, ROWS)."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    exists = (row < rows)[None, :] & (column < columns)[:, None]
    return tl.load(weight + row[None, :] * columns + column[:, None], mask=exists, other=0.0)


@triton.jit
def activated(x, norm, DIM: tl.constexpr):
    """silu of pixels (n, DIM) in float32, normalised by centre, scale and shift (3, DIM)."""
    channel = tl.arange(0, DIM)
    center, scale, shift = tl.load(norm + channel), tl.load(norm + DIM + channel), tl.load(norm + 2 * DIM + channel)
    normed = (x - center[None, :]) * scale[None, :] + shift[None, :]
    return normed / (1.0 + tl.exp(-normed))


@triton.jit
def half_block(x, norm, weight, channels, dtype: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """weight silu(norm(x)) of pixels (n, DIM) in float32."""
    matrix = load_matrix(weight, channels, channels, DIM, DIM)
    return tl.dot(activated(x, norm, DIM).to(dtype), matrix, input_precision=PRECISION)


@triton.jit
def load_pixels(
    pixels, projection, number, exists, channels, inputs, pixel_stride, channel_stride,
    DIM: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x0 (n, DIM) of an input's pixels (with INPUTS), or a map's pixels, in float32; zero where none exist."""
    if INPUTS > 0:
        channel = tl.arange(0, INPUTS)
        place = pixels + number[:, None] * pixel_stride + channel[None, :].to(tl.int64) * channel_stride
        values = tl.load(place, mask=exists[:, None] & (channel < inputs)[None, :], other=0.0)
        matrix = load_matrix(projection, channels, inputs, DIM, INPUTS)
        return tl.dot(values, matrix, input_precision=PRECISION)
    else:
        channel = tl.arange(0, DIM)
        place = pixels + number[:, None] * channels + channel[None, :]  # contiguous
        return tl.load(place, mask=exists[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def rotated(
    y, active, pixels, weight, tables, number, exists, width, height, channels,
    DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y cos(angle) + rotate_half(y) sin(angle) of y = x + weight active, pixels (n, DIM) of a map.

    rotate_half(y) is made as y is, from x and the rows of the weight in the order that it asks for: nothing changes
    places between threads.
    """
    channel = tl.arange(0, DIM)
    half = channels // 2
    partner = tl.where(channel < half, channel + half, channel - half)
    known = channel < channels
    place = weight + partner[None, :] * channels + channel[:, None]
    matrix = tl.load(place, mask=known[None, :] & known[:, None], other=0.0)
    other = tl.dot(active, matrix, input_precision=PRECISION)
    place = pixels + number.to(tl.int64)[:, None] * channels + partner[None, :]
    other += tl.load(place, mask=exists[:, None] & known[None, :], other=0.0).to(tl.float32)
    other = tl.where((channel < half)[None, :], -other, other)
    # The angle is the sum of a row's and a column's.
    down = tables + (number // width)[:, None] * (2 * DIM) + channel[None, :]
    across = tables + (height + number % width)[:, None] * (2 * DIM) + channel[None, :]
    row_cos, row_sin = tl.load(down), tl.load(down + DIM)
    column_cos, column_sin = tl.load(across), tl.load(across + DIM)
    return y * (row_cos * column_cos - row_sin * column_sin) + other * (row_sin * column_cos + row_cos * column_sin)


@triton.jit
def store_part(part, y, exists, existing, DIM: tl.constexpr):
    """Mean and summed squared deviation of each channel over a tile's pixels, (2, DIM), in two passes over them."""
    channel = tl.arange(0, DIM)
    mean = tl.sum(tl.where(exists[:, None], y, 0.0), axis=0) / existing
    deviation = tl.where(exists[:, None], y - mean[None, :], 0.0)
    tl.store(part + channel, mean)
    tl.store(part + DIM + channel, tl.sum(deviation * deviation, axis=0))


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pass_kernel(
    pixels, projection, norm1, weight1, norm2, weight2, tables, out, parts,
    # input or map, (D, Cin), (B, 3, DIM), (D, D), (B, 3, DIM), (D, D), (H + W, 2, DIM), (B, n, D), (B, tiles, 2, DIM)
    count, tiles, width, height, channels, inputs, image_stride, pixel_stride, channel_stride,
    DIM: tl.constexpr, INPUTS: tl.constexpr, HALVES: tl.constexpr, PIXELS: tl.constexpr, MEASURES: tl.constexpr,
    STORES: tl.constexpr, ROTATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of an image through HALVES half blocks, with the residual after two; grid: the tiles of all images.

    MEASURES: leave the tile's statistics in `parts`. STORES: put the result into `out`, ROTATES: rotated.
    """
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    number = tile * PIXELS + tl.arange(0, PIXELS)
    exists = number < count
    dtype: tl.constexpr = pixels.dtype.element_ty
    mine = pixels + image * image_stride
    x = load_pixels(
        mine, projection, number.to(tl.int64), exists, channels, inputs, pixel_stride, channel_stride,
        DIM, INPUTS, PRECISION,
    )  # fmt: skip
    y = x
    if HALVES > 0:
        y = half_block(x, norm1 + image * 3 * DIM, weight1, channels, dtype, DIM, PRECISION)
    if HALVES > 1:
        active = activated(y, norm2 + image * 3 * DIM, DIM).to(dtype)
        matrix = load_matrix(weight2, channels, channels, DIM, DIM)
        y = x + tl.dot(active, matrix, input_precision=PRECISION)
        if ROTATES:
            # Past an image's last pixel the tables end.
            at = tl.minimum(number, count - 1)
            y = rotated(y, active, mine, weight2, tables, at, exists, width, height, channels, DIM, PRECISION)
    if MEASURES:
        existing = tl.minimum(count - tile * PIXELS, PIXELS).to(tl.float32)
        store_part(parts + (image * tiles + tile) * 2 * DIM, y, exists, existing, DIM)
    if STORES:
        if ROTATES:
            tl.debug_barrier()  # `out` may be the map, whose pixels other threads have read as partners
        place = out + image * count * channels + number.to(tl.int64)[:, None] * channels
        channel = tl.arange(0, DIM)
        tl.store(place + channel[None, :], y.to(dtype), mask=exists[:, None] & (channel < channels)[None, :])


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


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pool_kernel(
    pixels, projection, norm1, weight1, norm2, out,
    # (B, n, D), (D, D), (B, 3, DIM), (D, D), (B, 3, DIM), (B, cells, 2, DIM) float32
    count, width, height, cells_high, cells_wide, channels,
    DIM: tl.constexpr, INPUTS: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The means over one cell of x and of silu(norm2(weight1 silu(norm1(x)))); grid: the cells of all images.

    The cells are those of adaptive average pooling, floor(i H / h) to ceil((i + 1) H / h).
    """
    cells = cells_high * cells_wide
    image, cell = (tl.program_id(0) // cells).to(tl.int64), tl.program_id(0) % cells
    row, column = cell // cells_wide, cell % cells_wide
    top, left = row * height // cells_high, column * width // cells_wide
    rows = ((row + 1) * height + cells_high - 1) // cells_high - top
    columns = ((column + 1) * width + cells_wide - 1) // cells_wide - left
    dtype: tl.constexpr = pixels.dtype.element_ty
    norm1 += image * 3 * DIM
    norm2 += image * 3 * DIM
    mine = pixels + image * count * channels
    passed, active = tl.zeros((DIM,), tl.float32), tl.zeros((DIM,), tl.float32)
    for first in tl.range(0, rows * columns, PIXELS):
        index = first + tl.arange(0, PIXELS)
        exists = index < rows * columns
        number = ((top + index // columns) * width + left + index % columns).to(tl.int64)
        x = load_pixels(mine, projection, number, exists, channels, channels, channels, 1, DIM, INPUTS, PRECISION)
        y = half_block(x, norm1, weight1, channels, dtype, DIM, PRECISION)
        passed += tl.sum(x, axis=0)
        active += tl.sum(tl.where(exists[:, None], activated(y, norm2, DIM), 0.0), axis=0)
    pixels_of_cell = (rows * columns).to(tl.float32)
    place = out + (image * cells + cell) * 2 * DIM + tl.arange(0, DIM)
    tl.store(place, passed / pixels_of_cell)
    tl.store(place + DIM, active / pixels_of_cell)


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
    inputs = 0 if projection is None else pixels.shape[2]
    nothing = pixels  # for pointers that are not followed
    weights: list[Tensor] = []
    for number in range(2):
        weights += halves[number] if number < len(halves) else (nothing, nothing)
    tiles = triton.cdiv(count, config.pixels)
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
            "channels": channels,
            "inputs": inputs,
            **dict(zip(("image_stride", "pixel_stride", "channel_stride"), pixels.stride(), strict=True)),
        },
        constants={
            "DIM": dim,
            "INPUTS": padded(inputs) if inputs else 0,
            "HALVES": len(halves),
            "PIXELS": config.pixels,
            "MEASURES": parts is not None,
            "STORES": out is not None,
            "ROTATES": tables is not None,
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
            "channels": channels,
        },
        constants={
            "DIM": padded(channels),
            "INPUTS": 0 if projection is None else padded(channels),
            "PIXELS": config.pixels,
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
