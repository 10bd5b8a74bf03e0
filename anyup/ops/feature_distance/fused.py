"""The feature distance in Triton kernels: each map is read once forward, and once for the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.feature_distance.arguments import NORM_EPS, SPAN_EPS, FeatureDistanceProblem
from anyup.ops.kernel_device import device_reasons, discouraged, dtype_reasons, installed

__all__ = ["backward", "discouraged", "forward", "unsupported"]


def unsupported(problem: FeatureDistanceProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if installed():
        for what, dtype in (("the prediction is", problem.dtype), ("the target is", problem.target_dtype)):
            reasons += dtype_reasons(what, dtype)
    return reasons


def forward(
    prediction: Tensor, target: Tensor, places: Tensor | None, *, save_statistics: bool
) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), (B, K, C, h, w), (B, K, 2) -> (B, 2), and what the backward pass takes; all sums in float32."""
    from anyup.kernels.feature_distance import CONFIGS, DistanceConfig, plan_forward

    batch, windows, _, rows, columns = target.shape
    places = None if places is None else places.contiguous()
    shape = (batch, windows, rows, columns, 3) if save_statistics else (0,)
    statistics = prediction.new_empty(shape, dtype=torch.float32)

    def run(config: DistanceConfig) -> Tensor:
        parts = statistics.new_empty(batch, windows, config.tiles(rows * columns), 2)
        kept = statistics if save_statistics else None
        plan_forward(prediction, target, places, parts, kept, norm_eps=NORM_EPS, span_eps=SPAN_EPS, config=config)()
        return parts

    return run_first(run, CONFIGS, kernel=_kernel("forward", prediction, target, places)).sum(dim=(1, 2)), statistics


def backward(grad: Tensor, prediction: Tensor, target: Tensor, places: Tensor | None, statistics: Tensor) -> Tensor:
    """The gradient of the prediction, channels last."""
    from anyup.kernels.feature_distance import CONFIGS, plan_backward

    batch, channels, height, width = prediction.shape
    places = None if places is None else places.contiguous()
    out = prediction.new_empty(batch, height, width, channels)
    run_first(
        lambda config: plan_backward(grad.contiguous(), prediction, target, places, statistics, out, config=config)(),
        CONFIGS,
        kernel=_kernel("backward", prediction, target, places),
    )
    return out.permute(0, 3, 1, 2)


def _kernel(name: str, prediction: Tensor, target: Tensor, places: Tensor | None) -> tuple[object, ...]:
    """What a kernel is compiled for."""
    return "feature_distance", name, prediction.device, prediction.dtype, target.dtype, places is None
