"""The feature distance as its definition reads: the oracle that every other backend is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.feature_distance.arguments import NORM_EPS, SPAN_EPS
from anyup.ops.precision import working_dtype
from anyup.ops.pullback import pullback


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


def forward(
    prediction: Tensor, target: Tensor, places: Tensor | None, *, save_statistics: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), (B, K, C, h, w), (B, K, 2) -> (B, 2), and what the backward pass takes."""
    wide = working_dtype(prediction.dtype)
    means = _means(prediction.to(wide), target.to(wide), places)
    if not save_statistics:
        return means, means.new_empty(0)
    near, target = _windows(prediction.to(wide), target, places), target.to(wide)
    norms = near.norm(dim=2), target.norm(dim=2)
    product = norms[0].clamp_min(NORM_EPS) * norms[1].clamp_min(NORM_EPS)
    cosine = (near * target).sum(dim=2) / product
    slope = torch.where(norms[0] > NORM_EPS, cosine / norms[0].square(), 0)
    span = target.amax(dim=2) - target.amin(dim=2) + SPAN_EPS
    return means, torch.stack((1 / product, slope, 1 / (target.shape[2] * span.square())), dim=-1)


def backward(grad: Tensor, prediction: Tensor, target: Tensor, places: Tensor | None, statistics: Tensor) -> Tensor:
    """The gradient of the prediction, by autograd through the definition."""
    wide = working_dtype(prediction.dtype)
    target = target.to(wide)
    (found,) = pullback(lambda x: _means(x, target, places), (prediction.to(wide),), grad.to(wide))
    return found.to(prediction.dtype)


def _means(prediction: Tensor, target: Tensor, places: Tensor | None) -> Tensor:
    near = _windows(prediction, target, places)
    cosine = 1 - F.cosine_similarity(near, target, dim=2, eps=NORM_EPS)
    span = target.amax(dim=2, keepdim=True) - target.amin(dim=2, keepdim=True) + SPAN_EPS
    error = ((near - target) / span).square()
    return torch.stack((cosine.flatten(1).mean(dim=1), error.flatten(1).mean(dim=1)), dim=1)


def _windows(prediction: Tensor, target: Tensor, places: Tensor | None) -> Tensor:
    """The windows (B, K, C, h, w) of the maps."""
    if places is None:
        return prediction[:, None]
    rows, columns = target.shape[3:]
    return torch.stack(
        [
            torch.stack([image[:, top : top + rows, left : left + columns] for top, left in corners])
            for image, corners in zip(prediction.unbind(0), places.tolist(), strict=True)
        ]
    )
