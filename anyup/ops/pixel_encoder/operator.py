"""The pixel encoder as one opaque operator, so that no tracer ever meets a backend's tiles."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, Operation, from_schema, to_schema, wants_gradient
from anyup.ops.pixel_encoder import arguments as problems
from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters
from anyup.ops.registration import register

OPERATION = Operation(
    "pixel_encoder",
    {
        "triton": lambda: importlib.import_module("anyup.ops.pixel_encoder.fused"),
        "torch": lambda: importlib.import_module("anyup.ops.pixel_encoder.eager"),
        "reference": lambda: importlib.import_module("anyup.ops.pixel_encoder.reference"),
    },
)


def encode_pixels(
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None = None,
    output_size: tuple[int, int] | None = None,
    backend: Backend = None,
) -> Tensor:
    """Encode each pixel: a projection and two residual blocks with group statistics over the whole map.

    Args:
        pixels: (B, H, W, Cin), any strides.
        parameters: the encoder's weights, in the pixels' dtype.
        frequencies: (2, D): apply the rotary embedding to the result; None: do not.
        output_size: (h, w) to average-pool the result to (adaptively, as torch does); None: (H, W).
        backend: None, a name, or a sequence of names (see `anyup.ops.dispatch`).

    Returns:
        (B, h, w, D), contiguous, in the pixels' dtype.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can; lists every reason.
    """
    problems.check(pixels, parameters, frequencies)
    height, width = output_size or (pixels.shape[1], pixels.shape[2])
    projection, block1, block2 = parameters
    needs_gradient = wants_gradient(pixels, projection, *block1, *block2, frequencies)
    return _forward(
        pixels, projection, *block1, *block2, frequencies, height, width, to_schema(backend), needs_gradient
    )


def explain_backends(
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None = None,
    output_size: tuple[int, int] | None = None,
    backend: Backend = None,
) -> Explanation:
    """Which backend `encode_pixels` would choose for these arguments, and why not the others."""
    problems.check(pixels, parameters, frequencies)
    needs_gradient = wants_gradient(pixels, parameters.projection, *parameters.block1, *parameters.block2, frequencies)
    size = output_size or (pixels.shape[1], pixels.shape[2])
    dim = parameters.block1.weight1.shape[0]
    return OPERATION.explain(problems.describe(pixels, dim, frequencies is not None, size, needs_gradient), backend)


def _run_forward(
    pixels: Tensor,
    projection: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight1: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight2: Tensor,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    weight3: Tensor,
    norm4_weight: Tensor,
    norm4_bias: Tensor,
    weight4: Tensor,
    frequencies: Tensor | None,
    height: int,
    width: int,
    backend: str,
    needs_gradient: bool,
) -> Tensor:
    parameters = EncoderParameters(
        projection,
        BlockParameters(norm1_weight, norm1_bias, weight1, norm2_weight, norm2_bias, weight2),
        BlockParameters(norm3_weight, norm3_bias, weight3, norm4_weight, norm4_bias, weight4),
    )
    size = (height, width)
    problem = problems.describe(pixels, weight1.shape[0], frequencies is not None, size, needs_gradient)
    arguments = {"frequencies": frequencies, "output_size": size}
    return OPERATION.run("forward", problem, from_schema(backend), pixels, parameters, **arguments).contiguous()


def _fake_forward(pixels, *arguments):  # type: ignore[no-untyped-def]
    weight1, height, width = arguments[3], arguments[-4], arguments[-3]
    return pixels.new_empty(pixels.shape[0], height, width, weight1.shape[0])


def _run_backward(
    grad: Tensor,
    pixels: Tensor,
    projection: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight1: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight2: Tensor,
    norm3_weight: Tensor,
    norm3_bias: Tensor,
    weight3: Tensor,
    norm4_weight: Tensor,
    norm4_bias: Tensor,
    weight4: Tensor,
    frequencies: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors that are there, in the schema's order (absent ones are left out)."""
    parameters = EncoderParameters(
        projection,
        BlockParameters(norm1_weight, norm1_bias, weight1, norm2_weight, norm2_bias, weight2),
        BlockParameters(norm3_weight, norm3_bias, weight3, norm4_weight, norm4_bias, weight4),
    )
    size = (grad.shape[1], grad.shape[2])
    problem = problems.describe(pixels, weight1.shape[0], frequencies is not None, size, needs_gradient=True)
    arguments = {"frequencies": frequencies, "output_size": size}
    grad_pixels, grads, grad_frequencies = OPERATION.run(
        "backward", problem, from_schema(backend), grad, pixels, parameters, **arguments
    )
    every = (grad_pixels, grads.projection, *grads.block1, *grads.block2, grad_frequencies)
    return [g.contiguous() for g in every if g is not None]


def _fake_backward(grad, *arguments):  # type: ignore[no-untyped-def]
    tensors = arguments[:-1]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _height, _width, backend, _needs_gradient = inputs
    ctx.backend = backend
    ctx.present = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    grads = iter(_backward(grad, *tensors, ctx.backend))
    return (*(next(grads) if present else None for present in ctx.present), None, None, None, None)


def _flops(pixels, projection, *arguments):  # type: ignore[no-untyped-def]
    weight1, frequencies = arguments[2], arguments[12]
    products = 4 * math.prod(weight1) + (0 if projection is None else math.prod(projection))
    angles = 0 if frequencies is None else 2 * pixels[1] * pixels[2] * math.prod(frequencies)
    return 2 * pixels[0] * pixels[1] * pixels[2] * products + angles


def _flops_backward(_grad, *arguments):  # type: ignore[no-untyped-def]
    without_angles = (*arguments[:14], None)
    # A gradient of the angles' frequencies, none of the coordinates that they multiply.
    return _flops(*arguments) + _flops(*without_angles)


_forward = register(
    "pixel_encoder", _run_forward, _fake_forward, flops=_flops, gradient=_gradient, setup_context=_setup_context
)
_backward = register("pixel_encoder_backward", _run_backward, _fake_backward, flops=_flops_backward)
