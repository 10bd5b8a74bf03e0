"""The feature distance as one opaque operator: forward one pass over both maps, backward one more."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, Operation, from_schema, to_schema, wants_gradient
from anyup.ops.feature_distance import arguments as problems
from anyup.ops.precision import working_dtype
from anyup.ops.registration import register

OPERATION = Operation(
    "feature_distance",
    {
        "triton": lambda: importlib.import_module("anyup.ops.feature_distance.fused"),
        "torch": lambda: importlib.import_module("anyup.ops.feature_distance.eager"),
        "reference": lambda: importlib.import_module("anyup.ops.feature_distance.reference"),
    },
)


def feature_distance(
    prediction: Tensor, target: Tensor, places: Tensor | None = None, *, backend: Backend = None
) -> tuple[Tensor, Tensor]:
    """How far features are from true ones: 1 - cosine similarity, and the min-max normalised squared error.

    For a pixel, the first is that of its channels. The second is the mean over the channels of ((p - t) / span)^2,
    where the span is the target's largest channel less its smallest: both are normalised by the target's range, and
    its minimum cancels.

    Args:
        prediction: (B, C, H, W).
        target: (B, C, H, W); with `places` windows of the map, (B, K, C, h, w). Any floating dtype; no gradient.
        places: (B, K, 2) int64, the first row and column of each window; they may overlap.
        backend: None, a name, or a sequence of names (see `anyup.ops.dispatch`).

    Returns:
        Both as means over an image's windows and pixels, each (B,), in float32 (float64 for a prediction in float64).

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can; lists every reason.
    """
    problems.check(prediction, target, places)
    target = target[:, None] if places is None else target
    means, _ = _forward(prediction, target, places, to_schema(backend), wants_gradient(prediction))
    cosine, error = means.unbind(1)  # whose gradient is one kernel, where those of slices are three
    return cosine, error


def explain_backends(
    prediction: Tensor, target: Tensor, places: Tensor | None = None, *, backend: Backend = None
) -> Explanation:
    """Which backend `feature_distance` would choose for these arguments, and why not the others."""
    problems.check(prediction, target, places)
    target = target[:, None] if places is None else target
    return OPERATION.explain(problems.describe(prediction, target, wants_gradient(prediction)), backend)


def _run_forward(
    prediction: Tensor, target: Tensor, places: Tensor | None, backend: str, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The means (B, 2), and for a gradient (B, K, h, w, 3) of each pixel: its factors of t and p in that of the cosine,
    1 / (|p| |t|) and cosine / |p|^2, and that of p - t in half of that of the error, 1 / (C span^2).
    """
    problem = problems.describe(prediction, target, needs_gradient)
    arguments = (prediction, target, places)
    return OPERATION.run("forward", problem, from_schema(backend), *arguments, save_statistics=needs_gradient)


def _fake_forward(prediction, target, places, backend, needs_gradient):  # type: ignore[no-untyped-def]
    batch, windows, _, rows, columns = target.shape
    wide = working_dtype(prediction.dtype)
    shape = (batch, windows, rows, columns, 3) if needs_gradient else (0,)
    return prediction.new_empty(batch, 2, dtype=wide), prediction.new_empty(shape, dtype=wide)


def _run_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, places: Tensor | None, statistics: Tensor, backend: str
) -> Tensor:
    problem = problems.describe(prediction, target, True)
    arguments = (grad, prediction, target, places, statistics)
    found = OPERATION.run("backward", problem, from_schema(backend), *arguments)
    # Channels last, as the upsampler's maps are.
    return found.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _fake_backward(grad, prediction, target, places, statistics, backend):  # type: ignore[no-untyped-def]
    batch, channels, height, width = prediction.shape
    return prediction.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, places, ctx.backend, _ = inputs
    ctx.save_for_backward(prediction, target, places, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


def _flops(*_):  # type: ignore[no-untyped-def]
    return 0  # sums over the channels, no products of matrices


_forward = register(
    "feature_distance", _run_forward, _fake_forward, flops=_flops, gradient=_gradient, setup_context=_setup_context
)
_backward = register("feature_distance_backward", _run_backward, _fake_backward, flops=_flops)
