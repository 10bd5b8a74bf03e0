"""Query projection in Triton kernels: forward the map is read once and the queries are written once."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.kernel_device import (
    device_reasons,
    discouraged,
    dot_precision,
    dtype_reasons,
    installed,
    multiprocessors,
    target,
)
from anyup.ops.precision import converted
from anyup.ops.query_projection.arguments import ProjectionParameters, QueryProjectionProblem

__all__ = ["backward", "discouraged", "forward", "unsupported"]

_HALF = (torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256
_EPS = torch.finfo(torch.float32).eps


def unsupported(problem: QueryProjectionProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    reasons += dtype_reasons("the encoded image is", problem.dtype)
    if problem.dim > _MOST_CHANNELS:
        reasons.append(f"{problem.dim} channels, at most {_MOST_CHANNELS} (a pixel's stay in registers)")
    return reasons


def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D); sums and normalisation in float32."""
    from anyup.kernels.products import in_float16
    from anyup.kernels.query_projection_forward import forward_configs, plan_forward

    dim, half, card = encoded.shape[3], encoded.dtype in _HALF, target(encoded.device)
    precision = dot_precision() if half else in_float16(dot_precision(), card)
    out = torch.empty_like(encoded, memory_format=torch.contiguous_format)
    convolution = _arranged(parameters.convolution)
    norm, weight, bias = (p.contiguous() for p in parameters[1:])
    run_first(
        lambda config: plan_forward(
            encoded, convolution, norm, weight, bias, out, eps=_EPS, precision=precision, config=config
        )(),
        forward_configs(dim, target=card, half=half, precision=precision),
        kernel=_kernel("", encoded),
    )
    return out


def backward(grad: Tensor, encoded: Tensor, parameters: ProjectionParameters) -> tuple[Tensor, ProjectionParameters]:
    """The gradients of the encoded image and the parameters; the convolution is computed again.

    Two maps are made beside the result: the convolved map's gradient, and the normalised map.
    """
    from anyup.kernels.query_projection_backward import pixels_configs, plan_map, plan_pixels
    from anyup.kernels.query_projection_forward import forward_configs

    if not encoded.numel():
        return torch.zeros_like(encoded), ProjectionParameters(*map(torch.zeros_like, parameters))
    dim, dtype, precision = encoded.shape[3], encoded.dtype, dot_precision()
    half = dtype in _HALF
    grad, encoded = grad.contiguous(), encoded.contiguous()
    convolution, norm, weight, _ = parameters
    grad_convolved, normal = torch.empty_like(encoded), torch.empty_like(encoded)
    taps, scale, rows = _arranged(convolution), norm.contiguous(), weight.contiguous()
    run_first(
        lambda config: plan_pixels(
            grad, encoded, taps, scale, rows, grad_convolved, normal, eps=_EPS, precision=precision, config=config
        )(),
        pixels_configs(dim, half=half),
        kernel=_kernel("backward_pixels", encoded),
    )
    products = sums_of_outer_products(grad, normal, 1)[0]
    grad_convolution = sums_of_outer_products(grad_convolved, encoded, 9).view(3, 3, dim, dim).permute(2, 3, 0, 1)
    grad_encoded = normal  # of what it holds nothing is needed any more
    turned = _arranged(convolution.flip(2, 3).transpose(0, 1))
    run_first(
        lambda config: plan_map(grad_convolved, turned, grad_encoded, precision=precision, config=config)(),
        forward_configs(dim, target=target(encoded.device), half=half),
        kernel=_kernel("backward_map", encoded),
    )
    grad_bias = grad.sum(dim=(0, 1, 2), dtype=torch.float32)
    grads = (grad_convolution, (products * weight).sum(dim=0), products * norm, grad_bias)
    return grad_encoded, ProjectionParameters(*converted(grads, dtype))


def sums_of_outer_products(grad: Tensor, values: Tensor, taps: int = 1) -> Tensor:
    """The sums over the pixels of the outer products of a gradient and the values at each tap: (taps, D, D) float32."""
    from anyup.kernels.query_projection_backward import WeightsConfig, plan_weights, weights_configs

    pixels, dim = grad.shape[:3].numel(), grad.shape[3]

    def run(config: WeightsConfig) -> Tensor:
        length = config.run(pixels, dim, taps, multiprocessors(grad.device))
        sums = torch.empty(-(-pixels // length), taps, dim, dim, dtype=torch.float32, device=grad.device)
        plan_weights(grad, values, sums, run=length, precision=dot_precision(), config=config)()
        return sums

    configs = weights_configs(half=grad.dtype in _HALF)
    return run_first(run, configs, kernel=(*_kernel("backward_weights", grad), taps)).sum(dim=0)


def _arranged(convolution: Tensor) -> Tensor:
    """(9, D, D): the map's channels before the result's, so that a product's operand is read contiguously."""
    dim = convolution.shape[0]
    return convolution.permute(2, 3, 1, 0).reshape(9, dim, dim).contiguous()


def _kernel(name: str, encoded: Tensor) -> tuple[object, ...]:
    """What a kernel is compiled for."""
    return "query_projection", name, encoded.device, encoded.dtype, encoded.shape[3], dot_precision()
