"""The pixel encoder as its definition reads: the oracle that every other backend is tested against.

A projection and two residual blocks y = x + W2 silu(gn2(W1 silu(gn1(x)))), group statistics over the whole map of
each image, then the rotary embedding (where frequencies are given) and adaptive average pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.ieee import in_ieee
from anyup.ops.pixel_encoder.arguments import BlockParameters, EncoderParameters, normalise
from anyup.ops.pullback import pullback


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


@in_ieee
def forward(
    pixels: Tensor, parameters: EncoderParameters, *, frequencies: Tensor | None, output_size: tuple[int, int]
) -> Tensor:
    """(B, H, W, Cin) -> (B, *output_size, D)."""
    x = pixels.permute(0, 3, 1, 2)
    if parameters.projection is not None:
        x = _conv(x, parameters.projection)
    x = _residual_block(x, parameters.block1)
    x = _residual_block(x, parameters.block2)
    if frequencies is not None:
        x = _rotate(x, frequencies)
    if tuple(x.shape[2:]) != tuple(output_size):
        x = F.adaptive_avg_pool2d(x, output_size)
    return x.permute(0, 2, 3, 1)


@in_ieee
def backward(
    grad: Tensor,
    pixels: Tensor,
    parameters: EncoderParameters,
    *,
    frequencies: Tensor | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, EncoderParameters, Tensor | None]:
    """The gradients of the pixels, the parameters and the frequencies, by autograd through `forward`."""
    # What may be absent goes in a dictionary: torch.func takes tensors only.
    optional = {"projection": parameters.projection, "frequencies": frequencies}
    optional = {name: tensor for name, tensor in optional.items() if tensor is not None}

    def run(pixels: Tensor, blocks: tuple[BlockParameters, BlockParameters], optional: dict[str, Tensor]) -> Tensor:
        whole = EncoderParameters(optional.get("projection"), *blocks)
        return forward(pixels, whole, frequencies=optional.get("frequencies"), output_size=output_size)

    primals = (pixels, (parameters.block1, parameters.block2), optional)
    grad_pixels, grad_blocks, grad_optional = pullback(run, primals, grad)
    grads = EncoderParameters(grad_optional.get("projection"), *grad_blocks)
    return grad_pixels, grads, grad_optional.get("frequencies")


def _residual_block(x: Tensor, block: BlockParameters) -> Tensor:
    y = F.silu(normalise(x, block.norm1_weight, block.norm1_bias))
    y = _conv(y, block.weight1)
    y = F.silu(normalise(y, block.norm2_weight, block.norm2_bias))
    return x + _conv(y, block.weight2)


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])


def _rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """x cos(angle) + rotate_half(x) sin(angle), the angle linear in the pixel's row and column in [0, 1]."""
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) / max(n - 1, 1) for n in (x.shape[2], x.shape[3]))
    coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (H, W, 2)
    angle = (coordinates @ frequencies).permute(2, 0, 1)  # (D, H, W)
    first, second = x.chunk(2, dim=1)
    return x * angle.cos() + torch.cat((-second, first), dim=1) * angle.sin()
