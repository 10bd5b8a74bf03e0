"""The gradients of the pixel encoder in Triton kernels.

The maps before the second, third and fourth normalisation are made again, by the passes of the forward, and stored.
Then two kernels go back through each half block (`kernels/pixel_encoder_backward.py`). Seven maps of D channels are
alive, in the dtype of the pixels; eight where the weights' gradients are made by a third.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.kernel_device import multiprocessors
from anyup.ops.linear import sum_of_outer_products
from anyup.ops.memory import PIXELS_AT_A_TIME
from anyup.ops.pixel_encoder.arguments import EPS, BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.fused_passes import Kernels, source_of
from anyup.ops.pixel_encoder.rotary import coordinates
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.ops.precision import accumulator_dtype, converted
from anyup.ops.query_projection.fused import sums_of_outer_products
from anyup.ops.tables import made_once

if TYPE_CHECKING:
    from anyup.kernels.launch import Launch
    from anyup.kernels.pixel_encoder_backward import Behind
    from anyup.kernels.pixel_encoder_config import EncoderConfig


class _Found(NamedTuple):
    """What the half blocks leave: of the first one the gradient (B, n, D) of its normalised map, and what finishes it.

    Where the first projection is square, its gradient is the last of the products, and `back` the pixels'.
    """

    back: Tensor
    behind: Behind
    totals: Tensor  # (4, B, 2, D) float32, the gradients of each normalisation's bias and weight
    products: Tensor  # (4 or 5, D, D) float32, of the weights


class _Stage(NamedTuple):
    """A half block y = W silu(gn(x)), with the map x that it takes and the map's statistics."""

    pixels: Tensor  # (B, n, D)
    unit: Tensor  # (B, 3, D padded), what normalises x, without weight and bias
    gain: Tensor  # (D,)
    bias: Tensor  # (D,)
    weight: Tensor  # (D, D)


def backward(
    grad: Tensor,
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    """The gradients of the pixels, the parameters and the frequencies, of a result (B, *output_size, D)."""
    batch, height, width, _ = pixels.shape
    some = max(1, PIXELS_AT_A_TIME // (height * width))
    some = -(-batch // -(-batch // some))  # groups of about one size
    groups = [slice(first, min(first + some, batch)) for first in range(0, batch, some)]
    found = [_Images(pixels[part], parameters).backward(grad[part], frequencies, output_size) for part in groups]
    parts, sums = zip(*found, strict=True)
    sizes, products, *last = converted([reduce(torch.add, each) for each in zip(*sums, strict=True)], pixels.dtype)
    blocks = [t for k in range(4) for t in (sizes[k, 1], sizes[k, 0], products[k])]
    angles = None if frequencies is None else last.pop()
    projection = None if parameters.projection is None else last.pop() if last else products[4]
    found_parameters = EncoderParameters(projection, BlockParameters(*blocks[:6]), BlockParameters(*blocks[6:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts), found_parameters, angles


class _Images:
    """The encoder of some images' pixels (B, H, W, Cin), made again, on its way back."""

    def __init__(self, pixels: Tensor, parameters: EncoderParameters) -> None:
        self._size = (pixels.shape[1], pixels.shape[2])
        self._flat, self._parameters = pixels.flatten(1, 2), parameters
        self._dtype, self._device = pixels.dtype, pixels.device
        self._dim = parameters.block1.weight1.shape[0]
        inputs = 0 if parameters.projection is None else pixels.shape[3]
        self._kernels = Kernels(self._dtype, self._device, self._dim, inputs, self._dtype)
        self._stages = self._encoded()

    def backward(
        self, grad: Tensor, frequencies: Tensor | None, output_size: tuple[int, int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the pixels, from that of the result, and those of the parameters in float32 or wider.

        These are the normalisations' biases and weights (4, 2, D), the weights (4, D, D) or (5, D, D) with a square
        projection, then the projection's, if it is another, and the frequencies', where they are there.
        """
        last: list[Tensor] = []
        grad = self._spread(grad, output_size)
        if frequencies is not None:
            grad, angles = self._unrotated(grad, frequencies)
            last.append(angles)
        # A config that is refused leaves the maps as they were.
        found = self._kernels.run("backward_half", lambda config: self._through(grad, config), kind="half")
        grad_pixels, projection = self._projected(found)
        if projection is not None:
            last.insert(0, projection)
        return grad_pixels, [found.totals.sum(dim=1), found.products, *last]

    def _encoded(self) -> list[_Stage]:
        """The half blocks, in order, with the maps that they take."""
        from anyup.kernels.pixel_encoder_backward import plan_unit_norms
        from anyup.kernels.pixel_encoder_passes import HalfBlock, Join, map_source

        projection, block1, block2 = self._parameters
        batch = len(self._flat)
        first = self._flat.contiguous()
        if projection is not None:
            first = torch.matmul(first, projection.T)
        source = source_of(self._flat, projection)
        kernels, dim, device = self._kernels, self._dim, self._device
        ones, zeros = made_once(
            ("ones and zeros", dim), device, lambda: (torch.ones(dim, device=device), torch.zeros(dim, device=device))
        )
        maps = [first, *(torch.empty_like(first) for _ in range(3))]
        halves = [[t.contiguous() for t in half] for block in (block1, block2) for half in (block[:3], block[3:])]
        blocks: list[HalfBlock] = []
        parts = [kernels.measure(source, ())[0]]
        for index, (gain, bias, weight) in enumerate(halves):
            blocks.append(HalfBlock(Join(parts[index], gain, bias, EPS), weight))
            if index == 3:
                break
            into = blocks[-1:] if index != 1 else blocks
            measured, norm = kernels.measure(source, tuple(into), out=maps[index + 1])
            parts.append(measured)
            blocks[-1] = blocks[-1]._replace(norm=norm)
            if index == 1:
                source, blocks = map_source(maps[2]), []
        self._last_block = source, tuple(blocks)
        units = first.new_empty(4, batch, 3, self._padded, dtype=torch.float32)
        self._run("unit_norms", plan_unit_norms(parts, ones, zeros, units, eps=EPS))
        return [_Stage(x, unit, *half) for x, unit, half in zip(maps, units, halves, strict=True)]

    @property
    def _padded(self) -> int:
        from anyup.kernels.products import padded

        return padded(self._dim)

    def _through(self, grad: Tensor, config: EncoderConfig) -> _Found:
        """Back through the half blocks, and through a projection of as many channels."""
        from anyup.kernels.pixel_encoder_backward import Behind, Normalised, plan_half, plan_means

        batch, count, dim = grad.shape
        programs = config.programs(-(-count // config.pixels), batch, multiprocessors(self._device))
        number = 4 + self._is_square
        held = grad.new_empty(number, batch, programs, dim, dim, dtype=torch.float32) if config.joins else None
        apart: list[Tensor] = [grad] * number
        totals = grad.new_empty(4, batch, 2, dim, dtype=torch.float32)
        sums = totals.new_empty(batch, programs, 2, dim)
        active = None if config.joins else torch.empty_like(grad)

        def go(
            index: int, back: Tensor, behind: Behind | None, x: Tensor, before: Normalised | None, weight: Tensor,
            passed: Tensor | None,
        ) -> Tensor:  # fmt: skip
            # Where a product with the gradient of y is still to be made, that takes the place of what it is made of.
            passed = back if passed is None and behind is not None and held is None else passed
            out = back if held is not None and behind is not None else torch.empty_like(grad)
            plan_half(
                back, behind, x, before, weight, out, products=None if held is None else held[index],
                active=None if before is None else active, passed=passed, programs=programs,
                precision=self._kernels.precision, config=config,
            )()  # fmt: skip
            if held is None:
                left, right = back if passed is None else passed, x if before is None or active is None else active
                apart[index] = sums_of_outer_products(self._as_image(left), self._as_image(right))[0]
            return out

        behind: Behind | None = None
        back = residual = grad
        for index in (3, 2, 1, 0):
            stage, means = self._stages[index], sums.new_empty(batch, 2, self._padded)
            passed = None
            if index == 1:
                residual = passed = back if held is None else torch.empty_like(grad)
            before = Normalised(stage.unit, stage.gain, stage.bias, sums)
            back = go(index, back, behind, stage.pixels, before, stage.weight, passed)
            self._run("means", plan_means(sums, stage.gain, means, totals[index], count=count))
            behind = Behind(stage.pixels, stage.unit, stage.gain, means, residual if index in (2, 0) else None)
        assert behind is not None
        if self._is_square:
            projection = self._parameters.projection
            assert projection is not None
            back = go(4, back, behind, self._flat.contiguous(), None, projection.contiguous(), None)
        return _Found(back, behind, totals, torch.stack(apart) if held is None else held.sum(dim=(1, 2)))

    @property
    def _is_square(self) -> bool:
        projection = self._parameters.projection
        return projection is not None and projection.shape[1] == self._dim

    def _projected(self, found: _Found) -> tuple[Tensor, Tensor | None]:
        """The gradients of the pixels (B, H, W, Cin) and, if `_through` has not made it, of the first projection."""
        from anyup.kernels.pixel_encoder_backward import plan_thin, plan_total

        projection, back = self._parameters.projection, found.back
        if self._is_square:
            return self._as_image(back), None
        if projection is None or projection.shape[1] > MOST_CHANNELS:
            self._run("total", plan_total(back, found.behind, back))
            if projection is None:
                return self._as_image(back), None
            left, right = back.flatten(0, 1).float(), self._flat.flatten(0, 1).float()
            return self._as_image(torch.matmul(back, projection)), sum_of_outer_products(left, right)
        out = torch.empty_like(self._flat, memory_format=torch.contiguous_format)
        batch, count, inputs = out.shape

        def run(config: EncoderConfig) -> Tensor:
            programs = config.programs(-(-count // config.pixels), batch, multiprocessors(self._device))
            products = out.new_empty(batch, programs, self._dim, inputs, dtype=torch.float32)
            plan_thin(
                back, found.behind, self._flat, projection.contiguous(), out, products,
                precision=self._kernels.precision, config=config,
            )()  # fmt: skip
            return products

        products = self._kernels.run("backward_thin", run, kind="thin")
        return self._as_image(out), products.sum(dim=(0, 1), dtype=accumulator_dtype(self._device))

    def _spread(self, grad: Tensor, output_size: tuple[int, int]) -> Tensor:
        """The gradient (B, n, D) of the unpooled result."""
        if output_size == self._size:
            return grad.flatten(1, 2).contiguous()
        from anyup.kernels.pixel_encoder_backward import plan_spread

        whole = grad.new_empty(self._flat.shape[0], self._flat.shape[1], self._dim, dtype=self._dtype)
        self._run("spread", plan_spread(grad.contiguous(), whole, size=self._size))
        return whole

    def _unrotated(self, grad: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients (B, n, D) of what was rotated, and (2, D) of the frequencies."""
        from anyup.kernels.pixel_encoder_backward import TILE, plan_rotation

        encoded = torch.empty_like(grad)
        self._kernels.store(*self._last_block, encoded)
        batch, count, dim = grad.shape
        sums = torch.empty(batch, -(-count // TILE), 2, dim, dtype=torch.float32, device=self._device)
        places = coordinates(self._size, torch.float32, self._device)
        out = torch.empty_like(grad)
        launch = plan_rotation(
            grad, encoded, places, frequencies.contiguous(), out, sums, size=self._size, form=self._kernels.form
        )
        self._run("rotation", launch)
        return out, sums.sum(dim=(0, 1))

    def _run(self, name: str, launch: Launch) -> None:
        """Launch a kernel that has one config."""
        # What it is compiled for.
        kernel = ("pixel_encoder", f"backward_{name}", self._device, self._dtype, self._dim, self._kernels.precision)
        run_first(lambda _: launch(), [None], kernel=kernel)

    def _as_image(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, self._size)
