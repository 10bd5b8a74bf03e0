"""Window attention in Triton kernels: no mask, no copied key, heads averaged on chip, one product with the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from anyup.ops.dispatch import BackendFailure
from anyup.ops.window_attention.problem import WindowAttentionProblem, no_part
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import CellWindow, Window

if TYPE_CHECKING:
    from anyup.kernels.config import Target
    from anyup.kernels.config_tables import Case
    from anyup.kernels.window_bounds import WindowRule

Config = TypeVar("Config")
Result = TypeVar("Result")

_HEAD_DIMS = (16, 32, 64, 128)
_MOST_HEADS = 8
_HALF = (torch.float16, torch.bfloat16)
_OLDEST_CAPABILITY = (8, 0)


def unsupported(problem: WindowAttentionProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    if find_spec("triton") is None:
        return ["triton is not installed (on Linux: pip install triton)"]
    reasons = device_reasons(problem.device) + no_part(problem)
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
                reasons.append(
                    f"2 * output {name} * grid {name} is {2 * queries * keys}, the cells need less than 2^31"
                )
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
    from anyup.kernels.config import forward_configs
    from anyup.kernels.window_attention_forward import plan_forward

    query, scale = _positive_scale(query, scale)
    batch, height, width, heads, _ = query.shape
    out = value.new_empty(batch, height, width, value.shape[3])
    lse = query.new_empty((batch, height, width, heads) if save_lse else (0,), dtype=torch.float32)
    arguments = _shared_arguments(query, key, window, scale)
    configs = forward_configs(_tile_keys(query, key, window), **_known(query, value))
    configs = _measured_first("forward", configs, query, key, value, window)
    run_first(lambda c: plan_forward(query, key, value, out, lse, **arguments, config=c)(), configs)
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, the weights recomputed from the log-sum-exp.

    Beside them it allocates two statistics for each pixel and head, and where the grid has few keys the partial sums
    of their gradients, which are at most as large as the query's.
    """
    from anyup.kernels import config
    from anyup.kernels.window_attention_backward_grid import plan_backward_key, plan_backward_value
    from anyup.kernels.window_attention_backward_query import plan_backward_query

    given, given_scale = query, scale
    query, scale = _positive_scale(query, scale)
    arguments = _shared_arguments(query, key, window, scale)
    known = _known(query, value)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    share, delta = torch.empty_like(lse), torch.empty_like(lse)
    run_first(
        lambda c: plan_backward_query(
            grad, query, key, value, lse, grad_query, share, delta, **arguments, config=c
        )(),
        _measured_first(
            "backward_query", config.backward_query_configs(_tile_keys(query, key, window), **known),
            query, key, value, window,
        ),
    )  # fmt: skip

    def add_up(kernel: str, like: Tensor, launch: Callable[[Tensor, Any], None]) -> Tensor:
        """The gradient of `like`, in as many parts as a cut has, added up in a fixed order."""

        def run(cut: Any) -> Tensor:
            parts = like.new_empty((cut.parts, *like.shape), dtype=torch.float32 if cut.parts > 1 else like.dtype)
            launch(parts, cut)
            return parts[0] if cut.parts == 1 else parts.sum(dim=0).to(like.dtype)

        keys = like.shape[0] * like.shape[1] * like.shape[2]
        pixels = query.shape[1] * query.shape[2]
        of_values = kernel == "backward_value"
        cuts = config.backward_grid_configs(pixels, keys, value.shape[3], of_values=of_values, **known)
        return run_first(run, _measured_first(kernel, cuts, query, key, value, window))

    grad_key = add_up(
        "backward_key",
        key,
        lambda out, c: plan_backward_key(grad, query, key, value, lse, share, delta, out, **arguments, config=c)(),
    )
    grad_value = add_up(
        "backward_value",
        value,
        lambda out, c: plan_backward_value(grad, query, key, lse, share, out, **arguments, config=c)(),
    )
    if query is not given:
        grad_query *= given_scale
    return grad_query, grad_key, grad_value


def target() -> Target:
    """What kernels are compiled for here."""
    from anyup.kernels.config import Target

    if _interprets():
        return Target()
    from triton.runtime import driver

    active = driver.active.get_current_target()
    return Target(active.backend, active.arch)


def _shared_arguments(query: Tensor, key: Tensor, window: Window, scale: float) -> dict[str, Any]:
    """What every pass takes by name."""
    rule = window_rule(window, (query.shape[1], query.shape[2]), (key.shape[1], key.shape[2]))
    return {"window": rule, "scale": scale, "precision": dot_precision()}


def _tile_keys(query: Tensor, key: Tensor, window: Window) -> Callable[[int, int], int]:
    """Rows and columns of a tile of pixels to the most keys that one such tile sees."""
    output_size, grid_size = (query.shape[1], query.shape[2]), (key.shape[1], key.shape[2])
    return lambda rows, columns: most_keys(window, output_size, grid_size, (rows, columns))


def _known(query: Tensor, value: Tensor) -> dict[str, Any]:
    """What every choice of a cut takes by name."""
    return {
        "target": target(),
        "half": query.dtype in _HALF and value.dtype in _HALF,
        "heads": query.shape[3],
        "head_dim": query.shape[4],
    }


def case(kernel: str, query: Tensor, key: Tensor, value: Tensor, window: Window) -> Case:
    """What a measured cut of a kernel is looked up by."""
    from anyup.kernels.config_tables import Case, rounded_keys

    names = [str(dtype).removeprefix("torch.") for dtype in (query.dtype, value.dtype)]
    return Case(
        kernel=kernel,
        dtype=names[0] if names[0] == names[1] else ", ".join(names),
        precision="" if query.dtype in _HALF and value.dtype in _HALF else dot_precision(),
        heads=query.shape[3],
        head_dim=query.shape[4],
        keys=rounded_keys(_tile_keys(query, key, window)),
    )


def device_name(device: torch.device) -> str:
    """What a table of measured cuts belongs to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _measured_first(
    kernel: str, rule: Sequence[Config], query: Tensor, key: Tensor, value: Tensor, window: Window
) -> Sequence[Config]:
    """The cuts to try: what was measured best on this card, where anything was and it fits, then the rule's."""
    from anyup.kernels import config_tables

    device = device_name(query.device)
    if not config_tables.in_force(device).entries:
        return rule
    return config_tables.before_the_rule(
        rule,
        case(kernel, query, key, value, window),
        device=device,
        most_keys=_tile_keys(query, key, window),
        channels=value.shape[3],
    )


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


def run_first(run: Callable[[Config], Result], configs: Sequence[Config]) -> Result:
    """The result with the first cut that the device takes; raises BackendFailure where it takes none."""
    from triton.errors import TritonError

    failures: list[Exception] = []
    for config in configs:
        try:
            return run(config)
        except TritonError as error:
            failures.append(error)
    told = "; ".join(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}" for error in failures)
    raise BackendFailure(told) from failures[0]


def _interprets() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    from triton import knobs

    return knobs.runtime.interpret


def device_reasons(device: torch.device) -> list[str]:
    if _interprets():
        return [] if device.type == "cpu" else [f"Triton's interpreter runs on cpu, not on {device.type}"]
    from triton.runtime import driver

    try:
        target, place = driver.active.get_current_target(), driver.active.get_active_torch_device()
    except RuntimeError:  # its drivers are counted: none is active, or several
        return ["Triton finds no GPU that it can drive"]
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
