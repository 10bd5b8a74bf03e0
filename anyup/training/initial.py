"""Weights to start from that make the upsampler a joint bilateral filter (Kopf et al., 2007), before any training.

A cell's weight for a pixel is a product of two factors, so that the logit of each head is a sum of two inner products:

- *Place*: the rotary embedding turns constant channels into cosines and sines of row and column, at three frequencies.
  The inner product of a pixel's with a cell's mean of them falls off over about a cell: a mean over a cell takes away
  what changes within the cell, so that the fall is the narrower the finer the grid is.
- *Colour*: steps between -1 and 1 across random planes of the colour space. The inner product of a pixel's with a
  cell's mean of them says how few planes lie between their colours.

All else that would change queries and keys, the features among it, begins at zero, where training takes it up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.model import AnyUp
from anyup.ops.pixel_encoder.arguments import GROUPS

FREQUENCIES = (15.0, 7.0, 1.0)
"""Of the place channels, in turns along the image."""

AMPLITUDES = (0.21, 0.25, 0.63)
"""Of the place channels at each frequency. Frequencies and amplitudes are rounded from the least squares between these
weights and bilinear interpolation's on grids of 8 to 48 cells, for outputs of 28 to 112 pixels; the numbers below were
chosen by trial, on photographs of the training."""

PLACE, COLOUR = 24.0, 15.0
"""Logits of a pixel's own place and own colour, about."""

ENERGY = 0.5
"""Squared norm of the colour channels in queries and keys, about, beside 1 of the place channels."""

STEEPNESS = 2.0
"""Of the steps, where the colours of an image have a standard deviation of 1."""


@torch.no_grad()
def start_as_bilateral(upsampler: AnyUp) -> None:
    """Set the weights of a new upsampler; torch draws the planes.

    Raises ValueError where a head is too narrow for both factors.
    """
    dim, heads = upsampler.config["qk_dim"], upsampler.config["num_heads"]
    quarter = dim // 4
    # Four channels for a frequency, a quarter apart: ones in the first and last become the cosines of row and column
    # there, and the sines in the two between.
    place = torch.arange(len(FREQUENCIES))[:, None] + torch.arange(4) * quarter
    if dim // heads <= place.numel():
        raise ValueError(
            f"model.initial: bilateral needs more than {place.numel()} channels for each of {heads} heads, "
            f"and model.qk_dim is {dim}"
        )
    rest = torch.ones(dim, dtype=torch.bool).index_fill(0, place.flatten(), False).nonzero()[:, 0]
    colour, opposite = rest[::2], rest[1::2]
    angle = 2 * math.pi * torch.tensor(FREQUENCIES)[:, None]
    upsampler.rope.freqs.zero_()
    upsampler.rope.freqs[0, place[:, :2]] = angle
    upsampler.rope.freqs[1, place[:, 2:]] = angle
    _encode_colours(upsampler, colour, opposite)
    _encode_ones(upsampler, place[:, [0, 3]].flatten(), colour)
    amplitude = torch.full((dim,), math.sqrt(ENERGY / len(colour)))
    amplitude[place] = torch.tensor(AMPLITUDES)[:, None]
    _pass_on(upsampler, amplitude)
    _project(upsampler, place.flatten(), colour)


def _encode_colours(upsampler: AnyUp, colour: Tensor, opposite: Tensor) -> None:
    """The image encoder's channels `colour` as steps from 0 to 2, by its first block: silu(x + 1) - silu(x - 1)."""
    first, spread, join = (
        upsampler.get_parameter(f"image_encoder.{name}.weight") for name in ("0", "1.block.2", "1.block.5")
    )
    centre = first.shape[2] // 2
    planes = F.normalize(torch.randn(len(colour), first.shape[1]), dim=1)
    places = STEEPNESS * torch.randn(len(colour))
    for weight in (first, spread, join):
        weight.zero_()
    upsampler.get_parameter("image_encoder.1.block.3.weight").fill_(STEEPNESS)
    bias = upsampler.get_parameter("image_encoder.1.block.3.bias")
    for channels, sign in ((colour, 1.0), (opposite, -1.0)):
        # Small, as the block's shortcut passes it on; its first norm makes up for that.
        first[channels, :, centre, centre] = 0.1 * sign * planes
        spread[channels[:, None], colour[:, None]] = 1.0  # silu(x) - silu(-x) = x
        spread[channels[:, None], opposite[:, None]] = -1.0
        bias[channels] = places + sign
        join[colour[:, None], channels[:, None]] = sign


def _encode_ones(upsampler: AnyUp, ones: Tensor, colour: Tensor) -> None:
    """The image encoder's channels `ones` as 1, and 1 less in the channels `colour`, by its second block."""
    hidden = len(upsampler.get_parameter("image_encoder.2.block.3.weight")) // GROUPS
    upsampler.get_parameter("image_encoder.2.block.3.weight")[:hidden] = 0.0
    upsampler.get_parameter("image_encoder.2.block.3.bias")[:hidden] = 1.0
    join = upsampler.get_parameter("image_encoder.2.block.5.weight")
    join.zero_()
    for channels, value in ((ones, 1.0), (colour, -1.0)):
        join[channels, :hidden] = value / (hidden * F.silu(torch.tensor(1.0)))


def _pass_on(upsampler: AnyUp, amplitude: Tensor) -> None:
    """The encoded image, each channel times its amplitude, as queries and keys."""
    dim = len(amplitude)
    for name in ("query_encoder", "key_encoder"):
        upsampler.get_parameter(f"{name}.0.weight")[:, :, 0, 0] = amplitude.diag()
    for name in ("aggregation.0", "cross_decode.conv2d"):
        weight = upsampler.get_parameter(f"{name}.weight")
        weight.zero_()
        weight[:, :dim, 1, 1] = torch.eye(dim)
    for name in ("query_encoder", "key_encoder", "aggregation"):
        for block in (1, 2):
            upsampler.get_parameter(f"{name}.{block}.block.5.weight").zero_()


def _project(upsampler: AnyUp, place: Tensor, colour: Tensor) -> None:
    """Each head's queries and keys: the place channels, and colour channels of its own, as many as it has room for."""
    dim, heads = upsampler.config["qk_dim"], upsampler.config["num_heads"]
    width = dim // heads
    weight = upsampler.get_parameter("cross_decode.cross_attn.attention.in_proj_weight")
    both = weight[: 2 * dim].view(2, heads, width, dim)
    both.zero_()
    # The squared weight for which channels whose squares have a sum of 1 before the norm give a logit of 1.
    unit = (1 + ENERGY) * math.sqrt(width) / dim
    both[:, :, torch.arange(len(place)), place] = math.sqrt(PLACE * unit)
    for head in range(heads):
        own = colour[head::heads][: width - len(place)]
        share = ENERGY * len(own) / len(colour)
        both[:, head, len(place) + torch.arange(len(own)), own] = math.sqrt(COLOUR * unit / share)
