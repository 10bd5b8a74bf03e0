"""What a call of the feature distance asks for, and the checks of what the caller passed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.precision import FLOATING, dtype_name

NORM_EPS = 1e-8
"""The least norm that a cosine divides by."""

SPAN_EPS = 1e-6
"""What is added to a target's range."""


@dataclass(frozen=True)
class FeatureDistanceProblem:
    """Everything a backend needs to know to say whether it can run a call."""

    batch: int
    size: tuple[int, int]
    windows: int
    window_size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    target_dtype: torch.dtype
    device: torch.device
    needs_gradient: bool

    def __str__(self) -> str:
        maps, windows = (" x ".join(map(str, size)) for size in (self.size, self.window_size))
        return (
            f"{maps}, {self.windows} windows of {windows}, batch {self.batch}, {self.channels} channels, "
            f"{dtype_name(self.dtype)}, {self.device.type}"
        )


def describe(prediction: Tensor, target: Tensor, needs_gradient: bool) -> FeatureDistanceProblem:
    """The problem that these (checked) tensors pose."""
    batch, channels, height, width = prediction.shape
    _, windows, _, rows, columns = target.shape
    return FeatureDistanceProblem(
        batch,
        (height, width),
        windows,
        (rows, columns),
        channels,
        prediction.dtype,
        target.dtype,
        prediction.device,
        needs_gradient,
    )


def check(prediction: Tensor, target: Tensor, places: Tensor | None) -> None:
    """Raise a ValueError or TypeError that names the argument unless the call makes sense.

    Where places lie is seen on a CPU alone: any other device would have to be waited for.
    """
    for name, tensor in (("prediction", prediction), ("target", target)):
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
    if prediction.dim() != 4:
        raise ValueError(f"prediction: expected (B, C, H, W), got shape {tuple(prediction.shape)}")
    batch, channels, height, width = prediction.shape
    if places is None:
        expected = f"{tuple(prediction.shape)} like the prediction"
        fits = target.shape == prediction.shape
    else:
        expected = f"({batch}, K, {channels}, h, w) with h up to {height} and w up to {width}"
        fits = target.dim() == 5 and (target.shape[0], target.shape[2]) == (batch, channels)
        fits = fits and target.shape[3] <= height and target.shape[4] <= width
    if not fits:
        raise ValueError(f"target: expected {expected}, got shape {tuple(target.shape)}")
    if not target.numel() and batch:
        raise ValueError(f"target: expected features to compare, got shape {tuple(target.shape)}")
    if target.requires_grad:
        raise ValueError("target: expected true features, through which no gradient flows; use target.detach()")
    for name, other in (("target", target), ("places", places)):
        if other is not None and other.device != prediction.device:
            raise ValueError(f"{name}: expected to be on {prediction.device} like the prediction, got {other.device}")
    if places is None:
        return
    if places.dtype != torch.int64:
        raise TypeError(f"places: expected int64, got {places.dtype}")
    if places.shape != (*target.shape[:2], 2):
        raise ValueError(f"places: expected ({batch}, {target.shape[1]}, 2), got shape {tuple(places.shape)}")
    if places.device.type == "cpu" and not torch.compiler.is_compiling() and places.numel():
        last = torch.tensor((height - target.shape[3], width - target.shape[4]))
        if bool((places < 0).any() | (places > last).any()):
            raise ValueError(f"places: expected windows within {height} x {width} pixels, got {places.tolist()}")
