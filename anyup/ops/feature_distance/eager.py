"""The feature distance in plain PyTorch, forward and backward: no map is stored for the backward pass but what came in.

Places are read on their device, so that nothing waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyup.ops.feature_distance.arguments import NORM_EPS, SPAN_EPS
from anyup.ops.precision import working_dtype


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


def forward(
    prediction: Tensor, target: Tensor, places: Tensor | None, *, save_statistics: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), (B, K, C, h, w), (B, K, 2) -> (B, 2), and what the backward pass takes."""
    near, target = _pixels(prediction, target, places)
    norm = torch.linalg.vector_norm(near, dim=-1)
    product = norm.clamp_min(NORM_EPS) * torch.linalg.vector_norm(target, dim=-1).clamp_min_(NORM_EPS)
    cosine = torch.linalg.vecdot(near, target) / product
    least, largest = target.aminmax(dim=-1)
    inverse = 1 / (target.shape[-1] * (largest - least + SPAN_EPS).square())
    difference = near - target
    error = torch.linalg.vecdot(difference, difference) * inverse
    means = torch.stack(((1 - cosine).flatten(1).mean(dim=1), error.flatten(1).mean(dim=1)), dim=1)
    if not save_statistics:
        return means, means.new_empty(0)
    slope = torch.where(norm > NORM_EPS, cosine / norm.square(), 0)
    return means, torch.stack((1 / product, slope, inverse), dim=-1)


def backward(grad: Tensor, prediction: Tensor, target: Tensor, places: Tensor | None, statistics: Tensor) -> Tensor:
    """The gradient of the prediction, channels last."""
    near, target = _pixels(prediction, target, places)
    of_cosine, of_error = (grad / math.prod(statistics.shape[1:4])).view(-1, 2, 1, 1, 1, 1).unbind(1)
    scale, slope, inverse = statistics[..., None].unbind(-2)
    # Not summed up before: where both are alike, the difference is small and exact.
    found = (near - target).mul_(2 * of_error * inverse)
    found = found.addcmul_(near, of_cosine * slope).addcmul_(target, of_cosine * scale, value=-1)
    if places is None:
        return found[:, 0].to(prediction.dtype).permute(0, 3, 1, 2)
    batch, channels, height, width = prediction.shape
    whole = found.new_zeros(batch, height, width, channels)
    whole.index_put_(_index(target, places), found, accumulate=True)
    return whole.to(prediction.dtype).permute(0, 3, 1, 2)


def _pixels(prediction: Tensor, target: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """The windows of both maps, (B, K, h, w, C), in the dtype of arithmetic."""
    wide = working_dtype(prediction.dtype)
    near = prediction.permute(0, 2, 3, 1)
    target = target.permute(0, 1, 3, 4, 2).to(wide).contiguous()
    return (near[:, None] if places is None else near[_index(target, places)]).to(wide), target


def _index(target: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image, the row and the column of each pixel of the windows (B, K, h, w, C)."""
    batch, _, rows, columns, _ = target.shape
    down, along = (torch.arange(length, device=places.device) for length in (rows, columns))
    image = torch.arange(batch, device=places.device).view(-1, 1, 1, 1)
    top, left = places[..., None, None].unbind(2)
    return image, top + down[:, None], left + along
