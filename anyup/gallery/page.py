"""One page of photographs, their features, and what the upsampler makes of them, which needs no other file.

Of each photograph there are four pictures to wipe between, and the attention weights of pixels on a regular grid.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.encoders import Encoder
from anyup.images import complete_or_absent, fit_within, normalize_imagenet, resize, round_to_multiple, to_pil
from anyup.model import AnyUp
from anyup.visualization import pca_picture
from anyup.window import axis_bounds

LONGER_SIDE = 448

_WEIGHTS = 200_000
"""About how many attention weights a photograph has, in bytes before they are packed."""

_LEAST_STEP = 4
"""From a pixel with weights to the next one."""

_QUALITY = 88
"""Of the pictures, as JPEG."""


def make_section(
    photograph: Tensor,
    upsampler: AnyUp,
    encoder: Encoder,
    *,
    name: str,
    credit: str = "",
    longer_side: int = LONGER_SIDE,
    untrained: bool = False,
) -> str:
    """A photograph's part of the page.

    Args:
        photograph: (1, 3, H, W) in 0..1; shown, encoded and upsampled at about this longer side, in whole cells of the
            encoder.
        upsampler, encoder: on one device.
        name, credit: texts to show with it.
        untrained: whether the weights are random, which is said.

    Raises:
        ValueError: features that are not finite, or a photograph that the encoder refuses.
    """
    size = round_to_multiple(fit_within((photograph.shape[2], photograph.shape[3]), longer_side), encoder.stride)
    device = next(upsampler.parameters()).device
    with torch.inference_mode():
        view = resize(photograph, size).to(device)
        image, low = normalize_imagenet(view), encoder(encoder.normalize(view)).float()
        bilinear = F.interpolate(low, size=size, mode="bilinear", align_corners=False)
        cells, smooth, sharp = pca_picture(low, bilinear, upsampler(image, low, size))
        attention = _attention(upsampler, image, low, size)
    pictures = {
        "photograph": _picture(view[0]),
        "features": _picture(cells, "PNG"),
        "bilinear": _picture(smooth),
        "AnyUp": _picture(sharp),
    }
    return _SECTION.format(
        name=escape(name),
        credit=escape(credit),
        alarm="<p class='alarm'>UNTRAINED WEIGHTS: what AnyUp shows means nothing</p>" if untrained else "",
        grid=" x ".join(map(str, low.shape[1:])),
        height=size[0],
        width=size[1],
        pictures="".join(
            f"<img alt='{title}' src='{source}'{_CELLS if title == 'features' else ''}>"
            for title, source in pictures.items()
        ),
        left=_options(pictures, "bilinear"),
        right=_options(pictures, "AnyUp"),
        data=json.dumps(attention, separators=(",", ":")),
    )


def write_page(path: str | os.PathLike[str], sections: Sequence[str], about: str) -> None:
    """Write the page (.html) of some sections, with a sentence about them; complete or not at all."""
    style, script = ((files("anyup.gallery") / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    text = _PAGE.format(style=style, script=script, about=escape(about), sections="".join(sections))
    with complete_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _attention(upsampler: AnyUp, image: Tensor, features: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """Where pixels on a regular grid look: what page.js reads."""
    grid = (features.shape[2], features.shape[3])
    bounds = [axis_bounds(upsampler.window, pixels, keys) for pixels, keys in zip(size, grid, strict=True)]
    # Keys that are so far apart are never seen by one pixel, and share a channel.
    rows, columns = (max(last - first for first, last in zip(*axis, strict=True)) for axis in bounds)
    step = max(_LEAST_STEP, math.ceil(math.sqrt(size[0] * size[1] * rows * columns / _WEIGHTS)))
    shown = [range(min(step // 2, length - 1), length, step) for length in size]
    channel = (torch.arange(grid[0]) % rows)[:, None] * columns + torch.arange(grid[1]) % columns
    keys = F.one_hot(channel, rows * columns).permute(2, 0, 1)[None].to(features)
    points = torch.cartesian_prod(*(torch.tensor(axis) for axis in shown))[None]
    weights = upsampler.at_points(image, features, points, size, values=keys)[0]
    levels = (weights / weights.amax(dim=1, keepdim=True) * 255).round().to("cpu", torch.uint8)
    return {
        "size": size,
        "grid": grid,
        "modulus": (rows, columns),
        "rows": list(shown[0]),
        "columns": list(shown[1]),
        "windows": [
            [[edge[position] for position in axis] for edge in edges] for edges, axis in zip(bounds, shown, strict=True)
        ],
        "weights": base64.b64encode(zlib.compress(levels.numpy().tobytes(), 9)).decode(),
    }


def _picture(picture: Tensor, kind: str = "JPEG") -> str:
    """A picture (3, H, W) in 0..1 as an address that holds it."""
    stored = io.BytesIO()
    to_pil(picture).save(stored, kind, **({"quality": _QUALITY, "optimize": True} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stored.getvalue()).decode()}"


def _options(names: Sequence[str] | dict[str, str], chosen: str) -> str:
    return "".join(f"<option{' selected' if name == chosen else ''}>{name}</option>" for name in names)


_CELLS = " class='cells'"

_SECTION = """
<section>
<h2>{name}</h2>
<p class="soft">{credit}</p>{alarm}
<div class="panels">
<figure>
<div class="picture wipe" style="aspect-ratio: {width} / {height}">{pictures}<div class="edge"></div></div>
<div class="controls">
<input type="range" min="0" max="100" step="any" value="50" aria-label="where the right picture begins">
<select class="left" aria-label="left picture">{left}</select>
<select class="right" aria-label="right picture">{right}</select>
</div>
<p class="soft">{height} x {width} pixels from features of {grid}</p>
</figure>
<figure>
<div class="picture look" style="aspect-ratio: {width} / {height}" tabindex="0" role="application"
 aria-label="where a pixel looks: click, or use the arrow keys"><img alt="">
<canvas width="{width}" height="{height}"></canvas></div>
<output></output>
</figure>
</div>
<script type="application/json">{data}</script>
</section>
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AnyUp: gallery</title>
<style>
{style}</style>
</head>
<body>
<h1>AnyUp: gallery</h1>
<p>{about}</p>
<p class="soft">Colours: the first three principal components of the low-resolution features, the same in all pictures.
Choose two pictures and wipe between them; click a pixel, or move by the arrow keys, to see where it looks: the brighter
a cell of the features, the more of it the pixel takes.</p>
{sections}
<script>
{script}</script>
</body>
</html>
"""
