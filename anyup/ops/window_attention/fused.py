"""Window attention in Triton kernels, without a mask and without copied keys; heads are averaged on the chip."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.dispatch import BackendFailure
from anyup.ops.kernel_device import (
    device_name,
    device_reasons,
    discouraged,
    dot_precision,
    dtype_reasons,
    installed,
    multiprocessors,
    target,
)
from anyup.ops.precision import dtype_name
from anyup.ops.window_attention.arguments import WindowAttentionProblem
from anyup.ops.window_attention.gathered_points import points_backward
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import CellWindow, Part, Window

if TYPE_CHECKING:
    from anyup.kernels.config_tables import Case
    from anyup.kernels.window_bounds import WindowRule

__all__ = ["backward", "case", "discouraged", "forward", "points", "points_backward", "unsupported", "window_rule"]

Config = TypeVar("Config", bound=Hashable)
Result = TypeVar("Result")

_HEAD_DIMS = (16, 32, 64, 128)
_MOST_HEADS = 8
_HALF = (torch.float16, torch.bfloat16)


def unsupported(problem: WindowAttentionProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    for name, dtype in (("queries", problem.query_dtype), ("values", problem.value_dtype)):
        reasons += dtype_reasons(f"{name} are", dtype)
    if problem.head_dim not in _HEAD_DIMS:
        widths = ", ".join(map(str, _HEAD_DIMS))
        reasons.append(f"heads are {problem.head_dim} wide, the kernels take {widths} (the matrix units' tiles)")
    if problem.heads > _MOST_HEADS:
        reasons.append(f"{problem.heads} heads, at most {_MOST_HEADS} (each keeps its state in registers)")
    if isinstance(problem.window, CellWindow):
        for name, queries, keys in zip(("height", "width"), problem.whole_size, problem.grid_size, strict=True):
            if 2 * queries * keys >= 2**31:
                reasons.append(
                    f"2 * output {name} * grid {name} is {2 * queries * keys}, the cells need less than 2^31"
                )
    return reasons


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    scale: float,
    max_queries: int | None = None,
    save_lse: bool = False,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, W, C) in the value's dtype, and the log-sum-exp (B, H, W, heads) of the scaled logits.

    `max_queries` is ignored: beside the result the kernel allocates nothing. If a tile sees many keys, it allocates the
    weights of all tiles that the card computes at a time, some tens of megabytes. The queries may be a part of a map.
    """
    from anyup.kernels.window_attention_config import ForwardConfig, forward_configs
    from anyup.kernels.window_attention_forward import allocate_kept, plan_forward

    query, scale = _positive_scale(query, scale)
    batch, height, width, heads, _ = query.shape
    out = value.new_empty(batch, height, width, value.shape[3])
    lse = query.new_empty((batch, height, width, heads) if save_lse else (0,), dtype=torch.float32)
    arguments = _shared_arguments(query, key, window, scale)
    tile_keys = _tile_keys(query, key, window, part)

    def run(config: ForwardConfig) -> None:
        kept = allocate_kept(value, most_keys=tile_keys, multiprocessors=multiprocessors(value.device), config=config)
        plan_forward(query, key, value, out, lse, **arguments, config=config, part=part, kept=kept)()

    _run_first(
        "forward",
        run,
        forward_configs(tile_keys, **_known(query, value), channels=value.shape[3]),
        query, key, value, window, part,
    )  # fmt: skip
    return out, lse


def points(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, *, window: Window, size: tuple[int, int]
) -> Tensor:
    """(N, C) in the dtype of the values; the arguments are those of `attend_points`. Arithmetic is in float32."""
    from anyup.kernels.window_attention_points import CONFIGS, plan_points

    out = value.new_empty(len(query), value.shape[2])
    pixels = torch.stack((rows, columns), dim=1).int().to(value.device)
    rule = window_rule(window, (key.shape[0], key.shape[1]))
    run_first(
        lambda config: plan_points(
            query, key, value, pixels, out, size=size, window=rule, scale=query.shape[2] ** -0.5, config=config
        )(),
        CONFIGS,
        kernel=("points", query.device, query.dtype, value.dtype, *query.shape[1:]),
    )
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; the weights are recomputed from the log-sum-exp.

    Beside the gradients it allocates two statistics for each pixel and head. If the grid has few keys, it also
    allocates partial sums of the gradients of keys and values, at most as large as the query's gradient.
    """
    from anyup.kernels import window_attention_config
    from anyup.kernels.window_attention_backward_query import plan_backward_query

    given, given_scale = query, scale
    query, scale = _positive_scale(query, scale)
    arguments = _shared_arguments(query, key, window, scale)
    known = _known(query, value)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    inv_l, delta = torch.empty_like(lse), torch.empty_like(lse)
    _run_first(
        "backward_query",
        lambda c: plan_backward_query(
            grad, query, key, value, lse, grad_query, inv_l, delta, **arguments, config=c
        )(),
        window_attention_config.backward_query_configs(_tile_keys(query, key, window), **known),
        query, key, value, window,
    )  # fmt: skip
    statistics = (lse, inv_l, delta)
    grad_key, grad_value = _backward_grid(grad, query, key, value, statistics, window=window, scale=scale)
    if query is not given:
        grad_query *= given_scale
    return grad_query, grad_key, grad_value


def _backward_grid(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    *,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of key and value: by one kernel if both sums fit its registers, else by a kernel for each.

    With `config.partials` above 1 a kernel computes partial sums, which are added up in a fixed order.
    """
    from anyup.kernels import window_attention_config
    from anyup.kernels.window_attention_backward_grid import plan_backward_key, plan_backward_value
    from anyup.kernels.window_attention_backward_key_value import plan_backward_key_value

    given = (query, key, value, window)
    sizes = (query.shape[1] * query.shape[2], key.shape[0] * key.shape[1] * key.shape[2], value.shape[3])
    arguments, known = _shared_arguments(query, key, window, scale), _known(query, value)

    def partials_of(like: Tensor, config: Any) -> Tensor:
        return like.new_empty(
            (config.partials, *like.shape), dtype=torch.float32 if config.partials > 1 else like.dtype
        )

    def sum_of(partials: Tensor, like: Tensor) -> Tensor:
        return partials[0] if len(partials) == 1 else partials.sum(dim=0).to(like.dtype)

    def of_both(config: Any) -> tuple[Tensor, Tensor]:
        of_key, of_value = partials_of(key, config), partials_of(value, config)
        plan_backward_key_value(grad, query, key, value, *statistics, of_key, of_value, **arguments, config=config)()
        return sum_of(of_key, key), sum_of(of_value, value)

    def of_keys(config: Any) -> Tensor:
        partials = partials_of(key, config)
        plan_backward_key(grad, query, key, value, *statistics, partials, **arguments, config=config)()
        return sum_of(partials, key)

    def of_values(config: Any) -> Tensor:
        partials = partials_of(value, config)
        plan_backward_value(grad, query, key, *statistics[:2], partials, **arguments, config=config)()
        return sum_of(partials, value)

    if both := window_attention_config.backward_key_value_configs(*sizes, **known):
        # It fails where the device refuses all configs, or where two kernels were measured to be faster: run these two.
        with suppress(BackendFailure):
            return _run_first("backward_key_value", of_both, both, *given)
    return (
        _run_first("backward_key", of_keys, window_attention_config.backward_grid_configs(*sizes, **known), *given),
        _run_first(
            "backward_value",
            of_values,
            window_attention_config.backward_grid_configs(*sizes, of_values=True, **known),
            *given,
        ),
    )


def _shared_arguments(query: Tensor, key: Tensor, window: Window, scale: float) -> dict[str, Any]:
    """The keyword arguments of every pass."""
    rule = window_rule(window, (key.shape[1], key.shape[2]))
    return {"window": rule, "scale": scale, "precision": dot_precision()}


def _tile_keys(query: Tensor, key: Tensor, window: Window, part: Part | None = None) -> Callable[[int, int], int]:
    """A function from a tile's rows and columns to the most keys that such a tile sees."""
    top, left, *whole = part or (0, 0, query.shape[1], query.shape[2])
    output_size, grid_size = (whole[0], whole[1]), (key.shape[1], key.shape[2])

    def most(rows: int, columns: int) -> int:
        return most_keys(window, output_size, grid_size, (rows, columns), (top % rows, left % columns))

    return most


def _known(query: Tensor, value: Tensor) -> dict[str, Any]:
    """The keyword arguments of every choice of a config."""
    return {
        "target": target(query.device),
        "half": query.dtype in _HALF and value.dtype in _HALF,
        "heads": query.shape[3],
        "head_dim": query.shape[4],
    }


def case(kernel: str, query: Tensor, key: Tensor, value: Tensor, window: Window, part: Part | None = None) -> Case:
    """The key under which a measured config of a kernel is looked up."""
    from anyup.kernels.config_tables import Case, rounded_keys

    names = [dtype_name(dtype) for dtype in (query.dtype, value.dtype)]
    return Case(
        kernel=kernel,
        dtype=names[0] if names[0] == names[1] else ", ".join(names),
        precision="" if query.dtype in _HALF and value.dtype in _HALF else dot_precision(),
        heads=query.shape[3],
        head_dim=query.shape[4],
        keys=rounded_keys(_tile_keys(query, key, window, part)),
    )


def _run_first(
    kernel: str,
    run: Callable[[Config], Result],
    rule: Sequence[Config],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    part: Part | None = None,
) -> Result:
    """The result of `run` with the first config that the device accepts: a measured one if any, then the rule's."""
    configs = _measured_first(kernel, rule, query, key, value, window, part)
    compiled_for = (kernel, query.device, query.dtype, value.dtype, *query.shape[3:], dot_precision())
    return run_first(run, configs, kernel=compiled_for)


def _measured_first(
    kernel: str,
    rule: Sequence[Config],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    part: Part | None,
) -> Sequence[Config]:
    """The configs to try: the one measured on this card, if there is one that fits, then those of the rule."""
    from anyup.kernels import config_tables

    device = device_name(query.device)
    if not config_tables.in_force(device).entries:
        return rule
    return config_tables.before_the_rule(
        rule,
        case(kernel, query, key, value, window, part),
        device=device,
        most_keys=_tile_keys(query, key, window, part),
        channels=value.shape[3],
    )


def window_rule(window: Window, grid_size: tuple[int, int]) -> WindowRule:
    """A window on a grid (h, w), in the form that kernels take."""
    from anyup.kernels.window_bounds import CELL, EVERY_KEY, RATIO, WindowRule

    # A window that leaves no key out needs no bounds.
    if window is None or window.ratio <= 0:
        return WindowRule(EVERY_KEY.value)
    if isinstance(window, CellWindow):
        if not window.ratio < 0.5:
            return WindowRule(EVERY_KEY.value)
        return WindowRule(CELL.value, window.ratio, *(window.size(keys) for keys in grid_size))
    return WindowRule(RATIO.value, window.ratio)


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale with a positive scale: the kernels take the maximum of logits before they scale them."""
    return (query, scale) if scale > 0 else (query * scale, 1.0)
