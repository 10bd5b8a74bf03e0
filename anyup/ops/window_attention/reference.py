"""Window attention as its definition reads: the oracle that every other backend is tested against.

For head a and pixel x with window W(x):  P_a(x, j) = softmax over j in W(x) of scale * <q_a(x), k_a(j)>,
P = mean over the heads of P_a,  out(x) = sum_j P(x, j) v(j).  One averaged P carries all C channels.
Dense and masked: it allocates heads * H*W * h*w values, `max_queries` at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from anyup.ops.ieee import in_ieee
from anyup.ops.precision import working_dtype
from anyup.ops.pullback import pullback
from anyup.window import Part, Window, part_bounds


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


def window_mask(
    window: Window, output_size: tuple[int, int], grid_size: tuple[int, int], part: Part | None = None
) -> Tensor:
    """True where a pixel sees a key: (H*W, h*w) bool."""
    rows, columns = _axis_masks(window, output_size, grid_size, part)
    mask = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, h, w)
    return mask.reshape(output_size[0] * output_size[1], grid_size[0] * grid_size[1])


def _axis_masks(
    window: Window, output_size: tuple[int, int], grid_size: tuple[int, int], part: Part | None = None
) -> list[Tensor]:
    """True where a row of pixels sees a row of keys, (H, h) bool, and so for the columns, (W, w)."""
    axes = []
    top, left, *full_size = part or (0, 0, *output_size)
    for queries, keys, first, total in zip(output_size, grid_size, (top, left), full_size, strict=True):
        bounds = part_bounds(window, queries, keys, first, total)
        start, stop = (torch.tensor(bound, device="cpu")[:, None] for bound in bounds)
        position = torch.arange(keys, device="cpu")
        axes.append((position >= start) & (position < stop))
    return axes


@in_ieee
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

    The queries may be a part of a map.
    """
    height, width = query.shape[1:3]
    grid = (key.shape[1], key.shape[2])
    mask = window_mask(window, (height, width), grid, part).to(query.device)
    q, k = (rearrange(t, "b row column head d -> b head (row column) d") for t in (query, key))
    v = rearrange(value, "b row column c -> b (row column) c")
    outputs, statistics = [], []
    step = max_queries or height * width
    for first in range(0, height * width, step):
        chunk = slice(first, first + step)
        logits = q[:, :, chunk] @ k.mT * scale  # (B, heads, queries, keys)
        logits = logits.masked_fill(~mask[chunk], float("-inf"))
        weights = torch.softmax(logits, dim=-1).mean(dim=1)
        outputs.append(weights.to(v.dtype) @ v)
        if save_lse:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            statistics.append(torch.logsumexp(wide, dim=-1))
    out = rearrange(torch.cat(outputs, dim=1), "b (row column) c -> b row column c", row=height)
    if not save_lse:
        return out, _empty_statistics(query)
    lse = rearrange(torch.cat(statistics, dim=2), "b head (row column) -> b row column head", row=height)
    return out, lse.contiguous()


@in_ieee
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, by autograd through `forward`."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return forward(query, key, value, window=window, scale=scale)[0]

    return pullback(run, (query, key, value), grad)


@in_ieee
def points(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, *, window: Window, size: tuple[int, int]
) -> Tensor:
    """(N, C) in the dtype of the values; the arguments are those of `attend_points`."""
    of_rows, of_columns = _axis_masks(window, size, (key.shape[0], key.shape[1]))
    mask = (of_rows[rows][:, :, None] & of_columns[columns][:, None]).flatten(1).to(query.device)  # (N, h*w)
    logits = torch.einsum("nad,kad->ank", query, key.flatten(0, 1)) * query.shape[2] ** -0.5
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1).mean(dim=0)
    return weights.to(value.dtype) @ value.flatten(0, 1)


@in_ieee
def points_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, **settings: Any
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, by autograd through `points`."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return points(query, key, value, rows, columns, **settings)

    return pullback(run, (query, key, value), grad)


def _empty_statistics(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=working_dtype(query.dtype))
