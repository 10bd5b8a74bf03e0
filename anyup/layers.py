"""The model's building blocks: parameters under their published names.

The heavy operations run in `anyup.ops`. A residual block that changes the width, and a convolution with a kernel larger
than 1x1, run here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from anyup.cross_attention import setup_cross_attention_block as setup_cross_attention_block  # the published place
from anyup.gaussian_derivatives import gaussian_derivatives
from anyup.ops.convolution import convolve
from anyup.ops.dispatch import Backend
from anyup.ops.feature_unification import unify_features
from anyup.ops.linear import linear
from anyup.ops.pixel_encoder import BlockParameters, EncoderParameters, encode_pixels
from anyup.ops.pixel_encoder.arguments import GROUPS, normalise
from anyup.ops.precision import without_autocast, working_dtype


class ResBlock(nn.Module):
    """Two times norm, SiLU and 1x1 convolution, plus a shortcut: (B, in, H, W) -> (B, out, H, W), channels last."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(GROUPS, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 1, bias=False),
        )
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        norm1, conv1, norm2, conv2 = self._layers()
        x = x.permute(0, 2, 3, 1)
        y = _pointwise(conv1, F.silu(_normalise(norm1, x)))
        y = _pointwise(conv2, F.silu(_normalise(norm2, y)))
        y = y + (_pointwise(self.shortcut, x) if isinstance(self.shortcut, nn.Conv2d) else x)
        return y.permute(0, 3, 1, 2)

    @property
    def keeps_width(self) -> bool:
        """Whether the shortcut is the identity, which the pixel encoder requires."""
        return isinstance(self.shortcut, nn.Identity)

    def parameters_for_op(self) -> BlockParameters:
        """The block's tensors, without a shortcut, in the form that the pixel encoder takes."""
        norm1, conv1, norm2, conv2 = self._layers()
        tensors = (norm1.weight, norm1.bias, conv1.weight, norm2.weight, norm2.bias, conv2.weight)
        return BlockParameters(*(t.flatten(1) if t.dim() == 4 else t for t in tensors))

    def _layers(self) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d]:
        norm1, _, conv1, norm2, _, conv2 = self.block
        return norm1, conv1, norm2, conv2  # type: ignore[return-value]


class BorderConv2d(nn.Conv2d):
    """A convolution (B, in, H, W) -> (B, H, W, out) that pads by reflection, half a kernel on each side.

    Along an axis too short to reflect (a grid of one row, say) it pads by replication. An even kernel gives a row and a
    column more (`encoded_size`).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, H, W, out), in the dtype of `x`."""
        return self._convolved(self.bordered(x)).to(x.dtype)

    def bordered(self, x: Tensor) -> Tensor:
        """(B, in, H, W) with its border, as pixels (B, H + s - 1, W + s - 1, in); a row and a column more if even."""
        half = self.kernel_size[0] // 2
        return _bordered(_bordered(x.permute(0, 2, 3, 1), 1, half), 2, half)

    def part(self, x: Tensor, rows: slice, columns: slice, dtype: torch.dtype, held: tuple[int, int]) -> Tensor:
        """A rectangle of the result, computed in `dtype`; `held` is that of `prepare_part`."""
        size = self.kernel_size[0]
        half, x = size // 2, x.permute(0, 2, 3, 1)
        for dim, span, (offset, length) in ((1, rows, held), (2, columns, (0, x.shape[2]))):
            first, stop = span.start - half, span.stop - half + size - 1
            x = _bordered(x, dim, half, first, stop, offset, length)
        return self._convolved(x.to(dtype)).to(dtype)

    def at(self, x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """The result (P, out) at pixels `rows`, `columns` (P,) of one image (in, H, W), computed in `dtype`."""
        size = self.kernel_size[0]
        index = [
            _bordered(torch.arange(length), 0, size // 2)[position[:, None] + torch.arange(size)]
            for length, position in zip(x.shape[1:], (rows, columns), strict=True)
        ]
        patches = x[:, index[0][:, :, None], index[1][:, None, :]].to(dtype)  # (in, P, size, size)
        wide = working_dtype(dtype)
        weight = self.weight.to(dtype).to(wide).flatten(1)
        return linear(patches.to(wide).transpose(0, 1).flatten(1), weight).to(dtype)

    def _convolved(self, padded: Tensor) -> Tensor:
        """Convolve bordered pixels (B, H, W, in); half precision is computed in float32."""
        wide = working_dtype(padded.dtype)
        with without_autocast(padded.device.type):
            return convolve(padded.to(wide), self.weight.to(padded.dtype).to(wide))


def encoded_size(size: tuple[int, int], kernel_size: int) -> tuple[int, int]:
    """(height, width) of an encoded image: a row and a column more than the image's where the kernel is even."""
    height, width = size
    more = 1 - kernel_size % 2
    return height + more, width + more


def _bordered(
    x: Tensor,
    dim: int,
    half: int,
    first: int | None = None,
    stop: int | None = None,
    offset: int = 0,
    length: int | None = None,
) -> Tensor:
    """The positions `first` to `stop` of an axis, which may lie up to `half` beyond its ends; None: all of them.

    Beyond its ends the axis is reflected, or its last position is repeated where it is too short to reflect. `x` holds
    the axis from `offset` on, of `length` positions in all (None: `x` is all of it), as far as they are needed.
    """
    length = x.shape[dim] if length is None else length
    before = half if first is None else max(-first, 0)
    after = half if stop is None else max(stop - length, 0)
    begin, end = (0, length) if first is None or stop is None else (max(first, 0), min(stop, length))
    inside = x.narrow(dim, begin - offset, end - begin)
    reflects = length > half
    ends = [
        [x.narrow(dim, (step if reflects else 0) - offset, 1) for step in range(before, 0, -1)],
        [x.narrow(dim, length - 1 - (step if reflects else 0) - offset, 1) for step in range(1, after + 1)],
    ]
    return torch.cat((*ends[0], inside, *ends[1]), dim=dim)


class Encoder(nn.Sequential):
    """A convolution without bias and two residual blocks. The pixel encoder runs the blocks, and a 1x1 convolution."""

    def __init__(self, in_channels: int, dim: int, kernel_size: int = 1) -> None:
        super().__init__(BorderConv2d(in_channels, dim, kernel_size), ResBlock(dim, dim), ResBlock(dim, dim))
        self.kernel_size = kernel_size

    def prepare(self, x: Tensor) -> tuple[Tensor, EncoderParameters]:
        """The arguments of `encode_pixels` for an input (B, C, H, W), in the dtype of `x`.

        A convolution that is larger than 1x1 is applied here.
        """
        conv, _, _ = self._layers()
        parameters = self.parameters_for_op(x.dtype)
        return conv(x) if self.kernel_size > 1 else x.permute(0, 2, 3, 1), parameters

    def prepare_part(self, x: Tensor, rows: slice, columns: slice, dtype: torch.dtype, held: tuple[int, int]) -> Tensor:
        """The pixels (rows, columns, C or D) of `prepare` for a rectangle of one image, in `dtype`.

        `x` is (C, h, W): rows of the image. `held` is the number of the first, and the number of all the image has.
        """
        conv, _, _ = self._layers()
        if self.kernel_size == 1:
            return x[:, rows.start - held[0] : rows.stop - held[0], columns].permute(1, 2, 0).to(dtype)
        return conv.part(x[None], rows, columns, dtype, held)[0]

    def prepare_at(self, x: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """The pixels (P, C or D) of `prepare` at `rows`, `columns` (P,) of one image (C, H, W), in `dtype`."""
        conv, _, _ = self._layers()
        if self.kernel_size == 1:
            return x[:, rows, columns].T.to(dtype)
        return conv.at(x, rows, columns, dtype)

    def parameters_for_op(self, dtype: torch.dtype) -> EncoderParameters:
        """The encoder's tensors in a dtype, in the form that the pixel encoder takes."""
        conv, block1, block2 = self._layers()
        projection = conv.weight.flatten(1) if self.kernel_size == 1 else None
        return EncoderParameters(projection, block1.parameters_for_op(), block2.parameters_for_op()).to(dtype)

    def unprojected_parameters_for_op(self) -> tuple[Tensor, EncoderParameters]:
        """The convolution's weight and the tensors of the blocks, in the dtypes of the parameters."""
        conv, block1, block2 = self._layers()
        return conv.weight, EncoderParameters(None, block1.parameters_for_op(), block2.parameters_for_op())

    @property
    def channels_of_op(self) -> tuple[int, int]:
        """The numbers of channels that the pixel encoder takes and returns."""
        conv, _, _ = self._layers()
        return conv.in_channels if self.kernel_size == 1 else conv.out_channels, conv.out_channels

    def forward(
        self,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
        frequencies: Tensor | None = None,
        backend: Backend = None,
    ) -> Tensor:
        """(B, in, H, W) -> (B, D, h, w), channels last in memory, in the dtype of `x`.

        (h, w) is `encoded_size`, or `output_size`, to which the map is pooled; `frequencies` adds the rotary embedding.
        """
        pixels, parameters = self.prepare(x)
        encoded = encode_pixels(pixels, parameters, frequencies=frequencies, output_size=output_size, backend=backend)
        return encoded.permute(0, 3, 1, 2)

    def _layers(self) -> tuple[BorderConv2d, ResBlock, ResBlock]:
        conv, block1, block2 = self
        return conv, block1, block2  # type: ignore[return-value]


def calls_are_unseen(encoder: nn.Module) -> bool:
    """Whether nothing sees or changes an encoder's calls: no hook, no `forward` of its own, no module in its place."""
    hooks = (
        encoder._forward_hooks,
        encoder._forward_pre_hooks,
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
    )
    return type(encoder) is Encoder and "forward" not in vars(encoder) and not any(hooks)


class RoPE(nn.Module):
    """The rotary embedding's learned frequencies (2, D): each channel's angle per unit of row and of column."""

    def __init__(self, dim: int, theta: float = 100.0) -> None:
        super().__init__()
        frequency = theta ** torch.linspace(0, -1, dim // 4)
        both = torch.cat((frequency, frequency))
        freqs = torch.zeros(2, dim)
        freqs[0, : dim // 2] = both
        freqs[1, dim // 2 :] = both
        self.freqs = nn.Parameter(freqs * 2 * math.pi)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        """Rotate positions (B, N, D) by the angles of their coordinates (N, 2), rows and columns from 0 to 1."""
        angle = coords @ self.freqs.to(coords.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


class LearnedFeatureUnification(nn.Module):
    """The filters (M, 1, s, s) that bring features of any number of channels to M."""

    def __init__(self, filters: int, kernel_size: int, init_gaussian_derivatives: bool = False) -> None:
        super().__init__()
        if init_gaussian_derivatives:
            basis = gaussian_derivatives(filters, kernel_size)
        else:
            basis = torch.randn(filters, 1, kernel_size, kernel_size)
        self.basis = nn.Parameter(basis)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, M, h, w)."""
        return unify_features(features, self.basis.to(features.dtype))


def _normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A group normalisation of (B, H, W, C), in the dtype of `x`."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return normalise(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, H, W, C) as a matrix product, in the dtype of `x`."""
    return F.linear(x, conv.weight.to(x.dtype).flatten(1))
