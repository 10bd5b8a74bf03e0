"""Other samples from the same features: changes to a view and its maps under which the right answer stays right.

Few photographs are learned by heart, colours and all, long before the upsampler has learned edges. Encoders need not
run again for any of these.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from anyup.training.randomness import Key, drawer

TURNS = 8
"""Quarter turns, each of the view and of its mirror image."""


def turn(maps: Tensor, number: int) -> Tensor:
    """Square maps (..., S, S) mirrored from left to right where `number` is odd, then turned number // 2 quarters."""
    mirrored = maps.flip(-1) if number % 2 else maps
    return mirrored.rot90(number // 2, (-2, -1))


def turn_places(places: Tensor, number: int, side: int, window: int) -> Tensor:
    """Where windows with a first row and column `places` (K, 2) begin once their map of `side` cells is turned."""
    top, left = places.unbind(1)
    far = side - window
    if number % 2:
        left = far - left
    for _ in range(number // 2):
        top, left = far - left, top
    return torch.stack((top, left), 1)


def recolour(rgb01: Tensor, *key: Key) -> Tensor:
    """An image (3, H, W) in 0..1 in other colours: the key draws a turn of the colour space and a gamma.

    Edges stay where they are; what an object's colour is tells nothing any more. The turn is about mid grey, and what
    leaves the cube of colours is scaled back, so that nothing is clipped.
    """
    draw = drawer("recolour", *key)
    normal = torch.tensor([[draw.gauss(0, 1) for _ in range(3)] for _ in range(3)])
    rotation, _ = torch.linalg.qr(normal)
    turned = torch.einsum("rc,chw->rhw", rotation, rgb01 - 0.5)
    turned = turned * (0.5 / max(0.5, float(turned.abs().max()))) + 0.5
    return turned.clamp(0, 1) ** (2.0 ** draw.uniform(-0.7, 0.7))


def draw_channels(channels: int, smallest: float, draw: random.Random) -> list[int]:
    """A share of the channels between `smallest` and all, in a drawn order."""
    count = max(1, round(channels * draw.uniform(smallest, 1.0)))
    return draw.sample(range(channels), count)
