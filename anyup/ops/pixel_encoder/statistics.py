"""Mergeable channel statistics, and the affine map that a group normalisation becomes once they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.problem import EPS, GROUPS


@dataclass(frozen=True)
class Statistics:
    """Count, mean (D,) and summed squared deviation from the mean (D,) of each channel over some pixels.

    Kept in float64 (float32 where the device has no float64), so that merging many bands loses nothing.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(pixels: Tensor) -> Statistics:
        """Statistics of (n, D) float32 or float64 pixels, by two passes over them: no cancellation."""
        if pixels.device.type == "cpu":
            # Four times as fast as var_mean over the first dimension, whose CPU kernel is not vectorised.
            image = pixels.view(1, 1, *pixels.shape).permute(0, 3, 1, 2)
            mean, variance = torch.ops.aten.batch_norm_update_stats(image, None, None, 0.0)
        else:
            variance, mean = torch.var_mean(pixels, dim=0, correction=0)
        wide = accumulator_dtype(pixels.device)
        return Statistics(pixels.shape[0], mean.to(wide), variance.to(wide) * pixels.shape[0])

    @staticmethod
    def of_projection(pixels: Tensor, weight: Tensor) -> Statistics:
        """Statistics of `pixels @ weight.T` from the mean and the covariance of (n, Cin) pixels.

        mean' = W mean and var' = diag(W cov W^T): exact for a linear map, and cheap where Cin is small.
        """
        wide = accumulator_dtype(pixels.device)
        x, w = pixels.to(wide), weight.to(wide)
        mean = x.mean(dim=0)
        x = x - mean
        return Statistics(pixels.shape[0], w @ mean, ((w @ (x.T @ x)) * w).sum(dim=1))

    @staticmethod
    def merge(parts: Sequence[Statistics]) -> Statistics:
        """The statistics of all pixels of the parts together (Chan, Golub and LeVeque 1983)."""
        first = parts[0].mean
        counts = torch.tensor([p.count for p in parts], dtype=first.dtype, device=first.device)[:, None]
        means = torch.stack([p.mean for p in parts])
        count = sum(p.count for p in parts)
        mean = (counts * means).sum(dim=0) / count
        deviation = torch.stack([p.deviation for p in parts]) + counts * (means - mean).square()
        return Statistics(count, mean, deviation.sum(dim=0))


@dataclass(frozen=True)
class Affine:
    """x -> x * scale + shift per channel: what a group normalisation is once its statistics are known."""

    scale: Tensor  # (D,)
    shift: Tensor  # (D,)

    @staticmethod
    def of(statistics: Statistics, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Affine:
        """The normalisation over groups of neighbouring channels with these channel statistics."""
        means = statistics.mean.view(GROUPS, -1)
        mean = means.mean(dim=1, keepdim=True)
        within = (statistics.deviation / statistics.count).view(GROUPS, -1)
        variance = (within + (means - mean).square()).mean(dim=1, keepdim=True)
        scale = weight.to(mean.dtype).view(GROUPS, -1) * torch.rsqrt(variance + EPS)
        shift = bias.to(mean.dtype).view(GROUPS, -1) - mean * scale
        return Affine(scale.flatten().to(dtype), shift.flatten().to(dtype))


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
