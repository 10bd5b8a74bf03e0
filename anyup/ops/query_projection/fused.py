"""Query projection in one Triton kernel: the map is read once, the queries are written once. For inference."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.dispatch import WITHOUT_GRADIENT
from anyup.ops.kernel_device import device_reasons, discouraged, dot_precision, dtype_reasons, installed, target
from anyup.ops.query_projection.arguments import ProjectionParameters, QueryProjectionProblem

__all__ = ["discouraged", "forward", "unsupported"]

_HALF = (torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256


def unsupported(problem: QueryProjectionProblem) -> list[str]:
    """Why the kernel cannot run a problem; empty: it can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    reasons += dtype_reasons("the encoded image is", problem.dtype)
    if problem.dim > _MOST_CHANNELS:
        reasons.append(f"{problem.dim} channels, at most {_MOST_CHANNELS} (a pixel's stay in registers)")
    if problem.needs_gradient:
        reasons.append(f"a gradient is wanted, the kernel has no backward pass: {WITHOUT_GRADIENT}")
    return reasons


def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D); sums and normalisation in float32."""
    from anyup.kernels.query_projection_forward import forward_configs, plan_forward

    dim = encoded.shape[3]
    out = torch.empty_like(encoded, memory_format=torch.contiguous_format)
    # Input channels before output channels, so that a product's operand is read contiguously.
    convolution = parameters.convolution.permute(2, 3, 1, 0).reshape(9, dim, dim).contiguous()
    norm, weight, bias = (p.contiguous() for p in parameters[1:])
    run_first(
        lambda config: plan_forward(
            encoded, convolution, norm, weight, bias, out,
            eps=torch.finfo(torch.float32).eps, precision=dot_precision(), config=config,
        )(),
        forward_configs(dim, target=target(encoded.device), half=encoded.dtype in _HALF),
        kernel=("query_projection", encoded.device, encoded.dtype, dim, dot_precision()),
    )  # fmt: skip
    return out
