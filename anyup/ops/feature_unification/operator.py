"""The feature unification as one opaque operator, so that no tracer ever meets a backend's tiles."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, Operation, from_schema, to_schema, wants_gradient
from anyup.ops.feature_unification import arguments as problems
from anyup.ops.registration import register

OPERATION = Operation(
    "feature_unification",
    {
        "triton": lambda: importlib.import_module("anyup.ops.feature_unification.fused"),
        "torch": lambda: importlib.import_module("anyup.ops.feature_unification.eager"),
        "reference": lambda: importlib.import_module("anyup.ops.feature_unification.reference"),
    },
)


def unify_features(
    features: Tensor, basis: Tensor, *, out_dtype: torch.dtype | None = None, backend: Backend = None
) -> Tensor:
    """Bring features of any number of channels to M channels.

    Args:
        features: (B, C, h, w), any C.
        basis: (M, 1, s, s) filters, s odd, in the features' dtype.
        out_dtype: of the result; None: the features'. The values of two positions differ little beside their mean of
            1 / M, so a wider dtype keeps more of the difference.
        backend: None, a name, or a sequence of names (see `anyup.ops.dispatch`).

    Returns:
        (B, M, h, w), contiguous.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can run it; lists every reason.
    """
    problems.check(features, basis)
    needs_gradient = wants_gradient(features, basis)
    return _forward(features, basis, out_dtype or features.dtype, to_schema(backend), needs_gradient)


def explain_backends(features: Tensor, basis: Tensor, *, backend: Backend = None) -> Explanation:
    """Which backend `unify_features` would choose for these arguments, and why not the others."""
    problems.check(features, basis)
    needs_gradient = wants_gradient(features, basis)
    return OPERATION.explain(problems.describe(features, basis, needs_gradient), backend)


def _run_forward(features: Tensor, basis: Tensor, out_dtype: torch.dtype, backend: str, needs_gradient: bool) -> Tensor:
    problem = problems.describe(features, basis, needs_gradient)
    out = OPERATION.run("forward", problem, from_schema(backend), features, basis, out_dtype=out_dtype)
    return out.contiguous()


def _fake_forward(features, basis, out_dtype, backend, needs_gradient):  # type: ignore[no-untyped-def]
    return features.new_empty(features.shape[0], basis.shape[0], *features.shape[2:], dtype=out_dtype)


def _run_backward(grad: Tensor, features: Tensor, basis: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    problem = problems.describe(features, basis, True)
    grads = OPERATION.run("backward", problem, from_schema(backend), grad, features, basis)
    return tuple(g.contiguous() for g in grads)


def _fake_backward(grad, features, basis, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, basis))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, basis, _, ctx.backend, _ = inputs
    ctx.save_for_backward(features, basis)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, basis = ctx.saved_tensors
    return (*_backward(grad.to(features.dtype), features, basis, ctx.backend), None, None, None)


def _flops(features, basis, *_):  # type: ignore[no-untyped-def]
    batch, channels, h, w = features
    filters, taps = basis[0], basis[2] * basis[3]
    return 2 * h * w * taps * (batch * channels * filters + 1)  # the 1 is the count of the taps inside the map


def _flops_backward(_grad, features, basis, *_):  # type: ignore[no-untyped-def]
    return 4 * math.prod(features) * math.prod(basis)


_forward = register(
    "feature_unification",
    _run_forward,
    _fake_forward,
    flops=_flops,
    gradient=_gradient,
    setup_context=_setup_context,
)
_backward = register("feature_unification_backward", _run_backward, _fake_backward, flops=_flops_backward)
