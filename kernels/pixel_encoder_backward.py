"""The pixel encoder, backward: through a half block y = W silu(gn(x)), in a kernel and two small ones.

The normalised map without weight and bias is z = (x - mean) / deviation, of each image's eight groups of channels. With
g the gradient of weight z + bias, that of x is (weight g - m1 - m2 z) / deviation, where m1 and m2 are the means over a
group of weight g and of weight g z. So it is known once two sums over the image are: `half` goes from the gradient of y
to g, and takes these sums, program by program; `means` joins them in their order; and the half block before, whose y is
this x, makes the gradient of g where it reads it. W's gradient is a sum of outer products, of the gradient of y and
silu(gn(x)). Where registers allow it a program holds that of its pixels, and programs are added up later, in their
order. So a half block reads four maps at most, and writes one; where a residual passes by, one more each. Elsewhere
both factors are stored, and another kernel makes the sum (`query_projection_backward`).

The first projection is such a product without a normalisation, or, of an image's few channels, `thin`; without one,
`total` makes the last gradient. Where the result was rotated, another kernel turns its gradient back first.

A group's channels are slots of a tile, padded to a power of two (`pixel_encoder_statistics`). Tables of an image have a
row for each number of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig
from .pixel_encoder_passes import sine_and_cosine
from .pixel_encoder_statistics import in_slots, make_norm, slot_channel, slot_exists
from .products import matmul, padded

SIZES = ("count", "programs")
"""Kernel arguments that the kernels are not specialised on, so that a new image size compiles no new kernel."""

PROGRAMS = ("programs1", "programs2", "programs3", "programs4")
"""The same, of the normalisations."""

THIN_SIZES = (*SIZES, "image_stride", "pixel_stride", "channel_stride")
"""The same, of the kernel of the first projection."""

ROTATION_SIZES = ("count", "width", "height")
"""The same, of the rotation."""

SPREAD_SIZES = ("height", "width", "cells_high", "cells_wide", "most_high", "most_wide")
"""The same, of the pooling."""

TILE = 32
"""Pixels of a program of `total` and of the rotation; of the pooling half as many."""

_AT_ONCE = 128


@triton.jit(do_not_specialize=PROGRAMS)
def _pixel_encoder_unit_norms_kernel(
    parts1, parts2, parts3, parts4, ones, zeros, norms, programs1, programs2, programs3, programs4, eps,
    # (B, 3, programs, 8) four times, (CHANNELS,) twice, (4, B, 3, DIM)
    CHANNELS: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What makes z of x, (3, DIM) for each image of four maps: factor, shift and centre; grid: images, maps."""
    image, which = tl.program_id(0), tl.program_id(1)
    norm = norms + (which * tl.num_programs(0) + image) * 3 * DIM
    if which == 0:
        _unit_norm(norm, parts1, image, ones, zeros, programs1, eps, CHANNELS, DIM, AT_ONCE)
    elif which == 1:
        _unit_norm(norm, parts2, image, ones, zeros, programs2, eps, CHANNELS, DIM, AT_ONCE)
    elif which == 2:
        _unit_norm(norm, parts3, image, ones, zeros, programs3, eps, CHANNELS, DIM, AT_ONCE)
    else:
        _unit_norm(norm, parts4, image, ones, zeros, programs4, eps, CHANNELS, DIM, AT_ONCE)


@triton.jit
def _unit_norm(
    norm, parts, image, ones, zeros, programs, eps, CHANNELS: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr
):
    make_norm(norm, parts + image * 3 * programs * 8, ones, zeros, programs, eps, CHANNELS, DIM, False, True, AT_ONCE)


@triton.jit
def _normalized(x, norm, slot, DIM: tl.constexpr):
    """z of pixels (n, DIM), and the factor that makes it."""
    factor = tl.load(norm + slot)
    return (x.to(tl.float32) - tl.load(norm + 2 * DIM + slot)[None, :]) * factor[None, :] + tl.load(norm + DIM + slot)[
        None, :
    ], factor


@triton.jit
def _finished(
    back, pixels, norm, gain, means, added, place, here, slot, channel, wanted, DIM: tl.constexpr,
):  # fmt: skip
    """The gradient of x, of its pixels (n, slots), from that of weight z + bias, and what is added."""
    z, factor = _normalized(tl.load(pixels + place, mask=here, other=0.0), norm, slot, DIM)
    scale = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)
    mean, slope = tl.load(means + slot), tl.load(means + DIM + slot)
    total = back.to(tl.float32) * scale[None, :]
    total = (total - mean[None, :] - z * slope[None, :]) * factor[None, :]
    if added is not None:
        total += tl.load(added + place, mask=here, other=0.0).to(tl.float32)
    return total


@triton.jit
def _through(
    grad, behind, behind_norm, behind_gain, behind_means, added, passed, weight, row, exists, slot, channel, wanted,
    total, CHANNELS: tl.constexpr, DIM: tl.constexpr, FIRST, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of y, of PIECE slots from FIRST, and `total` with what it adds to that of what W has multiplied."""
    taken = FIRST + tl.arange(0, PIECE)
    output = slot_channel(taken, CHANNELS, DIM)
    some = slot_exists(taken, CHANNELS, DIM)
    here = exists[:, None] & some[None, :]
    place = row + output[None, :]
    outer = tl.load(grad + place, mask=here, other=0.0)
    if behind is not None:
        found = _finished(
            outer, behind, behind_norm, behind_gain, behind_means, added, place, here, taken, output, some, DIM
        )
        outer = tl.where(here, found, 0.0).to(grad.dtype.element_ty)
        if passed is not None:
            tl.store(passed + place, outer, mask=here)
    matrix = weight + output[:, None] * CHANNELS + channel[None, :]
    matrix = tl.load(matrix, mask=some[:, None] & wanted[None, :], other=0.0)
    return outer, matmul(outer, matrix, total, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_backward_half_kernel(
    grad, behind, behind_norm, behind_gain, behind_means, added, passed, pixels, norm, gain, bias, weight, active, out,
    sums, products, count, programs,
    # (B, n, CHANNELS) twice, (B, 3, DIM), (CHANNELS,), (B, 2, DIM), (B, n, CHANNELS) three times, (B, 3, DIM),
    # (CHANNELS,) twice, (CHANNELS, CHANNELS), (B, n, CHANNELS) twice, (B, programs, 2, CHANNELS),
    # (B, programs, CHANNELS, CHANNELS)
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back from y to weight z + bias, with the sums of that, and W's gradient; grid: programs, images.

    With `behind`, the gradient of y is made first of what another half block has left of it; it goes to `passed`, if
    that is there. Without `norm`, y = W x. Without `products`, what W multiplies goes to `active`.
    """
    image = tl.program_id(1)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    first_number = image.to(tl.int64) * count
    if behind is not None:
        behind_norm += image * 3 * DIM
        behind_means += image * 2 * DIM
    if norm is not None:
        scale = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=wanted, other=0.0).to(tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    product = tl.zeros((DIM,), tl.float32)
    if products is not None:
        outer_products = tl.zeros((DIM, DIM), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, PIXELS), programs):
        number = tile * PIXELS + tl.arange(0, PIXELS)
        exists = number < count
        row = ((first_number + number) * CHANNELS)[:, None]
        here = exists[:, None] & wanted[None, :]
        if products is not None:
            outer, back = _through(
                grad, behind, behind_norm, behind_gain, behind_means, added, passed, weight, row, exists, slot, channel,
                wanted, None, CHANNELS, DIM, 0, DIM, PRECISION,
            )  # fmt: skip
        else:
            back = tl.zeros((PIXELS, DIM), tl.float32)
            for first in tl.range(0, DIM, PIECE):
                _, back = _through(
                    grad, behind, behind_norm, behind_gain, behind_means, added, passed, weight, row, exists, slot,
                    channel, wanted, back, CHANNELS, DIM, first, PIECE, PRECISION,
                )  # fmt: skip
        place = row + channel[None, :]
        x = tl.load(pixels + place, mask=here, other=0.0)
        if norm is not None:
            z, _ = _normalized(x, norm + image * 3 * DIM, slot, DIM)
            normed = z * scale[None, :] + shift[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-normed))
            x = (normed * sigmoid).to(x.dtype)
            if products is None:
                tl.store(active + place, x, mask=here)
            # Where no pixel exists `back` is zero.
            back = back * sigmoid * (1.0 + normed * (1.0 - sigmoid))
            total += tl.sum(back, axis=0)
            product += tl.sum(back * z, axis=0)
        tl.store(out + place, back, mask=here)
        if products is not None:
            outer_products = matmul(tl.trans(outer), x, outer_products, PRECISION)
    place = image * programs + tl.program_id(0)
    if norm is not None:
        tl.store(sums + place * 2 * CHANNELS + channel, total, mask=wanted)
        tl.store(sums + place * 2 * CHANNELS + CHANNELS + channel, product, mask=wanted)
    if products is not None:
        place = products + place.to(tl.int64) * CHANNELS * CHANNELS + channel[:, None] * CHANNELS + channel[None, :]
        tl.store(place, outer_products, mask=wanted[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_backward_means_kernel(
    sums, gain, means, totals, count, programs,
    # (B, programs, 2, CHANNELS), (CHANNELS,), (B, 2, DIM), (B, 2, CHANNELS)
    CHANNELS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The sums of all programs, and m1 and m2 of each slot; grid: images, 2."""
    image, which = tl.program_id(0), tl.program_id(1)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    place = sums + (image * programs * 2 + which) * CHANNELS + channel
    total = tl.zeros((DIM,), tl.float32)
    for program in tl.range(0, programs):
        total += tl.load(place + program * 2 * CHANNELS, mask=wanted, other=0.0)
    tl.store(totals + (image * 2 + which) * CHANNELS + channel, total, mask=wanted)
    weighted = total * tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)
    mean = tl.sum(tl.reshape(weighted, (8, DIM // 8)), axis=1) / (count.to(tl.float32) * (CHANNELS // 8))
    tl.store(means + (image * 2 + which) * DIM + slot, in_slots(mean, DIM))


@triton.jit(do_not_specialize=THIN_SIZES)
def _pixel_encoder_backward_thin_kernel(
    grad, pixels, norm, gain, means, added, image, projection, out, products, count, programs,
    image_stride, pixel_stride, channel_stride,
    # (B, n, CHANNELS) twice, (B, 3, DIM), (CHANNELS,), (B, 2, DIM), (B, n, CHANNELS), (B, n, INPUTS),
    # (CHANNELS, INPUTS), (B, n, INPUTS), (B, programs, CHANNELS, INPUTS)
    CHANNELS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the first projection of few channels, all sums in float32; grid: programs, images.

    Without `out` the image's gradient is left out.
    """
    number_of_image = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    norm += number_of_image * 3 * DIM
    means += number_of_image * 2 * DIM
    image += number_of_image * image_stride
    input = tl.arange(0, 16)
    if out is not None:
        some = wanted[:, None] & (input < INPUTS)[None, :]
        matrix = tl.load(projection + channel[:, None] * INPUTS + input[None, :], mask=some, other=0.0).to(tl.float32)
    sums = tl.zeros((16, DIM), tl.float32)
    rest = tl.zeros((16, DIM), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, PIXELS), programs):
        number = tile * PIXELS + tl.arange(0, PIXELS)
        here = (number < count)[:, None] & wanted[None, :]
        place = ((number_of_image * count + number) * CHANNELS)[:, None] + channel[None, :]
        back = tl.load(grad + place, mask=here, other=0.0)
        total = _finished(back, pixels, norm, gain, means, added, place, here, slot, channel, wanted, DIM)
        total = tl.where(here, total, 0.0)
        inside = (number < count)[:, None] & (input < INPUTS)[None, :]
        near = number.to(tl.int64)[:, None] * pixel_stride + input[None, :] * channel_stride
        x = tl.load(image + near, mask=inside, other=0.0).to(tl.float32)
        if out is not None:
            place = ((number_of_image * count + number) * INPUTS)[:, None] + input[None, :]
            tl.store(out + place, matmul(total, matrix, None, PRECISION), mask=inside)
        # What one channel of the image adds to all pixels' gradients nearly cancels in the norm behind it: what a sum
        # rounds off is added to the next (Kahan 1965).
        update = matmul(tl.trans(x), total, None, PRECISION) - rest
        more = sums + update
        rest = (more - sums) - update
        sums = more
    place = (number_of_image * programs + tl.program_id(0)) * CHANNELS * INPUTS
    some = (input < INPUTS)[:, None] & wanted[None, :]
    tl.store(products + place + channel[None, :] * INPUTS + input[:, None], sums, mask=some)


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_backward_total_kernel(
    grad, pixels, norm, gain, means, added, out, count,
    # (B, n, CHANNELS) twice, (B, 3, DIM), (CHANNELS,), (B, 2, DIM), (B, n, CHANNELS) twice
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and what is added; grid: tiles of pixels, images."""
    image = tl.program_id(1)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    number = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    here = (number < count)[:, None] & wanted[None, :]
    place = ((image.to(tl.int64) * count + number) * CHANNELS)[:, None] + channel[None, :]
    back = tl.load(grad + place, mask=here, other=0.0)
    norm += image * 3 * DIM
    means += image * 2 * DIM
    total = _finished(back, pixels, norm, gain, means, added, place, here, slot, channel, wanted, DIM)
    tl.store(out + place, total, mask=here)


@triton.jit(do_not_specialize=ROTATION_SIZES)
def _pixel_encoder_backward_rotation_kernel(
    grad, encoded, coordinates, frequencies, out, sums, count, width, height,
    # (B, n, CHANNELS) twice, (height + width, 2), (2, CHANNELS), (B, n, CHANNELS), (B, tiles, 2, CHANNELS)
    CHANNELS: tl.constexpr, HALF: tl.constexpr, PIXELS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The gradients of what was rotated, and of the frequencies, of a tile of pixels; grid: tiles, images."""
    tile, image = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, HALF)
    wanted = channel < CHANNELS // 2
    number = tile * PIXELS + tl.arange(0, PIXELS)
    here = (number < count)[:, None] & wanted[None, :]
    place = ((image.to(tl.int64) * count + number) * CHANNELS)[:, None] + channel[None, :]
    inside = tl.minimum(number, count - 1)
    down = tl.load(coordinates + inside // width * 2)[:, None]
    along = tl.load(coordinates + (height + inside % width) * 2 + 1)[:, None]
    first_angle = _angles(frequencies, down, along, channel, wanted, CHANNELS)
    second_angle = _angles(frequencies + CHANNELS // 2, down, along, channel, wanted, CHANNELS)
    first_sine, first_cosine = sine_and_cosine(first_angle, FORM)
    second_sine, second_cosine = sine_and_cosine(second_angle, FORM)
    first_grad = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
    second_grad = tl.load(grad + place + CHANNELS // 2, mask=here, other=0.0).to(tl.float32)
    # The rotation's transpose: the partner's sine, the other sign.
    tl.store(out + place, first_grad * first_cosine + second_grad * second_sine, mask=here)
    tl.store(out + place + CHANNELS // 2, second_grad * second_cosine - first_grad * first_sine, mask=here)
    first = tl.load(encoded + place, mask=here, other=0.0).to(tl.float32)
    second = tl.load(encoded + place + CHANNELS // 2, mask=here, other=0.0).to(tl.float32)
    first_grad *= -first * first_sine - second * first_cosine
    second_grad *= first * second_cosine - second * second_sine
    place = sums + ((image * tl.num_programs(0) + tile) * 2) * CHANNELS + channel
    tl.store(place, tl.sum(first_grad * down, axis=0), mask=wanted)
    tl.store(place + CHANNELS // 2, tl.sum(second_grad * down, axis=0), mask=wanted)
    tl.store(place + CHANNELS, tl.sum(first_grad * along, axis=0), mask=wanted)
    tl.store(place + CHANNELS + CHANNELS // 2, tl.sum(second_grad * along, axis=0), mask=wanted)


@triton.jit(do_not_specialize=SPREAD_SIZES)
def _pixel_encoder_backward_spread_kernel(
    grad, out, height, width, cells_high, cells_wide, most_high, most_wide,  # (B, cells, CHANNELS), (B, n, CHANNELS)
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The gradient of a map from that of its means over cells, which may overlap; grid: tiles of pixels, images."""
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, DIM)
    number = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = number // width, number % width
    total = tl.zeros((PIXELS, DIM), tl.float32)
    for down in tl.range(0, most_high):
        cell_row = row * cells_high // height + down
        in_rows, rows = _held_by(cell_row, row, height, cells_high)
        for along in tl.range(0, most_wide):
            cell_column = column * cells_wide // width + along
            in_columns, columns = _held_by(cell_column, column, width, cells_wide)
            place = ((image * cells_high + cell_row) * cells_wide + cell_column) * CHANNELS
            here = (in_rows & in_columns & (number < height * width))[:, None] & (channel < CHANNELS)[None, :]
            found = tl.load(grad + place[:, None] + channel[None, :], mask=here, other=0.0).to(tl.float32)
            total += found / (rows * columns).to(tl.float32)[:, None]
    here = (number < height * width)[:, None] & (channel < CHANNELS)[None, :]
    place = (image * height * width + number) * CHANNELS
    tl.store(out + place[:, None] + channel[None, :], total, mask=here)


@triton.jit
def _held_by(cell, position, length, cells):
    """Whether a cell of an axis holds a position of it; and how many it holds."""
    first, stop = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    return (cell < cells) & (first <= position) & (position < stop), tl.maximum(stop - first, 1)


@triton.jit
def _angles(frequencies, down, along, channel, wanted, CHANNELS: tl.constexpr):
    """Of pixels at coordinates (n, 1), for some channels: (n, channels)."""
    of_rows = tl.load(frequencies + channel, mask=wanted, other=0.0).to(tl.float32)
    of_columns = tl.load(frequencies + CHANNELS + channel, mask=wanted, other=0.0).to(tl.float32)
    return down * of_rows[None, :] + along * of_columns[None, :]


def plan_unit_norms(parts: Sequence[Tensor], ones: Tensor, zeros: Tensor, norms: Tensor, *, eps: float) -> Launch:
    """The launch that fills `norms` (4, B, 3, D padded) from four passes' statistics; `ones` and `zeros` are (D,)."""
    channels = len(ones)
    return Launch(
        kernel=_pixel_encoder_unit_norms_kernel,
        grid=(norms.shape[1], 4),
        arguments={
            **{f"parts{number}": each for number, each in enumerate(parts, 1)},
            "ones": ones,
            "zeros": zeros,
            "norms": norms,
            **{f"programs{number}": each.shape[2] for number, each in enumerate(parts, 1)},
            "eps": eps,
        },
        constants={"CHANNELS": channels, "DIM": padded(channels), "AT_ONCE": _AT_ONCE},
        options={"num_warps": 4, "num_stages": 1},
    )


class Behind(NamedTuple):
    """What makes the gradient of y where the next half block's kernel has left that of its weight z + bias."""

    pixels: Tensor  # (B, n, D), the map y that it takes
    norm: Tensor  # (B, 3, D padded)
    gain: Tensor  # (D,)
    means: Tensor  # (B, 2, D padded), of `plan_means`
    added: Tensor | None = None  # (B, n, D)


class Normalised(NamedTuple):
    """What stands before W in a half block."""

    norm: Tensor  # (B, 3, D padded), of `plan_unit_norms`
    gain: Tensor  # (D,)
    bias: Tensor  # (D,)
    sums: Tensor  # (B, programs, 2, D) float32: for those of the gradient of weight z + bias, and of its product with z


def plan_half(
    grad: Tensor,
    behind: Behind | None,
    pixels: Tensor,
    before: Normalised | None,
    weight: Tensor,
    out: Tensor,
    *,
    products: Tensor | None,
    active: Tensor | None = None,
    passed: Tensor | None = None,
    programs: int,
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch through a half block, or through a projection, y = W x. All tensors are contiguous.

    Args:
        grad: (B, n, D), the gradient of y, or with `behind` of the next half block's weight z + bias.
        behind: None where `grad` is that of y.
        pixels: (B, n, D), x.
        before: None for a projection.
        weight: (D, D).
        out: (B, n, D), the gradient of weight z + bias, or of x of a projection; with `products` it may be `grad`.
        products: (B, programs, D, D) float32: what each program adds to the weight's gradient; None: it is made of
            others, of which `active` is one.
        active: (B, n, D), for silu(gn(x)), where there is a half block and no `products`.
        passed: (B, n, D), where the gradient of y goes too; with `behind` alone. Without `products` it may be `grad`.
        programs: of an image.
        precision: of products of float32, Triton's `input_precision`.
        config: tiles, warps, stages.
    """
    batch, count, channels = pixels.shape
    last = behind or (None,) * 5
    norm, gain, bias, sums = before or (None,) * 4
    return Launch(
        kernel=_pixel_encoder_backward_half_kernel,
        grid=(programs, batch),
        arguments={
            "grad": grad,
            **dict(zip(("behind", "behind_norm", "behind_gain", "behind_means", "added"), last, strict=True)),
            "passed": passed,
            "pixels": pixels,
            "norm": norm,
            "gain": gain,
            "bias": bias,
            "weight": weight,
            "active": active,
            "out": out,
            "sums": sums,
            "products": products,
            "count": count,
            "programs": programs,
        },
        constants={
            "CHANNELS": channels,
            "DIM": padded(channels),
            "PIXELS": config.pixels,
            "PIECE": min(config.piece, padded(channels)),
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def plan_thin(
    grad: Tensor,
    behind: Behind,
    image: Tensor,
    projection: Tensor,
    out: Tensor | None,
    products: Tensor,
    *,
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch through the first projection of an image of at most 16 channels.

    Args:
        grad, behind: as of `plan_half`.
        image: (B, n, Cin), any strides.
        projection: (D, Cin), contiguous.
        out: (B, n, Cin), contiguous: the image's gradient; None: it is not wanted.
        products: (B, programs, D, Cin) float32: what each program adds to the projection's gradient.
        precision, config: as of `plan_half`; products are of float32.
    """
    batch, count, channels = behind.pixels.shape
    programs = products.shape[1]
    return Launch(
        kernel=_pixel_encoder_backward_thin_kernel,
        grid=(programs, batch),
        arguments={
            "grad": grad,
            **behind._asdict(),
            "image": image,
            "projection": projection,
            "out": out,
            "products": products,
            "count": count,
            "programs": programs,
            **dict(zip(("image_stride", "pixel_stride", "channel_stride"), image.stride(), strict=True)),
        },
        constants={
            "CHANNELS": channels,
            "DIM": padded(channels),
            "INPUTS": image.shape[2],
            "PIXELS": config.pixels,
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def plan_means(sums: Tensor, gain: Tensor, means: Tensor, totals: Tensor, *, count: int) -> Launch:
    """The launch that joins `sums` of `plan_half` to `totals` (B, 2, D), and makes `means` (B, 2, D padded) of them."""
    batch, programs, _, channels = sums.shape
    return Launch(
        kernel=_pixel_encoder_backward_means_kernel,
        grid=(batch, 2),
        arguments={"sums": sums, "gain": gain, "means": means, "totals": totals, "count": count, "programs": programs},
        constants={"CHANNELS": channels, "DIM": padded(channels)},
        options={"num_warps": 1, "num_stages": 1},
    )


def plan_total(grad: Tensor, behind: Behind, out: Tensor) -> Launch:
    """The launch that fills `out` (B, n, D) with the gradient of y, as `plan_half` makes it; it may be `grad`."""
    batch, count, channels = behind.pixels.shape
    return Launch(
        kernel=_pixel_encoder_backward_total_kernel,
        grid=(triton.cdiv(count, TILE), batch),
        arguments={"grad": grad, **behind._asdict(), "out": out, "count": count},
        constants={"CHANNELS": channels, "DIM": padded(channels), "PIXELS": TILE},
        options={"num_warps": 4, "num_stages": 1},
    )


def plan_spread(grad: Tensor, out: Tensor, *, size: tuple[int, int]) -> Launch:
    """The launch back through the pooling of maps of `size` (H, W), as torch pools adaptively.

    `grad` is (B, h, w, D), contiguous, `out` (B, H * W, D).
    """
    batch, *cells, channels = grad.shape
    # An axis's cells that may hold a position: their bounds are rounded away from them.
    most = [
        max(1, n // length) if not (length % n and n % length) else n // length + 2
        for n, length in zip(cells, size, strict=True)
    ]
    numbers = dict(zip(SPREAD_SIZES, (*size, *cells, *most), strict=True))
    return Launch(
        kernel=_pixel_encoder_backward_spread_kernel,
        grid=(triton.cdiv(size[0] * size[1], TILE // 2), batch),
        arguments={"grad": grad, "out": out, **numbers},
        constants={"CHANNELS": channels, "DIM": padded(channels), "PIXELS": TILE // 2},
        options={"num_warps": 8, "num_stages": 1},
    )


def plan_rotation(
    grad: Tensor,
    encoded: Tensor,
    coordinates: Tensor,
    frequencies: Tensor,
    out: Tensor,
    sums: Tensor,
    *,
    size: tuple[int, int],
    form: str,
) -> Launch:
    """The launch back through the rotation of maps of `size` (H, W).

    Args:
        grad, encoded: (B, n, D), contiguous: the gradient of the rotated maps, and the maps before.
        coordinates, frequencies: (H + W, 2) float32 and (2, D), contiguous, as the forward pass takes them.
        out: (B, n, D), the gradient of `encoded`; it may be `encoded`.
        sums: (B, tiles of `TILE` pixels, 2, D) float32, what each adds to the frequencies' gradient.
        size: of the maps.
        form: of sine and cosine, see `pixel_encoder_passes.sine_and_cosine`.
    """
    batch, count, channels = grad.shape
    return Launch(
        kernel=_pixel_encoder_backward_rotation_kernel,
        grid=(sums.shape[1], batch),
        arguments={
            "grad": grad,
            "encoded": encoded,
            "coordinates": coordinates,
            "frequencies": frequencies,
            "out": out,
            "sums": sums,
            "count": count,
            "width": size[1],
            "height": size[0],
        },
        constants={"CHANNELS": channels, "HALF": padded(channels // 2), "PIXELS": TILE, "FORM": form},
        options={"num_warps": 4, "num_stages": 1},
    )
