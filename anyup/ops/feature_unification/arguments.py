"""The problem that a call of the feature unification poses, and the checks of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.precision import dtype_name


@dataclass(frozen=True)
class FeatureUnificationProblem:
    """Everything a backend needs to know to say whether it can run a call."""

    batch: int
    grid_size: tuple[int, int]
    channels: int
    filters: int
    kernel_size: int
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool

    def __str__(self) -> str:
        h, w = self.grid_size
        return (
            f"{h} x {w}, batch {self.batch}, C = {self.channels}, {self.filters} filters of "
            f"{self.kernel_size} x {self.kernel_size}, {dtype_name(self.dtype)}, {self.device.type}"
        )


def describe(features: Tensor, basis: Tensor, needs_gradient: bool) -> FeatureUnificationProblem:
    """The problem that these (checked) tensors pose."""
    batch, channels, h, w = features.shape
    return FeatureUnificationProblem(
        batch=batch,
        grid_size=(h, w),
        channels=channels,
        filters=basis.shape[0],
        kernel_size=basis.shape[2],
        dtype=features.dtype,
        device=features.device,
        needs_gradient=needs_gradient,
    )


def check(features: Tensor, basis: Tensor) -> None:
    """Raise a ValueError or TypeError that names the argument unless the call makes sense."""
    if features.dim() != 4:
        raise ValueError(f"features: expected (B, C, h, w), got shape {tuple(features.shape)}")
    if not features.dtype.is_floating_point:
        raise TypeError(f"features: expected a floating-point tensor, got {features.dtype}")
    if basis.dim() != 4 or basis.shape[1] != 1 or basis.shape[2] != basis.shape[3] or basis.shape[2] % 2 == 0:
        raise ValueError(f"basis: expected (M, 1, s, s) with s odd, got shape {tuple(basis.shape)}")
    if basis.dtype != features.dtype or basis.device != features.device:
        raise ValueError(
            f"basis: expected {features.dtype} on {features.device} like the features, "
            f"got {basis.dtype} on {basis.device}"
        )
