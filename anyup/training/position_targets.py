"""Maps that are known at every pixel, to learn from where a pixel's weights have to lie.

Features vary so slowly from cell to cell that weights beside the pixel cost the reconstruction little, while whatever
a head says of the features ends up as far beside. These maps are averaged over the cells, carried with the features'
own weights, and compared with themselves: the guidance's colours, which change at its edges, and random fields, which
change everywhere, as fast as a map of that many cells can follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.training.randomness import Key, number

FIELDS = 4
"""Random fields of a sample."""

CELLS_PER_NODE = 1.5
"""How far apart a field's independent numbers are, about. Averaged over 16 x 16 cells and brought to twice as many by
bilinear interpolation, such a field is off by 9 % of its variance, by nearest 13 %, by bilinear after a mean over
3 x 3 cells 44 %. With a number for each cell nearest is best, 15 against 18 %; with one for every fourth, all three are
below 2 %."""


def position_maps(guidance: Tensor, cells: int, side: int, *key: Key) -> Tensor:
    """A guidance image (3, G, G), normalised, as a map of `side` pixels, and random fields drawn for the key:
    (3 + FIELDS, side, side), each of about zero mean and unit variance.

    A field is a smooth interpolation of independent normal numbers.
    """
    colours = F.interpolate(guidance[None], (side, side), mode="bilinear", antialias=True)
    generator = torch.Generator().manual_seed(number("known maps", *key))
    across = max(1, round(cells / CELLS_PER_NODE))
    nodes = torch.randn(1, FIELDS, across, across, generator=generator)
    fields = F.interpolate(nodes, (side, side), mode="bicubic")
    return torch.cat((colours, fields.to(colours)), 1)[0]
