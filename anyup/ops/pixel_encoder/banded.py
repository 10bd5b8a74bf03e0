"""The pixel encoder for maps that are never whole: bands of pixels that go through one after the other.

A band can go on only when the statistics of the next normalisation are known, which are those of the whole map. So the
bands pass four times, and each time go through the encoder from the start up to the next normalisation.
"""

from __future__ import annotations

from torch import Tensor

from anyup.ops.parallel import on_one_thread
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.eager import Band, norm_parameters
from anyup.ops.pixel_encoder.problem import EncoderParameters
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import Affine, Statistics
from anyup.ops.precision import working_dtype

PASSES = 4
"""Over all bands before one can be encoded."""


class BandedEncoder:
    """An encoder of one image, `PASSES` times `observe` for each band and `close_pass`, then `encode`."""

    def __init__(self, parameters: EncoderParameters) -> None:
        self._parameters = parameters
        self._norms: list[Affine] = []
        self._observed: list[Statistics] = []

    def observe(self, pixels: Tensor) -> None:
        """Take the statistics of a band (rows, columns, Cin) before the next normalisation."""
        assert len(self._norms) < PASSES
        band = Band(pixels.flatten(0, 1), self._parameters)
        norm = None
        for following in self._norms:
            band.pass_on(norm)
            norm = following
        self._observed.append(band.advance(norm))

    def close_pass(self) -> None:
        """All bands have been observed: their statistics together are the next normalisation."""
        weight, bias = list(norm_parameters(self._parameters))[len(self._norms)]
        with on_one_thread():
            self._norms.append(Affine.of(Statistics.merge(self._observed), weight, bias, working_dtype(weight.dtype)))
        self._observed.clear()

    def encode(self, pixels: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(rows, columns, Cin) -> (rows, columns, D), rotated as the map of that size that the rotation is of."""
        return self._ready(pixels).finish(self._norms[-1], rotation).view(*pixels.shape[:2], -1)

    def encode_pooled(self, pixels: Tensor, rows: Cells, columns: Cells) -> Tensor:
        """The pixels (rows, columns, Cin) that these cells need -> the cells (rows, columns, D)."""
        if rows.count == rows.length and columns.count == columns.length:
            return self.encode(pixels)
        dim = self._parameters.block1.weight1.shape[0]
        out = pixels.new_empty(rows.stop - rows.first, columns.stop - columns.first, dim)
        if rows.shrinks and columns.shrinks:
            self._ready(pixels).finish_pooled(self._norms[-1], rows, columns, out)
            return out
        encoded, mean = self.encode(pixels), columns.mean(working_dtype(pixels.dtype), pixels.device)
        for row in range(out.shape[0]):
            out[row] = mean(encoded[rows.within(row)].to(working_dtype(pixels.dtype)))
        return out

    def _ready(self, pixels: Tensor) -> Band:
        """A band that waits for the last normalisation."""
        assert len(self._norms) == PASSES
        band = Band(pixels.flatten(0, 1), self._parameters)
        for norm in (None, *self._norms[:-1]):
            band.pass_on(norm)
        return band
