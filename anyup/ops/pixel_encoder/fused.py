"""The pixel encoder in Triton kernels."""

from __future__ import annotations

from torch import Tensor

from anyup.ops.kernel_device import device_reasons, discouraged, dtype_reasons, installed
from anyup.ops.pixel_encoder import fused_gradients, gradients
from anyup.ops.pixel_encoder.arguments import EncoderParameters, PixelEncoderProblem
from anyup.ops.pixel_encoder.fused_passes import Encoder

__all__ = ["backward", "discouraged", "forward", "unsupported"]

_FEWEST_PIXELS = 64
"""The gradients of maps of as many are torch's, in float64: of so few a group's sums nearly cancel."""


def unsupported(problem: PixelEncoderProblem) -> list[str]:
    """Why the kernels cannot run a problem; empty: they can."""
    reasons = device_reasons(problem.device)
    if not installed():
        return reasons
    from anyup.kernels.pixel_encoder_config import MOST_CHANNELS

    reasons += dtype_reasons("pixels are", problem.dtype)
    for name, channels in (("map", problem.dim), ("input", problem.input_dim)):
        if channels > MOST_CHANNELS:
            reasons.append(f"the {name} has {channels} channels, at most {MOST_CHANNELS} (they stay on the chip)")
    return reasons


def forward(
    pixels: Tensor, parameters: EncoderParameters, *, frequencies: Tensor | None, output_size: tuple[int, int]
) -> Tensor:
    """(B, H, W, Cin) -> (B, *output_size, D); one map (B, H, W, D) is allocated, and the pooled one."""
    if 0 in pixels.shape:
        return pixels.new_zeros(pixels.shape[0], *output_size, parameters.block1.weight1.shape[0])
    return Encoder(pixels, parameters).result(output_size, frequencies)


def backward(
    grad: Tensor,
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    """The gradients of the pixels, the parameters and the frequencies, of a result (B, *output_size, D)."""
    few = not pixels.numel() or pixels.shape[1] * pixels.shape[2] <= _FEWEST_PIXELS
    run = gradients.backward if few else fused_gradients.backward
    return run(grad, pixels, parameters, frequencies=frequencies, output_size=output_size)
