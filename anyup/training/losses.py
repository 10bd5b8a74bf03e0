"""How far upsampled features are from the true ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the pixels of 1 - cosine similarity along the channels: (B, ..., C, H, W) -> (B,), in float32."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-3).flatten(1).mean(dim=1)


def normalised_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error after both are min-max normalised, each pixel by its target's minimum and maximum.

    (B, ..., C, H, W) -> (B,), in float32. The minimum cancels: what remains is the difference in units of the
    target's range.
    """
    target = target.float()
    span = target.amax(dim=-3, keepdim=True) - target.amin(dim=-3, keepdim=True) + _EPS
    return ((prediction.float() - target) / span).square().flatten(1).mean(dim=1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: (B, ..., C, H, W) -> (B,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def windows(upsampled: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """The windows (B, K, C, *size) of maps (B, C, H, W) whose first row and column are `places` (B, K, 2)."""
    height, width = size
    # Per image: a slice of the whole batch would cost the backward pass a zeroed batch for each window.
    return torch.stack(
        [
            torch.stack([image[:, top : top + height, left : left + width] for top, left in corners])
            for image, corners in zip(upsampled.unbind(0), places.tolist(), strict=True)
        ]
    )
