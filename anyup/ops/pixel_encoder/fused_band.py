"""A band of pixels on its way through the encoder, in Triton kernels.

As in `fused`, products are made again in each pass, and one map is stored: x1, between the two blocks. It is what a
band keeps between passes; before it is there, nothing but the pixels is.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from anyup.ops.pixel_encoder import eager
from anyup.ops.pixel_encoder.arguments import GROUPS, EncoderParameters
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.fused_passes import Kernels, source_of
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import Affine, Statistics
from anyup.ops.precision import accumulator_dtype

if TYPE_CHECKING:
    from anyup.kernels.pixel_encoder_passes import HalfBlock, Source

_STORED = 3
"""Steps after which x1 is there."""


class Band:
    """What `eager.Band` is, by the same calls: `advance` or `apply` for each normalisation, then one of the ends.

    The pixels may lie in the trunk, unless the first projection is thin.
    """

    def __init__(
        self, pixels: Tensor, parameters: EncoderParameters, trunk: Tensor, branch: Tensor, steps: int = 0
    ) -> None:
        """Of (n, Cin) pixels, or with `steps` of the encoder behind it, of which x1 (n, D) is in the trunk."""
        assert steps in (0, _STORED)
        self._pixels, self._parameters, self._trunk = pixels, parameters, trunk
        # x1 is made of pixels that may lie where it will be stored: programs would read what others have written.
        self._x1, self._other = (trunk, branch) if steps or eager.is_thin(parameters) else (branch, trunk)
        self._dim = trunk.shape[1]
        inputs = 0 if parameters.projection is None else pixels.shape[1]
        self._kernels = Kernels(trunk.dtype, trunk.device, self._dim, inputs)
        self._norms: dict[int, Affine] = {}
        self._steps = steps

    @staticmethod
    def steps_stored(thin: bool) -> tuple[int, ...]:
        """The steps that a trunk has behind it that is stored after no, one ... four passes over all bands."""
        return (0, 0, 0, _STORED, _STORED)

    def store_trunk(self) -> None:
        """Make the trunk what is stored of the last step."""
        if self._steps >= _STORED and self._x1 is not self._trunk:
            self._trunk.copy_(self._x1)

    def advance(self, norm: Affine | None, *, stores: bool = False) -> Statistics:
        """Apply a normalisation and what follows it, up to the next; the statistics of the next one's input.

        Without `stores` it is the last step of this band, and leaves nothing.
        """
        step = self._take(norm)
        out = self._x1[None] if stores and step == _STORED - 1 else None
        source = self._stored() if step == _STORED else self._source
        parts, _ = self._kernels.measure(source, self._halves(step), out=out)
        if stores:
            self.store_trunk()
        return self._joined(parts)

    def apply(self, norm: Affine | None) -> None:
        """The same where the next one's statistics are known already."""
        step = self._take(norm)
        if step == _STORED - 1:
            self._kernels.store(self._source, self._halves(step), self._x1[None])

    def finish(self, norm: Affine, rotation: Rotation | None = None) -> Tensor:
        """Apply the last normalisation and what follows it: the encoded pixels (n, D), in the trunk.

        A rotation is of whole rows, so the band must be its map.
        """
        self._take(norm)
        size = angles = None
        if rotation is not None:
            size = (len(self._trunk) // rotation.width, rotation.width)
            angles = rotation.coordinates.float(), rotation.frequencies.contiguous()
        self._kernels.store(self._stored(), self._halves(_STORED + 1), self._trunk[None], rotation=angles, size=size)
        return self._trunk

    def finish_pooled(self, norm: Affine, rows: Cells, columns: Cells, out: Tensor) -> None:
        """The same for a rectangle of pixels, pooled to `out` (h, w, D): these cells, which need these pixels."""
        self._unfinished().finish_pooled(norm, rows, columns, out)

    def add_to_cells(self, norm: Affine, rows: slice, cells: tuple[Cells, Cells], sums: tuple[Tensor, Tensor]) -> None:
        """Apply the last normalisation to some whole rows of a map, and add them to the cells of its pooling.

        There are two sums over these cells, of activations and of the trunk; `eager.pooled` makes the result of them.
        """
        self._unfinished().add_to_cells(norm, rows, cells, sums)

    def _unfinished(self) -> eager.Band:
        """It as torch's, for the sums over some of a map's cells, for which there is no kernel."""
        self._kernels.store(self._stored(), self._halves(_STORED), self._other[None])
        return eager.Band(self._pixels, self._parameters, self._x1, self._other, _STORED + 1)

    def _joined(self, parts: Tensor) -> Statistics:
        """Of the band's groups, from those of a pass's programs (1, 3, programs, 8)."""
        counts, means, deviations = parts[0].to(accumulator_dtype(parts.device)).unbind()
        # As of eight channels: a deviation is shared by the channels of its group.
        return Statistics.weighted(len(self._trunk), counts, means, deviations / (self._dim // GROUPS))

    def _take(self, norm: Affine | None) -> int:
        """Note the normalisation of the next step; its number."""
        step = self._steps
        if norm is not None:
            self._norms[step] = norm
        self._steps += 1
        return step

    @cached_property
    def _source(self) -> Source:
        """The pixels as the kernels read them."""
        return source_of(self._pixels[None], self._parameters.projection)

    def _stored(self) -> Source:
        """x1 as the kernels read it."""
        from anyup.kernels.pixel_encoder_passes import map_source

        return map_source(self._x1[None])

    def _halves(self, step: int) -> tuple[HalfBlock, ...]:
        """The half blocks between what a step reads, the pixels or x1, and what it makes."""
        from anyup.kernels.pixel_encoder_passes import HalfBlock

        block1, block2 = self._parameters.block1, self._parameters.block2
        weights = (block1.weight1, block1.weight2, block2.weight1, block2.weight2)
        first = 0 if step < _STORED else _STORED - 1
        return tuple(
            HalfBlock(self._prepared(self._norms[number + 1]), weights[number].contiguous())
            for number in range(first, step)
        )

    def _prepared(self, norm: Affine) -> Tensor:
        """As the kernels take it."""
        from anyup.kernels.pixel_encoder_passes import known_norm

        return known_norm(*norm.stacked, dtype=self._trunk.dtype, form=self._kernels.form)
