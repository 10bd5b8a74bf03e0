"""Changes to a guidance image under which the upsampled features should stay as they are.

Pillow does the work on bytes; a key decides the draws.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import torch
from torch import Tensor

from anyup.installing import pip_install

try:
    from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps
except ImportError as missing:
    raise ImportError(f"training needs Pillow: {pip_install('pillow')}") from missing

from anyup.training.randomness import Key, drawer, number

JPEG_QUALITIES = (95, 80, 60, 40)
NOISE = 0.03  # standard deviation, of values in 0..1
NOISE_PROBABILITY = 0.6

Change = Callable[[Image.Image, random.Random], Image.Image]


def augment(rgb: Tensor, *key: Key) -> Tensor:
    """An augmented copy of an image (3, H, W) of bytes, as (3, H, W) float32 in 0..1."""
    draw = drawer("augment", *key)
    picture = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    for probability, change in CHANGES:
        if draw.random() < probability:
            picture = change(picture, draw)
    result = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    result = result.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
    if draw.random() < NOISE_PROBABILITY:
        noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(number("noise", *key)))
        result = (result + NOISE * noise).clamp_(0, 1)
    return result.contiguous()


def colour_jitter(picture: Image.Image, draw: random.Random, strength: float = 0.4, hue: float = 0.1) -> Image.Image:
    """Brightness, contrast, saturation by factors around 1 and a turn of the hue, in an order that is drawn."""
    least, most = 1 - strength, 1 + strength
    steps: list[Change] = [
        lambda p, d: ImageEnhance.Brightness(p).enhance(d.uniform(least, most)),
        lambda p, d: ImageEnhance.Contrast(p).enhance(d.uniform(least, most)),
        lambda p, d: ImageEnhance.Color(p).enhance(d.uniform(least, most)),
        lambda p, d: turn_hue(p, d.uniform(-hue, hue)),
    ]
    draw.shuffle(steps)
    for step in steps:
        picture = step(picture, draw)
    return picture


def photometric_distortion(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Stronger changes of tone, each or not, and now and then another order of the channels."""
    if draw.random() < 0.5:
        picture = ImageEnhance.Brightness(picture).enhance(draw.uniform(0.875, 1.125))
    contrast_first = draw.random() < 0.5
    if contrast_first and draw.random() < 0.5:
        picture = ImageEnhance.Contrast(picture).enhance(draw.uniform(0.5, 1.5))
    if draw.random() < 0.5:
        picture = ImageEnhance.Color(picture).enhance(draw.uniform(0.5, 1.5))
    if draw.random() < 0.5:
        picture = turn_hue(picture, draw.uniform(-0.05, 0.05))
    if not contrast_first and draw.random() < 0.5:
        picture = ImageEnhance.Contrast(picture).enhance(draw.uniform(0.5, 1.5))
    if draw.random() < 0.5:
        channels = list(picture.split())
        draw.shuffle(channels)
        picture = Image.merge("RGB", channels)
    return picture


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """The hue of an RGB picture turned by a fraction of the circle."""
    hue, saturation, value = picture.convert("HSV").split()
    shift = Image.new("L", picture.size, round(turn * 256) % 256)
    return Image.merge("HSV", (ImageChops.add_modulo(hue, shift), saturation, value)).convert("RGB")


def jpeg(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Encoded at a quality that is drawn, and decoded."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=draw.choice(JPEG_QUALITIES))
    return Image.open(buffer).convert("RGB")


def sharpen(picture: Image.Image, draw: random.Random) -> Image.Image:
    """Twice the detail that a smoothed copy lacks."""
    return ImageEnhance.Sharpness(picture).enhance(2.0)


CHANGES: tuple[tuple[float, Change], ...] = (
    (0.5, colour_jitter),
    (0.5, photometric_distortion),
    (0.1, lambda picture, draw: picture.convert("L").convert("RGB")),
    (0.35, lambda picture, draw: picture.filter(ImageFilter.GaussianBlur(draw.uniform(0.1, 2.0)))),
    (1.0, jpeg),
    (0.2, lambda picture, draw: ImageOps.autocontrast(picture)),
    (0.15, lambda picture, draw: ImageOps.equalize(picture)),
    (0.2, sharpen),
    (0.1, lambda picture, draw: ImageOps.posterize(picture, 4)),
    (0.05, lambda picture, draw: ImageOps.solarize(picture, 128)),
    (0.02, lambda picture, draw: ImageOps.invert(picture)),
)
"""(probability, change), in the order in which they are applied; the noise comes last."""
