"""Window attention as one opaque operator, so that no tracer ever meets a backend's loops.

The body chooses the backend when it runs: a fallback works inside a compiled graph too.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, Explanation, Operation, from_schema, to_schema, wants_gradient
from anyup.ops.precision import working_dtype
from anyup.ops.registration import register
from anyup.ops.window_attention import arguments as problems
from anyup.window import Part, Window, describe_window, make_window, part_bounds

OPERATION = Operation(
    "window_attention",
    {
        "triton": lambda: importlib.import_module("anyup.ops.window_attention.fused"),
        "flex": lambda: importlib.import_module("anyup.ops.window_attention.flex"),
        "torch": lambda: importlib.import_module("anyup.ops.window_attention.eager"),
        "reference": lambda: importlib.import_module("anyup.ops.window_attention.reference"),
    },
)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    scale: float | None = None,
    backend: Backend = None,
    max_queries: int | None = None,
    part: Part | None = None,
) -> Tensor:
    """Attend from each pixel to the keys of its window, heads averaged, and carry the values.

    out(x) = sum_j mean_a softmax_j(scale * <q_a(x), k_a(j)>) v(j), with j over the window of pixel x.

    Args:
        query: (B, H, W, heads, head_dim), the output grid.
        key: (B, h, w, heads, head_dim), the same dtype.
        value: (B, h, w, C), shared by the heads, any C, any floating dtype.
        window: `RatioWindow`, `CellWindow` or None for every key.
        scale: factor of the logits; None means head_dim ** -0.5.
        backend: None, a name, or a sequence of names (see `anyup.ops.dispatch`).
        max_queries: the most output pixels worked on at a time, where the backend works in chunks.
            The result does not depend on it.
        part: where the queries lie in a larger output, whose windows they have; without gradients. None: they are
            all of it.

    Returns:
        (B, H, W, C), contiguous, in the value's dtype.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: no requested backend can; lists every reason. Or a gradient of a part is wanted.
    """
    problems.check(query, key, value, window, part)
    if max_queries is not None and max_queries < 1:
        raise ValueError(f"max_queries: expected a positive number of pixels, got {max_queries}")
    kind, ratio = describe_window(window)
    needs_gradient = wants_gradient(query, key, value)
    out, _ = _forward(
        query,
        key,
        value,
        kind,
        ratio,
        query.shape[-1] ** -0.5 if scale is None else scale,
        to_schema(backend),
        max_queries or 0,
        needs_gradient,
        *(part or (0, 0, 0, 0)),
    )
    return out


def explain_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    backend: Backend = None,
    part: Part | None = None,
) -> Explanation:
    """Which backend `window_attention` would choose for these arguments, and why not the others."""
    problems.check(query, key, value, window, part)
    needs_gradient = wants_gradient(query, key, value)
    return OPERATION.explain(problems.describe(query, key, value, window, needs_gradient, part), backend)


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_kind: str,
    ratio: float,
    scale: float,
    backend: str,
    max_queries: int,
    save_lse: bool,
    top: int = 0,
    left: int = 0,
    full_height: int = 0,
    full_width: int = 0,
) -> tuple[Tensor, Tensor]:
    """`full_height` is 0 where the queries are not a part."""
    window = make_window(window_kind, ratio)
    part = Part(top, left, full_height, full_width) if full_height else None
    problem = problems.describe(query, key, value, window, save_lse, part)
    return OPERATION.run(
        "forward",
        problem,
        from_schema(backend),
        query,
        key,
        value,
        window=window,
        scale=scale,
        max_queries=max_queries or None,
        save_lse=save_lse,
        **({} if part is None else {"part": part}),
    )


def _fake_forward(query, key, value, window_kind, ratio, scale, backend, max_queries, save_lse, *part):  # type: ignore[no-untyped-def]
    batch, height, width, heads, _ = query.shape
    wide = working_dtype(query.dtype)
    lse_shape = (batch, height, width, heads) if save_lse else (0,)
    return value.new_empty(batch, height, width, value.shape[3]), query.new_empty(lse_shape, dtype=wide)


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    window_kind: str,
    ratio: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    window = make_window(window_kind, ratio)
    problem = problems.describe(query, key, value, window, True)
    arguments = (grad, query, key, value, lse)
    grads = OPERATION.run("backward", problem, from_schema(backend), *arguments, window=window, scale=scale)
    return tuple(g.contiguous() for g in grads)


def _fake_backward(grad, query, key, value, lse, window_kind, ratio, scale, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, lse = ctx.saved_tensors
    kind, ratio, scale, backend, *_ = ctx.settings
    grads = _backward(grad, query, key, value, lse, kind, ratio, scale, backend)
    return (*grads, *(None,) * len(ctx.settings))


def _flops(query, key, value, kind, ratio, scale, backend, max_queries=0, save_lse=False, *part):  # type: ignore[no-untyped-def]
    batch, height, width, heads, head_dim = query
    top, left, full_height, full_width = part if part and part[2] else (0, 0, height, width)
    pairs = batch
    for axis in ((height, key[1], top, full_height), (width, key[2], left, full_width)):
        if all(type(number) is int for number in axis):
            start, stop = part_bounds(make_window(kind, ratio), *axis)
            pairs *= sum(stop) - sum(start)
        else:  # a size is symbolic, and must stay so: as many as there can be
            pairs *= axis[0] * axis[1]
    return 2 * pairs * (heads * head_dim + value[3])


def _flops_backward(_grad, query, key, value, _lse, *settings):  # type: ignore[no-untyped-def]
    return 2 * _flops(query, key, value, *settings)


_forward = register(
    "window_attention", _run_forward, _fake_forward, flops=_flops, gradient=_gradient, setup_context=_setup_context
)
_backward = register("window_attention_backward", _run_backward, _fake_backward, flops=_flops_backward)
