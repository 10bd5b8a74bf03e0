"""The statistics before the first normalisation where an encoder's input has few channels: of the input's moments.

x0 = P p is linear in the few channels of p. So the mean and the deviation of each channel of x0 follow from those of p
and the products of its channels, 3 and 6 numbers for an image. No product of P and a pixel is made.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .pixel_encoder_config import EncoderConfig
from .pixel_encoder_passes import SIZES, Source
from .pixel_encoder_statistics import slot_channel, slot_exists
from .products import padded

MOST_INPUTS = 4
"""Channels of an input; a thread has their sums, and those of the products of each two, in registers."""


@triton.jit
def _load(place, exists, channel_stride, INPUTS: tl.constexpr):
    """The channels of some pixels, (n,) float32 each; zero where no pixel exists."""
    channels = ()
    for channel in tl.static_range(INPUTS):
        pixels = tl.load(place + tl.full((), channel, tl.int64) * channel_stride, mask=exists, other=0.0)
        channels = channels + (pixels.to(tl.float32),)
    return channels


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_moments_kernel(
    pixels, projection, parts,  # (B, n, Cin), (D, Cin), (B, 3, programs, 8)
    count, image_stride, pixel_stride, channel_stride,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, INPUTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Statistics of the projected pixels, as a pass leaves them; grid: programs of an image, images.

    A program sums what its pixels lie away from a pivot, the mean of its first ones.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    pixels += image * image_stride
    number = program * PIXELS + tl.arange(0, PIXELS)
    exists = number < count
    first = _load(pixels + number.to(tl.int64) * pixel_stride, exists, channel_stride, INPUTS)
    values = tl.minimum(count - program * PIXELS, PIXELS).to(tl.float32)
    pivots, sums, products = (), (), ()
    for channel in tl.static_range(INPUTS):
        pivots = pivots + (tl.sum(first[channel], axis=0) / values,)
        sums = sums + (tl.zeros((PIXELS,), tl.float32),)
        for _other in tl.static_range(channel + 1):
            products = products + (tl.zeros((PIXELS,), tl.float32),)
    existing = 0
    for tile in tl.range(program, tl.cdiv(count, PIXELS), programs):
        number = tile * PIXELS + tl.arange(0, PIXELS)
        exists = number < count
        x = _load(pixels + number.to(tl.int64) * pixel_stride, exists, channel_stride, INPUTS)
        away, new_sums, new_products = (), (), ()
        for channel in tl.static_range(INPUTS):
            away = away + (tl.where(exists, x[channel] - pivots[channel], 0.0),)
            new_sums = new_sums + (sums[channel] + away[channel],)
            for other in tl.static_range(channel + 1):
                more = away[channel] * away[other]
                new_products = new_products + (products[channel * (channel + 1) // 2 + other] + more,)
        sums, products = new_sums, new_products
        existing += tl.minimum(count - tile * PIXELS, PIXELS)
    values = existing.to(tl.float32)
    slot = tl.arange(0, DIM)
    row = projection + slot_channel(slot, CHANNELS, DIM) * INPUTS
    offsets, weights = (), ()
    mean = tl.zeros((DIM,), tl.float32)
    deviation = tl.zeros((DIM,), tl.float32)
    for channel in tl.static_range(INPUTS):
        weight = tl.load(row + channel, mask=slot_exists(slot, CHANNELS, DIM), other=0.0).to(tl.float32)
        weights = weights + (weight,)
        offsets = offsets + (tl.sum(sums[channel], axis=0) / values,)
        mean += weight * (pivots[channel] + offsets[channel])
        for other in tl.static_range(channel + 1):
            product = tl.sum(products[channel * (channel + 1) // 2 + other], axis=0)
            product -= values * offsets[channel] * offsets[other]
            deviation += weight * weights[other] * product * (1 if other == channel else 2)
    shape: tl.constexpr = (8, DIM // 8)
    of_group = tl.sum(tl.reshape(mean, shape), axis=1) / (CHANNELS // 8)
    away_from_group = tl.where(
        tl.reshape(slot_exists(slot, CHANNELS, DIM), shape), tl.reshape(mean, shape) - of_group[:, None], 0.0
    )
    # A channel that sees no difference between pixels has a deviation of zero, but for rounding.
    deviations = tl.reshape(tl.maximum(deviation, 0.0), shape) + values * away_from_group * away_from_group
    place = parts + image * 3 * programs * 8 + program * 8 + tl.arange(0, 8)
    tl.store(place, tl.zeros_like(of_group) + values)
    tl.store(place + programs * 8, of_group)
    tl.store(place + 2 * programs * 8, tl.sum(deviations, axis=1))


def plan_moments(source: Source, parts: Tensor, *, config: EncoderConfig) -> Launch:
    """The launch that puts the statistics of a source's projected pixels into `parts` (B, 3, programs, 8)."""
    pixels, projection, _ = source
    assert projection is not None
    channels, inputs = projection.shape
    return Launch(
        kernel=_pixel_encoder_moments_kernel,
        grid=(parts.shape[2], len(pixels)),
        arguments={
            "pixels": pixels,
            "projection": projection,
            "parts": parts,
            "count": pixels.shape[1],
            **dict(zip(("image_stride", "pixel_stride", "channel_stride"), pixels.stride(), strict=True)),
        },
        constants={"CHANNELS": channels, "DIM": padded(channels), "INPUTS": inputs, "PIXELS": config.pixels},
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
