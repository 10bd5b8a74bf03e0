"""From the statistics of tiles to a normalisation: one centre, scale and shift for each channel.

A tile has left mean and summed squared deviation of each channel. The mean of a group of channels is their weighted
mean, and the group's deviation the sum of theirs and of count * (mean - group's mean)^2 (Chan, Golub and LeVeque 1983),
which subtracts no squares: in float64, in a fixed order, one program for each group of each image.

Eight programs would take long over many tiles. So where there are more than `_MOST_TILES`, they are first joined 64 at
a time, by the same formula for each channel, into parts that are as those of larger tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

SIZES = ("count", "tiles", "joined_tiles")
GROUPS = 8
_TILES_AT_ONCE = 64
_CHANNELS_AT_ONCE = 32
_MOST_TILES = 256


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_join_kernel(
    parts, joined,
    # (B, tiles, 2, DIM) float32, (B, joined tiles, 2, DIM) float64
    count, tiles, joined_tiles,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """CHANNELS of TILES tiles of PIXELS pixels, as of one tile; grid: the joined tiles of all images, channels."""
    image, number = (tl.program_id(0) // joined_tiles).to(tl.int64), tl.program_id(0) % joined_tiles
    tile = number * TILES + tl.arange(0, TILES)
    exists = (tile < tiles)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = parts + (image * tiles + tile)[:, None] * (2 * DIM) + channel[None, :]
    means = tl.load(place, mask=exists, other=0.0).to(tl.float64)
    within = tl.load(place + DIM, mask=exists, other=0.0).to(tl.float64)
    pixels = tl.where(exists, tl.minimum(count - tile * PIXELS, PIXELS).to(tl.float64)[:, None], 0.0)
    existing = tl.minimum(count - number * (TILES * PIXELS), TILES * PIXELS).to(tl.float64)
    mean = tl.sum(means * pixels, axis=0) / existing
    means -= mean[None, :]
    place = joined + (image * joined_tiles + number) * (2 * DIM) + channel
    tl.store(place, mean)
    tl.store(place + DIM, tl.sum(within + means * means * pixels, axis=0))


@triton.jit(do_not_specialize=SIZES)
def _pixel_encoder_statistics_kernel(
    parts, weight, bias, norm,
    # (B, tiles, 2, DIM), (D,), (D,), (B, 3, DIM)
    count, tiles, channels, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One group of an image's channels, at most WIDTH of them; grid: images, groups.

    PIXELS are those of a tile, of which only an image's last may have fewer. Beyond the channels `norm` becomes zero.
    """
    image = tl.program_id(0).to(tl.int64)
    group = channels // 8
    within = tl.arange(0, WIDTH)
    channel = tl.program_id(1) * group + within
    mine = within < group
    parts += image * tiles * 2 * DIM
    values = (count * group).to(tl.float64)
    total = tl.zeros((WIDTH,), tl.float64)
    for first in tl.range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        exists = (tile < tiles)[:, None] & mine[None, :]
        means = tl.load(parts + tile[:, None] * (2 * DIM) + channel[None, :], mask=exists, other=0.0)
        pixels = tl.minimum(count - tile * PIXELS, PIXELS).to(tl.float64)[:, None]
        total += tl.sum(tl.where(exists, means.to(tl.float64) * pixels, 0.0), axis=0)
    mean = tl.sum(total) / values
    deviation = tl.zeros((WIDTH,), tl.float64)
    for first in tl.range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        exists = (tile < tiles)[:, None] & mine[None, :]
        place = parts + tile[:, None] * (2 * DIM) + channel[None, :]
        means = tl.load(place, mask=exists, other=0.0).to(tl.float64) - mean
        within_tile = tl.load(place + DIM, mask=exists, other=0.0).to(tl.float64)
        pixels = tl.minimum(count - tile * PIXELS, PIXELS).to(tl.float64)[:, None]
        deviation += tl.sum(tl.where(exists, within_tile + means * means * pixels, 0.0), axis=0)
    variance = tl.sum(deviation) / values
    scale = tl.load(weight + channel, mask=mine, other=0.0).to(tl.float64) / tl.sqrt(variance + eps)
    # The centre is rounded; what that leaves of the mean goes into the shift.
    center = mean.to(tl.float32)
    shift = tl.load(bias + channel, mask=mine, other=0.0).to(tl.float64) + (center.to(tl.float64) - mean) * scale
    place = norm + image * 3 * DIM + channel
    tl.store(place, tl.zeros((WIDTH,), tl.float32) + center, mask=mine)
    tl.store(place + DIM, scale.to(tl.float32), mask=mine)
    tl.store(place + 2 * DIM, shift.to(tl.float32), mask=mine)
    beyond = tl.arange(0, DIM)
    nobody_s = beyond >= tl.where(tl.program_id(1) == 0, channels, DIM)
    for row in tl.static_range(3):
        tl.store(norm + image * 3 * DIM + row * DIM + beyond, 0.0, mask=nobody_s)


def plan_statistics(
    parts: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, *, count: int, pixels: int, eps: float
) -> list[Launch]:
    """The launches that fill `norm` (B, 3, D padded) float32, one or two.

    Args:
        parts: (B, tiles, 2, D padded), of tiles of `pixels` pixels.
        weight, bias: (D,) of the group normalisation with 8 groups.
        count: pixels of an image.
    """
    if parts.shape[1] <= _MOST_TILES:
        return [_plan_last(parts, weight, bias, norm, count=count, pixels=pixels, eps=eps)]
    batch, tiles, _, dim = parts.shape
    joined = parts.new_empty(batch, triton.cdiv(tiles, _TILES_AT_ONCE), 2, dim, dtype=torch.float64)
    channels = min(dim, _CHANNELS_AT_ONCE)
    join = Launch(
        kernel=_pixel_encoder_join_kernel,
        grid=(batch * joined.shape[1], dim // channels),
        arguments={"parts": parts, "joined": joined, "count": count, "tiles": tiles, "joined_tiles": joined.shape[1]},
        constants={"DIM": dim, "CHANNELS": channels, "PIXELS": pixels, "TILES": _TILES_AT_ONCE},
        options={"num_warps": 4, "num_stages": 1},
    )
    return [join, _plan_last(joined, weight, bias, norm, count=count, pixels=pixels * _TILES_AT_ONCE, eps=eps)]


def _plan_last(
    parts: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, *, count: int, pixels: int, eps: float
) -> Launch:
    batch, tiles, _, dim = parts.shape
    channels = weight.shape[0]
    return Launch(
        kernel=_pixel_encoder_statistics_kernel,
        grid=(batch, GROUPS),
        arguments={
            "parts": parts,
            "weight": weight,
            "bias": bias,
            "norm": norm,
            "count": count,
            "tiles": tiles,
            "channels": channels,
            "eps": eps,
        },
        constants={
            "DIM": dim,
            "WIDTH": triton.next_power_of_2(channels // GROUPS),
            "PIXELS": pixels,
            "TILES": _TILES_AT_ONCE,
        },
        options={"num_warps": 4, "num_stages": 1},
    )
