"""Window attention of single pixels, each with its own window's keys: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.dispatch import wants_gradient
from anyup.ops.precision import working_dtype
from anyup.window import Window, axis_bounds

# The most numbers in a buffer, which holds the keys or the values of the windows of some points.
_BUDGET = 2**20


def attend_points(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    window: Window,
    size: tuple[int, int],
) -> Tensor:
    """The result of `window_attention` at some pixels: (N, C), in the dtype of the values.

    Args:
        query: (N, heads, head_dim).
        key: (h, w, heads, head_dim).
        value: (h, w, C).
        rows, columns: (N,) int64 on the CPU, the positions of the pixels in the output.
        window: which keys a pixel sees.
        size: (H, W) of the output.
    """
    seen, exists = zip(
        *(
            _keys_of_axis(position, *axis_bounds(window, queries, keys))
            for position, queries, keys in zip((rows, columns), size, key.shape[:2], strict=True)
        ),
        strict=True,
    )
    wide = working_dtype(query.dtype)
    query = query.to(wide) * query.shape[2] ** -0.5
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    step = max(1, _BUDGET // (seen[0].shape[1] * seen[1].shape[1] * max(keys[0].numel(), values.shape[1])))

    def attended(q: Tensor, row: Tensor, column: Tensor, row_exists: Tensor, column_exists: Tensor) -> Tensor:
        """(n, C) of some of the points."""
        index = (row[:, :, None] * key.shape[1] + column[:, None, :]).flatten(1).to(key.device)  # (n, K)
        hidden = ~(row_exists[:, :, None] & column_exists[:, None, :]).flatten(1).to(key.device)
        logits = torch.einsum("nhd,nkhd->nhk", q, keys[index].to(wide)).masked_fill(hidden[:, None], -torch.inf)
        weights = logits.softmax(dim=2).mean(dim=1, keepdim=True)
        return (weights @ values[index].to(wide))[:, 0].to(value.dtype)

    parts = zip(*(each.split(step) for each in (query, *seen, *exists)), strict=True)
    if wants_gradient(query, key, value):
        return torch.cat([attended(*part) for part in parts])
    # The result is allocated first. A small result allocated after each group of points would keep the C library from
    # reusing the buffers before it: that took 600 MB where 20 MB are needed.
    found = value.new_empty(len(query), value.shape[2])
    for place, part in zip(found.split(step), parts, strict=True):
        place.copy_(attended(*part))
    return found


def _keys_of_axis(position: Tensor, start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The keys of each position's range, (N, k), and whether each is inside the range; k is the longest range.

    A shorter range is filled up with its first key, so that no key outside the window, which may be NaN, is read.
    """
    first, last = (torch.tensor(bounds)[position, None] for bounds in (start, stop))
    longest = int((last - first).max()) if len(position) else 1
    key = first + torch.arange(longest)
    return torch.where(key < last, key, first), key < last
