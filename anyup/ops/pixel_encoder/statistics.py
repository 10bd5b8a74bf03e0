"""Mergeable channel statistics, and the affine map that a group normalisation becomes once they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.problem import EPS, GROUPS
from anyup.ops.precision import accumulator_dtype

SUBSETS = 16
"""Pixels of a tile that are no multiple of this take one more pass."""

# Means of up to so many deviations lose nothing that matters when scale and shift are applied at once.
_LARGEST_OFFSET = 4.0


@dataclass(frozen=True)
class Part:
    """Mean and variance of each channel over each of some sets of `count` pixels: (sets * D,), as torch returns them.

    What a tile hands over. Making statistics of it takes many small operations, for which worker threads would wait
    for each other at Python's interpreter lock: it is done once for all tiles.
    """

    count: int
    means: Tensor
    variances: Tensor


def parts_of(pixels: Tensor) -> list[Part]:
    """The parts of (n, D) contiguous float32 or float64 pixels, by two passes over them: no cancellation."""
    count, dim = pixels.shape
    even = count - count % SUBSETS
    if pixels.device.type != "cpu" or not even:
        variance, mean = torch.var_mean(pixels, dim=0, correction=0)
        return [Part(count, mean, variance)]
    # var_mean over the first dimension is not vectorised on a CPU. This is, but sums one value after the other, so
    # that its error grows with their number: take interleaved subsets as if they were channels.
    image = pixels[:even].view(1, 1, even // SUBSETS, SUBSETS * dim).permute(0, 3, 1, 2)
    parts = [Part(even // SUBSETS, *torch.ops.aten.batch_norm_update_stats(image, None, None, 0.0))]
    return parts if even == count else parts + parts_of(pixels[even:])


@dataclass(frozen=True)
class Statistics:
    """Count, mean (D,) and summed squared deviation from the mean (D,) of each channel over some pixels.

    Kept in float64 (float32 where the device has no float64), so that merging many bands loses nothing.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(parts: Sequence[Part], dim: int) -> Statistics:
        """The statistics of all pixels of the parts together."""
        wide = accumulator_dtype(parts[0].means.device)
        means = torch.cat([part.means for part in parts]).to(wide).view(-1, dim)
        variances = torch.cat([part.variances for part in parts]).to(wide).view(-1, dim)
        counts = [part.count for part in parts for _ in range(part.means.numel() // dim)]
        return Statistics._merge(counts, means, variances * _column(counts, variances))

    @staticmethod
    def merge(several: Sequence[Statistics]) -> Statistics:
        """The statistics of all pixels together."""
        means, deviations = (torch.stack(t) for t in zip(*((s.mean, s.deviation) for s in several), strict=True))
        return Statistics._merge([s.count for s in several], means, deviations)

    @staticmethod
    def _merge(counts: Sequence[int], means: Tensor, deviations: Tensor) -> Statistics:
        """Stacked as (several, D), with `counts` pixels each (Chan, Golub and LeVeque 1983)."""
        count, each = sum(counts), _column(counts, means)
        mean = (each * means).sum(dim=0) / count
        return Statistics(count, mean, (deviations + each * (means - mean).square()).sum(dim=0))


def _column(counts: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(counts, dtype=like.dtype, device=like.device)[:, None]


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
