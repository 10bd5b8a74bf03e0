"""The gradients of the pixel encoder in Triton kernels.

The maps before the second, third and fourth normalisation are made again, by the passes of the forward, and stored.
Then four kernels go back through each half block (`kernels/pixel_encoder_backward.py`), and one of the query projection
makes its weight's gradient. Seven maps of D channels are alive, in the dtype of the pixels. What is smaller than a map,
and the pooling, is torch's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from anyup.ops.configs import run_first
from anyup.ops.kernel_device import multiprocessors
from anyup.ops.linear import sum_of_outer_products
from anyup.ops.pixel_encoder.arguments import EPS, BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.fused_passes import Kernels, source_of
from anyup.ops.pixel_encoder.gradients import Spread
from anyup.ops.pixel_encoder.rotary import coordinates
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.ops.precision import accumulator_dtype, converted
from anyup.ops.query_projection.fused import sums_of_outer_products
from anyup.ops.tables import made_once

if TYPE_CHECKING:
    from anyup.kernels.launch import Launch
    from anyup.kernels.pixel_encoder_config import EncoderConfig


class _Stage(NamedTuple):
    """A half block y = W silu(gn(x)), with the map x that it takes and the map's statistics."""

    pixels: Tensor  # (B, n, D)
    unit: Tensor  # (B, 3, D padded), what normalises x, without weight and bias
    gain: Tensor  # (D,)
    bias: Tensor  # (D,)
    weight: Tensor  # (D, D)


_MOST_PIXELS = 2**18
"""Of the images that are worked on at a time, unless one alone has more: they fill a card, and bound the memory."""


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
    some = max(1, _MOST_PIXELS // (height * width))
    groups = [slice(first, min(first + some, batch)) for first in range(0, batch, some)]
    found = [_Images(pixels[part], parameters).backward(grad[part], frequencies, output_size) for part in groups]
    parts, sums = zip(*found, strict=True)
    tensors = sums[0] if len(sums) == 1 else [torch.stack(each).sum(dim=0) for each in zip(*sums, strict=True)]
    tensors = list(converted(tensors, pixels.dtype))
    blocks = BlockParameters(*tensors[:6]), BlockParameters(*tensors[6:12])
    angles = None if frequencies is None else tensors.pop()
    projection = None if parameters.projection is None else tensors.pop()
    return parts[0] if len(parts) == 1 else torch.cat(parts), EncoderParameters(projection, *blocks), angles


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

        These are the blocks' twelve in order, then the projection's and the frequencies', where they are there. What is
        kept of the encoder is used up.
        """
        last: list[Tensor] = []
        grad = self._spread(grad, output_size)
        if frequencies is not None:
            grad, angles = self._unrotated(grad, frequencies)
            last.append(angles)
        found: list[tuple[Tensor, Tensor]] = []
        incoming = passed = grad
        for index in (3, 2, 1, 0):
            stage = self._stages.pop()
            active, out = torch.empty_like(stage.pixels), torch.empty_like(stage.pixels)
            means, totals = self._half(stage, incoming, active, out)
            found.append((sums_of_outer_products(self._as_image(incoming), self._as_image(active))[0], totals))
            incoming = self._total(stage, out, means, passed if index in (2, 0) else None, active)
            if index == 2:
                passed = incoming
        grad_pixels, projection = self._projected(incoming)
        if projection is not None:
            last.insert(0, projection)
        sums = torch.stack([totals for _, totals in reversed(found)]).sum(dim=1)  # (4, 2, D)
        products = [product for product, _ in reversed(found)]
        return grad_pixels, [t for k in range(4) for t in (sums[k, 1], sums[k, 0], products[k])] + last

    def _encoded(self) -> list[_Stage]:
        """The half blocks, in order, with the maps that they take."""
        from anyup.kernels.pixel_encoder_backward import plan_unit_norm
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
        parts, _ = kernels.measure(source, ())
        blocks: list[HalfBlock] = []
        units = []
        for index, (gain, bias, weight) in enumerate(halves):
            units.append(first.new_empty(batch, 3, self._padded, dtype=torch.float32))
            self._run("unit_norm", plan_unit_norm(Join(parts, ones, zeros, EPS), units[-1]))
            blocks.append(HalfBlock(Join(parts, gain, bias, EPS), weight))
            if index == 3:
                break
            into = blocks[-1:] if index != 1 else blocks
            parts, norm = kernels.measure(source, tuple(into), out=maps[index + 1])
            blocks[-1] = blocks[-1]._replace(norm=norm)
            if index == 1:
                source, blocks = map_source(maps[2]), []
        self._last_block = source, tuple(blocks)
        return [_Stage(x, unit, *half) for x, unit, half in zip(maps, units, halves, strict=True)]

    @property
    def _padded(self) -> int:
        from anyup.kernels.products import padded

        return padded(self._dim)

    def _half(self, stage: _Stage, grad: Tensor, active: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Through a half block: m1 and m2 (B, 2, D padded), and the sums (B, 2, D) of both."""
        from anyup.kernels.pixel_encoder_backward import plan_half, plan_means

        batch, count, dim = out.shape
        kernels = self._kernels

        def run(config: EncoderConfig) -> Tensor:
            programs = config.programs(-(-count // config.pixels), batch, multiprocessors(self._device))
            sums = out.new_empty(batch, programs, 2, dim, dtype=torch.float32)
            plan_half(grad, *stage, active, out, sums, precision=kernels.precision, config=config)()
            return sums

        sums = kernels.run("backward_half", run, kind="half")
        means = sums.new_empty(batch, 2, self._padded)
        totals = sums.new_empty(batch, 2, dim)
        self._run("means", plan_means(sums, stage.gain, means, totals, count=count))
        return means, totals

    def _total(self, stage: _Stage, grad: Tensor, means: Tensor, added: Tensor | None, out: Tensor) -> Tensor:
        """The gradient of a half block's map, and what is added to it, in `out`."""
        from anyup.kernels.pixel_encoder_backward import plan_total

        self._run("total", plan_total(grad, stage.pixels, stage.unit, stage.gain, means, added, out))
        return out

    def _projected(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the pixels (B, H, W, Cin) and of the first projection."""
        projection = self._parameters.projection
        if projection is None:
            return self._as_image(total), None
        inputs = projection.shape[1]
        left, right = total.flatten(0, 1), self._flat.flatten(0, 1)
        if inputs == self._dim:
            product = sums_of_outer_products(self._as_image(total), self._as_image(self._flat.contiguous()))[0]
        elif inputs <= MOST_CHANNELS:
            # What one channel of the image adds to all pixels' gradients nearly cancels in the norm behind it.
            wide = accumulator_dtype(self._device)
            product = left.to(wide).T @ right.to(wide)
        else:
            product = sum_of_outer_products(left.float(), right.float())
        return self._as_image(torch.matmul(total, projection)), product

    def _spread(self, grad: Tensor, output_size: tuple[int, int]) -> Tensor:
        """The gradient (B, n, D) of the unpooled result."""
        if output_size == self._size:
            return grad.flatten(1, 2).contiguous()
        spread = Spread(self._size, output_size, torch.float32, self._device)
        count = self._flat.shape[1]
        return spread.over_rows(spread.over_columns(grad.float()), slice(0, count)).to(self._dtype)

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
