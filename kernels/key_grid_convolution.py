"""The 3 x 3 convolution of the image's and the features' keys, side by side, on their grid, whose border is reflected.

It is a sum of products, one for each tap and each run of channels: a tap's operand is loaded from where its cells lie,
and no map is bordered, joined or unfolded in memory. The grid is small, so that what counts is how many programs there
are: each makes a few cells and a few channels of the result. Along an axis of one cell the border repeats it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .key_grid_config import ConvolutionConfig
from .launch import Launch
from .pixel_encoder_statistics import slot_channel, slot_exists, store_statistics
from .products import mixed_matmul, padded

SIZES = ("height", "width")


@triton.jit
def _inside(number, length):
    """The number itself, or its reflection at the border where it lies one beyond it."""
    number = tl.where(number < 0, 1, number)
    number = tl.where(number >= length, length - 2, number)
    return tl.minimum(tl.maximum(number, 0), length - 1)


@triton.jit(do_not_specialize=SIZES)
def _key_grid_convolution_kernel(
    image_keys, feature_keys, weight, out, parts,
    # (B, h, w, D), (B, h, w, D) float32, (9, 2, D, D), (B, h * w, D) float32, (B, 3, runs of cells, 8)
    height, width,
    CHANNELS: tl.constexpr, DIM: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUTPUTS slots of CELLS cells, and their groups' statistics; grid: runs of cells, runs of slots, images."""
    image = tl.program_id(2).to(tl.int64)
    count = height * width
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    exists = cell < count
    row, column = cell // width, cell % width
    image_keys += image * count * CHANNELS
    feature_keys += image * count * CHANNELS
    slot = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    output = slot_channel(slot, CHANNELS, DIM)
    wanted = slot_exists(slot, CHANNELS, DIM)
    total = tl.zeros((CELLS, OUTPUTS), tl.float32)
    PIECES: tl.constexpr = (CHANNELS + PIECE - 1) // PIECE
    for turn in tl.range(0, 9 * PIECES):
        tap = turn // PIECES
        near = _inside(row + tap // 3 - 1, height) * width + _inside(column + tap % 3 - 1, width)
        channel = turn % PIECES * PIECE + tl.arange(0, PIECE)
        place = near[:, None] * CHANNELS + channel[None, :]
        there = exists[:, None] & (channel < CHANNELS)[None, :]
        of_weight = weight + (tap * 2 * CHANNELS + channel)[:, None] * CHANNELS + output[None, :]
        asked = (channel < CHANNELS)[:, None] & wanted[None, :]
        x = tl.load(image_keys + place, mask=there, other=0.0)  # (CELLS, PIECE)
        total = mixed_matmul(x, tl.load(of_weight, mask=asked, other=0.0), total, PRECISION)
        x = tl.load(feature_keys + place, mask=there, other=0.0)
        of_weight += CHANNELS * CHANNELS
        total = mixed_matmul(x, tl.load(of_weight, mask=asked, other=0.0), total, PRECISION)
    place = out + (image * count + cell)[:, None] * CHANNELS + output[None, :]
    tl.store(place, total, mask=exists[:, None] & wanted[None, :])
    runs = tl.num_programs(0)
    first = tl.program_id(1) * (OUTPUTS // (DIM // 8))
    place = parts + (image * 3 * runs + tl.program_id(0)) * 8 + first
    store_statistics(place, runs * 8, total, exists, wanted, CHANNELS, DIM)


def plan_convolution(
    image_keys: Tensor,
    feature_keys: Tensor,
    weight: Tensor,
    out: Tensor,
    parts: Tensor,
    *,
    precision: str,
    config: ConvolutionConfig,
) -> Launch:
    """The launch that fills `out` (B, h * w, D) and the statistics of its groups, `parts`, both float32.

    Args:
        image_keys, feature_keys: (B, h, w, D), contiguous, of any dtypes; the convolution's first and second D
            channels.
        weight: (3, 3, 2 D, D), the map's channels before the result's, contiguous, of any dtype.
        parts: (B, 3, runs of cells, 8), see `pixel_encoder_statistics`; `ConvolutionConfig.runs` says how many.
        precision: of products of float32; Triton's `input_precision`.
        config: sizes of tiles, warps, stages.
    """
    batch, height, width, channels = image_keys.shape
    dim = padded(channels)
    outputs = min(config.outputs, dim)
    return Launch(
        kernel=_key_grid_convolution_kernel,
        grid=(parts.shape[2], dim // outputs, batch),
        arguments={
            "image_keys": image_keys,
            "feature_keys": feature_keys,
            "weight": weight,
            "out": out,
            "parts": parts,
            "height": height,
            "width": width,
        },
        constants={
            "CHANNELS": channels,
            "DIM": dim,
            "CELLS": config.cells,
            "OUTPUTS": outputs,
            "PIECE": min(config.piece, dim),
            "PRECISION": precision,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
