"""Two encoders of the same pixels in Triton kernels: two maps alive beside the input, a launch of a pass for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from anyup.ops.dispatch import WITHOUT_GRADIENT
from anyup.ops.pixel_encoder.arguments import EncoderParameters
from anyup.ops.pixel_encoder.fused_passes import Encoder
from anyup.ops.pixel_encoder.operator import OPERATION as PIXEL_ENCODER

if TYPE_CHECKING:
    from anyup.ops.pixel_encoder.pair import PairProblem


def unsupported(problem: PairProblem) -> list[str]:
    """Why the kernels do not run a pair; empty: they do, where each encoder alone would run on its kernels."""
    encoder, reasons = problem.encoder, []
    if encoder.needs_gradient:
        reasons.append(f"a gradient is wanted, the kernels have no backward pass: {WITHOUT_GRADIENT}")
    chosen = PIXEL_ENCODER.explain(encoder, problem.backend).chosen
    if chosen != "triton":
        reasons.append(f"the pixel_encoder runs on {chosen}")
    if 0 in (encoder.batch, *encoder.size):
        reasons.append("there are no pixels")
    for h, w in problem.sizes or (encoder.size,):
        height, width = encoder.size
        if h > height or w > width or (h, w) == (height, width):
            reasons.append(f"keys of {h} x {w} are not pooled from {height} x {width} pixels")
    return reasons


def forward(
    pixels: Tensor,
    first: EncoderParameters,
    second: EncoderParameters,
    convolution: Tensor,
    *,
    sizes: Sequence[tuple[int, int]],
    output_size: tuple[int, int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(B, H, W, Cin) to the first encoder's (B, *size, D) for each of `sizes`, and the second's (B, *output_size, D).

    The second's may be a part of the memory of both maps. The third result is the convolution's weight.
    """
    # The memory of both maps begins with that of the second encoder, which is returned.
    of_second, of_first = Encoder(pixels, second, second=first).apart()
    outputs, inputs, *taps = convolution.shape
    arranged = convolution.new_empty(*taps, inputs, outputs)
    weights: tuple[Tensor, Tensor] | None = (convolution.contiguous(), arranged)
    pooled = []
    for size in sizes:
        pooled.append(of_first.pooled(size, weights))
        weights = None
    return pooled, of_second.result(output_size), arranged.permute(3, 2, 0, 1)
