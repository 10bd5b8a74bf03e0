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

One map is alive beside the input: x2 replaces x1 where it is. As many programs as a card holds at a time walk over the
tiles of an image, with the weights on the chip where they fit. What a pass leaves for the next normalisation, and how
the next pass makes it of that, is in `pixel_encoder_statistics.py`. The last product commutes with the pooling:
`pixel_encoder_pool.py`.

In half precision a program multiplies its pixels with P once more for the residual, where registers do not hold x0.
In float32 it holds them in pieces of their channels, and reads them again: x0 waits in x1's place for that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig
from .pixel_encoder_statistics import (
    GROUPS,
    away_from,
    in_runs,
    joined_runs,
    joined_threads,
    make_norm,
    no_sums,
    run_sums,
    slot_channel,
    slot_exists,
    store_sums,
)
from .products import matrix_scale, padded, split_matmul

SIZES = (
    "count",
    "width",
    "height",
    "images",
    "opaque_zero",
    "joined",
    "cells_high",
    "cells_wide",
    "image_stride",
    "pixel_stride",
    "channel_stride",
)


class Join(NamedTuple):
    """The statistics that a pass left, and the group normalisation that follows from them."""

    parts: Tensor  # (B, 3, programs, 8) float32: count, mean, squared deviation
    weight: Tensor  # (D,)
    bias: Tensor  # (D,)
    eps: float
    second: tuple[Tensor, Tensor] | None = None  # weight and bias of the second encoder of a pair


class HalfBlock(NamedTuple):
    """y = weight silu(norm(x))."""

    norm: Tensor | Join  # (B, rows, D padded) float32, see `norm_rows`; of a pass's last half block it may be a join
    weight: Tensor  # (D, D)
    second: Tensor | None = None  # the weight of the second encoder of a pair


class Source(NamedTuple):
    """What a pass reads: a contiguous map (B, n, D), or an input (B, n, Cin) of any strides and what projects it.

    Two encoders of the same input go through the passes as a pair, in the same launches. Their maps, norms and
    statistics are those of one batch: of all images by the first encoder, then by the second.
    """

    pixels: Tensor
    projection: Tensor | None  # (D, Cin); of a map None, or the identity, see `map_source`
    second: Tensor | None = None  # the projection of the second encoder of a pair

    @property
    def images(self) -> int:
        """Of the maps that a pass makes."""
        return len(self.pixels) * (1 if self.second is None else 2)


def map_source(pixels: Tensor) -> Source:
    """A contiguous map (B, n, D) as a source.

    In half precision a product with the identity, which is exact, brings it into the layout that the other products'
    results have: otherwise the compiler would change its layout, and the residual's, by way of shared memory.
    """
    if pixels.element_size() > 2:
        return Source(pixels, None)
    return Source(pixels, _identity(pixels.shape[2], pixels.dtype, pixels.device))


def _identity(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix, made once: but for one that a graph would fill when it is replayed."""
    kind = (channels, dtype, device)
    found = _identities.get(kind)
    if found is None:
        found = torch.eye(channels, dtype=dtype, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _identities[kind] = found
    return found


_identities: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


class KeyProjection(NamedTuple):
    """keys = weight (gain x / rms(x)) + bias, the root of the mean square over the channels."""

    gain: Tensor  # (D,)
    weight: Tensor  # (D, D)
    bias: Tensor  # (D,)
    eps: float


def norm_rows(dtype: torch.dtype) -> int:
    """Numbers of a channel in a normalisation: scale and shift, and a centre that is subtracted before, in float32.

    In half precision a map is further off than what the centre saves.
    """
    return 2 if dtype.itemsize == 2 else 3


@triton.jit
def load_matrix(weight, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, INPUTS: tl.constexpr,
                DIM: tl.constexpr, OUTPUT: tl.constexpr, INPUT: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """A piece of a contiguous (CHANNELS, INPUTS) matrix, transposed: (INPUT, OUTPUT), zero where there is nothing.

    Its outputs are OUTPUT slots from OUTER * OUTPUT, its inputs INPUT slots from INNER * INPUT; PLAIN: channels.
    """
    output = OUTER * OUTPUT + tl.arange(0, OUTPUT)
    input = INNER * INPUT + tl.arange(0, INPUT)
    exists = slot_exists(output, CHANNELS, DIM)[None, :]
    row = slot_channel(output, CHANNELS, DIM)
    if PLAIN:
        exists &= (input < INPUTS)[:, None]
        column = input
    else:
        exists &= slot_exists(input, CHANNELS, DIM)[:, None]
        column = slot_channel(input, CHANNELS, DIM)
    return tl.load(weight + row[None, :] * INPUTS + column[:, None], mask=exists, other=0.0)


@triton.jit
def multiplied(totals, x, weight, scale, CHANNELS: tl.constexpr, NUMBER: tl.constexpr, DIM: tl.constexpr,
               PIECE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`totals`, pieces (n, PIECE) of a product, and what piece NUMBER of the other factor, x, adds to each.

    Of the weight, whose `matrix_scale` is known, only a piece's rows and columns are in registers, where a product of
    float32 takes them apart into two numbers each.
    """
    updated = ()
    for outer in tl.static_range(DIM // PIECE):
        matrix = load_matrix(weight, outer, NUMBER, CHANNELS, CHANNELS, DIM, PIECE, PIECE, False)
        updated = updated + (split_matmul(x, matrix, scale, None if NUMBER == 0 else totals[outer], PRECISION),)
    return updated


SILU_OF_HALF = tl.constexpr("{ .reg .f32 t; tanh.approx.f32 t, $1; fma.rn.f32 $0, $1, t, $1; }")
"""PTX: from x / 2 to x sigmoid(x) = x / 2 + x / 2 tanh(x / 2)."""

SILU = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }"
)
"""PTX: from x to x / (1 + 2^(-log2(e) x))."""


@triton.jit
def silu(x, FORM: tl.constexpr):
    """x sigmoid(x), with FORM "tanh" of x / 2; see `pixel_encoder_config.silu_form`."""
    if FORM == "tanh":
        return tl.inline_asm_elementwise(SILU_OF_HALF, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif FORM == "exp2":
        return tl.inline_asm_elementwise(SILU, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, norm, dtype: tl.constexpr, NUMBER: tl.constexpr, DIM: tl.constexpr, CENTERED: tl.constexpr,
              FORM: tl.constexpr):  # fmt: skip
    """silu of piece NUMBER of pixels, (n, PIECE) float32, normalised by a norm (2 or 3, DIM), in a dtype."""
    slot = NUMBER * x.shape[1] + tl.arange(0, x.shape[1])
    scale, shift = tl.load(norm + slot), tl.load(norm + DIM + slot)
    if CENTERED:
        x = x - tl.load(norm + 2 * DIM + slot)[None, :]
    return silu(x * scale[None, :] + shift[None, :], FORM).to(dtype)


@triton.jit
def half_block(
    x, norm, weight, scale, CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """weight silu(norm(x)) of pixels of float32, both in pieces (n, PIECE)."""
    totals = ()
    for number in tl.static_range(len(x)):
        active = activated(x[number], norm, tl.float32, number, DIM, True, FORM)
        totals = multiplied(totals, active, weight, scale, CHANNELS, number, DIM, PIECE, PRECISION)
    return totals


@triton.jit
def half_block_of_map(
    pixels, number, exists, norm, weight, scale,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`half_block` of pixels of a contiguous map, each piece of them loaded when it is needed."""
    totals = ()
    for piece in tl.static_range(DIM // PIECE):
        x = load_piece(pixels, number, exists, CHANNELS, DIM, piece, PIECE)
        active = activated(x, norm, tl.float32, piece, DIM, True, FORM)
        totals = multiplied(totals, active, weight, scale, CHANNELS, piece, DIM, PIECE, PRECISION)
    return totals


@triton.jit
def load_piece(pixels, number, exists, CHANNELS: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr,
               PIECE: tl.constexpr):  # fmt: skip
    """A piece of the slots of some pixels of a contiguous map, (n, PIECE), as it is stored; zero where none exist."""
    slot = NUMBER * PIECE + tl.arange(0, PIECE)
    place = pixels + number.to(tl.int64)[:, None] * CHANNELS + slot_channel(slot, CHANNELS, DIM)[None, :]
    return tl.load(place, mask=exists[:, None] & slot_exists(slot, CHANNELS, DIM)[None, :], other=0.0)


@triton.jit
def load_map(pixels, number, exists, CHANNELS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr):
    """Pixels of a contiguous map in pieces (n, PIECE), as they are stored; zero where none exist."""
    pieces = ()
    for piece in tl.static_range(DIM // PIECE):
        pieces = pieces + (load_piece(pixels, number, exists, CHANNELS, DIM, piece, PIECE),)
    return pieces


@triton.jit
def store_map(out, y, number, exists, CHANNELS: tl.constexpr, DIM: tl.constexpr):
    """The inverse of `load_map`."""
    for piece in tl.static_range(len(y)):
        slot = piece * y[0].shape[1] + tl.arange(0, y[0].shape[1])
        place = out + number.to(tl.int64)[:, None] * CHANNELS + slot_channel(slot, CHANNELS, DIM)[None, :]
        mask = exists[:, None] & slot_exists(slot, CHANNELS, DIM)[None, :]
        tl.store(place, y[piece].to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_input(pixels, number, exists, pixel_stride, channel_stride, INPUTS: tl.constexpr, NUMBER: tl.constexpr,
               WIDTH: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Piece NUMBER, of WIDTH channels, of some pixels of an input; zero where none exist. PACKED: it is contiguous."""
    channel = NUMBER * WIDTH + tl.arange(0, WIDTH)
    if PACKED:
        place = pixels + number.to(tl.int64)[:, None] * INPUTS + channel[None, :]
    else:
        place = pixels + number.to(tl.int64)[:, None] * pixel_stride
        place = place + channel[None, :].to(tl.int64) * channel_stride
    return tl.load(place, mask=exists[:, None] & (channel < INPUTS)[None, :], other=0.0)


@triton.jit
def load_pixels(
    pixels, projection, scale, number, exists, pixel_stride, channel_stride,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, PACKED: tl.constexpr,
    PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x0 of an input's pixels (with INPUT_DIM), or a map's, in pieces (n, PIECE) float32; zero where none exist."""
    if INPUT_DIM > 0:
        WIDTH: tl.constexpr = min(INPUT_DIM, PIECE)
        totals = ()
        for piece in tl.static_range(INPUT_DIM // WIDTH):
            x = load_input(pixels, number, exists, pixel_stride, channel_stride, INPUTS, piece, WIDTH, PACKED)
            updated = ()
            for outer in tl.static_range(DIM // PIECE):
                matrix = load_matrix(projection, outer, piece, CHANNELS, INPUTS, DIM, PIECE, WIDTH, True)
                updated = updated + (split_matmul(x, matrix, scale, None if piece == 0 else totals[outer], PRECISION),)
            totals = updated
        return totals
    else:
        return load_map(pixels, number, exists, CHANNELS, DIM, PIECE)


@triton.jit
def encoded_pixels(
    mine, projection, norm1, weight1, norm2, weight2, scales, result, number, exists, opaque_zero, pixel_stride,
    channel_stride,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, HALVES: tl.constexpr,
    PACKED: tl.constexpr, FETCHES: tl.constexpr, PIECE: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some pixels of float32 through HALVES half blocks, with the residual after two, in pieces (n, PIECE).

    `scales` are those of the weights in their order.

    FETCHES: x does not wait in registers for the residual: it is loaded again, and what was projected is stored for
    that in `result`.
    """
    if FETCHES and INPUT_DIM == 0:
        y = half_block_of_map(mine, number, exists, norm1, weight1, scales[1], CHANNELS, DIM, PIECE, FORM, PRECISION)
    else:
        x = load_pixels(
            mine, projection, scales[0], number, exists, pixel_stride, channel_stride, CHANNELS, INPUTS, DIM, INPUT_DIM,
            PACKED, PIECE, PRECISION,
        )  # fmt: skip
        if FETCHES:
            store_map(result, x, number, exists, CHANNELS, DIM)
        y = half_block(x, norm1, weight1, scales[1], CHANNELS, DIM, PIECE, FORM, PRECISION) if HALVES > 0 else x
    if HALVES > 1:
        y = half_block(y, norm2, weight2, scales[2], CHANNELS, DIM, PIECE, FORM, PRECISION)
        if FETCHES:
            if INPUT_DIM > 0:
                tl.debug_barrier()  # other threads have stored it
            x = load_map((result if INPUT_DIM > 0 else mine) + opaque_zero, number, exists, CHANNELS, DIM, PIECE)
            tl.debug_barrier()  # other threads have read what is replaced
        total = ()
        for piece in tl.static_range(len(x)):
            total = total + (x[piece] + y[piece],)
        y = total
    return y


@triton.jit
def load_residents(
    projection, weight1, weight2,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The weights of half precision that HALVES half blocks of a projected input need, for `encoded_half_pixels`."""
    weights = (load_matrix(projection, 0, 0, CHANNELS, INPUTS, DIM, DIM, INPUT_DIM, True),)
    if HALVES > 0:
        weights = weights + (load_matrix(weight1, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False),)
    if HALVES > 1:
        weights = weights + (load_matrix(weight2, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False),)
    return weights


@triton.jit
def encoded_half_pixels(
    x, projection, norm1, weight1, norm2, weight2, residents,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, HALVES: tl.constexpr,
    FORM: tl.constexpr, RESIDENT: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Some pixels of half precision, projected and through HALVES half blocks, with the residual after two, in float32.

    RESIDENT: the weights are in registers or shared memory, by `load_residents`. After each load of a weight a barrier:
    the compiler would load the next one before the last product is done, and spill registers.
    """
    dtype: tl.constexpr = x.dtype
    projected = residents[0] if RESIDENT else load_matrix(projection, 0, 0, CHANNELS, INPUTS, DIM, DIM, INPUT_DIM, True)
    total = tl.dot(x, projected)
    x0 = total.to(dtype)
    if HALVES > 0:
        active = activated(total, norm1, dtype, 0, DIM, False, FORM)
        if RESIDENT:
            matrix1 = residents[1]
        else:
            matrix1 = load_matrix(weight1, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False)
            tl.debug_barrier()
        total = tl.dot(active, matrix1)
    if HALVES > 1:
        active = activated(total, norm2, dtype, 0, DIM, False, FORM)
        if RESIDENT:
            matrix2 = residents[2]
        else:
            matrix2 = load_matrix(weight2, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False)
            tl.debug_barrier()
        total = tl.dot(active, matrix2, x0.to(tl.float32)) if KEEPS else tl.dot(x, projected, tl.dot(active, matrix2))
    return total


SINE = tl.constexpr("sin.approx.ftz.f32 $0, $1;")
COSINE = tl.constexpr("cos.approx.ftz.f32 $0, $1;")
"""PTX."""


@triton.jit
def sine_and_cosine(angle, FORM: tl.constexpr):
    """Both of angles in float32; FORM as of silu.

    "tanh" and "exp2": an instruction each, to 2^-20 within a turn and to 2^-14 within fifty (PTX ISA, sin.approx),
    a quarter of what float16 rounds off. "plain": to 1e-7 and the rounding of the angle, up to some ten thousand turns,
    by polynomials of least error on an eighth of a turn to each side of the nearest quarter. The library's functions
    take twice as many instructions, and a way of their own, with a stack, for large angles.
    """
    if FORM != "plain":
        sine = tl.inline_asm_elementwise(SINE, "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
        cosine = tl.inline_asm_elementwise(COSINE, "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
        return sine, cosine
    else:
        quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
        # A quarter turn in three numbers, of which the first two are so short that their products are exact.
        rest = angle - quarter * 1.5703125 - quarter * 4.837512969970703e-4 - quarter * 7.549790126404332e-8
        square = rest * rest
        sine = rest + rest * square * (-0.16666651 + square * (0.00833198 - 0.00019495 * square))
        cosine = 0.0416666468 + square * (-0.00138873645 + 2.44380912e-5 * square)
        cosine = 1.0 - 0.5 * square + square * square * cosine
        number = quarter.to(tl.int32)
        odd = number & 1 != 0
        swapped, other = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
        return tl.where(number & 2 != 0, -swapped, swapped), tl.where((number + 1) & 2 != 0, -other, other)


@triton.jit
def rotated(y, coordinates, frequencies, number, width, height, CHANNELS: tl.constexpr, DIM: tl.constexpr,
            FORM: tl.constexpr):  # fmt: skip
    """y cos(angle) + rotate_half(y) sin(angle), in pieces. The angle is that of a row's and a column's coordinates.

    A piece that is all slots is taken apart for that: a thread holds both halves of what it holds of a product.
    """
    PIXELS: tl.constexpr = y[0].shape[0]
    if len(y) == 1:
        halves = tl.split(tl.permute(tl.reshape(y[0], (PIXELS, 2, DIM // 2)), (0, 2, 1)))
        first, second = rotated(halves, coordinates, frequencies, number, width, height, CHANNELS, DIM, FORM)
        return (tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (PIXELS, DIM)),)
    else:
        HALF: tl.constexpr = len(y) // 2
        row, column = coordinates + number // width * 2, coordinates + (height + number % width) * 2
        down = tl.load(row) + tl.load(column)
        across = tl.load(row + 1) + tl.load(column + 1)
        pieces = ()
        for piece in tl.static_range(len(y)):
            slot = piece * y[0].shape[1] + tl.arange(0, y[0].shape[1])
            channel = slot_channel(slot, CHANNELS, DIM)
            exists = slot_exists(slot, CHANNELS, DIM)
            of_rows = tl.load(frequencies + channel, mask=exists, other=0.0).to(tl.float32)
            of_columns = tl.load(frequencies + CHANNELS + channel, mask=exists, other=0.0).to(tl.float32)
            angle = down[:, None] * of_rows[None, :] + across[:, None] * of_columns[None, :]
            sine, cosine = sine_and_cosine(angle, FORM)
            if piece < HALF:
                pieces = pieces + (y[piece] * cosine - y[HALF + piece] * sine,)
            else:
                pieces = pieces + (y[piece] * cosine + y[piece - HALF] * sine,)
        return pieces


@triton.jit
def projected_keys(y, gain, weight, weight_scale, bias, eps, CHANNELS: tl.constexpr, DIM: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """weight (gain y / rms(y)) + bias of pixels y of float32, both in pieces (n, PIECE)."""
    PIECE: tl.constexpr = y[0].shape[1]
    squares = tl.sum(y[0] * y[0], axis=1)
    for piece in tl.static_range(1, len(y)):
        squares += tl.sum(y[piece] * y[piece], axis=1)
    scale = tl.rsqrt(squares / CHANNELS + eps)
    totals = ()
    for piece in tl.static_range(len(y)):
        slot = piece * PIECE + tl.arange(0, PIECE)
        exists = slot_exists(slot, CHANNELS, DIM)
        factor = tl.load(gain + slot_channel(slot, CHANNELS, DIM), mask=exists, other=0.0).to(tl.float32)
        normed = y[piece] * scale[:, None] * factor[None, :]
        totals = multiplied(totals, normed, weight, weight_scale, CHANNELS, piece, DIM, PIECE, PRECISION)
    shifted = ()
    for piece in tl.static_range(len(totals)):
        slot = piece * PIECE + tl.arange(0, PIECE)
        exists = slot_exists(slot, CHANNELS, DIM)
        shift = tl.load(bias + slot_channel(slot, CHANNELS, DIM), mask=exists, other=0.0).to(tl.float32)
        shifted = shifted + (totals[piece] + shift[None, :],)
    return shifted


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pass_kernel(
    pixels, projection, norm1, weight1, norm2, weight2, found, gain, bias, coordinates, frequencies, out, parts,
    # input or map, (D, Cin), a norm (B, rows, DIM), (D, D), a norm, (D, D),
    # (B, 3, joined, 8), (D,), (D,), (H + W, 2), (2, D), (B, n, D), (B, 3, programs, 8)
    second_projection, second_weight1, second_weight2, second_gain, second_bias,  # as the first encoder's, or None
    key_gain, key_weight, key_bias,
    # (D,), (D, D), (D,)
    count, width, height, images, opaque_zero, joined, image_stride, pixel_stride, channel_stride, eps, key_eps,
    CHANNELS: tl.constexpr, INPUTS: tl.constexpr, DIM: tl.constexpr, INPUT_DIM: tl.constexpr, HALVES: tl.constexpr,
    PIXELS: tl.constexpr, MEASURES: tl.constexpr, JOINS: tl.constexpr, STORES: tl.constexpr, ROTATES: tl.constexpr,
    KEYS: tl.constexpr, PAIR: tl.constexpr, PACKED: tl.constexpr, FETCHES: tl.constexpr, PIECE: tl.constexpr,
    FORM: tl.constexpr, RESIDENT: tl.constexpr, KEEPS: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """An image's pixels through HALVES half blocks, with the residual after two; grid: programs of an image, images.

    A program takes every so many'th PIXELS pixels, REVERSED: from the last ones on. JOINS: it makes the last
    normalisation of the statistics that the pass before has `found`, in its own of the norms (programs, B, rows, DIM).
    MEASURES: it leaves those of its result in `parts`. STORES: put the result into `out`, ROTATES: rotated, KEYS:
    normalised and projected as attention's keys are. PAIR: half of the images are the second encoder's; `pixels` may be
    of so few `images` that both read the same. RESIDENT: the weights are loaded once. KEEPS: what was projected waits
    for the residual, or it is projected again. With `opaque_zero` the normalisations are loaded for each tile and take
    no registers between tiles.
    A width is a constant of the code: as a number, it would take registers for all the places in the weights.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    if PAIR:
        # Neighbours are the two encoders of an image: what the one has loaded is in the cache for the other.
        if image % 2 == 1:
            projection = second_projection
            weight1 = second_weight1
            weight2 = second_weight2
            gain = second_gain
            bias = second_bias
        image = image % 2 * (tl.num_programs(1) // 2) + image // 2
    dtype: tl.constexpr = pixels.dtype.element_ty
    HALF: tl.constexpr = dtype != tl.float32
    ROWS: tl.constexpr = 2 if HALF else 3
    GROUP: tl.constexpr = DIM // 8
    RUN: tl.constexpr = min(GROUP, 8)
    RUNS: tl.constexpr = GROUP // RUN
    norm1 += image * ROWS * DIM
    norm2 += image * ROWS * DIM
    if JOINS:
        mine = program.to(tl.int64) * tl.num_programs(1) * (ROWS * DIM)
        if HALVES > 1:
            norm2 += mine
        else:
            norm1 += mine
        make_norm(
            norm2 if HALVES > 1 else norm1, found + image * 3 * joined * 8, gain, bias, joined, eps,
            CHANNELS, DIM, FORM == "tanh", not HALF, AT_ONCE,
        )  # fmt: skip
        tl.debug_barrier()  # other threads have stored it
    result = out + image * count * CHANNELS
    read = image % images if PAIR else image
    mine = pixels + read * (count * (INPUTS if INPUT_DIM > 0 else CHANNELS) if PACKED else image_stride)
    if HALF and RESIDENT:
        residents = load_residents(projection, weight1, weight2, CHANNELS, INPUTS, DIM, INPUT_DIM, HALVES)
    else:
        residents = ()
    if not HALF:
        scales = (
            matrix_scale(projection, CHANNELS * INPUTS if INPUT_DIM > 0 else 0, PRECISION),
            matrix_scale(weight1, CHANNELS * CHANNELS if HALVES > 0 else 0, PRECISION),
            matrix_scale(weight2, CHANNELS * CHANNELS if HALVES > 1 else 0, PRECISION),
            matrix_scale(key_weight, CHANNELS * CHANNELS if KEYS else 0, PRECISION),
        )
    sums, squares, pivots = (), (), ()
    if MEASURES:
        for _piece in tl.static_range(DIM // PIECE):
            sums = sums + (no_sums(PIXELS, PIECE // RUN, RUN),)
            squares = squares + (no_sums(PIXELS, PIECE // RUN, RUN),)
            pivots = pivots + (tl.zeros((PIECE // RUN,), tl.float32),)
    existing = 0
    tiles = tl.cdiv(count, PIXELS)
    for turn in tl.range(program, tiles, programs):
        tile = tiles - 1 - turn if REVERSED else turn
        number = tile * PIXELS + tl.arange(0, PIXELS)
        exists = number < count
        fresh = tl.multiple_of(turn * opaque_zero, 16)
        if HALF:
            x = load_input(mine, number, exists, pixel_stride, channel_stride, INPUTS, 0, INPUT_DIM, PACKED)
            y = (
                encoded_half_pixels(
                    x, projection + fresh, norm1 + fresh, weight1 + fresh, norm2 + fresh, weight2 + fresh, residents,
                    CHANNELS, INPUTS, DIM, INPUT_DIM, HALVES, FORM, RESIDENT, KEEPS,
                ),
            )  # fmt: skip
        else:
            y = encoded_pixels(
                mine, projection + fresh, norm1 + fresh, weight1 + fresh, norm2 + fresh, weight2 + fresh, scales,
                result, number, exists, fresh, pixel_stride, channel_stride,
                CHANNELS, INPUTS, DIM, INPUT_DIM, HALVES, PACKED, FETCHES, PIECE, FORM, PRECISION,
            )  # fmt: skip
        if ROTATES:
            # Past an image's last pixel there are no coordinates.
            inside = tl.minimum(number, count - 1)
            y = rotated(y, coordinates, frequencies, inside, width, height, CHANNELS, DIM, FORM)
        if MEASURES:
            here = tl.minimum(count - tile * PIXELS, PIXELS)
            existing += here
            new_sums, new_squares, new_pivots = (), (), ()
            for piece in tl.static_range(DIM // PIECE):
                pivot = pivots[piece]
                if turn == program:
                    some = tl.where(exists[:, None], y[piece], 0.0)
                    values = here.to(tl.float32) * (CHANNELS // 8)
                    pivot = in_runs(joined_runs(joined_threads(run_sums(some, RUN)), RUNS) / values, RUNS)
                away = away_from(y[piece], pivot, exists, RUN)
                if CHANNELS < DIM:
                    slot = piece * PIECE + tl.arange(0, PIECE)
                    away = tl.where(slot_exists(slot, CHANNELS, DIM)[None, :], away, 0.0)
                new_sums = new_sums + (sums[piece] + run_sums(away, RUN),)
                new_squares = new_squares + (squares[piece] + run_sums(away * away, RUN),)
                new_pivots = new_pivots + (pivot,)
            sums, squares, pivots = new_sums, new_squares, new_pivots
        if KEYS:
            y = projected_keys(y, key_gain, key_weight + fresh, scales[3], key_bias, key_eps, CHANNELS, DIM, PRECISION)
        if STORES:
            store_map(result, y, number, exists, CHANNELS, DIM)
    if MEASURES:
        values = existing.to(tl.float32) * (CHANNELS // 8)
        for piece in tl.static_range(DIM // PIECE):
            group = piece * (PIECE // GROUP) + tl.arange(0, PIECE // GROUP)
            place = parts + image * 3 * programs * 8 + program * 8 + group
            store_sums(
                place, programs * 8, joined_runs(joined_threads(sums[piece]), RUNS),
                joined_runs(joined_threads(squares[piece]), RUNS), joined_runs(pivots[piece], RUNS) / RUNS,
                values, existing.to(tl.float32),
            )  # fmt: skip


def plan_pass(
    source: Source,
    halves: tuple[HalfBlock, ...],
    *,
    norms: Tensor | None = None,
    parts: Tensor | None,
    out: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None = None,
    keys: KeyProjection | None = None,
    size: tuple[int, int],
    programs: int,
    form: str,
    precision: str,
    config: EncoderConfig,
    is_reversed: bool = False,
) -> Launch:
    """The launch of one pass over the pixels of maps of `size` (H, W).

    Args:
        source: what is read, of the dtype that is worked and stored in.
        halves: none, one or two half blocks; two make a block, with its residual.
        norms: (programs, B, rows, D padded) of `allocate_norms`: where each program makes the norm of a join.
        parts: (B, 3, programs, 8) float32, takes the statistics of the result.
        out: (B, n, D), contiguous, takes the result; it may be the map that is read.
        rotation: coordinates of the rows and the columns (H + W, 2) float32 and frequencies (2, D), contiguous: rotate
            what is stored by their products; after two half blocks of a map.
        keys: project what is stored, of maps of float32, to keys; `out`, of any dtype, is then another map.
        programs: of an image, see `EncoderConfig.programs`.
        form: of silu, see `silu_form`.
        precision: of products of float32, see `products`.
        config: sizes of tiles, warps, stages.
        is_reversed: take the last pixels first, which the pass before has left in the L2 cache if it took them last.
    """
    pixels, projection, _ = source
    count = pixels.shape[1]
    channels = (pixels if projection is None else projection).shape[2 if projection is None else 0]
    dim = padded(channels)
    inputs = 0 if projection is None else pixels.shape[2]
    half = pixels.element_size() == 2
    nothing = pixels  # for pointers that are not followed
    join = halves[-1].norm if halves and isinstance(halves[-1].norm, Join) else None
    weights: list[Tensor | Join | None] = []
    for half_block in halves:
        weights += (norms if half_block.norm is join else half_block.norm, half_block.weight)
    weights += [nothing] * (4 - len(weights))
    waits = len(halves) > 0 if projection is None else len(halves) > 1 and out is not None
    found, gain, bias, eps = (nothing, nothing, nothing, 0.0) if join is None else join[:4]
    firsts = {
        "projection": nothing if projection is None else projection,
        "weight1": weights[1],
        "weight2": weights[3],
        "gain": gain,
        "bias": bias,
    }
    of_second = dict(zip(("weight1", "weight2"), (half_block.second for half_block in halves), strict=False))
    of_second |= dict(zip(("gain", "bias"), join.second if join and join.second else (), strict=False))
    of_second = {name: own for name, own in (*of_second.items(), ("projection", source.second)) if own is not None}
    key_gain, key_weight, key_bias, key_eps = (nothing, nothing, nothing, 0.0) if keys is None else keys
    return Launch(
        kernel=_pixel_encoder_pass_kernel,
        grid=(programs, source.images),
        arguments={
            "pixels": pixels,
            **firsts,
            "norm1": weights[0],
            "norm2": weights[2],
            "found": found,
            # What is not the second encoder's own is shared.
            **{f"second_{name}": of_second.get(name, first) if of_second else None for name, first in firsts.items()},
            **dict(zip(("coordinates", "frequencies"), rotation or (nothing, nothing), strict=True)),
            "out": nothing if out is None else out,
            "parts": nothing if parts is None else parts,
            "key_gain": key_gain,
            "key_weight": key_weight,
            "key_bias": key_bias,
            "count": count,
            "width": size[1],
            "height": size[0],
            "images": len(pixels),
            "opaque_zero": 0,
            "joined": 0 if join is None else found.shape[2],
            **dict(zip(("image_stride", "pixel_stride", "channel_stride"), pixels.stride(), strict=True)),
            "eps": eps,
            "key_eps": key_eps,
        },
        constants={
            "CHANNELS": channels,
            "INPUTS": inputs,
            "DIM": dim,
            "INPUT_DIM": padded(inputs) if inputs else 0,
            "HALVES": len(halves),
            "PIXELS": config.pixels,
            "MEASURES": parts is not None,
            "JOINS": join is not None,
            "STORES": out is not None,
            "ROTATES": rotation is not None,
            "KEYS": keys is not None,
            "PAIR": bool(of_second),
            "PACKED": pixels.is_contiguous(),
            "FETCHES": waits and not half,
            "PIECE": dim if half else min(config.piece, dim),
            "FORM": form,
            "RESIDENT": config.resident,
            "KEEPS": config.keeps,
            "AT_ONCE": 32 * config.num_warps,
            "PRECISION": precision,
            "REVERSED": is_reversed,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def allocate_parts(batch: int, programs: int, device: torch.device) -> Tensor:
    """Room for the statistics of each program: (B, 3, programs, 8)."""
    return torch.empty(batch, 3, programs, GROUPS, dtype=torch.float32, device=device)


def allocate_norms(batch: int, programs: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for the norm that each program makes: (programs, B, rows, D padded)."""
    shape = (programs, batch, norm_rows(dtype), padded(channels))
    return torch.empty(shape, dtype=torch.float32, device=device)


def known_norm(center: Tensor, scale: Tensor, shift: Tensor, *, dtype: torch.dtype, form: str) -> Tensor:
    """(x - center) * scale + shift, each (D,) float32, as a norm (1, rows, D padded) of maps of a dtype."""
    rows = [scale, shift, center] if norm_rows(dtype) == 3 else [scale, torch.addcmul(shift, center, scale, value=-1)]
    if form == "tanh":
        rows[:2] = (row / 2 for row in rows[:2])
    norm = torch.stack(rows)[None]
    dim = padded(len(scale))
    if dim == len(scale):
        return norm
    return F.pad(norm.unflatten(2, (GROUPS, -1)), (0, (dim - len(scale)) // GROUPS)).flatten(2)
