"""The query projection in plain PyTorch, a band of rows at a time.

Each band is read with a halo of one row, convolved, normalised and projected while it is in the cache: one pass over
memory instead of six. The norm's weight is folded into the projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import linear
from anyup.ops.memory import empty
from anyup.ops.parallel import cut, map_tiles
from anyup.ops.precision import working_dtype
from anyup.ops.query_projection.problem import ProjectionParameters

# Pixels of a band: on a CPU its working set stays in a shared cache.
_BAND_PIXELS = {"cpu": 4096}
_BAND_PIXELS_ELSEWHERE = 2**18


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D); float32 inside for half precision."""
    batch, height, width, dim = encoded.shape
    wide = working_dtype(encoded.dtype)
    convolution, norm, weight, bias = (p.to(wide) for p in parameters)
    convolution = convolution.contiguous(memory_format=torch.channels_last)
    weight = weight * norm
    eps = torch.finfo(wide).eps
    out = empty((batch, height, width, dim), encoded)
    most = max(1, _BAND_PIXELS.get(encoded.device.type, _BAND_PIXELS_ELSEWHERE) // width)

    def go(band: tuple[int, slice]) -> None:
        image, (first, last) = band[0], (band[1].start, band[1].stop)
        rows = encoded[image, max(first - 1, 0) : last + 1].to(wide)
        rows = F.pad(rows, (0, 0, 0, 0, first == 0, last == height))
        x = F.conv2d(rows.permute(2, 0, 1)[None], convolution, padding=(0, 1))
        x = x.permute(0, 2, 3, 1).reshape(-1, dim)
        x *= torch.rsqrt(torch.linalg.vecdot(x, x)[:, None] / dim + eps)
        out[image, first:last] = linear(x, weight, bias).view(last - first, width, dim)

    map_tiles(
        go, [(image, rows) for image in range(batch) for rows in cut(height, most, encoded.device)], encoded.device
    )
    return out


def backward(grad: Tensor, encoded: Tensor, parameters: ProjectionParameters) -> tuple[Tensor, ProjectionParameters]:
    """The gradients of the encoded image and the parameters; the convolution is computed again."""
    wide = working_dtype(encoded.dtype)
    image = encoded.permute(0, 3, 1, 2)
    convolved = F.conv2d(image, parameters.convolution, padding=1)
    x, outer = convolved.permute(0, 2, 3, 1).flatten(0, 2).to(wide), grad.flatten(0, 2).to(wide)  # (pixels, D)
    _, norm, weight, _ = (p.to(wide) for p in parameters)
    inverse = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + torch.finfo(wide).eps)
    x = x * inverse
    grad_weight, grad_bias = outer.T @ (x * norm), outer.sum(dim=0)
    outer = outer @ weight
    grad_norm = (outer * x).sum(dim=0)
    outer = outer * norm
    grad_x = inverse * (outer - x * (outer * x).mean(dim=1, keepdim=True))
    grad_x = grad_x.view(grad.shape).permute(0, 3, 1, 2).to(encoded.dtype)
    one = (1, 1)
    grad_image, grad_convolution, _ = torch.ops.aten.convolution_backward(
        grad_x, image, parameters.convolution, None, one, one, one, False, (0, 0), 1, (True, True, False)
    )
    grads = (grad_convolution, grad_norm, grad_weight, grad_bias)
    return grad_image.permute(0, 2, 3, 1), ProjectionParameters(*(g.to(encoded.dtype) for g in grads))
