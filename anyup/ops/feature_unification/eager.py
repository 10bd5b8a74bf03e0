"""The feature unification in plain PyTorch, a few positions at a time.

A position's C patches against M filters are one matrix product of (C, s*s) by (s*s, M), and its result, read as
(M, C), is all that this position's softmax and mean need. So the C*M*h*w values never exist together. The division
by the taps inside the map is applied to the patches, which are M / (s*s) times fewer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.memory import empty
from anyup.ops.parallel import map_tiles

# Values worked on at a time: on a CPU what stays in its caches.
_BUDGET = {"cpu": 2**20}
_BUDGET_ELSEWHERE = 2**26


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(features: Tensor, basis: Tensor) -> Tensor:
    """(B, C, h, w), (M, 1, s, s) -> (B, M, h, w); float32 inside for half precision."""
    batch, _, h, w = features.shape
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    filters = basis.flatten(1).to(wide)
    out = empty((batch, basis.shape[0], h, w), features)
    patches = _Patches(features.to(wide), basis)

    def unify(tile: tuple[int, slice]) -> None:
        image, positions = tile
        out[image].flatten(1)[:, positions] = _weights(patches.take(tile), filters).mean(dim=2).T

    map_tiles(unify, patches.tiles, features.device)
    return out


def backward(grad: Tensor, features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of features and basis, everything recomputed."""
    batch, channels, h, w = features.shape
    count, _, size, _ = basis.shape
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    filters = basis.flatten(1).to(wide)
    grad_patches = torch.empty(batch, h * w, channels, size * size, dtype=wide, device=features.device)
    grad_filters = torch.zeros_like(filters)
    patches = _Patches(features.to(wide), basis)
    for tile in patches.tiles:
        image, positions = tile
        near = patches.take(tile)
        weights = _weights(near, filters)
        outer = grad[image].flatten(1)[:, positions].T.to(wide)[:, :, None] / channels  # (n, M, 1)
        inner = weights * (outer - (weights * outer).sum(dim=1, keepdim=True))
        inner = inner.view(-1, count)  # back to (positions * C, M)
        grad_filters += inner.T @ near.flatten(0, 1)
        grad_patches[image, positions] = (inner @ filters).view(-1, channels, size * size)
    # The transpose of taking patches: divide by the taps inside the map, add up where patches overlap.
    grad_patches /= _taps_inside((h, w), size, grad_patches)[:, None, None]
    columns = grad_patches.permute(0, 2, 3, 1).flatten(1, 2)
    grad_features = F.fold(columns, (h, w), size, padding=size // 2)
    return grad_features.to(features.dtype), grad_filters.view_as(basis).to(basis.dtype)


def _weights(patches: Tensor, filters: Tensor) -> Tensor:
    """Softmax weights (n, M, C) of n positions from their patches (n, C, s*s)."""
    n, channels, _ = patches.shape
    z = patches.flatten(0, 1) @ filters.T  # (n * C, M), channel-major
    return torch.softmax(z.view(n, filters.shape[0], channels), dim=1)


class _Patches:
    """The patches of some features, divided by the taps inside the map, a tile of positions at a time."""

    def __init__(self, features: Tensor, basis: Tensor) -> None:
        batch, channels, h, w = features.shape
        filters, _, size, _ = basis.shape
        positions = h * w
        length = max(1, _BUDGET.get(features.device.type, _BUDGET_ELSEWHERE) // (channels * filters))
        self.tiles = [
            (image, slice(first, min(first + length, positions)))
            for image in range(batch)
            for first in range(0, positions, length)
        ]
        self._inside = _taps_inside((h, w), size, features)
        padded = F.pad(features, (size // 2,) * 4)
        self._windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, h, w, s, s), a view

    def take(self, tile: tuple[int, slice]) -> Tensor:
        """(n, C, s*s)."""
        image, positions = tile
        windows = self._windows[image]
        position = torch.arange(positions.start, positions.stop, device=windows.device)
        w = windows.shape[2]
        patches = windows[:, position // w, position % w].flatten(2).transpose(0, 1)
        return patches / self._inside[positions, None, None]


def _taps_inside(size: tuple[int, int], kernel_size: int, like: Tensor) -> Tensor:
    """How many taps of a kernel lie inside a map at each position: (h * w,)."""
    half = kernel_size // 2
    axes = []
    for n in size:
        position = torch.arange(n, device=like.device)
        axes.append((position + half).clamp(max=n - 1) - (position - half).clamp(min=0) + 1)
    return (axes[0][:, None] * axes[1]).flatten().to(like.dtype)
