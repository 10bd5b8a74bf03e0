"""What a call of the query projection asks for, its parameters, and the checks of what the caller passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anyup.ops.precision import dtype_name


class ProjectionParameters(NamedTuple):
    """A 3x3 convolution, an RMS normalisation and a linear projection, all of width D."""

    convolution: Tensor  # (D, D, 3, 3)
    norm: Tensor  # (D,)
    weight: Tensor  # (D, D)
    bias: Tensor  # (D,)


@dataclass(frozen=True)
class QueryProjectionProblem:
    """Everything a backend needs to know to say whether it can run a call."""

    batch: int
    size: tuple[int, int]
    dim: int
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{height} x {width}, batch {self.batch}, {self.dim} channels, {dtype_name(self.dtype)}, {self.device.type}"
        )


def describe(encoded: Tensor, needs_gradient: bool) -> QueryProjectionProblem:
    """The problem that these (checked) tensors pose."""
    batch, height, width, dim = encoded.shape
    return QueryProjectionProblem(batch, (height, width), dim, encoded.dtype, encoded.device, needs_gradient)


def check(encoded: Tensor, parameters: ProjectionParameters) -> None:
    """Raise a ValueError or TypeError that names the argument unless the call makes sense."""
    dim = parameters.weight.shape[0]
    if encoded.dim() != 4 or encoded.shape[3] != dim:
        raise ValueError(f"encoded: expected (B, H, W, {dim}), got shape {tuple(encoded.shape)}")
    for name, tensor in zip(parameters._fields, parameters, strict=True):
        if tensor.dtype != encoded.dtype or tensor.device != encoded.device:
            raise ValueError(
                f"{name}: expected {encoded.dtype} on {encoded.device} like the encoded image, "
                f"got {tensor.dtype} on {tensor.device}"
            )
