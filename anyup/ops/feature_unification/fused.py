"""Feature unification in Triton kernels: a position's softmaxes a block at a time, nothing of C*M values stored."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.cuts import run_first
from anyup.ops.feature_unification.problem import FeatureUnificationProblem
from anyup.ops.kernel_device import device_reasons, dot_precision, installed, interprets, target

_HALF = (torch.float16, torch.bfloat16)
_MOST_TAPS = 128


def unsupported(problem: FeatureUnificationProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    from anyup.kernels.feature_unification_config import MOST_FILTERS

    if problem.dtype == torch.float64:
        reasons.append("features are float64, the kernels compute in float32")
    elif problem.dtype == torch.bfloat16 and interprets():
        reasons.append("features are bfloat16, which Triton's interpreter multiplies wrongly")
    if problem.filters > MOST_FILTERS:
        reasons.append(f"{problem.filters} filters, at most {MOST_FILTERS} (a softmax over them stays in registers)")
    if problem.kernel_size**2 > _MOST_TAPS:
        size = problem.kernel_size
        reasons.append(f"filters of {size} x {size} taps, at most {_MOST_TAPS} taps (a patch stays on the chip)")
    if problem.filters * problem.channels >= 2**31:
        reasons.append(f"{problem.filters} filters of {problem.channels} channels, together fewer than 2^31 maps")
    return reasons


def discouraged(problem: FeatureUnificationProblem) -> list[str]:
    """Why the kernels are not chosen unless asked for by name, although they can run a problem."""
    return ["Triton's interpreter is for tests, and slow"] if interprets() else []


def forward(features: Tensor, basis: Tensor) -> Tensor:
    """(B, C, h, w), (M, 1, s, s) -> (B, M, h, w); float32 inside for half precision.

    Beside the result it allocates a copy of the features, bordered by zeros.
    """
    from anyup.kernels.feature_unification_config import forward_configs
    from anyup.kernels.feature_unification_forward import plan_forward
    from anyup.kernels.feature_unification_patches import arrange

    batch, channels, height, width = features.shape
    filters, _, size, _ = basis.shape
    out = features.new_empty(batch, filters, height, width)
    known = target(features.device)
    half = features.dtype in _HALF
    kernel = ("feature_unification_forward", features.device, features.dtype, filters, size, channels % filters == 0)
    basis = basis.contiguous()
    arranged = run_first(
        lambda _: arrange(features, filters=filters, kernel_size=size), [None], kernel=("arrange", *kernel)
    )
    run_first(
        lambda config: plan_forward(
            arranged, basis, out, channels=channels, precision=dot_precision(), config=config
        )(),
        forward_configs(filters, channels, target=known, half=half),
        kernel=kernel,
    )
    return out
