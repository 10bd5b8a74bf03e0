"""Mergeable channel statistics, and the affine map that a group normalisation becomes once they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.problem import EPS, GROUPS
from anyup.ops.precision import accumulator_dtype

_SUBSETS = 16

# Means of up to so many deviations lose nothing that matters when scale and shift are applied at once.
_LARGEST_OFFSET = 4.0


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
    """x -> (x - center) * scale + shift per channel: a group normalisation whose statistics are known."""

    scale: Tensor  # (D,)
    shift: Tensor  # (D,)
    center: Tensor | None  # (D,); None: 0

    @staticmethod
    def of(statistics: Statistics, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Affine:
        """The normalisation over groups of neighbouring channels with these channel statistics."""
        means = statistics.mean.view(GROUPS, -1)
        mean = means.mean(dim=1, keepdim=True)
        within = (statistics.deviation / statistics.count).view(GROUPS, -1)
        variance = (within + (means - mean).square()).mean(dim=1, keepdim=True)
        scale = (weight.to(mean.dtype).view(GROUPS, -1) * torch.rsqrt(variance + EPS)).to(dtype)
        offset = mean * scale.to(mean.dtype)
        # x * scale - offset cancels where the mean is large beside the deviation; subtracting first does not, but is
        # one more pass. Whether it must be is asked on a CPU only; elsewhere asking would wait for the device.
        center = None
        if mean.device.type != "cpu" or bool(offset.abs().max() > _LARGEST_OFFSET):
            center = mean.to(dtype)
            offset = (mean - center.to(mean.dtype)) * scale.to(mean.dtype)
            center = center.expand_as(scale).flatten()
        # From the rounded scale and centre, so that their rounding does not multiply x itself.
        shift = (bias.to(mean.dtype).view(GROUPS, -1) - offset).to(dtype)
        return Affine(scale.flatten(), shift.flatten(), center)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise (..., D) pixels."""
        return torch.addcmul(self.shift, x if self.center is None else x - self.center, self.scale)
