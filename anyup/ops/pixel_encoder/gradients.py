"""The gradients of the pixel encoder in plain PyTorch, tile by tile.

A tile is some rows of one image, or as many whole images as it has room for: all products and sums are theirs together.
Nothing is kept from the forward pass: the maps before the second, third and fourth normalisation are made again. Once
some sums are known, the gradient of a normalisation is a scale and a shift of each channel too, of the gradient and of
the map. So a half block y = W silu(gn(x)) takes one pass over the tiles: it finishes what the last pass left of the
gradient of y, goes through W and silu, stores the result, and takes the sums that the next pass waits for. Two maps of
gradients are alive beside the three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import linear, linear_backward, sum_of_outer_products
from anyup.ops.memory import empty
from anyup.ops.parallel import on_one_thread
from anyup.ops.pixel_encoder.arguments import EPS, GROUPS, BlockParameters, EncoderParameters
from anyup.ops.pixel_encoder.cells import Cells
from anyup.ops.pixel_encoder.rotary import Rotation
from anyup.ops.pixel_encoder.statistics import Statistics
from anyup.ops.pixel_encoder.thin import MOST_CHANNELS
from anyup.ops.pixel_encoder.tiles import map_groups, map_pixels, measured
from anyup.ops.precision import accumulator_dtype, working_dtype
from anyup.ops.tables import made_once

Result = TypeVar("Result")
Source = Callable[[slice], Tensor]
"""Some of the pixels of each image's map, (k, n, D), in the dtype worked in."""

_FEW_PIXELS = 256
"""A map of at most as many is worked on in the accumulator's dtype.

A normalisation over few values, and more so its gradient, is what is left of nearly equal terms, to the point where a
group of two keeps a thousandth of its digits. On so small a map the wider arithmetic takes no time.
"""


def backward(
    grad: Tensor,
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    """The gradients of the pixels, the parameters and the frequencies, of a result (B, *output_size, D)."""
    if not pixels.numel():
        return _zeros(pixels, parameters, frequencies)
    batch, height, width, inputs = pixels.shape
    size, count = (height, width), height * width
    wide = dtype_of_work(pixels.dtype, size, pixels.device)
    rotation = None if frequencies is None else Rotation(size, frequencies)
    spread = None if output_size == size else Spread(size, output_size, wide, pixels.device)
    grad_pixels = empty(tuple(pixels.shape), pixels)
    flat, result, wider = pixels.reshape(batch, count, inputs), grad_pixels.flatten(1, 2), parameters.to(wide)

    def differentiate(some: slice) -> list[Tensor | None]:
        images = _Images(flat[some], wider, size, wide)
        return images.backward(grad[some], rotation, spread, result[some])

    found = map_groups(differentiate, batch, count, pixels.device)
    projection, angles, *blocks = (_total(each, pixels.dtype) for each in zip(*found, strict=True))
    halves = (BlockParameters(*blocks[:6]), BlockParameters(*blocks[6:]))  # type: ignore[arg-type]
    return grad_pixels, EncoderParameters(projection, *halves), angles


def _total(groups: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """The sum over the groups of images of what each gives, if they do."""
    found = [each for each in groups if each is not None]
    return torch.stack(found).sum(dim=0).to(dtype) if found else None


def _zeros(
    pixels: Tensor, parameters: EncoderParameters, frequencies: Tensor | None
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    blocks = (BlockParameters(*map(torch.zeros_like, block)) for block in parameters[1:])
    projection, grad_frequencies = (None if t is None else torch.zeros_like(t) for t in (parameters[0], frequencies))
    return torch.zeros_like(pixels), EncoderParameters(projection, *blocks), grad_frequencies


def dtype_of_work(dtype: torch.dtype, size: tuple[int, int], device: torch.device) -> torch.dtype:
    """What a map of that size is worked on in, forward and backward."""
    return accumulator_dtype(device) if size[0] * size[1] <= _FEW_PIXELS else working_dtype(dtype)


class Spread:
    """The transpose of adaptive average pooling from `size` to `output_size`, some rows of the map at a time."""

    def __init__(
        self, size: tuple[int, int], output_size: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        def make() -> list[Tensor]:
            """The weight of each cell's gradient in each position of an axis: (length, cells)."""
            inside = (
                Cells(0, cells, cells, length).indicator(dtype, device).T
                for length, cells in zip(size, output_size, strict=True)
            )
            return [axis / axis.sum(dim=0) for axis in inside]

        self._rows, self._columns = made_once(("spread", size, output_size, dtype), device, make)

    def over_columns(self, grid: Tensor) -> Tensor:
        """(..., h, w, D) to (..., h, W, D)."""
        return self._columns @ grid

    def over_rows(self, wide: Tensor, pixels: slice) -> Tensor:
        """(..., h, W, D) to these pixels, whole rows of the map: (..., n, D)."""
        width, dim = wide.shape[-2:]
        rows = self._rows[self._of(pixels, width)] @ wide.flatten(-2)
        return rows.unflatten(-1, (width, dim)).flatten(-3, -2)

    def pool_rows(self, x: Tensor, pixels: slice) -> Tensor:
        """What these pixels (..., n, D), whole rows, add to the map pooled along its columns: (..., h, W, D)."""
        width = self._columns.shape[0]
        rows = x.unflatten(-2, (-1, width)).flatten(-2)
        return (self._rows[self._of(pixels, width)].T @ rows).unflatten(-1, (width, -1))

    def pool_columns(self, wide: Tensor) -> Tensor:
        """(..., h, W, D) to (..., h, w, D)."""
        return self._columns.T @ wide

    @staticmethod
    def _of(pixels: slice, width: int) -> slice:
        return slice(pixels.start // width, -(-pixels.stop // width))


class _HalfBlock(NamedTuple):
    """The parameters of y = W silu(gn(x))."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor


class _Gradients(NamedTuple):
    """Of a half block's parameters, in the dtype worked in or wider."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Norm:
    """Some images' group normalisation with known statistics, and what its gradient takes.

    The mean is always subtracted first, which costs a pass: sums of products with values far from zero would cancel.
    """

    center: Tensor  # (k, 1, D), the mean as the dtype worked in has it
    scale: Tensor  # (k, 1, D)
    shift: Tensor  # (k, 1, D)
    mean: Tensor  # (k, D), what the centre leaves of it
    rstd: Tensor  # (k, D)
    weight: Tensor  # (D,)
    count: int  # values of a group

    @staticmethod
    def of(statistics: Statistics, parameters: _HalfBlock, dtype: torch.dtype) -> _Norm:
        """From the statistics of (k, D) channels: each image's are channels of their own."""
        dim = parameters.norm_weight.shape[0]
        each = dim // GROUPS
        mean, variance = (
            t.expand(-1, each).reshape(-1, dim) for t in statistics.of_groups(statistics.mean.numel() // dim)
        )
        rstd = torch.rsqrt(variance + EPS)
        weight, bias = parameters.norm_weight.to(mean.dtype), parameters.norm_bias.to(mean.dtype)
        center = mean.to(dtype)
        mean = mean - center.to(mean.dtype)
        scale = weight * rstd
        shift = bias - mean * scale
        center, scale, shift = (t.to(dtype)[:, None] for t in (center, scale, shift))
        return _Norm(center, scale, shift, mean, rstd, weight, statistics.count * each)

    def of_centered(self, x: Tensor) -> Tensor:
        """Normalise pixels (k, n, D) less the centre."""
        return torch.addcmul(self.shift, x, self.scale)

    def activated(self, x: Tensor) -> Tensor:
        """silu(gn(x)) of pixels (k, n, D)."""
        return F.silu(self.of_centered(x - self.center), inplace=True)

    def backward(self, sum_grad: Tensor, sum_product: Tensor, dtype: torch.dtype) -> tuple[_Pending, Tensor, Tensor]:
        """From each image's sums (k, D) over its pixels of the result's gradient and of its product with centred x.

        Returns how the gradient of x follows, and the gradients of the weight and the bias.
        """
        grad_weight = self.rstd * (sum_product - self.mean * sum_grad)
        mean_grad, mean_product = (self._group_mean(self.weight * t) for t in (sum_grad, grad_weight))
        # rstd (weight grad - mean_grad - normalised mean_product), the normalised x written out.
        slope = -self.rstd.square() * mean_product
        offset = -slope * self.mean - self.rstd * mean_grad
        pending = _Pending(self.scale, slope.to(dtype)[:, None], offset.to(dtype)[:, None])
        return pending, grad_weight.sum(dim=0), sum_grad.sum(dim=0)

    def _group_mean(self, channels: Tensor) -> Tensor:
        groups = channels.unflatten(1, (GROUPS, -1))
        return (groups.sum(dim=2, keepdim=True) / self.count).expand_as(groups).flatten(1)


@dataclass(frozen=True)
class _Pending:
    """The gradient of x, given that of its normalised map: scale * grad + slope * centred x + offset."""

    scale: Tensor  # (k, 1, D), as the others
    slope: Tensor
    offset: Tensor

    def __call__(self, grad: Tensor, centered: Tensor) -> Tensor:
        return torch.addcmul(self.offset, centered, self.slope).addcmul_(grad, self.scale)


class _Images:
    """The pixels (k, n, Cin) of some images, whose maps of `size` are encoded again and differentiated."""

    def __init__(
        self, pixels: Tensor, parameters: EncoderParameters, size: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._pixels = pixels.contiguous()
        self._dtype = dtype
        self._size = size
        projection, block1, block2 = parameters
        self._projection = projection
        halves = (block1[:3], block1[3:], block2[:3], block2[3:])
        self._halves = [_HalfBlock(*half) for half in halves]
        self._dim = block1.weight1.shape[0]
        first = self._first_map()
        norm1 = self._norm(0, first)
        map1, norm2 = self._next(1, first, norm1)
        map2, norm3 = self._next(2, map1, norm2, residual=first)
        map3, norm4 = self._next(3, map2, norm3)
        self._maps, self._norms = (first, map1, map2, map3), (norm1, norm2, norm3, norm4)

    def backward(
        self, grad: Tensor, rotation: Rotation | None, spread: Spread | None, result: Tensor
    ) -> list[Tensor | None]:
        """From the gradient (k, h, w, D) of the images' result: that of the pixels goes to `result` (k, n, Cin).

        Returns the gradients of the projection, of the frequencies and of the blocks' parameters in order.
        """
        stored = self._empty()
        incoming: Source
        grad_frequencies: Tensor | None = None
        if rotation is None and spread is not None:
            wide = spread.over_columns(grad.to(self._dtype))

            def incoming(tile: slice) -> Tensor:
                return spread.over_rows(wide, tile)

            pending, last = self._pooled_half(grad.to(self._dtype), spread, stored)
        else:
            grad = self._whole(grad, spread)
            if rotation is not None:
                grad, grad_frequencies = self._unrotated(grad, rotation)

            def incoming(tile: slice) -> Tensor:
                return grad[:, tile].to(self._dtype)

            pending, last = self._half(3, incoming, stored)
        pending, third = self._half(2, self._after(pending, stored, 3), stored)
        passed = self._empty()
        whole = self._after(pending, stored, 2)

        def second(tile: slice) -> Tensor:
            total = whole(tile).add_(incoming(tile))
            passed[:, tile] = total
            return total

        pending, middle = self._half(1, second, stored)
        pending, start = self._half(0, self._after(pending, stored, 1), stored)
        grad_projection = self._projected(self._after(pending, stored, 0), passed, result)
        return [grad_projection, grad_frequencies, *start, *middle, *third, *last]

    def _projected(self, whole: Source, passed: Tensor, result: Tensor) -> Tensor | None:
        """Backward through the first projection: the pixels' gradient goes to `result`."""
        projection = self._projection
        if projection is None:

            def apply(tile: slice) -> None:
                torch.add(whole(tile), passed[:, tile], out=result[:, tile])

            self._map(apply)
            return None
        # What one channel of the image adds to all pixels' gradients nearly cancels in the norm behind it.
        wide = accumulator_dtype(result.device) if projection.shape[1] <= MOST_CHANNELS else self._dtype

        def go(tile: slice) -> Tensor:
            total, pixels = whole(tile).add_(passed[:, tile]), self._pixels[:, tile].to(self._dtype)
            if wide == self._dtype:
                grad, grad_weight = linear_backward(total.flatten(0, 1), pixels.flatten(0, 1), projection)
                result[:, tile] = grad.view_as(pixels)
                return grad_weight
            result[:, tile] = total @ projection
            return total.flatten(0, 1).to(wide).T @ pixels.flatten(0, 1).to(wide)

        return torch.stack(self._map(go)).sum(dim=0)

    def _first_map(self) -> Source:
        projection = self._projection
        if projection is None:
            return lambda tile: self._pixels[:, tile].to(self._dtype)
        if projection.shape[1] <= MOST_CHANNELS:
            return lambda tile: F.linear(self._pixels[:, tile].to(self._dtype), projection)
        stored = self._empty()

        def project(tile: slice) -> None:
            stored[:, tile] = _linear(self._pixels[:, tile].to(self._dtype), projection)

        self._map(project)
        return lambda tile: stored[:, tile]

    def _next(self, index: int, source: Source, norm: _Norm, residual: Source | None = None) -> tuple[Source, _Norm]:
        """The map behind the half block of that number, and its norm."""
        weight, stored = self._halves[index - 1].weight, self._empty()

        def go(tile: slice) -> Tensor:
            made = _linear(norm.activated(source(tile)), weight)
            if residual is not None:
                made += residual(tile)
            stored[:, tile] = made
            return made

        return (lambda tile: stored[:, tile]), self._norm(index, go)

    def _norm(self, index: int, source: Source) -> _Norm:
        """Of the map that it takes."""
        shape = (*self._pixels.shape[:2], self._dim)
        statistics = measured(source, shape, self._dtype, self._pixels.device, self._size[1])
        with on_one_thread():
            return _Norm.of(statistics, self._halves[index], self._dtype)

    def _half(self, index: int, incoming: Source, stored: Tensor) -> tuple[_Pending, _Gradients]:
        """Backward through a half block: the gradient of its normalised map goes to `stored`."""
        norm, weight = self._norms[index], self._halves[index].weight

        def go(tile: slice) -> tuple[Tensor, Tensor, Tensor]:
            x = self._center(index, tile)
            normed = norm.of_centered(x)
            grad, activated = incoming(tile).flatten(0, 1), F.silu(normed).flatten(0, 1)
            grad, grad_weight = linear_backward(grad, activated, weight)
            return (grad_weight, *self._activated(grad.view_as(x), normed, x, stored[:, tile]))

        return self._sums(norm, self._map(go))

    def _pooled_half(self, grad: Tensor, spread: Spread, stored: Tensor) -> tuple[_Pending, _Gradients]:
        """The last half block, where its convolution runs behind the pooling: on the small grid (k, h, w, D)."""
        norm, weight = self._norms[3], self._halves[3].weight
        cells = grad.reshape(-1, self._dim)
        wide = spread.over_columns(linear(cells, weight.T.contiguous()).view_as(grad))

        def go(tile: slice) -> tuple[Tensor, Tensor, Tensor]:
            x = self._center(3, tile)
            normed = norm.of_centered(x)
            pooled = spread.pool_rows(F.silu(normed), tile)
            return (pooled, *self._activated(spread.over_rows(wide, tile), normed, x, stored[:, tile]))

        tiles = self._map(go)
        pooled = spread.pool_columns(torch.stack([tile[0] for tile in tiles]).sum(dim=0))
        pending, (grad_norm, grad_bias, _) = self._sums(norm, tiles)
        grad_weight = sum_of_outer_products(cells, pooled.reshape(-1, self._dim))
        return pending, _Gradients(grad_norm, grad_bias, grad_weight)

    @staticmethod
    def _activated(grad: Tensor, normed: Tensor, centered: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Store the gradient of the normalised map, and give its sum and that of its product with centred x.

        `grad` is used up.
        """
        torch.ops.aten.silu_backward.grad_input(grad, normed, grad_input=stored)
        return stored.sum(dim=1), torch.mul(stored, centered, out=grad).sum(dim=1)

    def _sums(self, norm: _Norm, tiles: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[_Pending, _Gradients]:
        with on_one_thread():
            weights, sums, products = (torch.stack(t) for t in zip(*tiles, strict=True))
            wide = norm.mean.dtype
            sums, products = (t.to(wide).sum(dim=0) for t in (sums, products))
            pending, grad_norm, grad_bias = norm.backward(sums, products, self._dtype)
            return pending, _Gradients(grad_norm, grad_bias, weights.sum(dim=0))

    def _center(self, index: int, tile: slice) -> Tensor:
        """A tile of a map, less the centre of its norm; so it stays, but for the first map."""
        x, center = self._maps[index](tile), self._norms[index].center
        return x.sub_(center) if index else x - center

    def _after(self, pending: _Pending, stored: Tensor, index: int) -> Source:
        """The gradient of the map that a normalisation took; it is centred by now."""
        return lambda tile: pending(stored[:, tile], self._maps[index](tile) if index else self._center(0, tile))

    def _whole(self, grad: Tensor, spread: Spread | None) -> Tensor:
        """The gradient (k, n, D) of the unpooled result."""
        if spread is None:
            return grad.flatten(1, 2)
        whole, wide = self._empty(), spread.over_columns(grad.to(self._dtype))

        def go(tile: slice) -> None:
            whole[:, tile] = spread.over_rows(wide, tile)

        self._map(go)
        return whole

    def _unrotated(self, grad: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The gradients (k, n, D) of what was rotated, and (2, D) of the frequencies."""
        before, norm, weight = self._empty(), self._norms[3], self._halves[3].weight
        source, residual = self._maps[3], self._maps[2]

        def go(tile: slice) -> Tensor:
            encoded = _linear(norm.activated(source(tile)), weight).add_(residual(tile))
            before[:, tile], grad_frequencies = rotation.backward(grad[:, tile].to(self._dtype), encoded, tile)
            return grad_frequencies

        return before, torch.stack(self._map(go)).sum(dim=0)

    def _empty(self) -> Tensor:
        """A map (k, n, D) in the dtype worked in."""
        like = self._pixels.new_empty(0, dtype=self._dtype)
        return empty((*self._pixels.shape[:2], self._dim), like)

    def _map(self, function: Callable[[slice], Result]) -> list[Result]:
        """The function's result for each tile of whole rows, of all images, in order."""
        return map_pixels(function, self._pixels.shape[1], self._pixels.device, self._size[1])


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of contiguous pixels (k, n, Cin)."""
    return linear(x.flatten(0, 1), weight).view(*x.shape[:2], -1)
