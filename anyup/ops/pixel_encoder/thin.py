"""A first projection of few channels, which is recomputed wherever it is needed instead of being stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyup.ops.pixel_encoder.statistics import Affine, Statistics
from anyup.ops.precision import accumulator_dtype

MOST_CHANNELS = 16
"""Beyond this, reading a stored map is cheaper."""

Moments = tuple[Tensor, Tensor]
"""Sum (Cin,) and sum of outer products (Cin, Cin) of centred pixels."""


class ThinProjection:
    """W x of (n, Cin) pixels x for a (D, Cin) weight W.

    The pixels are centred first: what is then computed from them loses nothing to a mean that is large beside the
    deviation, and W x is the projection of the centred pixels and a constant.
    """

    def __init__(self, pixels: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self._wide = accumulator_dtype(pixels.device)
        self._weight = weight.to(self._wide)
        self._mean = pixels.mean(dim=0, dtype=self._wide).to(dtype)
        self._centered = pixels.to(dtype) - self._mean
        self._transposed = weight.to(dtype).T
        self._dtype = dtype

    @property
    def offset(self) -> Tensor:
        """What `add` leaves out: (D,)."""
        return self._offset.to(self._dtype)

    @property
    def _offset(self) -> Tensor:
        return self._weight @ self._mean.to(self._wide)

    def moments(self, tile: slice) -> Moments:
        """What `statistics` takes, of a tile."""
        x = self._centered[tile].to(self._wide)
        return x.sum(dim=0), x.T @ x

    def statistics(self, moments: Sequence[Moments]) -> Statistics:
        """Statistics of the projected pixels from all tiles' moments: mean' = W mean and var' = diag(W cov W^T)."""
        count = self._centered.shape[0]
        sums, products = (torch.stack(t).sum(dim=0) for t in zip(*moments, strict=True))
        # The mean of what was centred is zero but for rounding: nothing cancels.
        covariance = products - torch.outer(sums, sums) / count
        mean = self._weight @ (sums / count) + self._offset
        return Statistics(count, mean, ((self._weight @ covariance) * self._weight).sum(dim=1))

    def normalised(self, norm: Affine) -> tuple[Tensor, Tensor]:
        """What `project` takes to apply a normalisation at once: a scale and a shift are linear too."""
        scale, shift = norm.scale.to(self._wide), norm.shift.to(self._wide)
        offset = self._offset if norm.center is None else self._offset - norm.center.to(self._wide)
        weight = self._weight * scale[:, None]
        return weight.T.to(self._dtype).contiguous(), (offset * scale + shift).to(self._dtype)

    def project(self, tile: slice, normalised: tuple[Tensor, Tensor]) -> Tensor:
        """A tile, projected and normalised: (n, D)."""
        weight, bias = normalised
        return torch.addmm(bias, self._centered[tile], weight)

    def add(self, tile: slice, result: Tensor) -> Tensor:
        """Add a tile's projection, less `offset`, to `result` in place."""
        return result.addmm_(self._centered[tile], self._transposed)
