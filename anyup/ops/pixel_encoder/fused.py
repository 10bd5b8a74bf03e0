"""The pixel encoder in Triton kernels: one map alive beside the input, products made again instead of being stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.cuts import run_first
from anyup.ops.dispatch import WITHOUT_GRADIENT
from anyup.ops.kernel_device import device_reasons, discouraged, dot_precision, dtype_reasons, installed, target
from anyup.ops.pixel_encoder.problem import EPS, EncoderParameters, PixelEncoderProblem

if TYPE_CHECKING:
    from anyup.kernels.pixel_encoder_passes import HalfBlock, Source

__all__ = ["discouraged", "forward", "unsupported"]

Result = TypeVar("Result")


def unsupported(problem: PixelEncoderProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    from anyup.kernels.pixel_encoder_config import MOST_CHANNELS

    if problem.needs_gradient:
        reasons.append(f"a gradient is wanted, the kernels have no backward pass: {WITHOUT_GRADIENT}")
    reasons += dtype_reasons("pixels are", problem.dtype)
    for name, channels in (("map", problem.dim), ("input", problem.input_dim)):
        if channels > MOST_CHANNELS:
            reasons.append(f"the {name} has {channels} channels, at most {MOST_CHANNELS} (they stay on the chip)")
    return reasons


def forward(
    pixels: Tensor, parameters: EncoderParameters, *, frequencies: Tensor | None, output_size: tuple[int, int]
) -> Tensor:
    """(B, H, W, Cin) -> (B, *output_size, D); one map (B, H, W, D) is allocated, and the pooled one."""
    size = (pixels.shape[1], pixels.shape[2])
    if 0 in pixels.shape:
        return pixels.new_zeros(pixels.shape[0], *output_size, parameters.block1.weight1.shape[0])
    encoder = _Encoder(pixels, parameters)
    if frequencies is None and output_size != size and output_size[0] <= size[0] and output_size[1] <= size[1]:
        return encoder.pooled(output_size)
    out = encoder.whole(frequencies)
    if output_size == size:
        return out
    return F.adaptive_avg_pool2d(out.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Kernels:
    """What the kernels are compiled for: maps of so many channels, of an input of so many (0: a map).

    Torch's precision of products is read once, not at each of some forty launches of a forward.
    """

    dtype: torch.dtype
    device: torch.device
    dim: int
    inputs: int
    precision: str = field(default_factory=dot_precision)

    def run(self, name: str, run: Callable[[Any], Result], *, kind: str = "pass", **known: Hashable) -> Result:
        """What `run` gives with the first cut that the device takes; `known` is what else it is compiled for."""
        from anyup.kernels.pixel_encoder_config import encoder_configs

        kernel = ("pixel_encoder", name, self.device, self.dtype, self.dim, self.inputs, self.precision)
        configs = encoder_configs(kind, self.dtype, target(self.device))
        return run_first(run, configs, kernel=(*kernel, kind, *known.items()))

    def measure(
        self,
        source: Source,
        halves: tuple[HalfBlock, ...],
        use: Callable[[Tensor, int], Result],
        *,
        out: Tensor | None = None,
    ) -> Result:
        """A pass's statistics, of each tile as (B, tiles, 2, D padded), and a tile's pixels, as `use` takes them.

        What the pass makes goes to `out`. Where `use` launches what a device refuses, another cut of the pass is tried.
        """
        from anyup.kernels.pixel_encoder_passes import allocate_parts, plan_pass

        batch, count = source.pixels.shape[:2]

        def run(config: Any) -> Result:
            parts = allocate_parts(batch, count, self.dim, config, self.device)
            plan_pass(
                source, halves,
                parts=parts, out=out, size=(1, count), precision=self.precision, config=config,
            )()  # fmt: skip
            return use(parts, config.pixels)

        projects = source.projection is not None
        return self.run("measure", run, halves=len(halves), projects=projects, stores=out is not None)

    def store(
        self,
        source: Source,
        halves: tuple[HalfBlock, ...],
        out: Tensor,
        *,
        tables: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """A pass whose result goes to `out`, rotated where there are tables, of a map of that size."""
        from anyup.kernels.pixel_encoder_passes import plan_pass

        shape = (1, source.pixels.shape[1]) if size is None else size

        def run(config: Any) -> None:
            plan_pass(
                source, halves,
                parts=None, out=out, tables=tables, size=shape, precision=self.precision, config=config,
            )()  # fmt: skip

        # A launch that fails has written nothing: the next cut finds the map as it was.
        kind = "pass" if tables is None else "rotate"
        self.run("store", run, kind=kind, halves=len(halves), projects=source.projection is not None)


def source_of(pixels: Tensor, projection: Tensor | None) -> Source:
    """What the encoder takes (B, n, Cin), of any strides, as the kernels read it."""
    from anyup.kernels.pixel_encoder_passes import Source, map_source

    return map_source(pixels.contiguous()) if projection is None else Source(pixels, projection.contiguous())


class _Encoder:
    """The passes over the images' pixels up to the last normalisation, whose statistics are known then."""

    def __init__(self, pixels: Tensor, parameters: EncoderParameters) -> None:
        from anyup.kernels.pixel_encoder_passes import HalfBlock, map_source

        batch, height, width, inputs = pixels.shape
        self._size = (height, width)
        self._dim = parameters.block1.weight1.shape[0]
        self._dtype, self._device = pixels.dtype, pixels.device
        inputs = 0 if parameters.projection is None else inputs
        self._kernels = Kernels(self._dtype, self._device, self._dim, inputs)
        block1, block2 = parameters.block1, parameters.block2
        source = source_of(pixels.flatten(1, 2), parameters.projection)  # a view where rows follow each other
        norm1 = self._measure(source, (), *block1[:2])
        first = HalfBlock(norm1, block1.weight1.contiguous())
        norm2 = self._measure(source, (first,), *block1[3:5])
        self._map = pixels.new_empty(batch, height * width, self._dim)
        second = HalfBlock(norm2, block1.weight2.contiguous())
        norm3 = self._measure(source, (first, second), *block2[:2], out=self._map)
        self._third = HalfBlock(norm3, block2.weight1.contiguous())
        self._stored = map_source(self._map)
        self._norm4 = self._measure(self._stored, (self._third,), *block2[3:5])
        self._weight4 = block2.weight2.contiguous()

    def whole(self, frequencies: Tensor | None) -> Tensor:
        """(B, H, W, D), rotated where there are frequencies."""
        from anyup.kernels.pixel_encoder_passes import HalfBlock

        halves = (self._third, HalfBlock(self._norm4, self._weight4))
        tables = None if frequencies is None else self._angles(frequencies)
        self._kernels.store(self._stored, halves, self._map, tables=tables, size=self._size)
        return self._map.unflatten(1, self._size)

    def _angles(self, frequencies: Tensor) -> Tensor:
        from anyup.kernels.pixel_encoder_config import padded
        from anyup.kernels.pixel_encoder_passes import plan_angles

        shape = (sum(self._size), 2, padded(self._dim))
        tables = torch.empty(shape, dtype=torch.float32, device=self._device)
        run_first(
            lambda _: plan_angles(frequencies.contiguous(), tables, size=self._size)(),
            [None],
            kernel=("pixel_encoder", "angles", self._device, self._dtype, self._dim),
        )
        return tables

    def pooled(self, cells: tuple[int, int]) -> Tensor:
        """(B, h, w, D), averaged over cells."""
        from anyup.kernels.pixel_encoder_config import padded
        from anyup.kernels.pixel_encoder_passes import plan_pool

        means = torch.empty(
            len(self._map), cells[0] * cells[1], 2, padded(self._dim), dtype=torch.float32, device=self._device
        )

        def run(config: Any) -> None:
            plan_pool(
                self._stored, self._third, self._norm4, means,
                size=self._size, cells=cells, precision=self._kernels.precision, config=config,
            )()  # fmt: skip

        self._kernels.run("pool", run, kind="pool")
        passed, activated = means[..., : self._dim].unbind(2)
        return (passed + activated @ self._weight4.float().T).to(self._dtype).unflatten(1, cells)

    def _measure(
        self,
        source: Source,
        halves: tuple[HalfBlock, ...],
        weight: Tensor,
        bias: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """The normalisation (B, 3, D padded) of what a pass makes, which goes to `out`."""
        from anyup.kernels.pixel_encoder_config import padded
        from anyup.kernels.pixel_encoder_statistics import plan_statistics

        batch, count = source.pixels.shape[:2]
        norm = torch.empty(batch, 3, padded(self._dim), dtype=torch.float32, device=self._device)

        def join(parts: Tensor, pixels: int) -> None:
            for launch in plan_statistics(
                parts, weight.contiguous(), bias.contiguous(), norm, count=count, pixels=pixels, eps=EPS
            ):
                launch()

        self._kernels.measure(source, halves, join, out=out)
        return norm
