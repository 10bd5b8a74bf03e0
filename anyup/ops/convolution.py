"""Convolutions with short sums, as exact as products of float32 are.

A library's convolution may add up all taps and channels in one sum of more than a thousand terms. Several shorter sums,
added at the end, make a float32 result two to four times as exact. Besides, cuDNN's convolution uses TF32 by default,
whatever precision is set for products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.dispatch import wants_gradient
from anyup.ops.linear import goes_through_convolution, sum_of_outer_products

_FEWEST_TERMS = 128
"""The fewest terms of a product: taps with fewer channels are joined to one product."""

_CHANNELS = 32
"""Input channels of each oneDNN convolution. With fewer, adding up the results costs more than it gains."""


class Convolution:
    """The cross-correlation of padded pixels with a weight (Cout, Cin, s, s)."""

    def __init__(self, weight: Tensor) -> None:
        self._size, self._channels = weight.shape[2], weight.shape[1]
        # Not while traced: torch's convolution compares the input's size with a constant, so that a size on the other
        # side of the constant would recompile.
        self._is_library_s = not torch.compiler.is_compiling() and goes_through_convolution(weight)
        if self._is_library_s:
            parts = weight.split(_CHANNELS, dim=1)
            self._weights = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        else:
            taps = weight.permute(2, 3, 1, 0).flatten(0, 1)  # (taps, Cin, Cout)
            self._together = max(1, _FEWEST_TERMS // self._channels)
            self._weights = [part.flatten(0, 1) for part in taps.split(self._together)]

    def __call__(self, padded: Tensor) -> Tensor:
        """(B, H + s - 1, W + s - 1, Cin) in the weight's dtype to (B, H, W, Cout), whose rows may have gaps between."""
        return self._by_library(padded) if self._is_library_s else self._by_products(padded)

    def _by_library(self, padded: Tensor) -> Tensor:
        image = padded.permute(0, 3, 1, 2)
        first, *rest = zip(image.split(_CHANNELS, dim=1), self._weights, strict=True)
        out = F.conv2d(*first)
        for part, weight in rest:
            out += F.conv2d(part, weight)
        return out.permute(0, 2, 3, 1)

    def _by_products(self, padded: Tensor) -> Tensor:
        batch, rows, stride, _ = padded.shape
        height, width = rows - self._size + 1, stride - self._size + 1
        # With rows joined in memory, the pixels of one tap are a contiguous run. The products also compute the pixels
        # between two rows of the result, which the strides below skip.
        pixels, count = padded.flatten(1, 2), height * stride - (self._size - 1)
        starts = [row * stride + column for row in range(self._size) for column in range(self._size)]
        out: Tensor | None = None
        for index, weight in enumerate(self._weights):
            some = starts[index * self._together :][: self._together]
            runs = [pixels[:, start : start + count] for start in some]
            terms = runs[0] if len(runs) == 1 else torch.cat(runs, dim=2)
            weight = weight.expand(batch, -1, -1)
            out = torch.bmm(terms, weight) if out is None else out.baddbmm_(terms, weight)
        assert out is not None
        channels = out.shape[2]
        strides = (count * channels, stride * channels, channels, 1)
        return out.as_strided((batch, height, width, channels), strides)


def convolve(padded: Tensor, weight: Tensor) -> Tensor:
    """`Convolution(weight)(padded)`, with a gradient of few operations."""
    if torch.compiler.is_compiling() or not wants_gradient(padded, weight):
        return Convolution(weight)(padded)
    found: Tensor = _Convolved.apply(padded, weight)
    return found


class _Convolved(torch.autograd.Function):
    """Its gradients are a product each, of all taps together; autograd would go through the forward's tap by tap."""

    @staticmethod
    def forward(padded: Tensor, weight: Tensor) -> Tensor:
        return Convolution(weight)(padded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, weight = ctx.saved_tensors
        outputs, inputs, size, _ = weight.shape
        grad_padded = grad_weight = None
        _, height, width, _ = grad.shape
        taps = [
            (slice(None), slice(row, row + height), slice(column, column + width))
            for row in range(size)
            for column in range(size)
        ]
        pixels = grad.flatten(0, 2)
        if ctx.needs_input_grad[0]:
            back = (pixels @ weight.permute(0, 2, 3, 1).flatten(1)).view(*grad.shape[:3], size * size, inputs)
            grad_padded = torch.zeros_like(padded)
            for tap, part in zip(taps, back.unbind(3), strict=True):
                grad_padded[tap].add_(part)
        if ctx.needs_input_grad[1]:
            joined = torch.cat([padded[tap] for tap in taps], dim=3).flatten(0, 2)
            product = sum_of_outer_products(pixels, joined)
            grad_weight = product.view(outputs, size, size, inputs).permute(0, 3, 1, 2)
        return grad_padded, grad_weight
