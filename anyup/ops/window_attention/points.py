"""Window attention of single pixels, each with its own window's keys: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.precision import working_dtype
from anyup.window import Window, axis_bounds

# Numbers in the largest buffer: the keys or the values of some pixels' windows.
_BUDGET = 2**22


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
        rows, columns: (N,) int64 on the CPU: where the pixels lie in the output of this size (H, W).
    """
    seen, exists = zip(
        *(
            _keys_of_axis(position, *axis_bounds(window, queries, keys), keys)
            for position, queries, keys in zip((rows, columns), size, key.shape[:2], strict=True)
        ),
        strict=True,
    )
    index = (seen[0][:, :, None] * key.shape[1] + seen[1][:, None, :]).flatten(1).to(key.device)  # (N, K)
    hidden = ~(exists[0][:, :, None] & exists[1][:, None, :]).flatten(1).to(key.device)
    wide = working_dtype(query.dtype)
    query = query.to(wide) * query.shape[2] ** -0.5
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    step = max(1, _BUDGET // (index.shape[1] * max(keys[0].numel(), values.shape[1])))
    found = [values.new_zeros(0, values.shape[1])]
    for q, i, none in zip(query.split(step), index.split(step), hidden.split(step), strict=True):
        logits = torch.einsum("nhd,nkhd->nhk", q, keys[i].to(wide)).masked_fill(none[:, None], -torch.inf)
        weights = logits.softmax(dim=2).mean(dim=1, keepdim=True)
        # What is hidden has no weight, and must not become a NaN by it.
        seen_values = values[i].to(wide).masked_fill(none[:, :, None], 0)
        found.append((weights @ seen_values)[:, 0].to(value.dtype))
    return torch.cat(found)


def _keys_of_axis(position: Tensor, start: tuple[int, ...], stop: tuple[int, ...], keys: int) -> tuple[Tensor, Tensor]:
    """The keys of each position's range (N, k), and which of them are within it: the longest range fixes k."""
    first, last = (torch.tensor(bounds)[position] for bounds in (start, stop))
    longest = int((last - first).max()) if len(position) else 1
    key = first[:, None] + torch.arange(longest)
    return key.clamp(max=keys - 1), key < last[:, None]
