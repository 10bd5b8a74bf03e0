"""One image's half of the work with no map of its full resolution alive: a band of rows at a time.

The normalisations' statistics are those of the whole map, so the bands pass through the image encoder four times and
through the query and the key encoder four times more before anything can be used, each time recomputed from the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyup.ops import memory, query_projection
from anyup.ops.pixel_encoder.banded import PASSES, BandedEncoder
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.precision import without_autocast

if TYPE_CHECKING:
    from anyup.model import AnyUp

# Pixels that the queries' 3x3 convolution sees beyond.
_HALO = 1


def band_rows(width: int, pixels: int) -> int:
    """Rows of an image of this width in a band of so many pixels, at least one."""
    return max(1, pixels // width)


def output_rows(image_size: tuple[int, int], output_size: tuple[int, int], pixels: int) -> int:
    """Rows of the output that are worked on at a time: neither they nor the image rows they need exceed a band."""
    needed = band_rows(image_size[1], pixels) * output_size[0] // image_size[0]
    return max(1, min(needed, band_rows(output_size[1], pixels)))


class BandedImage:
    """The queries and pooled keys of one image, computed for the part that is asked for.

    Args:
        model: whose weights are used, without gradients.
        image: (input_dim, Hi, Wi).
        size: (H, W) of the output.
        dtype: that queries and keys are computed in.
        band_pixels: about how many pixels are worked on at a time, at least a row.
    """

    def __init__(
        self, model: AnyUp, image: Tensor, size: tuple[int, int], dtype: torch.dtype, band_pixels: int
    ) -> None:
        self._model, self._image, self._size, self._dtype = model, image, size, dtype
        self._height, self._width = image.shape[1:]
        self._band_rows = band_rows(self._width, band_pixels)
        encoders = (model.image_encoder, model.query_encoder, model.key_encoder)
        self._image_encoder, self._query_encoder, self._key_encoder = (
            BandedEncoder(encoder.parameters_for_op(dtype)) for encoder in encoders
        )
        self._rotation = Rotation((self._height, self._width), model.rope.freqs.to(dtype))
        self._measure()

    def queries(self, rows: slice, columns: slice) -> Tensor:
        """(1, rows, columns, heads, head_dim) of a rectangle of the output."""
        # At the map's border the 3x3 convolution pads with zeros.
        reach = [
            slice(max(part.start - _HALO, 0), min(part.stop + _HALO, length))
            for part, length in zip((rows, columns), self._size, strict=True)
        ]
        row_cells, column_cells = (
            Cells(part.start, part.stop, count, length)
            for part, count, length in zip(reach, self._size, (self._height, self._width), strict=True)
        )
        with without_autocast(self._image.device.type):
            guidance = self._guidance(row_cells.pixels, column_cells.pixels)
            encoded = self._query_encoder.encode_pooled(guidance, row_cells, column_cells)
            del guidance
            parameters = self._model.cross_decode.query_parameters(self._dtype)
            projected = query_projection.project_queries(
                encoded[None], parameters, backend=self._model._backends["query_projection"]
            )
        within = [
            slice(part.start - wide.start, part.stop - wide.start)
            for part, wide in zip((rows, columns), reach, strict=True)
        ]
        return self._model.cross_decode.split_heads(projected[:, within[0], within[1]])

    def image_keys(self, grid: tuple[int, int]) -> Tensor:
        """(1, h, w, D): the keys pooled to a grid."""
        h, w = grid
        columns = Cells(0, w, w, self._width)
        pooled = []
        with without_autocast(self._image.device.type), memory.reuse():
            most = max(1, self._band_rows * h // self._height)
            for first in range(0, h, most):
                rows = Cells(first, min(first + most, h), h, self._height)
                pooled.append(self._key_encoder.encode_pooled(self._guidance(rows.pixels), rows, columns))
        return torch.cat(pooled)[None]

    def _measure(self) -> None:
        """The statistics of every normalisation."""
        with without_autocast(self._image.device.type), memory.reuse():
            for _ in range(PASSES):
                for rows in self._bands():
                    self._image_encoder.observe(self._pixels(rows))
                self._image_encoder.close_pass()
            encoders = (self._query_encoder, self._key_encoder)
            for _ in range(PASSES):
                for rows in self._bands():
                    guidance = self._guidance(rows)
                    for encoder in encoders:
                        encoder.observe(guidance)
                for encoder in encoders:
                    encoder.close_pass()

    def _bands(self) -> Iterator[slice]:
        for first in range(0, self._height, self._band_rows):
            yield slice(first, min(first + self._band_rows, self._height))

    def _pixels(self, rows: slice, columns: slice | None = None) -> Tensor:
        """(rows, columns, C): what the image encoder takes; None: all columns."""
        columns = slice(0, self._width) if columns is None else columns
        return self._model.image_encoder.prepare_part(self._image, rows, columns, self._dtype)

    def _guidance(self, rows: slice, columns: slice | None = None) -> Tensor:
        """(rows, columns, D): the encoded image."""
        columns = slice(0, self._width) if columns is None else columns
        return self._image_encoder.encode(self._pixels(rows, columns), self._rotation.part(rows, columns))
