"""The pixel encoder in plain PyTorch, tile by tile.

Between two group normalisations everything is pixelwise. So the map passes through the encoder in five steps, each
of which reads a tile of pixels, normalises, activates and multiplies it while it is in the cache, stores the result
over what is not needed any more, and takes the statistics that the next step's normalisation waits for. Two maps of
D channels are alive. Where the first projection has few inputs its map is never stored: its statistics follow from
the mean and covariance of its input, and recomputing it is cheaper than reading it (`thin`).
Where the result is pooled, the last convolution and the residual commute with the pooling and run on the small grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import linear
from anyup.ops.memory import empty
from anyup.ops.parallel import map_tiles
from anyup.ops.pixel_encoder.arguments import EncoderParameters
from anyup.ops.pixel_encoder.cells import Cells, averaged
from anyup.ops.pixel_encoder.gradients import backward, dtype_of_work
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import SUBSETS, Affine, Statistics
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS, ThinProjection
from anyup.ops.pixel_encoder.tiles import map_groups, map_pixels, measured, tile_pixels
from anyup.ops.precision import product_dtype, working_dtype

__all__ = ["backward", "forward", "unsupported"]

Result = TypeVar("Result")


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(
    pixels: Tensor, parameters: EncoderParameters, *, frequencies: Tensor | None, output_size: tuple[int, int]
) -> Tensor:
    """(B, H, W, Cin) -> (B, *output_size, D)."""
    batch, height, width, _ = pixels.shape
    wide = dtype_of_work(pixels.dtype, (height, width), pixels.device)
    if wide != working_dtype(pixels.dtype):
        angles = None if frequencies is None else frequencies.to(wide)
        out = forward(pixels.to(wide), parameters.to(wide), frequencies=angles, output_size=output_size)
        return out.to(pixels.dtype)
    dim = parameters.block1.weight1.shape[0]
    shrinks = output_size != (height, width) and output_size[0] <= height and output_size[1] <= width
    shrinks = shrinks and frequencies is None
    out = empty((batch, *(output_size if shrinks else (height, width)), dim), pixels)
    rotation = None if frequencies is None else Rotation((height, width), frequencies)

    def encode(some: slice) -> None:
        for image, result in zip(pixels[some], out[some], strict=True):
            band = Band(image.flatten(0, 1), parameters, trunk=None if shrinks else result.flatten(0, 1))
            norms: list[Affine] = []
            for norm_weight, norm_bias in norm_parameters(parameters):
                statistics = band.advance(norms[-1] if norms else None)
                norms.append(Affine.of(statistics, norm_weight, norm_bias, band.work_dtype))
            if shrinks:
                rows, columns = (Cells(0, n, n, length) for n, length in zip(output_size, (height, width), strict=True))
                band.finish_pooled(norms[-1], rows, columns, result)
            else:
                band.finish(norms[-1], rotation)

    map_groups(encode, batch, height * width, pixels.device)
    return averaged(out, output_size)


class Band:
    """A run of an image's pixels on its way through the encoder.

    `advance` is called once for each of the four normalisations, in order: it takes the affine map that the
    previous normalisation has become (None at first) and returns the statistics of the next one's input over the
    band. With several bands, merge their statistics before going on. `finish` applies the last one.
    """

    def __init__(
        self,
        pixels: Tensor,
        parameters: EncoderParameters,
        trunk: Tensor | None = None,
        branch: Tensor | None = None,
        steps: int = 0,
    ) -> None:
        """Of (n, Cin) pixels, or with `steps` of the encoder behind it.

        Args:
            pixels: what the encoder takes; it is not read where a trunk of three steps (one, unless the first
                projection is thin) is there.
            parameters: its weights.
            trunk: (n, D), what the residual blocks add to; the result goes there. A new tensor if None.
            branch: (n, D), room for what they add; it may be the trunk up to the third step of a thin encoder.
            steps: how far the trunk (and, in the middle of a block, the branch) has come already.
        """
        self._parameters = parameters
        self.work_dtype = working_dtype(pixels.dtype)
        self._product_dtype = product_dtype(pixels.dtype, pixels.device)
        self._count, self._device = pixels.shape[0], pixels.device
        self._dim = parameters.block1.weight1.shape[0]
        self._trunk = empty((self._count, self._dim), pixels) if trunk is None else trunk
        self._branch = branch
        self._norms_done = steps
        self._measures = True
        projection = parameters.projection
        self._thin: ThinProjection | None = None
        if steps > 2:
            return
        if projection is not None and is_thin(parameters):
            self._thin = ThinProjection(pixels, projection, self.work_dtype)
        elif not steps:
            self._pixels = pixels.contiguous()

    @staticmethod
    def steps_stored(thin: bool) -> tuple[int, ...]:
        """The steps that a trunk has behind it that is stored after no, one ... four passes over all bands."""
        return (0, 0, 2, 3, 3) if thin else (0, 1, 1, 3, 3)

    def store_trunk(self) -> None:
        """Make the trunk what is stored of the last step: it is."""

    def advance(self, norm: Affine | None, *, stores: bool = False) -> Statistics:
        """Apply a normalisation and what follows it, up to the next; the statistics of the next one's input.

        The trunk is fit to be stored afterwards, wanted or not.
        """
        self._measures = True
        statistics = self._step(norm)
        assert statistics is not None
        return statistics

    def apply(self, norm: Affine | None) -> None:
        """The same where the next one's statistics are known already."""
        self._measures = False
        self._step(norm)

    def _step(self, norm: Affine | None) -> Statistics | None:
        step = self._norms_done
        self._norms_done += 1
        if step == 0:
            return self._project()
        assert norm is not None
        if self._branch is None:
            self._branch = empty(tuple(self._trunk.shape), self._trunk)
        if step == 2:
            return self._close_block(norm)
        block = self._parameters.block1 if step == 1 else self._parameters.block2
        weight = block.weight1.to(self._product_dtype)
        branch, thin = self._branch, self._thin if step == 1 else None
        normalised = None if thin is None else thin.normalised(norm)

        def go(tile: slice) -> Tensor:
            if thin is not None and normalised is not None:
                activated = F.silu(thin.project(tile, normalised), inplace=True)
            else:
                activated = _activate(self._trunk[tile].to(self.work_dtype), norm)
            return branch[tile].copy_(self._product(activated, weight))

        return self._statistics(go)

    def finish(self, norm: Affine, rotation: Rotation | None = None) -> Tensor:
        """Apply the last normalisation and what follows it: the encoded pixels (n, D), in the trunk.

        A rotation is of whole rows, so the band must be its map.
        """
        assert self._branch is not None
        weight, branch = self._parameters.block2.weight2.to(self._product_dtype), self._branch

        def go(tile: slice) -> None:
            result = self._product(_activate(branch[tile].to(self.work_dtype), norm), weight)
            if rotation is None:
                torch.add(result, self._trunk[tile], out=self._trunk[tile])
            else:
                self._trunk[tile] = rotation(result.to(self.work_dtype).add_(self._trunk[tile]), tile)

        self._map(go, 1 if rotation is None else rotation.width)
        return self._trunk

    def finish_pooled(self, norm: Affine, rows: Cells, columns: Cells, out: Tensor) -> None:
        """The same for a rectangle of pixels, pooled to `out` (h, w, D): these cells, which need these pixels."""
        assert self._branch is not None
        height, width = (cells.pixels.stop - cells.pixels.start for cells in (rows, columns))
        branch, trunk = (t.view(height, width, -1) for t in (self._branch, self._trunk))
        activated, passed = (torch.empty(out.shape, dtype=self.work_dtype, device=out.device) for _ in range(2))
        total = columns.total(self.work_dtype, out.device)

        def go(row: int) -> None:
            within = rows.within(row)
            activated[row] = total(self._sum(branch[within], norm))
            passed[row] = total(self._sum(trunk[within]))

        map_tiles(go, range(out.shape[0]), out.device)
        out.copy_(pooled((activated, passed), (rows, columns), self._parameters))

    def add_to_cells(self, norm: Affine, rows: slice, cells: tuple[Cells, Cells], sums: tuple[Tensor, Tensor]) -> None:
        """Apply the last normalisation to some whole rows of a map, and add them to the cells of its pooling.

        There are two sums over these cells, of activations and of the trunk; `pooled` makes the result of them.
        """
        assert self._branch is not None
        row_cells, columns = cells
        branch, trunk = (t.view(rows.stop - rows.start, columns.length, -1) for t in (self._branch, self._trunk))
        total = columns.total(self.work_dtype, self._device)

        def go(cell: int) -> None:
            wanted = replace(row_cells, first=cell, stop=cell + 1).pixels
            within = slice(max(wanted.start - rows.start, 0), min(wanted.stop, rows.stop) - rows.start)
            activations, passed = (s[cell - row_cells.first] for s in sums)
            activations += total(self._sum(branch[within], norm))
            passed += total(self._sum(trunk[within]))

        map_tiles(go, row_cells.touching(rows), self._device)

    def _sum(self, rows: Tensor, norm: Affine | None = None) -> Tensor:
        """Rows (r, pixels, D), activated where there is a norm, and summed: (pixels, D).

        Some rows at a time, because a row of cells of a large map is much larger than a tile.
        """
        parts = (part.to(self.work_dtype) for part in rows.split(max(1, tile_pixels(self._device) // rows.shape[1])))
        return reduce(torch.add, ((part if norm is None else _activate(part, norm)).sum(dim=0) for part in parts))

    def _project(self) -> Statistics | None:
        if self._thin is not None:
            return self._thin.statistics(self._map(self._thin.moments)) if self._measures else None
        projection = self._parameters.projection
        if projection is not None:
            projection = projection.to(self._product_dtype)

        def go(tile: slice) -> Tensor:
            result = self._pixels[tile]
            if projection is not None:
                result = self._product(result, projection)
            self._trunk[tile] = result
            return result

        return self._statistics(go)

    def _close_block(self, norm: Affine) -> Statistics | None:
        """The first block's second convolution and residual."""
        assert self._branch is not None
        weight = self._parameters.block1.weight2.to(self._product_dtype)
        branch, trunk, thin = self._branch, self._trunk, self._thin
        bias = None if thin is None else thin.offset.to(self._product_dtype)

        def go(tile: slice) -> Tensor:
            result = self._product(_activate(branch[tile].to(self.work_dtype), norm), weight, bias)
            if thin is None:
                return torch.add(result, trunk[tile], out=trunk[tile])
            return trunk[tile].copy_(thin.add(tile, result.to(self.work_dtype)))

        return self._statistics(go)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x.to(self._product_dtype), weight, bias)

    def _statistics(self, store: Callable[[slice], Tensor]) -> Statistics | None:
        """Of what is stored for each tile, as it is returned."""
        if self._measures:
            shape = self._count, self._dim
            return measured(lambda tile: store(tile).to(self.work_dtype), shape, self.work_dtype, self._device, SUBSETS)

        def only_store(tile: slice) -> None:
            store(tile)  # what it returns must not live until the last tile

        self._map(only_store, SUBSETS)
        return None

    def _map(self, function: Callable[[slice], Result], multiple: int = 1) -> list[Result]:
        """The function's result for each tile, in order."""
        return map_pixels(function, self._count, self._device, multiple)


def norm_parameters(parameters: EncoderParameters) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of each normalisation, in order."""
    for block in (parameters.block1, parameters.block2):
        yield block.norm1_weight, block.norm1_bias
        yield block.norm2_weight, block.norm2_bias


def is_thin(parameters: EncoderParameters) -> bool:
    """Whether the first projection has so few inputs that its map is never stored."""
    return parameters.projection is not None and parameters.projection.shape[1] <= MOST_CHANNELS


def pooled(sums: tuple[Tensor, Tensor], cells: tuple[Cells, Cells], parameters: EncoderParameters) -> Tensor:
    """(h, w, D): the pooled result, from the sums over its cells of the last activations and of the trunk.

    The sums are used up.
    """
    activated, passed = sums
    rows, columns = (axis.sizes(activated.dtype, activated.device) for axis in cells)
    for each in sums:
        each.div_((rows[:, None] * columns)[:, :, None])
    weight = parameters.block2.weight2.to(activated.dtype)
    return linear(activated.flatten(0, 1), weight).view_as(passed).add_(passed)


def _activate(x: Tensor, norm: Affine) -> Tensor:
    return F.silu(norm(x), inplace=True)
