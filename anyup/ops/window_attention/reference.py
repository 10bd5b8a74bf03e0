"""Window attention as its definition reads: the oracle that every other backend is tested against.

For head a and pixel x with window W(x):  P_a(x, j) = softmax over j in W(x) of scale * <q_a(x), k_a(j)>,
P = mean over the heads of P_a,  out(x) = sum_j P(x, j) v(j).  One averaged P carries all C channels.
Dense and masked: it allocates heads * H*W * h*w values, `max_queries` at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.window import Window, axis_bounds


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


def window_mask(window: Window, output_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """True where a pixel sees a key: (H*W, h*w) bool."""
    axes = []
    for queries, keys in zip(output_size, grid_size, strict=True):
        start, stop = (torch.tensor(bound)[:, None] for bound in axis_bounds(window, queries, keys))
        position = torch.arange(keys)
        axes.append((position >= start) & (position < stop))
    rows, columns = axes
    mask = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, h, w)
    return mask.reshape(output_size[0] * output_size[1], grid_size[0] * grid_size[1])


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
    """Out (B, H, W, C) in the value's dtype, and the log-sum-exp (B, H, W, heads) of the scaled logits."""
    batch, height, width, heads, head_dim = query.shape
    grid = (key.shape[1], key.shape[2])
    mask = window_mask(window, (height, width), grid).to(query.device)
    q = query.reshape(batch, height * width, heads, head_dim)
    k = key.reshape(batch, grid[0] * grid[1], heads, head_dim)
    v = value.reshape(batch, grid[0] * grid[1], -1)
    outputs, statistics = [], []
    step = max_queries or height * width
    for first in range(0, height * width, step):
        chunk = slice(first, first + step)
        logits = torch.einsum("bqnd,bknd->bnqk", q[:, chunk], k) * scale
        logits = logits.masked_fill(~mask[chunk], float("-inf"))
        weights = torch.softmax(logits, dim=-1).mean(dim=1)
        outputs.append(weights.to(v.dtype) @ v)
        if save_lse:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            statistics.append(torch.logsumexp(wide, dim=-1).transpose(1, 2))
    out = torch.cat(outputs, dim=1).reshape(batch, height, width, -1)
    if not save_lse:
        return out, _empty_statistics(query)
    return out, torch.cat(statistics, dim=1).reshape(batch, height, width, heads)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, *, window: Window, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, by autograd through `forward`."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return forward(query, key, value, window=window, scale=scale)[0]

    pullback = torch.func.vjp(run, query, key, value)[1]
    return pullback(grad)


def _empty_statistics(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
