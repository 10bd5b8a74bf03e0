"""Convolutions whose sums are short, and as exact as products of float32 are.

A library's own convolution may add up all taps and channels in one chain of a thousand terms and more; in several of
them, added at the end, a float32 result is two to four times as exact. And cuDNN's takes TF32 unless it is told not to,
whatever precision products are to have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import goes_through_convolution

_FEWEST_TERMS = 128
"""Of a product: taps of fewer channels are put side by side."""

_CHANNELS = 32
"""Of one of oneDNN's convolutions: with fewer there is more to add up afterwards than is gained."""


class Convolution:
    """The cross-correlation with a weight (Cout, Cin, s, s) of pixels whose border is there already."""

    def __init__(self, weight: Tensor) -> None:
        self._size, self._channels = weight.shape[2], weight.shape[1]
        # A traced convolution compares its input's size with a constant to choose an algorithm, and compiles again on
        # the other side of it.
        self._is_library_s = not torch.compiler.is_compiling() and goes_through_convolution(weight)
        if self._is_library_s:
            parts = weight.split(_CHANNELS, dim=1)
            self._weights = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        else:
            taps = weight.permute(2, 3, 1, 0).flatten(0, 1)  # (taps, Cin, Cout)
            self._together = max(1, _FEWEST_TERMS // self._channels)
            self._weights = [part.flatten(0, 1) for part in taps.split(self._together)]

    def __call__(self, padded: Tensor) -> Tensor:
        """(B, H + s - 1, W + s - 1, Cin) in the weight's dtype to (B, H, W, Cout), of which rows may lie apart."""
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
        # Pixels one after the other, as they lie in memory: those of a tap are a run of them. Pixels of the result
        # between two of its rows are made as well, and left out.
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
