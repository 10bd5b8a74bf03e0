"""The kernels of the window attention launched with given configs, and what the reference says they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.recipe import AttentionShape, attention_tensors
from torch import Tensor

from anyup.kernels.window_attention_config import (
    BackwardGridConfig,
    BackwardQueryConfig,
    ForwardConfig,
    backward_grid_configs,
    backward_key_value_configs,
    backward_query_configs,
    forward_configs,
)
from anyup.ops.kernel_device import dot_precision, target
from anyup.ops.window_attention import reference
from anyup.ops.window_attention.fused import _tile_keys, window_rule
from anyup.ops.window_attention.tiles import most_keys
from anyup.window import Part, Window


@dataclass(frozen=True)
class Configs:
    """The config of each pass: keys and values alike, and both at once where that is another config."""

    forward: ForwardConfig
    query: BackwardQueryConfig
    grid: BackwardGridConfig
    both: BackwardGridConfig | None = None


def shipped_configs(shape: AttentionShape, *, half: bool) -> list[Configs]:
    """Every config that ships for a shape, the keys' and values' pixels undivided and in two parts by turns."""

    def keys_of(rows: int, columns: int) -> int:
        return most_keys(shape.window, shape.output, shape.grid, (rows, columns))

    keys = shape.batch * math.prod(shape.grid)
    place = torch.device("cuda", torch.cuda.current_device())
    known: dict[str, Any] = {"target": target(place), "half": half, "heads": shape.heads, "head_dim": shape.head_dim}
    grid_sizes = (math.prod(shape.output), keys, shape.channels)
    grid_configs = backward_grid_configs(*grid_sizes, **known)
    choices: tuple[Sequence[Any], ...] = (
        forward_configs(keys_of, **known, channels=shape.channels),
        backward_query_configs(keys_of, **known),
        grid_configs,
        backward_key_value_configs(*grid_sizes, **known) or grid_configs,
    )
    made = []
    for turn in range(max(2, *map(len, choices))):
        *others, grid, both = (choice[min(turn, len(choice) - 1)] for choice in choices)
        partials = 1 + turn % 2
        made.append(Configs(*others, replace(grid, partials=partials), replace(both, partials=partials)))
    return made


def device_tensors(shape: AttentionShape, query_dtype: torch.dtype, value_dtype: torch.dtype) -> dict[str, Tensor]:
    """Query, key, value and the output's gradient on the device."""
    tensors = attention_tensors(shape)
    size = (shape.batch, *shape.output, shape.channels)
    tensors["grad"] = torch.randn(size, generator=torch.Generator().manual_seed(5))
    wide = {"query": query_dtype, "key": query_dtype, "value": value_dtype, "grad": value_dtype}
    return {name: tensor.to("cuda", wide[name]) for name, tensor in tensors.items()}


def channels_first(tensor: Tensor) -> Tensor:
    """The same numbers, channels (or heads) outermost in memory, as the model passes features."""
    order = (0, 3, 4, 1, 2) if tensor.dim() == 5 else (0, 3, 1, 2)
    return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.dim())])


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers, NaN between any two of them in memory."""
    return torch.stack((tensor, torch.full_like(tensor, math.nan)), dim=-1)[..., 0]


def run_passes(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *, window: Window, configs: Configs
) -> dict[str, Tensor]:
    """What the kernels compute, into memory that holds NaN before."""
    # Here, because where triton is missing these tests are skipped, not in error.
    from anyup.kernels.window_attention_backward_grid import plan_backward_key, plan_backward_value
    from anyup.kernels.window_attention_backward_key_value import plan_backward_key_value
    from anyup.kernels.window_attention_backward_query import plan_backward_query
    from anyup.kernels.window_attention_forward import plan_forward

    shared: dict[str, Any] = {
        "window": window_rule(window, tuple(key.shape[1:3])),
        "scale": query.shape[4] ** -0.5,
        "precision": dot_precision(),
    }

    def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), math.nan, dtype=dtype, device="cuda")

    out = unwritten((*query.shape[:3], value.shape[3]), value.dtype)
    lse, inv_l, delta = (unwritten(query.shape[:4], torch.float32) for _ in range(3))
    kept = _unwritten_weights(query, key, value, window, configs.forward)
    plan_forward(query, key, value, out, lse, **shared, config=configs.forward, kept=kept)()
    grad_query = unwritten(query.shape, query.dtype)
    plan_backward_query(grad, query, key, value, lse, grad_query, inv_l, delta, **shared, config=configs.query)()

    def unwritten_parts(config: BackwardGridConfig) -> list[Tensor]:
        dtypes = (torch.float32 if config.partials > 1 else like.dtype for like in (key, value))
        return [
            unwritten((config.partials, *like.shape), dtype) for like, dtype in zip((key, value), dtypes, strict=True)
        ]

    grad_key, grad_value = unwritten_parts(configs.grid)
    plan_backward_key(grad, query, key, value, lse, inv_l, delta, grad_key, **shared, config=configs.grid)()
    plan_backward_value(grad, query, key, lse, inv_l, grad_value, **shared, config=configs.grid)()
    config = configs.both or configs.grid
    both = unwritten_parts(config)
    plan_backward_key_value(grad, query, key, value, lse, inv_l, delta, *both, **shared, config=config)()
    return {
        "output": out,
        "log-sum-exp": lse,
        "gradient of query": grad_query,
        "gradient of key": grad_key.sum(dim=0).to(key.dtype),
        "gradient of value": grad_value.sum(dim=0).to(value.dtype),
        "gradient of key, with the value's": both[0].sum(dim=0).to(key.dtype),
        "gradient of value, with the key's": both[1].sum(dim=0).to(value.dtype),
    }


def run_forward_of_part(
    query: Tensor, key: Tensor, value: Tensor, *, window: Window, part: Part, config: ForwardConfig
) -> dict[str, Tensor]:
    """What the forward kernel computes of a part of an output, into memory that holds NaN before."""
    from anyup.kernels.window_attention_forward import plan_forward

    shape = (*query.shape[:3], value.shape[3])
    out = torch.full(shape, math.nan, dtype=value.dtype, device="cuda")
    lse = torch.full(tuple(query.shape[:4]), math.nan, dtype=torch.float32, device="cuda")
    rule = window_rule(window, tuple(key.shape[1:3]))
    settings: dict[str, Any] = {"window": rule, "scale": query.shape[4] ** -0.5, "precision": dot_precision()}
    kept = _unwritten_weights(query, key, value, window, config, part)
    plan_forward(query, key, value, out, lse, **settings, config=config, part=part, kept=kept)()
    return {"output": out, "log-sum-exp": lse}


def _unwritten_weights(
    query: Tensor, key: Tensor, value: Tensor, window: Window, config: ForwardConfig, part: Part | None = None
) -> Tensor | None:
    """Memory for the weights of a card of two multiprocessors, each with several tiles to work on."""
    from anyup.kernels.window_attention_forward import allocate_kept

    kept = allocate_kept(value, most_keys=_tile_keys(query, key, window, part), multiprocessors=2, config=config)
    return None if kept is None else kept.fill_(math.nan)


def reference_passes(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *, window: Window) -> dict[str, Tensor]:
    """The same by the reference, in the dtypes of its arguments."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out, lse = reference.forward(*leaves, window=window, scale=query.shape[4] ** -0.5, save_lse=True)
    of_query, of_key, of_value = torch.autograd.grad(out, leaves, grad)
    return {
        "output": out.detach(),
        "log-sum-exp": lse.detach(),
        "gradient of query": of_query,
        "gradient of key": of_key,
        "gradient of value": of_value,
        "gradient of key, with the value's": of_key,
        "gradient of value, with the key's": of_value,
    }
