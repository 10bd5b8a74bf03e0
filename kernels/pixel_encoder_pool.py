"""The pixel encoder's last pass where its result is pooled: the last product commutes with the means over cells.

What is left of a map are, for each cell of the small grid, the means of x and of silu(n4(W3 silu(n3(x)))), of which the
last product makes the cell's result, in float32. In half precision the sums over a cell's pixels are products with
ones, which add up what threads hold of many pixels without moving it between them.

Of a pair of encoders the other one's last pass is in the same launch: its map is encoded where it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig
from .pixel_encoder_passes import (
    SIZES,
    HalfBlock,
    Join,
    Source,
    activated,
    encoded_half_pixels,
    encoded_pixels,
    load_input,
    load_matrix,
    load_piece,
    load_residents,
    multiplied,
    store_map,
)
from .pixel_encoder_statistics import make_norm, slot_channel, slot_exists
from .products import matrix_scale, padded
from .weight_arrangement import arrange_weight, arrangement


@triton.jit
def _cell(cell, width, height, cells_high, cells_wide):
    """A cell's first row and column, its rows and columns."""
    row, column = cell // cells_wide, cell % cells_wide
    top, left = row * height // cells_high, column * width // cells_wide
    rows = ((row + 1) * height + cells_high - 1) // cells_high - top
    columns = ((column + 1) * width + cells_wide - 1) // cells_wide - left
    return top, left, rows, columns


@triton.jit
def _product(x, weight, output, NUMBER: tl.constexpr, CHANNELS: tl.constexpr, DIM: tl.constexpr):
    """What some rows of a (D, D) weight make of piece NUMBER of a vector's slots, x, float32."""
    slot = NUMBER * x.shape[0] + tl.arange(0, x.shape[0])
    place = weight + slot_channel(slot, CHANNELS, DIM)[:, None] + (output * CHANNELS)[None, :]
    mask = slot_exists(slot, CHANNELS, DIM)[:, None] & (output < CHANNELS)[None, :]
    return tl.sum(x[:, None] * tl.load(place, mask=mask, other=0.0).to(tl.float32), axis=0)


@triton.jit
def _encode_map(
    pixels, projection, norm1, weight1, norm2, weight2, count, opaque_zero,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr, PIECE: tl.constexpr, FORM: tl.constexpr,
    RESIDENT: tl.constexpr, KEEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Put x + weight2 silu(norm2(weight1 silu(norm1(x)))) in the place of a map's x, from its last PIXELS on.

    A program takes every so many'th PIXELS. The next pass begins with the first pixels, which are in the L2 cache then.
    """
    HALF: tl.constexpr = pixels.dtype.element_ty != tl.float32
    if not HALF:
        NUMBERS: tl.constexpr = CHANNELS * CHANNELS
        scales = (
            (1.0, 1.0), matrix_scale(weight1, NUMBERS, PRECISION), matrix_scale(weight2, NUMBERS, PRECISION)
        )  # fmt: skip
    elif RESIDENT:
        residents = load_residents(projection, weight1, weight2, CHANNELS, CHANNELS, DIM, DIM, 2)
    else:
        residents = ()
    tiles = tl.cdiv(count, PIXELS)
    for turn in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        number = (tiles - 1 - turn) * PIXELS + tl.arange(0, PIXELS)
        exists = number < count
        fresh = tl.multiple_of(turn * opaque_zero, 16)
        if HALF:
            x = load_input(pixels, number, exists, CHANNELS, 1, CHANNELS, 0, DIM, True)
            y = (
                encoded_half_pixels(
                    x, projection + fresh, norm1 + fresh, weight1 + fresh, norm2 + fresh, weight2 + fresh, residents,
                    CHANNELS, CHANNELS, DIM, DIM, 2, FORM, RESIDENT, KEEPS,
                ),
            )  # fmt: skip
        else:
            y = encoded_pixels(
                pixels, projection, norm1 + fresh, weight1 + fresh, norm2 + fresh, weight2 + fresh, scales, pixels,
                number, exists, fresh, CHANNELS, 1, CHANNELS, 0, DIM, 0, 2, True, True, PIECE, FORM, PRECISION,
            )  # fmt: skip
        store_map(pixels, y, number, exists, CHANNELS, DIM)


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_pool_kernel(
    pixels, projection, norm1, weight1, norm2, weight2, found, gain, bias, out, weight, arranged_weight,
    # (B, n, D), (D, D), a norm (B, rows, DIM), (D, D), norms (programs, B, rows, DIM), (D, D), (B, 3, joined, 8), (D,),
    # (D,), (B, cells, D), (OUTPUTS, INPUTS, WEIGHT_TAPS), (WEIGHT_TAPS, INPUTS, OUTPUTS)
    other_weight1, other_weight2, other_gain, other_bias,  # of the other encoder, or None: (D, D), (D, D), (D,), (D,)
    count, width, height, cells_high, cells_wide, opaque_zero, joined, eps,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr, PIECE: tl.constexpr, FORM: tl.constexpr,
    RESIDENT: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, WEIGHT_TAPS: tl.constexpr, BLOCK: tl.constexpr, PAIR: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """The means over cells of x + weight2 silu(norm2(weight1 silu(norm1(x)))); grid: programs of an image, images.

    The cells are those of adaptive average pooling, floor(i H / h) to ceil((i + 1) H / h); a program takes every so
    many'th. The second norm is made as in `_pixel_encoder_pass_kernel`. With OUTPUTS a convolution's weight is arranged
    as well. PAIR: of twice as many maps the first half is the other encoder's, and is encoded; with KEEPS its weights
    are loaded for each tile.
    """
    if OUTPUTS > 0:
        arrange_weight(weight, arranged_weight, OUTPUTS, INPUTS, WEIGHT_TAPS, BLOCK)
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = pixels.dtype.element_ty
    HALF: tl.constexpr = dtype != tl.float32
    ROWS: tl.constexpr = 2 if HALF else 3
    images = tl.num_programs(1)
    if PAIR:
        own = norm2 + (program.to(tl.int64) * 2 * images + image) * ROWS * DIM
        make_norm(
            own, found + image * 3 * joined * 8, other_gain, other_bias, joined, eps, CHANNELS, DIM, FORM == "tanh",
            not HALF, AT_ONCE,
        )  # fmt: skip
        tl.debug_barrier()  # other threads have stored it
        _encode_map(
            pixels + image * count * CHANNELS, projection, norm1 + image * ROWS * DIM, other_weight1, own,
            other_weight2, count, opaque_zero, CHANNELS, DIM, PIXELS, PIECE, FORM, RESIDENT and not KEEPS, KEEPS,
            PRECISION,
        )  # fmt: skip
        pixels += images.to(tl.int64) * count * CHANNELS
        norm1 += images * ROWS * DIM
        norm2 += (program.to(tl.int64) + 1) * images * ROWS * DIM
        found += images * 3 * joined * 8
    norm1 += image * ROWS * DIM
    norm2 += (program.to(tl.int64) * images + image) * ROWS * DIM
    make_norm(
        norm2, found + image * 3 * joined * 8, gain, bias, joined, eps, CHANNELS, DIM, FORM == "tanh", not HALF, AT_ONCE
    )
    tl.debug_barrier()  # other threads have stored it
    mine = pixels + image * count * CHANNELS
    if HALF and RESIDENT:
        projected = load_matrix(projection, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, True)
        matrix = load_matrix(weight1, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False)
    if not HALF:
        scale = matrix_scale(weight1, CHANNELS * CHANNELS, PRECISION)
    for cell in tl.range(program, cells_high * cells_wide, programs):
        top, left, rows, columns = _cell(cell, width, height, cells_high, cells_wide)
        place = out + (image * cells_high * cells_wide + cell) * CHANNELS
        if HALF:
            passed = tl.zeros((16, DIM), tl.float32)
            activations = tl.zeros((16, DIM), tl.float32)
        else:
            sums = ()
            for _piece in tl.static_range(2 * (DIM // PIECE)):
                sums = sums + (tl.zeros((PIECE,), tl.float32),)
        for first in tl.range(0, rows * columns, PIXELS):
            index = first + tl.arange(0, PIXELS)
            exists = index < rows * columns
            number = (top + index // columns) * width + left + index % columns
            fresh = tl.multiple_of((cell + first) * opaque_zero, 16)
            if HALF:
                x = load_input(mine, number, exists, CHANNELS, 1, CHANNELS, 0, DIM, True)
                # After each load a barrier: the compiler would load the next weight before the last product is done.
                if not RESIDENT:
                    projected = load_matrix(projection + fresh, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, True)
                    tl.debug_barrier()
                # Added up before the products, as is seen to by a barrier, x does not wait for them in shared memory,
                # which has room for a second program so. Where no pixel exists x is zero.
                passed = tl.dot(tl.full((16, PIXELS), 1.0, dtype), x, passed)
                tl.debug_barrier()
                active = activated(tl.dot(x, projected), norm1 + fresh, dtype, 0, DIM, False, FORM)
                if not RESIDENT:
                    matrix = load_matrix(weight1 + fresh, 0, 0, CHANNELS, CHANNELS, DIM, DIM, DIM, False)
                    tl.debug_barrier()
                active = activated(tl.dot(active, matrix), norm2 + fresh, dtype, 0, DIM, False, FORM)
                ones = tl.broadcast_to(exists[None, :], (16, PIXELS)).to(dtype)
                activations = tl.dot(ones, active, activations)
            else:
                updated = ()
                y = ()
                for piece in tl.static_range(DIM // PIECE):
                    x = load_piece(mine, number, exists, CHANNELS, DIM, piece, PIECE)
                    updated = updated + (sums[piece] + tl.sum(x, axis=0),)
                    active = activated(x, norm1 + fresh, dtype, piece, DIM, True, FORM)
                    y = multiplied(y, active, weight1 + fresh, scale, CHANNELS, piece, DIM, PIECE, PRECISION)
                for piece in tl.static_range(DIM // PIECE):
                    active = activated(y[piece], norm2 + fresh, dtype, piece, DIM, True, FORM)
                    more = tl.sum(tl.where(exists[:, None], active, 0.0), axis=0)
                    updated = updated + (sums[DIM // PIECE + piece] + more,)
                sums = updated
        pixels_of_cell = (rows * columns).to(tl.float32)
        if HALF:
            # Every row is the same.
            channel = tl.arange(0, DIM)
            total = tl.max(passed, axis=0) + _product(tl.max(activations, axis=0), weight2, channel, 0, CHANNELS, DIM)
            tl.store(place + channel, (total / pixels_of_cell).to(dtype), mask=channel < CHANNELS)
        else:
            for outer in tl.static_range(DIM // PIECE):
                slot = outer * PIECE + tl.arange(0, PIECE)
                output = slot_channel(slot, CHANNELS, DIM)
                total = sums[outer]
                for inner in tl.static_range(DIM // PIECE):
                    total += _product(sums[DIM // PIECE + inner], weight2, output, inner, CHANNELS, DIM)
                tl.store(place + output, total / pixels_of_cell, mask=slot_exists(slot, CHANNELS, DIM))


def plan_pool(
    source: Source,
    half: HalfBlock,
    last: HalfBlock,
    out: Tensor,
    *,
    norms: Tensor,
    size: tuple[int, int],
    cells: tuple[int, int],
    weights: tuple[Tensor, Tensor] | None = None,
    programs: int,
    form: str,
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch that fills `out` (B, cells, D) with the means over cells of what maps (B, n, D) of `size` become.

    Args:
        source: x, a map.
        half, last: the last block's half blocks; the second one's norm is a join. Of a pair, whose maps (2 B, n, D) are
            the first encoder's and then the second's, the first's are encoded in their place, the second's are pooled.
        out: contiguous, in the map's dtype.
        size, cells: (H, W) of the map and (h, w) of the pooled one.
        weights: a convolution's weight and its arrangement, which the launch takes along (`arrangement`).
        norms, programs, form, precision, config: as of `plan_pass`.
    """
    pixels, projection, _ = source
    join = last.norm
    assert isinstance(join, Join)
    maps, count, channels = pixels.shape
    dim = padded(channels)
    copy, of_copy = arrangement(weights, pixels)
    pair = half.second is not None
    first = (half.weight, last.weight, join.weight, join.bias)
    pooled, other = ((half.second, last.second, *(join.second or ())), first) if pair else (first, (None,) * 4)
    names = ("weight1", "weight2", "gain", "bias")
    return Launch(
        kernel=_pixel_encoder_pool_kernel,
        grid=(programs, maps // 2 if pair else maps),
        arguments={
            "pixels": pixels,
            "projection": pixels if projection is None else projection,
            "norm1": half.norm,
            "norm2": norms,
            "found": join.parts,
            **dict(zip(names, pooled, strict=True)),
            "out": out,
            **copy,
            **{f"other_{name}": tensor for name, tensor in zip(names, other, strict=True)},
            "count": count,
            "width": size[1],
            "height": size[0],
            "cells_high": cells[0],
            "cells_wide": cells[1],
            "opaque_zero": 0,
            "joined": join.parts.shape[2],
            "eps": join.eps,
        },
        constants={
            "CHANNELS": channels,
            "DIM": dim,
            "PIXELS": config.pixels,
            "PIECE": dim if pixels.element_size() == 2 else min(config.piece, dim),
            "FORM": form,
            "RESIDENT": config.resident,
            "AT_ONCE": 32 * config.num_warps,
            "PRECISION": precision,
            **of_copy,
            "PAIR": pair,
            "KEEPS": config.keeps,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
