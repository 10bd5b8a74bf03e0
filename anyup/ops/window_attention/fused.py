"""Window attention in Triton kernels: no mask, no copied key, heads averaged on chip, one product with the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyup.ops.dispatch import BackendFailure
from anyup.ops.window_attention.problem import WindowAttentionProblem
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import CellWindow, Window

if TYPE_CHECKING:
    from anyup.kernels.window_bounds import WindowRule

_HEAD_DIMS = (16, 32, 64, 128)
_MOST_HEADS = 8
_HALF = (torch.float16, torch.bfloat16)
_OLDEST_CAPABILITY = (8, 0)


def unsupported(problem: WindowAttentionProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    if find_spec("triton") is None:
        return ["triton is not installed (on Linux: pip install triton)"]
    reasons = _device_reasons(problem.device)
    for name, dtype in (("queries", problem.query_dtype), ("values", problem.value_dtype)):
        if dtype == torch.float64:
            reasons.append(f"{name} are float64, the kernels compute in float32")
        elif dtype == torch.bfloat16 and _interprets():
            reasons.append(f"{name} are bfloat16, which Triton's interpreter multiplies wrongly")
    if problem.head_dim not in _HEAD_DIMS:
        widths = ", ".join(map(str, _HEAD_DIMS))
        reasons.append(f"heads are {problem.head_dim} wide, the kernels take {widths} (the matrix units' tiles)")
    if problem.heads > _MOST_HEADS:
        reasons.append(f"{problem.heads} heads, at most {_MOST_HEADS} (each keeps its state in registers)")
    if isinstance(problem.window, CellWindow):
        for name, queries, keys in zip(("height", "width"), problem.output_size, problem.grid_size, strict=True):
            if 2 * queries * keys >= 2**31:
                reasons.append(f"2 * output {name} * grid {name} is {2 * queries * keys}, the cells need less than 2^31")
    return reasons


def discouraged(problem: WindowAttentionProblem) -> list[str]:
    """Why the kernels are not chosen unless asked for by name, although they can run a problem."""
    return ["Triton's interpreter is for tests, and slow"] if _interprets() else []


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window,
    scale: float,
    max_queries: int | None = None,
    save_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, W, C) in the value's dtype, and the log-sum-exp (B, H, W, heads) of the scaled logits.

    `max_queries` is not needed: beyond its results the kernel allocates nothing.
    """
    from anyup.kernels import config
    from anyup.kernels.window_attention_forward import plan_forward

    query, scale = _positive_scale(query, scale)
    batch, height, width, heads, _ = query.shape
    sizes = ((height, width), (key.shape[1], key.shape[2]))
    out = value.new_empty(batch, height, width, value.shape[3])
    lse = query.new_empty((batch, height, width, heads) if save_lse else (0,), dtype=torch.float32)
    configs = config.forward_configs(
        lambda rows, columns: most_keys(window, *sizes, (rows, columns)),
        half=query.dtype in _HALF and value.dtype in _HALF,
    )
    rule = window_rule(window, *sizes)
    arguments = {"window": rule, "scale": scale, "precision": dot_precision()}
    _launch_first([lambda c=c: plan_forward(query, key, value, out, lse, **arguments, config=c)() for c in configs])
    return out, lse


def window_rule(window: Window, output_size: tuple[int, int], grid_size: tuple[int, int]) -> WindowRule:
    """A window on given sizes, as kernels take it."""
    from anyup.kernels.window_bounds import CELL, EVERY_KEY, RATIO, WindowRule

    # A window that leaves no key out needs no bounds.
    if window is None or window.ratio <= 0:
        return WindowRule(EVERY_KEY.value)
    if isinstance(window, CellWindow):
        if not window.ratio < 0.5:
            return WindowRule(EVERY_KEY.value)
        return WindowRule(CELL.value, window.ratio, *(window.size(keys) for keys in grid_size))
    return WindowRule(RATIO.value, window.ratio)


def dot_precision() -> str:
    """Triton's `input_precision` for products of float32, by torch's own setting."""
    if torch.version.hip is not None or _interprets():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels limit logits before they scale them, which takes a positive scale."""
    return (query, scale) if scale > 0 else (query * scale, 1.0)


def _launch_first(launches: Sequence[Callable[[], Any]]) -> None:
    """Run the first launch that the device takes; raises BackendFailure where it takes none."""
    from triton.errors import TritonError

    failures = []
    for launch in launches:
        try:
            launch()
            return
        except TritonError as error:
            failures.append(error)
    told = "; ".join(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}" for error in failures)
    raise BackendFailure(told) from failures[0]


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    from triton import knobs

    return knobs.runtime.interpret


def _device_reasons(device: torch.device) -> list[str]:
    if _interprets():
        return [] if device.type == "cpu" else [f"Triton's interpreter runs on cpu, not on {device.type}"]
    from triton.runtime import driver

    try:
        target, place = driver.active.get_current_target(), driver.active.get_active_torch_device()
    except RuntimeError as error:
        return [f"Triton finds no GPU here ({error})"]
    if device.type not in ("cuda", place.type):
        return [f"tensors are on {device.type}, Triton's kernels run on {place.type}"]
    if target.backend not in ("cuda", "hip"):
        return [f"Triton's target is {target.backend}, the kernels are for CUDA and ROCm"]
    if target.backend == "cuda":
        capability = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
        if capability < _OLDEST_CAPABILITY:
            have, need = (".".join(map(str, c)) for c in (capability, _OLDEST_CAPABILITY))
            return [f"the card's compute capability is {have}, at least {need} is needed"]
    return []
