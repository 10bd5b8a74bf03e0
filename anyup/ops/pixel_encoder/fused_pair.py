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
    both = Encoder(pixels, second, second=first)
    of_second, of_first = both.apart()
    outputs, inputs, *taps = convolution.shape
    arranged = convolution.new_empty(*taps, inputs, outputs)
    weights = convolution.contiguous(), arranged
    is_whole = output_size == tuple(pixels.shape[1:3])
    # The last launch is of both encoders, where the second's result is a map.
    pooled = [of_first.pooled(size) for size in sizes[:-1]]
    pooled.append((both if is_whole else of_first).pooled(sizes[-1], weights))
    result = of_second.stored if is_whole else of_second.result(output_size)
    return pooled, result, arranged.permute(3, 2, 0, 1)
