"""Window attention of single pixels, each with its own window's keys, as an operator.

A kernel gives each point a program (`kernels/window_attention_points.py`). The gradient is PyTorch's on any device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, from_schema, to_schema, wants_gradient
from anyup.ops.registration import register
from anyup.ops.window_attention.arguments import WindowAttentionProblem, check_points, check_positions, describe
from anyup.ops.window_attention.operator import OPERATION
from anyup.window import Window, axis_bounds, describe_window, make_window


def attend_points(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    window: Window,
    size: tuple[int, int],
    backend: Backend = None,
) -> Tensor:
    """The result of `window_attention` at some pixels: (N, C), in the dtype of the values.

    Args:
        query: (N, heads, head_dim).
        key: (h, w, heads, head_dim).
        value: (h, w, C).
        rows, columns: (N,) int64 on the CPU, the positions of the pixels in the output.
        window: which keys a pixel sees.
        size: (H, W) of the output.
        backend: as of `window_attention`.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can; lists every reason.
    """
    check_points(query, key, value, window, size)
    check_positions(rows, columns, len(query), size)
    kind, ratio = describe_window(window)
    gradient = wants_gradient(query, key, value)
    return _forward(query, key, value, rows, columns, kind, ratio, *size, to_schema(backend), gradient)


def explain_points(
    query: Tensor, key: Tensor, value: Tensor, *, window: Window, size: tuple[int, int], backend: Backend = None
) -> Explanation:
    """Which backend `attend_points` would choose for these arguments, and why not the others."""
    check_points(query, key, value, window, size)
    problem = _describe(query, key, value, window, size, wants_gradient(query, key, value))
    return OPERATION.explain(problem, backend)


def _describe(
    query: Tensor, key: Tensor, value: Tensor, window: Window, size: tuple[int, int], needs_gradient: bool
) -> WindowAttentionProblem:
    row_of_pixels = describe(query[None, None], key[None], value[None], window, needs_gradient)
    return replace(row_of_pixels, output_size=size, points=len(query))


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    window_kind: str,
    ratio: float,
    height: int,
    width: int,
    backend: str,
    needs_gradient: bool,
) -> Tensor:
    window, size = make_window(window_kind, ratio), (height, width)
    problem = _describe(query, key, value, window, size, needs_gradient)
    arguments = (query, key, value, rows, columns)
    return OPERATION.run("points", problem, from_schema(backend), *arguments, window=window, size=size)


def _fake_forward(query, key, value, *arguments):  # type: ignore[no-untyped-def]
    return value.new_empty(query.shape[0], value.shape[2])


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    window_kind: str,
    ratio: float,
    height: int,
    width: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    window, size = make_window(window_kind, ratio), (height, width)
    problem = _describe(query, key, value, window, size, True)
    arguments = (grad, query, key, value, rows, columns)
    grads = OPERATION.run("points_backward", problem, from_schema(backend), *arguments, window=window, size=size)
    return tuple(g.contiguous() for g in grads)


def _fake_backward(grad, query, key, value, *arguments):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.ratio, ctx.height, ctx.width, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, ctx.kind, ctx.ratio, ctx.height, ctx.width, ctx.backend)
    return (*grads, *(None,) * 8)


def _flops(query, key, value, rows, columns, kind, ratio, height, width, *settings):  # type: ignore[no-untyped-def]
    pairs = query[0]  # each with as many keys as a pixel of the output sees on average
    for queries, keys in ((height, key[0]), (width, key[1])):
        start, stop = axis_bounds(make_window(kind, ratio), queries, keys)
        pairs *= (sum(stop) - sum(start)) / queries
    return round(2 * pairs * (query[1] * query[2] + value[2]))


def _flops_backward(_grad, *arguments):  # type: ignore[no-untyped-def]
    return 2 * _flops(*arguments)


_forward = register(
    "window_attention_points",
    _run_forward,
    _fake_forward,
    flops=_flops,
    gradient=_gradient,
    setup_context=_setup_context,
)
_backward = register("window_attention_points_backward", _run_backward, _fake_backward, flops=_flops_backward)
