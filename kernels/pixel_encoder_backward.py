"""The pixel encoder, backward: through a half block y = W silu(gn(x)), in two kernels and two small ones.

The normalised map without weight and bias is z = (x - mean) / deviation, of each image's eight groups of channels. With
g the gradient of weight z + bias, that of x is (weight g - m1 - m2 z) / deviation, where m1 and m2 are the means over a
group of weight g and of weight g z. So it is known once two sums over the image are: `half` goes from the gradient of y
to g, and takes these sums, program by program; `means` joins them in their order; `total` makes the gradient of x of g,
and adds that of a residual. W's gradient is a sum of outer products, of the gradient of y and silu(gn(x)), which `half`
stores for it (`query_projection_backward`). Where the result was rotated, another kernel turns its gradient back first.

A group's channels are slots of a tile, padded to a power of two (`pixel_encoder_statistics`). Tables of an image have a
row for each number of a slot.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig
from .pixel_encoder_passes import Join, sine_and_cosine
from .pixel_encoder_statistics import in_slots, make_norm, slot_channel, slot_exists
from .products import matmul, padded

SIZES = ("count", "programs")
"""Kernel arguments that the kernels are not specialised on, so that a new image size compiles no new kernel."""

ROTATION_SIZES = ("count", "width", "height")
"""The same, of the rotation."""

TILE = 32
"""Pixels of a program of `total` and of the rotation."""

_AT_ONCE = 128


@triton.jit
def _pixel_encoder_unit_norm_kernel(
    parts, ones, zeros, norm, programs, eps,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What makes z of x, (3, DIM) for each image: factor, shift and centre; grid: images."""
    image = tl.program_id(0)
    make_norm(
        norm + image * 3 * DIM, parts + image * 3 * programs * 8, ones, zeros, programs, eps,
        CHANNELS, DIM, False, True, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _normalized(x, norm, slot, DIM: tl.constexpr):
    """z of pixels (n, DIM), and the factor that makes it."""
    factor = tl.load(norm + slot)
    return (x.to(tl.float32) - tl.load(norm + 2 * DIM + slot)[None, :]) * factor[None, :] + tl.load(norm + DIM + slot)[
        None, :
    ], factor


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_backward_half_kernel(
    grad, pixels, norm, gain, bias, weight, active, out, sums, count, programs,
    # (B, n, CHANNELS) twice, (B, 3, DIM), (CHANNELS,) twice, (CHANNELS, CHANNELS), (B, n, CHANNELS) twice,
    # (B, programs, 2, CHANNELS)
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of y to that of weight z + bias, its sums, and silu(gn(x)); grid: programs, images."""
    image = tl.program_id(1)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    first_number = image.to(tl.int64) * count
    scale = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=wanted, other=0.0).to(tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    product = tl.zeros((DIM,), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, PIXELS), programs):
        number = tile * PIXELS + tl.arange(0, PIXELS)
        exists = number < count
        row = ((first_number + number) * CHANNELS)[:, None]
        here = exists[:, None] & wanted[None, :]
        back = tl.zeros((PIXELS, DIM), tl.float32)
        for first in tl.range(0, DIM, PIECE):
            taken = first + tl.arange(0, PIECE)
            output = slot_channel(taken, CHANNELS, DIM)
            some = slot_exists(taken, CHANNELS, DIM)
            outer = tl.load(grad + row + output[None, :], mask=exists[:, None] & some[None, :], other=0.0)
            place = weight + output[:, None] * CHANNELS + channel[None, :]
            back = matmul(outer, tl.load(place, mask=some[:, None] & wanted[None, :], other=0.0), back, PRECISION)
        z, _ = _normalized(
            tl.load(pixels + row + channel[None, :], mask=here, other=0.0), norm + image * 3 * DIM, slot, DIM
        )
        x = z * scale[None, :] + shift[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        tl.store(active + row + channel[None, :], x * sigmoid, mask=here)
        # Where no pixel exists `back` is zero.
        back = back * sigmoid * (1.0 + x * (1.0 - sigmoid))
        tl.store(out + row + channel[None, :], back, mask=here)
        total += tl.sum(back, axis=0)
        product += tl.sum(back * z, axis=0)
    place = sums + (image * programs + tl.program_id(0)) * 2 * CHANNELS + channel
    tl.store(place, total, mask=wanted)
    tl.store(place + CHANNELS, product, mask=wanted)


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


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_backward_total_kernel(
    grad, pixels, norm, gain, means, added, out, count,
    # (B, n, CHANNELS) twice, (B, 3, DIM), (CHANNELS,), (B, 2, DIM), (B, n, CHANNELS) twice
    CHANNELS: tl.constexpr, DIM: tl.constexpr, PIXELS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and with ADDS what is added; grid: tiles of pixels, images."""
    image = tl.program_id(1)
    slot = tl.arange(0, DIM)
    channel = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    number = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    here = (number < count)[:, None] & wanted[None, :]
    place = ((image.to(tl.int64) * count + number) * CHANNELS)[:, None] + channel[None, :]
    z, factor = _normalized(tl.load(pixels + place, mask=here, other=0.0), norm + image * 3 * DIM, slot, DIM)
    scale = tl.load(gain + channel, mask=wanted, other=0.0).to(tl.float32)
    mean, slope = tl.load(means + image * 2 * DIM + slot), tl.load(means + image * 2 * DIM + DIM + slot)
    total = tl.load(grad + place, mask=here, other=0.0).to(tl.float32) * scale[None, :]
    total = (total - mean[None, :] - z * slope[None, :]) * factor[None, :]
    if ADDS:
        total += tl.load(added + place, mask=here, other=0.0).to(tl.float32)
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


@triton.jit
def _angles(frequencies, down, along, channel, wanted, CHANNELS: tl.constexpr):
    """Of pixels at coordinates (n, 1), for some channels: (n, channels)."""
    of_rows = tl.load(frequencies + channel, mask=wanted, other=0.0).to(tl.float32)
    of_columns = tl.load(frequencies + CHANNELS + channel, mask=wanted, other=0.0).to(tl.float32)
    return down * of_rows[None, :] + along * of_columns[None, :]


def plan_unit_norm(join: Join, norm: Tensor) -> Launch:
    """The launch that fills `norm` (B, 3, D padded) from a pass's statistics; the join's weight is 1, its bias 0."""
    channels = len(join.weight)
    return Launch(
        kernel=_pixel_encoder_unit_norm_kernel,
        grid=(len(norm),),
        arguments={
            "parts": join.parts,
            "ones": join.weight,
            "zeros": join.bias,
            "norm": norm,
            "programs": join.parts.shape[2],
            "eps": join.eps,
        },
        constants={"CHANNELS": channels, "DIM": padded(channels), "AT_ONCE": _AT_ONCE},
        options={"num_warps": 4, "num_stages": 1},
    )


def plan_half(
    grad: Tensor,
    pixels: Tensor,
    norm: Tensor,
    gain: Tensor,
    bias: Tensor,
    weight: Tensor,
    active: Tensor,
    out: Tensor,
    sums: Tensor,
    *,
    precision: str,
    config: EncoderConfig,
) -> Launch:
    """The launch through a half block.

    Args:
        grad, pixels: (B, n, D), contiguous: the gradient of y, and x.
        norm: (B, 3, D padded), of `plan_unit_norm`.
        gain, bias, weight: (D,), (D,), (D, D), contiguous.
        active, out: (B, n, D): silu(gn(x)), and the gradient of gn(x).
        sums: (B, programs, 2, D) float32: of `out` and of its product with z.
        precision: of products of float32, Triton's `input_precision`.
        config: tiles, warps, stages.
    """
    batch, count, channels = pixels.shape
    return Launch(
        kernel=_pixel_encoder_backward_half_kernel,
        grid=(sums.shape[1], batch),
        arguments={
            "grad": grad,
            "pixels": pixels,
            "norm": norm,
            "gain": gain,
            "bias": bias,
            "weight": weight,
            "active": active,
            "out": out,
            "sums": sums,
            "count": count,
            "programs": sums.shape[1],
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


def plan_total(
    grad: Tensor, pixels: Tensor, norm: Tensor, gain: Tensor, means: Tensor, added: Tensor | None, out: Tensor
) -> Launch:
    """The launch that fills `out` (B, n, D) with the gradient of `pixels`, of what `plan_half` and `plan_means` made.

    `added` (B, n, D) is added; `out` may be `grad` or `added`.
    """
    batch, count, channels = pixels.shape
    return Launch(
        kernel=_pixel_encoder_backward_total_kernel,
        grid=(triton.cdiv(count, TILE), batch),
        arguments={
            "grad": grad,
            "pixels": pixels,
            "norm": norm,
            "gain": gain,
            "means": means,
            "added": added,
            "out": out,
            "count": count,
        },
        constants={"CHANNELS": channels, "DIM": padded(channels), "PIXELS": TILE, "ADDS": added is not None},
        options={"num_warps": 4, "num_stages": 1},
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
