"""Two encoders of the same pixels as one opaque operator: a pass over the pixels is one launch for both.

It has kernels alone: elsewhere the model runs one encoder after the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.dispatch import Backend, BackendFailure, Operation, wants_gradient
from anyup.ops.pixel_encoder import arguments as problems
from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters, PixelEncoderProblem
from anyup.ops.registration import register

OPERATION = Operation(
    "pixel_encoder_pair",
    {"triton": lambda: importlib.import_module("anyup.ops.pixel_encoder.fused_pair")},
    otherwise="one encoder after the other",
)

_BLOCK = len(BlockParameters._fields)


@dataclass(frozen=True)
class PairProblem:
    """Everything a backend needs to know to say whether it can run two encoders at once.

    Attributes:
        encoder: the problem of the second one.
        sizes: to which the first one's result is pooled.
        backend: what was asked for of either.
        device: of the tensors.
    """

    encoder: PixelEncoderProblem
    sizes: tuple[tuple[int, int], ...]
    backend: Backend
    device: torch.device

    def __str__(self) -> str:
        return str(self.encoder)


def describe_pair(
    pixels: Tensor,
    first: EncoderParameters,
    second: EncoderParameters,
    convolution: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    output_size: tuple[int, int],
    backend: Backend = None,
) -> PairProblem:
    """The problem that the arguments of `encode_pair` pose."""
    for parameters in (first, second):
        problems.check(pixels, parameters, None)
    needs_gradient = wants_gradient(pixels, *_flat(first), *_flat(second), convolution)
    problem = problems.describe(pixels, len(second.block1.weight1), False, output_size, needs_gradient)
    return PairProblem(problem, tuple(sizes), backend, pixels.device)


def encode_pair(
    pixels: Tensor,
    first: EncoderParameters,
    second: EncoderParameters,
    convolution: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    output_size: tuple[int, int],
    backend: Backend = None,
) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """Encode each pixel twice: what `encode_pixels` gives for each encoder, or None where `OPERATION` has a reason.

    A launch takes along what the convolution behind the second encoder would need one for.

    Args:
        pixels: (B, H, W, Cin), any strides.
        first, second: the encoders' weights, in the pixels' dtype, with a projection each.
        convolution: (D', D, k, k), its weight, of any dtype.
        sizes: (h, w) to which the first encoder's result is pooled.
        output_size: (H', W') of the second encoder's result.
        backend: as of `encode_pixels`.

    Returns:
        (B, h, w, D) for each of `sizes`, and (B, H', W', D); all contiguous, in the pixels' dtype. Then the
        convolution's weight, in memory as (k, k, D, D').

    Raises:
        ValueError, TypeError: arguments that do not fit together.
    """
    problem = describe_pair(pixels, first, second, convolution, sizes=sizes, output_size=output_size, backend=backend)
    if OPERATION.explain(problem).chosen is None:
        return None
    lengths = [length for size in sizes for length in size]
    try:
        *pooled, whole, arranged = _forward(pixels, _flat(first), _flat(second), convolution, lengths, *output_size)
    except BackendFailure as failure:
        OPERATION.give_up(OPERATION.choose(problem), problem, None, failure)
        return None
    return pooled, whole, arranged


def _flat(parameters: EncoderParameters) -> list[Tensor]:
    assert parameters.projection is not None
    return [parameters.projection, *parameters.block1, *parameters.block2]


def _parameters_of(flat: list[Tensor]) -> EncoderParameters:
    """The inverse of `_flat`."""
    projection, *blocks = flat
    return EncoderParameters(projection, BlockParameters(*blocks[:_BLOCK]), BlockParameters(*blocks[_BLOCK:]))


def _run_forward(
    pixels: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    convolution: Tensor,
    sizes: list[int],
    height: int,
    width: int,
) -> list[Tensor]:
    from anyup.ops.pixel_encoder import fused_pair

    encoders = _parameters_of(first), _parameters_of(second)
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    pooled, *rest = fused_pair.forward(pixels, *encoders, convolution, sizes=pairs, output_size=(height, width))
    return [*pooled, *rest]


def _fake_forward(pixels, first, _second, convolution, sizes, height, width):  # type: ignore[no-untyped-def]
    every = [*zip(sizes[::2], sizes[1::2], strict=True), (height, width)]
    arranged = torch.empty_like(convolution.permute(2, 3, 1, 0), memory_format=torch.contiguous_format)
    maps = [pixels.new_empty(len(pixels), *size, len(first[0])) for size in every]
    return [*maps, arranged.permute(3, 2, 0, 1)]


def _flops(pixels, first, second, *_):  # type: ignore[no-untyped-def]
    products = sum(shape[0] * shape[1] for shape in (*first, *second) if len(shape) > 1)
    return 2 * pixels[0] * pixels[1] * pixels[2] * products


_forward = register("pixel_encoder_pair", _run_forward, _fake_forward, flops=_flops)
