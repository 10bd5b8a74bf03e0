"""How far known maps are from true ones; features have `anyup.ops.feature_distance`."""

from __future__ import annotations

from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: (B, ..., C, H, W) -> (B,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
