"""The pixel encoder for maps that are not whole: bands of pixels that go through one after the other.

A band can go on only when the statistics of the next normalisation are known, which are those of the whole map. So the
bands pass four times. A band whose trunk is stored between the passes resumes there; any other goes through the
encoder from the start, up to the next normalisation, each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, BackendFailure, parse_backend
from anyup.ops.memory import empty
from anyup.ops.parallel import on_one_thread
from anyup.ops.pixel_encoder import eager, fused_band
from anyup.ops.pixel_encoder.arguments import EncoderParameters, PixelEncoderProblem
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.eager import is_thin, norm_parameters, pooled
from anyup.ops.pixel_encoder.operator import OPERATION
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import Affine, Statistics
from anyup.ops.precision import working_dtype

PASSES = 4
"""Over all bands before one can be encoded."""

BACKENDS = ("triton", "torch")
"""Of the pixel encoder: those that have bands."""

Band = eager.Band | fused_band.Band


def problem_of(
    inputs: int, dim: int, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> PixelEncoderProblem:
    """What an encoder of one map, in bands, from so many channels to `dim`, asks of a backend."""
    return PixelEncoderProblem(
        batch=1,
        size=size,
        output_size=size,
        input_dim=inputs,
        dim=dim,
        rotates=False,
        dtype=dtype,
        device=device,
        needs_gradient=False,
    )


def of_bands(backend: Backend) -> Backend:
    """Of the backends that a model asks for, those that have bands; raises NotImplementedError where there are none."""
    names = parse_backend(backend)
    able = tuple(name for name in names if name in BACKENDS)
    if names and not able:
        raise NotImplementedError(f"backend: bands of pixels are encoded by {' or '.join(BACKENDS)}, got {backend!r}")
    return able or None


def check_backend(problem: PixelEncoderProblem, backend: Backend) -> None:
    """Raise NotImplementedError where none of the backends asked for has bands and can run them."""
    OPERATION.choose(problem, of_bands(backend))


class BandedEncoder:
    """An encoder of one image, `PASSES` times `accumulate_statistics` for each band and `finish_pass`, then `encode`.

    The maps that it works in, `trunk` and `branch`, are (rows, columns, D), contiguous, the caller's. With `resumes`
    the trunk holds what `accumulate_statistics` left in it in the last pass, so that the pixels are not needed again
    (but for those of a thin first projection).
    """

    def __init__(self, parameters: EncoderParameters, problem: PixelEncoderProblem, backend: Backend = None) -> None:
        """With what `problem_of` gives; raises as `check_backend` does."""
        self._parameters, self._problem, self._backend = parameters, problem, of_bands(backend)
        self._norms: list[Affine] = []
        self._partial_statistics: list[Statistics] = []
        self.is_thin = is_thin(parameters)
        self.choose()

    @property
    def runs_kernels(self) -> bool:
        """Whether its bands are those of a backend that may fail."""
        return self._kind is not eager.Band

    def choose(self) -> None:
        """Take the first backend that can; between two passes, where no trunk is stored."""
        self._module = OPERATION.choose(self._problem, self._backend)
        self._kind: type[Band] = eager.Band if self._module is eager else fused_band.Band

    def give_up(self, failure: BackendFailure) -> None:
        """Take the next backend, by a warning, after a failure; raises it where that one alone was asked for."""
        OPERATION.give_up(self._module, self._problem, self._backend, failure)

    @property
    def passes(self) -> int:
        """How many have been closed."""
        return len(self._norms)

    def accumulate_statistics(
        self, pixels: Tensor, trunk: Tensor, branch: Tensor, *, stores: bool = False, resumes: bool = False
    ) -> None:
        """Take the statistics of a band (rows, columns, Cin) before the next normalisation.

        With `stores` the trunk is fit to be stored afterwards. The pixels may lie in the trunk, unless they are thin.
        """
        assert len(self._norms) < PASSES
        # A thin projection is not stored: in the first block it is the branch that is worth it.
        if stores and self.is_thin and self.passes < 3:
            branch = trunk
        band = self._band(pixels, trunk, branch, resumes, self.passes)
        self._partial_statistics.append(band.advance(self._last_norm(), stores=stores))

    def finish_pass(self, join: Callable[[Statistics | None], Statistics]) -> None:
        """All bands have been seen: their statistics together are the next normalisation.

        `join` takes the statistics of these bands, None if there are none, to those of the whole image.
        """
        weight, bias = list(norm_parameters(self._parameters))[len(self._norms)]
        with on_one_thread():
            seen = Statistics.merge(self._partial_statistics) if self._partial_statistics else None
            self._norms.append(Affine.of(join(seen), weight, bias, working_dtype(weight.dtype)))
        self._partial_statistics.clear()

    def abandon_pass(self) -> None:
        """Some bands failed: the pass begins anew."""
        self._partial_statistics.clear()

    def begin(self, pixels: Tensor, trunk: Tensor, branch: Tensor) -> None:
        """Bring a band to where a trunk that has been stored through all passes is."""
        assert len(self._norms) == PASSES
        self._band(pixels, trunk, branch, resumes=False, steps=PASSES - 1).store_trunk()

    def encode(
        self, pixels: Tensor, trunk: Tensor, branch: Tensor, rotation: Rotation | None = None, *, resumes: bool = False
    ) -> Tensor:
        """(rows, columns, Cin) -> (rows, columns, D) in the trunk, rotated as the map of that size."""
        self._ready(pixels, trunk, branch, resumes).finish(self._norms[-1], rotation)
        return trunk

    def encode_pooled(
        self, pixels: Tensor, trunk: Tensor, branch: Tensor, rows: Cells, columns: Cells, *, resumes: bool = False
    ) -> Tensor:
        """The pixels (rows, columns, Cin) that these cells need -> the cells (rows, columns, D)."""
        if rows.count == rows.length and columns.count == columns.length:
            return self.encode(pixels, trunk, branch, resumes=resumes)
        out = empty((rows.stop - rows.first, columns.stop - columns.first, trunk.shape[2]), trunk)
        if rows.shrinks and columns.shrinks:
            self._ready(pixels, trunk, branch, resumes).finish_pooled(self._norms[-1], rows, columns, out)
            return out
        encoded = self.encode(pixels, trunk, branch, resumes=resumes)
        mean = columns.mean(working_dtype(encoded.dtype), encoded.device)
        for row in range(out.shape[0]):
            out[row] = mean(encoded[rows.within(row)].to(working_dtype(encoded.dtype)))
        return out

    def add_to_cells(
        self,
        pixels: Tensor,
        trunk: Tensor,
        branch: Tensor,
        rows: slice,
        cells: tuple[Cells, Cells],
        sums: tuple[Tensor, Tensor],
        *,
        resumes: bool = False,
    ) -> None:
        """Add a band of whole rows to two sums (rows, columns, D) over these cells of a pooling."""
        self._ready(pixels, trunk, branch, resumes).add_to_cells(self._norms[-1], rows, cells, sums)

    def pooled(self, cells: tuple[Cells, Cells], sums: tuple[Tensor, Tensor]) -> Tensor:
        """(rows, columns, D), in the dtype worked in, of the sums to which bands have been added; they are used up.

        Of several sums over the same cells, to which some of the bands have been added each, the results add up to that
        of all bands.
        """
        return pooled(sums, cells, self._parameters)

    def _ready(self, pixels: Tensor, trunk: Tensor, branch: Tensor, resumes: bool) -> Band:
        """A band that waits for the last normalisation."""
        assert len(self._norms) == PASSES
        band = self._band(pixels, trunk, branch, resumes, PASSES - 1)
        band.apply(self._norms[-2])
        return band

    def _band(self, pixels: Tensor, trunk: Tensor, branch: Tensor, resumes: bool, steps: int) -> Band:
        """A band that has taken so many steps."""
        taken = min(self._kind.steps_stored(self.is_thin)[self.passes], steps) if resumes else 0
        band = self._kind(pixels.flatten(0, 1), self._parameters, trunk.flatten(0, 1), branch.flatten(0, 1), taken)
        for step in range(taken, steps):
            band.apply(self._norms[step - 1] if step else None)
        return band

    def _last_norm(self) -> Affine | None:
        return self._norms[-1] if self._norms else None
