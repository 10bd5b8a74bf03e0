"""Bands of rows that both directions of the query projection work on in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.convolution import Convolution
from anyup.ops.memory import PIXELS_AT_A_TIME
from anyup.ops.parallel import even_slices
from anyup.ops.winograd import WinogradConvolution

Band = tuple[int, slice]
"""An image of the batch and some of its rows."""

# Pixels of a band: on a CPU as many as keep what Winograd's convolution makes of them in a core's cache.
_BAND_PIXELS = {"cpu": 1024}


def bands_of(encoded: Tensor) -> list[Band]:
    batch, height, width, _ = encoded.shape
    most = max(2, _BAND_PIXELS.get(encoded.device.type, PIXELS_AT_A_TIME) // max(1, width))
    return [(image, rows) for image in range(batch) for rows in even_slices(height, most, encoded.device, 2)]


def with_halo(maps: Tensor, band: Band) -> Tensor:
    """A band's n rows and those above and below, zero beyond the image on all sides: (n + 2, W + 2, D)."""
    image, rows = band
    inside = maps[image, max(rows.start - 1, 0) : rows.stop + 1]
    return F.pad(inside, (0, 0, 1, 1, rows.start == 0, rows.stop == maps.shape[1]))


def convolution_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes rows (n + 2, W + 2, D) to their convolution (n, W, D)."""
    if weight.dtype == torch.bfloat16:  # Winograd's sums would be rounded; the library's are not
        weight = weight.contiguous(memory_format=torch.channels_last)
        return lambda rows: F.conv2d(rows.permute(2, 0, 1)[None], weight)[0].permute(1, 2, 0)
    if weight.device.type == "cpu":
        return WinogradConvolution(weight)
    convolve = Convolution(weight)
    return lambda rows: convolve(rows[None])[0]


def inverse_rms(x: Tensor) -> Tensor:
    """One over the root mean square of each pixel (n, D): (n, 1)."""
    return torch.rsqrt(torch.linalg.vecdot(x, x)[:, None] / x.shape[1] + torch.finfo(x.dtype).eps)
