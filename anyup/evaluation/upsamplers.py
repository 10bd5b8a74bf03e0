"""What is compared: interpolation, and any number of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyup.checkpoints import NAMED, load
from anyup.fingerprint import module_fingerprint
from anyup.image_context import ImageContext
from anyup.model import AnyUp

Guide = Tensor | ImageContext

REFERENCE = "bilinear"
"""The method that the others are measured against."""


@dataclass(frozen=True)
class Interpolation:
    """Interpolation of the features alone: "bilinear" (half-pixel centres) or "nearest"."""

    name: str

    def encode(self, image: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Guide:
        """The image."""
        return image

    def __call__(self, image: Guide, features: Tensor, size: tuple[int, int], values: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to (B, C, *size); the image says nothing."""
        carried = features if values is None else values
        if self.name == "nearest":
            return F.interpolate(carried, size=size, mode="nearest-exact")
        return F.interpolate(carried, size=size, mode="bilinear", align_corners=False)

    def describe(self) -> dict[str, Any]:
        """What results are stored with."""
        return {"kind": "interpolation"}


@dataclass(frozen=True)
class Learned:
    """A model in eval mode under the name that tables show."""

    name: str
    model: AnyUp
    trained: bool = True

    def encode(self, image: Tensor, size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Guide:
        """What calls to `size`, with features on `grids`, take instead of the image (B, 3, Hi, Wi), normalised."""
        return self.model.encode_image(image, size, grids=grids)

    def __call__(self, image: Guide, features: Tensor, size: tuple[int, int], values: Tensor | None = None) -> Tensor:
        """(B, 3, Hi, Wi) normalised, or encoded, and (B, C, h, w) to (B, C, *size)."""
        upsampled: Tensor = self.model(image, features, size, values=values)
        return upsampled

    def describe(self) -> dict[str, Any]:
        """What results are stored with."""
        return {
            "kind": "weights" if self.trained else "untrained weights",
            "sha256": module_fingerprint(self.model),
            "arguments": self.model.config,
        }


Upsampler = Interpolation | Learned


def make_upsamplers(
    weights: Sequence[str],
    *,
    untrained: bool = False,
    window_ratios: Sequence[float] = (),
    device: torch.device,
    backend: str | None = None,
) -> list[Upsampler]:
    """Nearest, bilinear, then the model of each name or file for `anyup.load`, then (if asked for) an untrained one.

    A file is called by its stem, or by its path where two have the same. Each is there once with its own window, and
    once with each of `window_ratios` that is not its own. Raises ValueError for the same weights or the same ratio
    twice, and for a ratio that is not positive.
    """
    for argument, given in (("weights", list(weights)), ("window_ratio", [f"{ratio:g}" for ratio in window_ratios])):
        if repeated := sorted({value for value in given if given.count(value) > 1}):
            raise ValueError(f"{argument}: expected each once, got {', '.join(repeated)} more than once")
    if wrong := [ratio for ratio in window_ratios if not ratio > 0]:
        raise ValueError(f"window_ratio: expected more than 0, got {wrong[0]:g}")
    short = [source if source in NAMED else Path(source).stem for source in weights]
    taken = {"nearest", REFERENCE, "untrained"}
    names = [
        name if short.count(name) == 1 and name not in taken else source
        for name, source in zip(short, weights, strict=True)
    ]
    learned = []
    for name, source in zip(names, weights, strict=True):
        own = load(source, device=device, backend=backend)
        learned.append(Learned(name, own))
        for ratio in window_ratios:
            if ratio != own.window_ratio:
                other = load(source, device=device, backend=backend, window_ratio=ratio)
                learned.append(Learned(f"{name} (window {ratio:g})", other))
    if untrained:
        from anyup.checkpoints import untrained_model

        learned.append(Learned("untrained", untrained_model(device, backend), trained=False))
    return [Interpolation("nearest"), Interpolation(REFERENCE), *learned]
