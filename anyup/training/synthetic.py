"""Features made of a photograph itself: another encoder for each sample, which costs nothing and is known everywhere.

The colours of a pixel, those of its surroundings at several scales, and where it lies go through a random layer. The
result is smooth, or almost constant in regions whose edges are the photograph's. A mean over cells of any size is what
an upsampler gets, and the map itself what it has to give: edges that coarse features of real encoders only hint at, on
grids that these do not have.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.training.randomness import Key, drawer, number

CELLS = 8
"""Fewest cells a side of the grid to upsample from; most are half the pixels of the guidance."""

CHANNELS = (16, 96)
"""Fewest and most channels."""

HIDDEN = 24
"""Width of the random layer: regions of an image, at most."""

SURROUNDINGS = (2, 4, 8)
"""Pixels across the means that a pixel's features know of."""

SHARPNESS = 4.0
"""Of the regions' edges."""


def draw_cells(guidance_size: int, *key: Key) -> int:
    """Cells a side for a guidance image of that size; each doubling of the grid is as likely as the next."""
    most = max(1, guidance_size // 2)
    return round(math.exp(drawer("cells", *key).uniform(math.log(min(CELLS, most)), math.log(most))))


def draw_width(*key: Key) -> int:
    """Channels of a step's features."""
    return drawer("width", *key).randint(*CHANNELS)


def synthetic_features(guidance: Tensor, channels: int, *key: Key) -> Tensor:
    """Features (channels, G, G) of a guidance image (3, G, G), normalised; the key draws the encoder."""
    side = guidance.shape[-1]
    generator = torch.Generator().manual_seed(number("synthetic", *key))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(guidance)

    maps = [guidance[None]]
    for pixels in SURROUNDINGS:
        mean = F.adaptive_avg_pool2d(guidance[None], max(1, side // pixels))
        maps.append(F.interpolate(mean, (side, side), mode="bilinear"))
    axis = torch.linspace(-1, 1, side).to(guidance)
    maps.append(torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None])
    seen = torch.cat(maps, 1)[0]
    hidden = torch.einsum("hc,cyx->hyx", normal(HIDDEN, len(seen)), seen) / 2 + normal(HIDDEN, 1, 1)
    smooth = drawer("synthetic", *key).random() < 0.5
    active = F.relu(hidden) if smooth else (SHARPNESS * hidden).softmax(0)
    return torch.einsum("ch,hyx->cyx", normal(channels, HIDDEN), active)
