"""The launches of the pixel encoder's passes: one map alive beside the input, products made again instead of stored."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.kernel_device import dot_precision, multiprocessors, target
from anyup.ops.pixel_encoder.arguments import EPS, EncoderParameters
from anyup.ops.pixel_encoder.cells import averaged
from anyup.ops.pixel_encoder.rotary import coordinates

if TYPE_CHECKING:
    from anyup.kernels.pixel_encoder_config import EncoderConfig
    from anyup.kernels.pixel_encoder_passes import HalfBlock, KeyProjection, Source

Result = TypeVar("Result")

MANY_PIXELS = 2**14
"""With as many each program of a pass has several tiles."""


@dataclass(frozen=True)
class Kernels:
    """What the kernels are compiled for: maps of so many channels, of an input of so many (0: a map).

    Torch's precision of products is read once, not at each launch of a forward. `weights` is their dtype, where it is
    another than the maps'.
    """

    dtype: torch.dtype
    device: torch.device
    dim: int
    inputs: int
    weights: torch.dtype | None = None
    precision: str = field(default_factory=dot_precision)

    @cached_property
    def form(self) -> str:
        """Of silu."""
        from anyup.kernels.pixel_encoder_config import silu_form

        return silu_form(self.dtype, target(self.device))

    def precision_of(self, count: int) -> str:
        """Of the products of maps of so many pixels: of few, in three of float16 as exact they are no faster."""
        from anyup.kernels.products import in_float16

        wide = self.dtype == (self.weights or self.dtype) == torch.float32
        return in_float16(self.precision, target(self.device)) if wide and count >= MANY_PIXELS else self.precision

    def run(
        self,
        name: str,
        run: Callable[[EncoderConfig], Result],
        *,
        kind: str,
        precision: str | None = None,
        **known: Hashable,
    ) -> Result:
        """What `run` gives with the first config that the device takes; `known` is what else it is compiled for."""
        from anyup.kernels.pixel_encoder_config import encoder_configs

        precision = precision or self.precision
        kernel = ("pixel_encoder", name, self.device, self.dtype, self.weights, self.dim, self.inputs, precision)
        configs = encoder_configs(kind, self.dtype, target(self.device), precision)
        return run_first(run, configs, kernel=(*kernel, kind, *known.items()))

    def measure(
        self,
        source: Source,
        halves: tuple[HalfBlock, ...],
        *,
        out: Tensor | None = None,
        is_reversed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """A pass's statistics, of each program as (B, 3, programs, 8), and the norm that it made of the last's.

        What the pass makes goes to `out`. `is_reversed` as in `plan_pass`.
        """
        from anyup.kernels.pixel_encoder_moments import MOST_INPUTS

        few = source.projection is not None and source.second is None and source.pixels.shape[2] <= MOST_INPUTS
        if few and out is None and not halves:
            return self._measure_moments(source), None
        parts, norm = self._run_pass("measure", source, halves, out, is_reversed=is_reversed)
        assert parts is not None
        return parts, norm

    def _measure_moments(self, source: Source) -> Tensor:
        """The statistics of the projected pixels of a source of few channels."""
        from anyup.kernels.pixel_encoder_moments import plan_moments
        from anyup.kernels.pixel_encoder_passes import allocate_parts

        batch, count, _ = source.pixels.shape

        def run(config: EncoderConfig) -> Tensor:
            programs = config.programs(-(-count // config.pixels), batch, multiprocessors(self.device))
            parts = allocate_parts(batch, programs, self.device)
            plan_moments(source, parts, config=config)()
            return parts

        return self.run("moments", run, kind="moments")

    def store(
        self,
        source: Source,
        halves: tuple[HalfBlock, ...],
        out: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        size: tuple[int, int] | None = None,
        keys: KeyProjection | None = None,
    ) -> None:
        """A pass whose result goes to `out`: rotated as a map of that size, see `plan_pass`; or projected."""
        # A launch that fails has written nothing: the next config finds the map as it was.
        self._run_pass("store", source, halves, out, rotation=rotation, size=size, keys=keys)

    def pool(
        self,
        source: Source,
        halves: tuple[HalfBlock, HalfBlock],
        out: Tensor,
        *,
        size: tuple[int, int],
        cells: tuple[int, int],
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The means over cells of what maps of that size become, into `out` (B, cells, D); see `plan_pool`."""
        from anyup.kernels.pixel_encoder_passes import allocate_norms
        from anyup.kernels.pixel_encoder_pool import plan_pool

        maps, count, _ = source.pixels.shape
        pair, precision = halves[0].second is not None, self.precision_of(count)

        def run(config: EncoderConfig) -> None:
            turns = max(cells[0] * cells[1], -(-count // config.pixels) if pair else 0)
            programs = config.programs(turns, len(out), multiprocessors(self.device))
            plan_pool(
                source, *halves, out,
                norms=allocate_norms(maps, programs, self.dim, self.dtype, self.device), size=size, cells=cells,
                weights=weights, programs=programs, form=self.form, precision=precision, config=config,
            )()  # fmt: skip

        weight = None if weights is None else weights[0].shape
        self.run("pool", run, kind="pair's pool" if pair else "pool", precision=precision, weight=weight)

    def _run_pass(
        self,
        name: str,
        source: Source,
        halves: tuple[HalfBlock, ...],
        out: Tensor | None,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        size: tuple[int, int] | None = None,
        keys: KeyProjection | None = None,
        is_reversed: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What each program of a pass has measured, if its name is "measure", and the norm that it made, if it did."""
        from anyup.kernels.pixel_encoder_config import kind_of
        from anyup.kernels.pixel_encoder_passes import Join, allocate_norms, allocate_parts, plan_pass

        images, count = source.images, source.pixels.shape[1]
        measures, joins = name == "measure", bool(halves) and isinstance(halves[-1].norm, Join)
        precision = self.precision_of(count)

        def run(config: EncoderConfig) -> tuple[Tensor | None, Tensor | None]:
            programs = config.programs(-(-count // config.pixels), images, multiprocessors(self.device))
            parts = allocate_parts(images, programs, self.device) if measures else None
            norms = allocate_norms(images, programs, self.dim, self.dtype, self.device) if joins else None
            plan_pass(
                source, halves, norms=norms, parts=parts, out=out, rotation=rotation, keys=keys,
                size=size or (1, count), programs=programs, form=self.form, precision=precision, config=config,
                is_reversed=is_reversed,
            )()  # fmt: skip
            return parts, None if norms is None else norms[0]

        projects = source.projection is not None
        pair = source.second is not None or any(half.second is not None for half in halves)
        rotates, stored = rotation is not None, None if keys is None or out is None else out.dtype
        kind = kind_of(len(halves), measures=measures, rotates=rotates, keys=keys is not None, pair=pair)
        return self.run(
            name, run, kind=kind, precision=precision, halves=len(halves), projects=projects, joins=joins,
            stores=out is not None, keys=stored, pair=pair,
        )  # fmt: skip


def source_of(pixels: Tensor, projection: Tensor | None, second: Tensor | None = None) -> Source:
    """What the encoder takes (B, n, Cin), of any strides, as the kernels read it; `second` is another's projection."""
    from anyup.kernels.pixel_encoder_passes import Source, map_source

    if projection is None:
        return map_source(pixels.contiguous())
    return Source(pixels, projection.contiguous(), None if second is None else second.contiguous())


class Encoder:
    """The passes over the images' pixels up to the last normalisation, whose statistics are known then.

    `parts` are the statistics of x0, (B, 3, programs, 8), where they are known before. Of float32 pixels the parameters
    may be of any dtype. With the parameters of a `second` encoder, which projects too, a pass is one launch for both.
    """

    def __init__(
        self,
        pixels: Tensor,
        parameters: EncoderParameters,
        parts: Tensor | None = None,
        *,
        second: EncoderParameters | None = None,
    ) -> None:
        from anyup.kernels.pixel_encoder_passes import map_source

        _, height, width, inputs = pixels.shape
        self._size = (height, width)
        self._dim = parameters.block1.weight1.shape[0]
        self._dtype, self._device = pixels.dtype, pixels.device
        inputs = 0 if parameters.projection is None else inputs
        weights = parameters.block1.weight1.dtype
        self._kernels = Kernels(self._dtype, self._device, self._dim, inputs, weights)
        self._parameters, self._second = parameters, second
        # A view where rows follow each other.
        source = source_of(pixels.flatten(1, 2), parameters.projection, None if second is None else second.projection)
        measure = self._kernels.measure
        # A pass begins with the pixels that the one before it took last; a pair follows the passes of one encoder.
        back = second is not None
        if parts is None:
            parts, _ = measure(source, (), is_reversed=back)
        first = self._half(0, parts)
        parts, norm = measure(source, (first,), is_reversed=not back)
        first = first._replace(norm=norm)
        self._map = pixels.new_empty(source.images, height * width, self._dim)
        parts, _ = measure(source, (first, self._half(1, parts)), out=self._map, is_reversed=back)
        self._stored = map_source(self._map)
        third = self._half(2, parts)
        parts, norm = measure(self._stored, (third,), is_reversed=not back)
        self._halves = third._replace(norm=norm), self._half(3, parts)

    def apart(self) -> tuple[Encoder, Encoder]:
        """Each of two encoders for itself."""
        assert self._second is not None
        images = len(self._map) // 2
        return self._some(slice(images), self._parameters), self._some(slice(images, None), self._second)

    def result(self, output_size: tuple[int, int], frequencies: Tensor | None = None) -> Tensor:
        """(B, *output_size, D), rotated where there are frequencies."""
        shrinks = all(length <= whole for length, whole in zip(output_size, self._size, strict=True))
        if frequencies is None and output_size != self._size and shrinks:
            return self.pooled(output_size)
        return averaged(self.whole(frequencies), output_size)

    def whole(self, frequencies: Tensor | None = None) -> Tensor:
        """(B, H, W, D), rotated where there are frequencies."""
        rotation = None
        if frequencies is not None:
            rotation = coordinates(self._size, torch.float32, self._device), frequencies.contiguous()
        self._kernels.store(self._stored, self._halves, self._map, rotation=rotation, size=self._size)
        return self.stored

    @property
    def stored(self) -> Tensor:
        """(B, H, W, D), what the last pass has left."""
        return self._map.unflatten(1, self._size)

    def keys(self, projection: KeyProjection, out: Tensor) -> None:
        """Normalised and projected, of float32 into `out` (B, H, W, D), of any dtype."""
        self._kernels.store(self._stored, self._halves, out.flatten(1, 2), keys=projection)

    def pooled(self, cells: tuple[int, int], weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, h, w, D), averaged over cells; a convolution's weight is arranged on the way.

        Of a pair it is the second's; the first's map, the first half of its memory, is encoded in the same launch.
        """
        images = len(self._map) // (1 if self._second is None else 2)
        out = self._map.new_empty(images, *cells, self._dim)
        self._kernels.pool(self._stored, self._halves, out, size=self._size, cells=cells, weights=weights)
        return out

    def _half(self, number: int, parts: Tensor) -> HalfBlock:
        """The half block of a number, its normalisation of what a pass has measured."""
        from anyup.kernels.pixel_encoder_passes import HalfBlock, Join

        def own(parameters: EncoderParameters) -> tuple[Tensor, ...]:
            half = (*parameters.block1, *parameters.block2)[3 * number :][:3]
            return tuple(tensor.contiguous() for tensor in half)

        gain, bias, weight = own(self._parameters)
        if self._second is None:
            return HalfBlock(Join(parts, gain, bias, EPS), weight)
        *norm, second = own(self._second)
        return HalfBlock(Join(parts, gain, bias, EPS, tuple(norm)), weight, second)

    def _some(self, images: slice, parameters: EncoderParameters) -> Encoder:
        """It with some of the images, whose encoder has these parameters."""
        from anyup.kernels.pixel_encoder_passes import Join, map_source

        some = copy.copy(self)
        some._parameters, some._second = parameters, None
        some._map = self._map[images]
        some._stored = map_source(some._map)
        third, last = self._halves
        assert isinstance(third.norm, Tensor) and isinstance(last.norm, Join)
        some._halves = (
            some._half(2, last.norm.parts[images])._replace(norm=third.norm[images]),
            some._half(3, last.norm.parts[images]),
        )
        return some
