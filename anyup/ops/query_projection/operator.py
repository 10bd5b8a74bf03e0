"""The query projection as one opaque operator, so that no tracer ever meets a backend's bands."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, Operation, from_schema, to_schema, wants_gradient
from anyup.ops.query_projection import arguments as problems
from anyup.ops.query_projection.arguments import ProjectionParameters
from anyup.ops.registration import register

OPERATION = Operation(
    "query_projection",
    {
        "triton": lambda: importlib.import_module("anyup.ops.query_projection.fused"),
        "torch": lambda: importlib.import_module("anyup.ops.query_projection.eager"),
        "reference": lambda: importlib.import_module("anyup.ops.query_projection.reference"),
    },
)


def project_queries(encoded: Tensor, parameters: ProjectionParameters, *, backend: Backend = None) -> Tensor:
    """Turn the encoded image into queries: 3x3 convolution (zero padding), RMS normalisation, projection.

    Args:
        encoded: (B, H, W, D).
        parameters: in the dtype of `encoded`.
        backend: None, a name, or a sequence of names (see `anyup.ops.dispatch`).

    Returns:
        (B, H, W, D), contiguous, in the dtype of `encoded`.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can; lists every reason.
    """
    problems.check(encoded, parameters)
    needs_gradient = wants_gradient(encoded, *parameters)
    return _forward(encoded, *parameters, to_schema(backend), needs_gradient)


def explain_backends(encoded: Tensor, parameters: ProjectionParameters, *, backend: Backend = None) -> Explanation:
    """Which backend `project_queries` would choose for these arguments, and why not the others."""
    problems.check(encoded, parameters)
    needs_gradient = wants_gradient(encoded, *parameters)
    return OPERATION.explain(problems.describe(encoded, needs_gradient), backend)


def _run_forward(
    encoded: Tensor,
    convolution: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    backend: str,
    needs_gradient: bool,
) -> Tensor:
    problem = problems.describe(encoded, needs_gradient)
    parameters = ProjectionParameters(convolution, norm, weight, bias)
    return OPERATION.run("forward", problem, from_schema(backend), encoded, parameters).contiguous()


def _fake_forward(encoded, convolution, norm, weight, bias, backend, needs_gradient):  # type: ignore[no-untyped-def]
    return torch.empty_like(encoded, memory_format=torch.contiguous_format)


def _run_backward(
    grad: Tensor,
    encoded: Tensor,
    convolution: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = problems.describe(encoded, True)
    parameters = ProjectionParameters(convolution, norm, weight, bias)
    grad_encoded, grads = OPERATION.run("backward", problem, from_schema(backend), grad, encoded, parameters)
    return tuple(g.contiguous() for g in (grad_encoded, *grads))


def _fake_backward(grad, *arguments):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in arguments[:-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.backend), None, None)


def _flops(encoded, convolution, _norm, weight, *_):  # type: ignore[no-untyped-def]
    return 2 * math.prod(encoded[:3]) * (math.prod(convolution) + math.prod(weight))


def _flops_backward(_grad, *arguments):  # type: ignore[no-untyped-def]
    return 2 * _flops(*arguments)


_forward = register(
    "query_projection", _run_forward, _fake_forward, flops=_flops, gradient=_gradient, setup_context=_setup_context
)
_backward = register("query_projection_backward", _run_backward, _fake_backward, flops=_flops_backward)
