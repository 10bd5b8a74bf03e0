"""The feature unification in plain PyTorch, a few positions at a time.

A position's C patches against M filters are one matrix product of (C, s*s) by (s*s, M), and its result, read as
(M, C), is all that this position's softmax and mean need. So the C*M*h*w values never exist at once. The division
by the taps inside the map is applied to the patches, which hold M / (s*s) times fewer values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import sum_of_outer_products
from anyup.ops.memory import empty
from anyup.ops.parallel import even_slices, map_tiles
from anyup.ops.precision import accumulator_dtype, working_dtype

# Values computed at a time: on a CPU as many as stay in its caches.
_BUDGET = {"cpu": 2**18}
_BUDGET_ELSEWHERE = 2**26

_FEW = 2**20
"""Up to so many values (C * M * h * w) everything is computed in the result's wider dtype: over a few positions a
channel may hardly vary, and the normalisation that follows magnifies its rounding."""

_Tile = tuple[int, slice]  # an image of the batch, and some of its positions


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(features: Tensor, basis: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """(B, C, h, w), (M, 1, s, s) -> (B, M, h, w); float32 inside for half precision."""
    out_dtype = out_dtype or features.dtype
    if math.prod(features.shape[1:]) * basis.shape[0] <= _FEW:
        wider = torch.promote_types(out_dtype, features.dtype)
        features, basis = features.to(wider), basis.to(wider)
    out = empty((features.shape[0], basis.shape[0], *features.shape[2:]), features.new_empty(0, dtype=out_dtype))
    summed = torch.promote_types(out_dtype, working_dtype(features.dtype))
    patches = _Patches(features, basis)

    def unify(tile: _Tile) -> None:
        image, positions = tile
        weights = patches.weights(patches.take(tile))
        out[image].flatten(1)[:, positions] = weights.mean(dim=2, dtype=summed).T

    map_tiles(unify, patches.tiles, features.device)
    return out


def backward(grad: Tensor, features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of features and basis; the forward pass is recomputed."""
    channels = features.shape[1]
    patches = _Patches(features, basis)
    grad_padded = torch.zeros_like(patches.padded)
    grad_filters = torch.zeros_like(patches.filters, dtype=accumulator_dtype(features.device))
    for tile in patches.tiles:
        image, positions = tile
        near = patches.take(tile)
        weights = patches.weights(near)
        outer = grad[image].flatten(1)[:, positions].T.to(near.dtype)[:, :, None] / channels  # (n, M, 1)
        inner = weights * (outer - (weights * outer).sum(dim=1, keepdim=True))
        inner = inner.view(near.shape[0], channels, -1)  # back to channel-major (n, C, M)
        grad_filters += sum_of_outer_products(inner.flatten(0, 1), near.transpose(1, 2).flatten(0, 1))
        patches.add(grad_padded, tile, (inner @ patches.filters).transpose(1, 2))
    half = basis.shape[2] // 2
    h, w = features.shape[2:]
    grad_features = grad_padded[:, half : half + h, half : half + w].permute(0, 3, 1, 2)
    return grad_features.to(features.dtype), grad_filters.view_as(basis).to(basis.dtype)


def scratch_bytes(
    shape: tuple[int, int, int], filters: int, taps: int, dtype: torch.dtype, device_type: str, workers: int
) -> int:
    """Bytes that `forward` takes for features (batch, channels, cells), its result left out; an estimate."""
    batch, channels, cells = shape
    tiles = -(-cells // _positions(channels, filters, device_type))  # of about one size
    tile = workers * -(-cells // tiles) * channels * (2 * filters + taps)
    return (2 * batch * cells * channels + tile + 2 * cells * taps) * working_dtype(dtype).itemsize


def _positions(channels: int, filters: int, device_type: str) -> int:
    """The most positions of a tile."""
    return max(1, _BUDGET.get(device_type, _BUDGET_ELSEWHERE) // (channels * filters))


class _Patches:
    """The patches of some features, divided by the taps inside the map, a tile of positions at a time.

    Attributes:
        filters: (M, s*s).
        padded: (B, h + s - 1, w + s - 1, C), so that a patch is s*s contiguous rows.
        tiles: what `take` takes, covering every position of every image.
    """

    def __init__(self, features: Tensor, basis: Tensor) -> None:
        wide = working_dtype(features.dtype)
        batch, channels, h, w = features.shape
        filters, _, size, _ = basis.shape
        self.filters = basis.flatten(1).to(wide)
        self.padded = F.pad(features.permute(0, 2, 3, 1).to(wide), (0, 0) + (size // 2,) * 4)
        row, column, tap = (torch.arange(n, device=features.device) for n in (h, w, size))
        corner = row[:, None] * self.padded.shape[2] + column
        taps = tap[:, None] * self.padded.shape[2] + tap
        self._rows = corner.flatten()[:, None] + taps.flatten()  # (h*w, s*s), rows of a flattened padded map
        self._inside = _taps_inside((h, w), size, self.padded)[:, None, None]
        positions = even_slices(h * w, _positions(channels, filters, features.device.type), features.device)
        self.tiles: list[_Tile] = [(image, tile) for image in range(batch) for tile in positions]

    def take(self, tile: _Tile) -> Tensor:
        """A tile's patches (n, s*s, C)."""
        image, positions = tile
        rows = self._rows[positions]
        near = self.padded[image].flatten(0, 1).index_select(0, rows.flatten())
        return near.view(*rows.shape, -1) / self._inside[positions]

    def add(self, padded: Tensor, tile: _Tile, update: Tensor) -> None:
        """The transpose of `take`: add (n, s*s, C) to where a tile's patches came from."""
        image, positions = tile
        update = (update / self._inside[positions]).flatten(0, 1)
        padded[image].flatten(0, 1).index_add_(0, self._rows[positions].flatten(), update)

    def weights(self, patches: Tensor) -> Tensor:
        """Softmax weights (n, M, C) of patches (n, s*s, C)."""
        n, taps, channels = patches.shape
        z = torch.bmm(patches.transpose(1, 2), self.filters.T.expand(n, taps, -1))  # (n, C, M), channel-major
        return torch.softmax(z.view(n, -1, channels), dim=1)


def _taps_inside(size: tuple[int, int], kernel_size: int, like: Tensor) -> Tensor:
    """How many taps of a kernel lie inside a map at each position: (h * w,)."""
    half = kernel_size // 2
    axes = []
    for n in size:
        position = torch.arange(n, device=like.device)
        axes.append((position + half).clamp(max=n - 1) - (position - half).clamp(min=0) + 1)
    return (axes[0][:, None] * axes[1]).flatten().to(like.dtype)
