"""Mergeable channel statistics, and the affine map that a group normalisation becomes once they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.problem import EPS, GROUPS

_SUBSETS = 16


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
        """Statistics of (n, D) contiguous float32 or float64 pixels, by two passes over them: no cancellation."""
        count, dim = pixels.shape
        wide = accumulator_dtype(pixels.device)
        even = count - count % _SUBSETS
        if pixels.device.type != "cpu" or not even:
            variance, mean = torch.var_mean(pixels, dim=0, correction=0)
            return Statistics(count, mean.to(wide), variance.to(wide) * count)
        # var_mean over the first dimension is not vectorised on a CPU. This is, but sums one value after the other, so
        # that its error grows with their number: take interleaved subsets as if they were channels.
        image = pixels[:even].view(1, 1, even // _SUBSETS, _SUBSETS * dim).permute(0, 3, 1, 2)
        means, variances = torch.ops.aten.batch_norm_update_stats(image, None, None, 0.0)
        means, variances = (t.view(_SUBSETS, dim).to(wide) for t in (means, variances))
        each = even // _SUBSETS
        subsets = Statistics._of_parts(even, each, means, variances * each)
        if even == count:
            return subsets
        variance, mean = torch.var_mean(pixels[even:], dim=0, correction=0)
        rest = Statistics(count - even, mean.to(wide), variance.to(wide) * (count - even))
        return Statistics.merge([subsets, rest])

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
        """The statistics of all pixels of the parts together."""
        first = parts[0].mean
        counts = torch.tensor([p.count for p in parts], dtype=first.dtype, device=first.device)[:, None]
        means, deviations = (torch.stack(t) for t in zip(*((p.mean, p.deviation) for p in parts), strict=True))
        return Statistics._of_parts(sum(p.count for p in parts), counts, means, deviations)

    @staticmethod
    def _of_parts(count: int, counts: Tensor | int, means: Tensor, deviations: Tensor) -> Statistics:
        """Parts stacked as (parts, D), with `counts` pixels each, `count` in all (Chan, Golub and LeVeque 1983)."""
        mean = (counts * means).sum(dim=0) / count
        return Statistics(count, mean, (deviations + counts * (means - mean).square()).sum(dim=0))


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
        scale = (weight.to(mean.dtype).view(GROUPS, -1) * torch.rsqrt(variance + EPS)).to(dtype)
        # From the rounded scale, so that its rounding multiplies x - mean and not x, which may be much larger.
        shift = bias.to(mean.dtype).view(GROUPS, -1) - mean * scale.to(mean.dtype)
        return Affine(scale.flatten(), shift.flatten().to(dtype))


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
