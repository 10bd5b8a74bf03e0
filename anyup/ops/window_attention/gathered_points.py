"""Window attention of single pixels in plain PyTorch: some points at a time, the keys of each gathered.

The backend `torch` runs on it; its gradient serves the kernels too. The gradient makes the weights anew, so that a
forward pass keeps no copy of the windows. `key` and `value` of points have no batch: they are one image's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anyup.ops.precision import accumulator_dtype, working_dtype
from anyup.window import Window, axis_bounds

# The most numbers in a buffer, which holds the keys or the values of the windows of some points.
_BUDGET = {"cpu": 2**20}
_BUDGET_ELSEWHERE = 2**25


def points(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, *, window: Window, size: tuple[int, int]
) -> Tensor:
    """(N, C) in the dtype of the values; the arguments are those of `attend_points`."""
    # The result is allocated first. A small result allocated after each group of points would keep the C library from
    # reusing the buffers before it: that took 600 MB where 20 MB are needed.
    found = value.new_empty(len(query), value.shape[2])
    wide = working_dtype(query.dtype)
    for some in _groups(key, value, rows, columns, window, size):
        weights = _weights(query[some.points].to(wide), key, some).mean(dim=1, keepdim=True)
        found[some.points] = (weights @ _gathered(value, some).to(wide))[:, 0].to(value.dtype)
    return found


def points_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    window: Window,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; on a GPU their sums have no fixed order.

    With n heads, dP_a = dP / n and dS_a = P_a (dP_a - sum_j P_aj dP_aj).
    """
    heads, head_dim = query.shape[1:]
    wide, widest = working_dtype(query.dtype), accumulator_dtype(query.device)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Each is a sum over all points that see a key.
    grad_key = key.new_zeros((key.shape[0] * key.shape[1], heads, head_dim), dtype=widest)
    grad_value = value.new_zeros((key.shape[0] * key.shape[1], value.shape[2]), dtype=widest)
    for some in _groups(key, value, rows, columns, window, size):
        q, outer = query[some.points].to(wide), grad[some.points].to(wide)
        weights = _weights(q, key, some)  # (n, heads, K)
        of_value = weights.mean(dim=1)[:, :, None] * outer[:, None]
        grad_value.index_add_(0, some.keys.flatten(), of_value.flatten(0, 1).to(widest))
        # Added up in pairs: the library's product with a single vector has five times the error.
        of_weights = torch.linalg.vecdot(_gathered(value, some).to(wide), outer[:, None])[:, None] / heads  # (n, 1, K)
        of_logits = weights * (of_weights - (weights * of_weights).sum(dim=2, keepdim=True)) * head_dim**-0.5
        grad_query[some.points] = torch.einsum("nhk,nkhd->nhd", of_logits, _gathered(key, some).to(wide)).to(q.dtype)
        of_key = torch.einsum("nhk,nhd->nkhd", of_logits, q)
        grad_key.index_add_(0, some.keys.flatten(), of_key.flatten(0, 1).to(widest))
    return grad_query, grad_key.to(key.dtype).view(key.shape), grad_value.to(value.dtype).view(value.shape)


class _Group(NamedTuple):
    """Some of the points, n of them, and their windows' keys."""

    points: slice
    keys: Tensor
    """(n, K): each key's number, row by row; a window with fewer than K keys repeats some of them."""
    repeated: Tensor
    """(n, K): which keys are such repetitions."""


def _groups(
    key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, window: Window, size: tuple[int, int]
) -> Iterator[_Group]:
    (row, row_exists), (column, column_exists) = (
        [each.to(key.device) for each in _keys_of_axis(position, *axis_bounds(window, queries, keys))]
        for position, queries, keys in zip((rows, columns), size, key.shape[:2], strict=True)
    )
    numbers = row.shape[1] * column.shape[1] * max(key[0, 0].numel(), value.shape[2])
    step = max(1, _BUDGET.get(key.device.type, _BUDGET_ELSEWHERE) // numbers)
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        yield _Group(
            some,
            (row[some, :, None] * key.shape[1] + column[some, None, :]).flatten(1),
            ~(row_exists[some, :, None] & column_exists[some, None, :]).flatten(1),
        )


def _gathered(grid: Tensor, some: _Group) -> Tensor:
    """(n, K, ...) of a grid (h, w, ...)."""
    return grid.flatten(0, 1)[some.keys]


def _weights(query: Tensor, key: Tensor, some: _Group) -> Tensor:
    """Each head's weights, (n, heads, K), in the dtype of the query, which is scaled here."""
    near = _gathered(key, some).to(query.dtype)
    logits = torch.linalg.vecdot(near, (query * query.shape[2] ** -0.5)[:, None]).transpose(1, 2)
    return logits.masked_fill(some.repeated[:, None], -torch.inf).softmax(dim=2)


def _keys_of_axis(position: Tensor, start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The keys of each position's range, (N, k), and whether each is inside the range; k is the longest range.

    A shorter range is filled up with its first key, so that no key outside the window, which may be NaN, is read.
    """
    first, last = (torch.tensor(bounds)[position, None] for bounds in (start, stop))
    longest = int((last - first).max()) if len(position) else 1
    key = first + torch.arange(longest)
    return torch.where(key < last, key, first), key < last
