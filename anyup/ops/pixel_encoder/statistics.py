"""Mergeable channel statistics, and the affine map that a group normalisation becomes once they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.arguments import EPS, GROUPS
from anyup.ops.precision import accumulator_dtype

SUBSETS = 16
"""Pixels of a tile that are no multiple of this take one more pass."""

_TILES_AT_ONCE = 256  # whose sets are widened

# Means of up to so many deviations lose nothing that matters when scale and shift are applied at once.
_LARGEST_OFFSET = 4.0


class TileStatistics:
    """Mean and variance of each channel over each of some sets of pixels, several sets for each tile.

    Tiles leave them in one block of memory: small tensors that live until the last tile would lie between the buffers
    of one tile and the next, and cut up what the allocator could use again. And they leave no more than this: making
    statistics of it takes many small operations, for which worker threads would wait for each other at Python's
    interpreter lock. It is done once for all tiles.

    Args:
        tiles: how many there will be.
        dim: channels, those of all images together.
        dtype: of the pixels, float32 or float64.
        device: where they are.
    """

    def __init__(self, tiles: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._subsets = SUBSETS if device.type == "cpu" else 0
        # Zeros, because a set of no pixels counts with a weight of zero.
        self._means, self._variances = torch.zeros(2, tiles, self._subsets + 1, dim, dtype=dtype, device=device)
        self._counts = [[0] * (self._subsets + 1) for _ in range(tiles)]

    def take(self, tile: int, pixels: Tensor) -> None:
        """Of a tile's contiguous pixels (n, D), or (k, n, D) of k images, by two passes over them: no cancellation."""
        images = pixels.view(-1, *pixels.shape[-2:])
        _, count, dim = images.shape
        means, variances, counts = self._means[tile], self._variances[tile], self._counts[tile]
        even = count - count % SUBSETS if self._subsets else 0
        if even:
            # var_mean over pixels is not vectorised on a CPU. This is, but sums one value after the other, so that its
            # error grows with their number: take interleaved subsets as if they were channels.
            for index, image in enumerate(images):
                subsets = image[:even].view(1, 1, even // SUBSETS, SUBSETS * dim).permute(0, 3, 1, 2)
                mean, variance = torch.ops.aten.batch_norm_update_stats(subsets, None, None, 0.0)
                own = slice(index * dim, (index + 1) * dim)
                means[:SUBSETS, own], variances[:SUBSETS, own] = mean.view(SUBSETS, dim), variance.view(SUBSETS, dim)
            counts[:SUBSETS] = [even // SUBSETS] * SUBSETS
        if even < count:
            variance, mean = torch.var_mean(images[:, even:], dim=1, correction=0)
            variances[-1], means[-1] = variance.flatten(), mean.flatten()
            counts[-1] = count - even

    def statistics(self) -> Statistics:
        """Of all pixels together."""
        some = range(0, len(self._counts), _TILES_AT_ONCE)
        return Statistics.merge([self._of(slice(first, first + _TILES_AT_ONCE)) for first in some])

    def _of(self, tiles: slice) -> Statistics:
        wide = accumulator_dtype(self._means.device)
        means, variances = (t[tiles].to(wide).flatten(0, 1) for t in (self._means, self._variances))
        counts = [count for tile in self._counts[tiles] for count in tile]
        return Statistics.joined(counts, means, variances.mul_(_column(counts, variances)))


@dataclass(frozen=True)
class Statistics:
    """Count, mean (D,) and summed squared deviation from the mean (D,) of each channel over some pixels.

    Or of each group of channels, as if it were one channel: (8,), the deviation divided by the group's channels.

    Kept in float64 (float32 where the device has no float64), so that merging many bands loses nothing.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    def of_groups(self, images: int = 1) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of neighbouring channels, of so many images: (groups of all, 1)."""
        means = self.mean.view(images * GROUPS, -1)
        mean = means.mean(dim=1, keepdim=True)
        within = (self.deviation / self.count).view_as(means)
        return mean, (within + (means - mean).square()).mean(dim=1, keepdim=True)

    def as_groups(self) -> Statistics:
        """The statistics of each group of channels."""
        mean, variance = self.of_groups()
        return Statistics(self.count, mean[:, 0], variance[:, 0] * self.count)

    @staticmethod
    def merge(several: Sequence[Statistics]) -> Statistics:
        """The statistics of all pixels together."""
        means, deviations = (torch.stack(t) for t in zip(*((s.mean, s.deviation) for s in several), strict=True))
        return Statistics.joined([s.count for s in several], means, deviations)

    @staticmethod
    def joined(counts: Sequence[int], means: Tensor, deviations: Tensor) -> Statistics:
        """Of several, stacked as (several, D), with `counts` pixels each (Chan, Golub and LeVeque 1983)."""
        if len(counts) == 1:
            return Statistics(counts[0], means[0], deviations[0])
        return Statistics.weighted(sum(counts), _column(counts, means), means, deviations)

    @staticmethod
    def weighted(count: int, each: Tensor, means: Tensor, deviations: Tensor) -> Statistics:
        """The same of `count` pixels in all, with those of each as a tensor (several, 1), or (several, D)."""
        mean = (each * means).sum(dim=0) / count
        return Statistics(count, mean, (deviations + each * (means - mean).square()).sum(dim=0))


def _column(counts: Sequence[int], like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return torch.tensor(counts, dtype=like.dtype, device="cpu")[:, None]
    # Numbers of the host's would be copied, which waits for the device; what fills memory takes one as its argument.
    column, first = like.new_empty(len(counts), 1), 0
    for count, run in groupby(counts):
        stop = first + len(list(run))
        column[first:stop].fill_(count)
        first = stop
    return column


@dataclass(frozen=True)
class Affine:
    """x -> (x - center) * scale + shift per channel: a group normalisation whose statistics are known."""

    scale: Tensor  # (D,)
    shift: Tensor  # (D,)
    center: Tensor | None  # (D,); None: 0

    @cached_property
    def stacked(self) -> Tensor:
        """Centre, scale and shift: (3, D)."""
        center = torch.zeros_like(self.scale) if self.center is None else self.center
        return torch.stack((center, self.scale, self.shift))

    @staticmethod
    def of(statistics: Statistics, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Affine:
        """The normalisation over groups of neighbouring channels with these channel statistics."""
        mean, variance = statistics.of_groups()
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
