"""What a call of the pixel encoder asks for, its parameters, and the checks of what the caller passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anyup.ops.precision import converted, dtype_name

GROUPS = 8
EPS = 1e-5


class BlockParameters(NamedTuple):
    """A residual block y = x + W2 silu(gn2(W1 silu(gn1(x)))) of width D."""

    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor  # (D,)
    weight1: Tensor  # (D, D)
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor  # (D,)
    weight2: Tensor  # (D, D)


class EncoderParameters(NamedTuple):
    """A first projection (None: the input has D channels already) and two residual blocks."""

    projection: Tensor | None  # (D, Cin)
    block1: BlockParameters
    block2: BlockParameters

    def to(self, dtype: torch.dtype) -> EncoderParameters:
        """In a dtype, all of them converted at once."""
        projections = () if self.projection is None else (self.projection,)
        tensors = converted((*self.block1, *self.block2, *projections), dtype)
        half = len(BlockParameters._fields)
        return EncoderParameters(
            tensors[-1] if projections else None,
            BlockParameters(*tensors[:half]),
            BlockParameters(*tensors[half : 2 * half]),
        )


@dataclass(frozen=True)
class PixelEncoderProblem:
    """Everything a backend needs to know to say whether it can run a call."""

    batch: int
    size: tuple[int, int]
    output_size: tuple[int, int]
    input_dim: int
    dim: int
    rotates: bool
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool

    def __str__(self) -> str:
        (height, width), (h, w) = self.size, self.output_size
        pooled = "" if self.size == self.output_size else f" to {h} x {w}"
        return (
            f"{height} x {width}{pooled}, batch {self.batch}, {self.input_dim} to {self.dim} channels, "
            f"{dtype_name(self.dtype)}, {self.device.type}"
        )


def describe(
    pixels: Tensor, dim: int, rotates: bool, output_size: tuple[int, int], needs_gradient: bool
) -> PixelEncoderProblem:
    """The problem that these (checked) arguments pose."""
    batch, height, width, input_dim = pixels.shape
    return PixelEncoderProblem(
        batch=batch,
        size=(height, width),
        output_size=output_size,
        input_dim=input_dim,
        dim=dim,
        rotates=rotates,
        dtype=pixels.dtype,
        device=pixels.device,
        needs_gradient=needs_gradient,
    )


def check(pixels: Tensor, parameters: EncoderParameters, frequencies: Tensor | None) -> None:
    """Raise a ValueError or TypeError that names the argument unless the call makes sense."""
    if pixels.dim() != 4:
        raise ValueError(f"pixels: expected (B, H, W, C), got shape {tuple(pixels.shape)}")
    if not pixels.dtype.is_floating_point:
        raise TypeError(f"pixels: expected a floating-point tensor, got {pixels.dtype}")
    projection, block1, block2 = parameters
    dim = block1.weight1.shape[0]
    width = dim if projection is None else projection.shape[1]
    if pixels.shape[3] != width:
        raise ValueError(f"pixels: expected {width} channels, got {pixels.shape[3]}")
    for name, tensor in (
        ("projection", projection),
        ("frequencies", frequencies),
        *zip(block1._fields, block1, strict=True),
        *zip(block2._fields, block2, strict=True),
    ):
        if tensor is None:
            continue
        if tensor.dtype != pixels.dtype or tensor.device != pixels.device:
            raise ValueError(
                f"{name}: expected {pixels.dtype} on {pixels.device} like the pixels, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The group normalisation of (B, D, H, W), as torch computes it."""
    # Contiguous, because torch's CPU kernel for channels last subtracts squares and loses a variance that is small
    # beside the mean. Not F.group_norm, which refuses a group of a single value.
    return torch.group_norm(x.contiguous(), GROUPS, weight, bias, EPS)
