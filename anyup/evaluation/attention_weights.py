"""Bringing class logits from the small grid to the labels' pixels, many times for the same image.

While a probe trains, the encoder and the upsampler are frozen: what changes from step to step are the logits that are
carried. So the averaged attention weights of an image are taken out of the model once, by carrying one-hot maps with
its own attention, and from then on a step is one small matrix product, forward and backward.

The windows make this small. Two keys whose rows (or columns) differ by the size of the largest window are never seen
by the same pixel, so keys are told apart by their position modulo that size: at 448 pixels from 32 cells, 64 one-hot
channels instead of 1024 give all weights, 25.7 MB an image in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anyup.model import AnyUp
from anyup.ops.window_attention.segments import Segments, axis_segments
from anyup.window import Window

# Longest side of a tile in pixels, as in the attention itself.
_LONGEST = 32

# Bytes of what is carried to the pixels of some tiles: on a CPU few enough for a core's cache.
_AT_A_TIME = {"cpu": 1 << 20}
_AT_A_TIME_ELSEWHERE = 1 << 28


@dataclass(frozen=True)
class _Axis:
    """The segments of one axis that have one length: pixels that share a small range of keys."""

    pixels: Tensor  # (count, length) int64
    keys: Tensor  # (count, modulus) int64: the key of each residue that a segment's pixels see


@dataclass(frozen=True)
class Tiling:
    """The pixels of an image in tiles, those of one shape together, and the keys that each tile sees.

    Attributes:
        modulus: (rows, columns), the residues by which keys are told apart.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    modulus: tuple[int, int]
    shapes: tuple[tuple[_Axis, _Axis], ...]

    @property
    def keys(self) -> int:
        """Weights of each pixel."""
        return self.modulus[0] * self.modulus[1]

    @property
    def count(self) -> int:
        """Weights of an image."""
        return self.size[0] * self.size[1] * self.keys

    def one_hot(self) -> Tensor:
        """(1, keys, h, w) float32: 1 in the channel of a key's residue."""
        h, w = self.grid
        residue = (torch.arange(h) % self.modulus[0])[:, None] * self.modulus[1] + torch.arange(w) % self.modulus[1]
        return F.one_hot(residue, self.keys).permute(2, 0, 1)[None].float()

    def by_tiles(self, pixels: Tensor) -> Tensor:
        """(H, W, ...) to (H * W, ...), tile after tile."""
        return torch.cat([p.flatten(0, 1) for p in self.tiles(pixels)])

    def tiles(self, pixels: Tensor) -> Iterator[Tensor]:
        """(H, W, ...) as (tiles, pixels of a tile, ...), one tensor for each shape of tile."""
        for rows, columns in self.shapes:
            picked = pixels[rows.pixels.flatten()][:, columns.pixels.flatten()]
            picked = picked.unflatten(1, columns.pixels.shape).unflatten(0, rows.pixels.shape)
            yield picked.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows, columns, row, column, ...)

    @cached_property
    def places(self) -> Tensor:
        """(H * W,): where each pixel, row by row, stands in the order of `by_tiles`."""
        return self.by_tiles(torch.arange(self.size[0] * self.size[1]).view(self.size)).argsort()

    def split(self, tiled: Tensor) -> Iterator[Tensor]:
        """(H * W, ...), tile after tile, as (tiles, pixels of a tile, ...) views, one for each shape of tile."""
        first = 0
        for rows, columns in self.shapes:
            tiles = len(rows.pixels) * len(columns.pixels)
            pixels = rows.pixels.shape[1] * columns.pixels.shape[1]
            yield tiled[first : first + tiles * pixels].view(tiles, pixels, *tiled.shape[1:])
            first += tiles * pixels

    def near(self, values: Tensor) -> Iterator[Tensor]:
        """(C, h, w) as (tiles, C, keys): what each tile's pixels can see, one tensor for each shape of tile."""
        for rows, columns in self.shapes:
            at_rows, at_columns = (axis.keys.flatten().to(values.device) for axis in (rows, columns))
            picked = values.index_select(1, at_rows).index_select(2, at_columns)
            picked = picked.unflatten(2, columns.keys.shape).unflatten(1, rows.keys.shape)
            # (C, rows, row residues, columns, column residues) to (rows, columns, C, residues)
            yield picked.permute(1, 3, 0, 2, 4).flatten(3, 4).flatten(0, 1)


@lru_cache(maxsize=8)
def tile(window: Window, size: tuple[int, int], grid: tuple[int, int]) -> Tiling:
    """The tiling of an output of `size` pixels from `grid` cells."""
    axes = [axis_segments(window, pixels, keys, _LONGEST) for pixels, keys in zip(size, grid, strict=True)]
    rows, columns = (max(segments.keys for segments in axis) for axis in axes)
    shapes = tuple((_axis(r, rows, grid[0]), _axis(c, columns, grid[1])) for r in axes[0] for c in axes[1])
    return Tiling(size, grid, (rows, columns), shapes)


def _axis(segments: Segments, modulus: int, keys: int) -> _Axis:
    starts = torch.tensor(segments.starts)[:, None]
    first = torch.tensor(segments.key_starts)[:, None]
    # Of each residue the key in first ... first + modulus - 1. Where that lies behind the grid, no pixel sees it: its
    # weight is zero and any key will do.
    position = first + (torch.arange(modulus) - first) % modulus
    return _Axis(starts + torch.arange(segments.length), position.clamp(max=keys - 1))


def averaged_weights(model: AnyUp, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """The model's attention weights for one image, averaged over the heads: (H * W, keys) float16, cut into tiles.

    image (1, 3, Hi, Wi), features (1, C, h, w). Rounding to float16 changes a weight by at most 1/2048 of it.
    """
    tiling = tile(model.window, size, (features.shape[2], features.shape[3]))
    weights = model(image, features, size, values=tiling.one_hot().to(features.device))
    return tiling.by_tiles(weights[0].permute(1, 2, 0)).half()


class AttentionWeights:
    """Carries by averaged attention weights.

    Args:
        weights: (H * W, keys), as `averaged_weights` gives them.
    """

    def __init__(self, tiling: Tiling, weights: Tensor) -> None:
        self.tiling = tiling
        self._weights = weights.float()

    def factors(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(C, h, w) to what the pixels of each shape of tile can see of it, (tiles, C, keys), differentiable, and their
        weights (tiles, pixels, keys); in the order of `targets`."""
        yield from zip(self.tiling.near(values), self.tiling.split(self._weights), strict=True)

    def logits(self, values: Tensor) -> Iterator[Tensor]:
        """(C, h, w) to (tiles, C, pixels) for each shape of tile, in the order of `targets`; differentiable."""
        for near, weights in self.factors(values):
            yield near @ weights.transpose(1, 2)

    def whole(self, parts: Iterable[Tensor]) -> Tensor:
        """Maps of any channels in the order of `logits` to (C, H, W); differentiable."""
        tiled = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        return tiled.index_select(1, self.tiling.places.to(tiled.device)).unflatten(1, self.tiling.size)

    def targets(self, labels: Tensor, classes: int) -> Iterator[Tensor]:
        """(H, W) uint8 to int64 (tiles, pixels) for each shape of tile."""
        yield from self.tiling.tiles(labels.long())


class BilinearWeights:
    """Carries by bilinear interpolation to (H, W): a matrix for each axis, whose transposes are the backward pass."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        self._rows, self._columns = (_linear(pixels, cells) for pixels, cells in zip(size, grid, strict=True))

    def factors(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(C, h, w) to (H, C, w) and (H, W, w): a row of pixels is a tile; see `AttentionWeights.factors`."""
        near = (self._rows.to(values) @ values).transpose(0, 1)
        yield near, self._columns.to(values).expand(len(near), -1, -1)

    def logits(self, values: Tensor) -> Iterator[Tensor]:
        """(C, h, w) to (H, C, W); differentiable."""
        for near, weights in self.factors(values):
            yield near @ weights.transpose(1, 2)

    def whole(self, parts: Iterable[Tensor]) -> Tensor:
        """The one map (H, C, W) to (C, H, W)."""
        (part,) = parts
        return part.transpose(0, 1)

    def targets(self, labels: Tensor, classes: int) -> Iterator[Tensor]:
        """(H, W) uint8 to int64 (H, W)."""
        yield labels.long()


class NearestWeights:
    """Carries by nearest interpolation to (H, W): all pixels of a cell have its logits, so their labels are counted."""

    def __init__(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        self._count = grid[0] * grid[1]
        cells = torch.arange(self._count).view(1, 1, *grid)
        # float64, because a number of cells beyond 2^24 would be rounded.
        self._cells = F.interpolate(cells.double(), size=size, mode="nearest-exact")[0, 0].long()

    def logits(self, values: Tensor) -> Iterator[Tensor]:
        """(C, h, w) to (1, C, h * w)."""
        yield values.flatten(1)[None]

    def whole(self, parts: Iterable[Tensor]) -> Tensor:
        """The one map (1, C, h * w) to (C, H, W), each cell's value for all of its pixels; differentiable."""
        (part,) = parts
        cells = self._cells.to(part.device)
        return part[0].index_select(1, cells.flatten()).unflatten(1, cells.shape)

    def targets(self, labels: Tensor, classes: int) -> Iterator[Tensor]:
        """(H, W) uint8 to float32 (1, classes, h * w): how many of a cell's pixels have each class; void is none."""
        cells = self._cells.to(labels.device)
        valid = labels < classes
        counts = torch.bincount(cells[valid] * classes + labels[valid].long(), minlength=classes * self._count)
        yield counts.view(-1, classes).T[None].float()


@lru_cache(maxsize=8)
def _linear(pixels: int, cells: int) -> Tensor:
    """(pixels, cells): the weights of linear interpolation along an axis."""
    return F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear", align_corners=False)[0].T.contiguous()


FixedWeights = AttentionWeights | BilinearWeights | NearestWeights


Head = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""From (C, H, W) to outputs (outputs, rows, W) of some rows at a time, and the maps of what a function makes of them.
"""


class HeadedWeights:
    """Carries by fixed weights to (H, W), and then runs a head for each seed, which sees a pixel's neighbours too.

    What is at the pixels is made again in the backward pass, for one seed and image at a time, and never held.

    Args:
        heads: of each seed.
    """

    def __init__(self, weights: FixedWeights, heads: Sequence[Head]) -> None:
        self._weights, self._heads = weights, heads

    def maps(self, values: Tensor, then: Callable[[Tensor], Tensor] = lambda outputs: outputs) -> Tensor:
        """(seeds * C, h, w) to (seeds, channels, H, W): what `then` makes of the outputs; differentiable."""

        def of_seed(head: Head, low: Tensor) -> Tensor:
            return head(self._weights.whole(self._weights.logits(low)), then)

        of_seeds = zip(self._heads, values.unflatten(0, (len(self._heads), -1)), strict=True)
        return torch.stack([checkpoint(of_seed, *each, use_reentrant=False) for each in of_seeds])

    def logits(self, values: Tensor) -> Iterator[Tensor]:
        """(seeds * C, h, w) to (H, seeds * outputs, W): a row of pixels is a tile; differentiable."""
        yield self.maps(values).flatten(0, 1).transpose(0, 1)

    def whole(self, parts: Iterable[Tensor]) -> Tensor:
        """The one map (H, C, W) to (C, H, W)."""
        (part,) = parts
        return part.transpose(0, 1)

    def targets(self, labels: Tensor, classes: int) -> Iterator[Tensor]:
        """(H, W) uint8 to int64 (H, W)."""
        yield labels.long()


def some_tiles(near: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What is carried to the pixels by a tile's factors, some tiles at a time.

    `near` (tiles, C, keys) and `weights` (tiles, pixels, keys) give which tiles, and (some tiles, C, pixels), new
    memory without a gradient.
    """
    each = near.shape[1] * weights.shape[1] * near.element_size()
    count = max(1, _AT_A_TIME.get(near.device.type, _AT_A_TIME_ELSEWHERE) // each)
    for first in range(0, len(near), count):
        tiles = slice(first, first + count)
        yield tiles, near[tiles] @ weights[tiles].transpose(1, 2)


Carrier = FixedWeights | HeadedWeights
"""What brings a probe's values from the small grid to the pixels."""
