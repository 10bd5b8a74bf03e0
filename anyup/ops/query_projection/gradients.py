"""The gradients of the query projection in plain PyTorch, a band of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.linear import linear, sum_of_outer_products
from anyup.ops.memory import empty
from anyup.ops.parallel import map_tiles
from anyup.ops.precision import working_dtype
from anyup.ops.query_projection.arguments import ProjectionParameters
from anyup.ops.query_projection.bands import Band, bands_of, convolution_of, inverse_rms, with_halo


def backward(grad: Tensor, encoded: Tensor, parameters: ProjectionParameters) -> tuple[Tensor, ProjectionParameters]:
    """The gradients of the encoded image and the parameters; the convolution is computed again.

    There are two passes over the bands, because the gradient of a row needs the convolution's gradient at the rows
    beside it. That gradient, one map, is stored between the passes.
    """
    if not encoded.numel():
        return torch.zeros_like(encoded), ProjectionParameters(*map(torch.zeros_like, parameters))
    dim, width = encoded.shape[3], encoded.shape[2]
    wide = working_dtype(encoded.dtype)
    convolution, norm, weight, _ = (p.to(wide) for p in parameters)
    convolve, turned = convolution_of(convolution), convolution_of(convolution.flip(2, 3).transpose(0, 1))
    back = (weight * norm).T.contiguous()
    grad_convolved = empty(tuple(encoded.shape), encoded.new_empty(0, dtype=wide))

    def parameters_of(band: Band) -> tuple[Tensor, Tensor, Tensor]:
        image, rows = band
        pixels = with_halo(encoded, band).to(wide)
        x = convolve(pixels).reshape(-1, dim)
        inverse = inverse_rms(x)
        x *= inverse
        outer = grad[image, rows].reshape(-1, dim).to(wide)
        product, grad_bias = sum_of_outer_products(outer, x), outer.sum(dim=0)
        outer = linear(outer, back)
        outer = torch.addcmul(outer, x, torch.linalg.vecdot(outer, x)[:, None], value=-1 / dim).mul_(inverse)
        outer = outer.view(-1, width, dim)
        grad_convolved[image, rows] = outer
        return _taps(outer, pixels), product, grad_bias

    bands = bands_of(encoded)
    found = map_tiles(parameters_of, bands, encoded.device)
    taps, products, biases = (torch.stack(t).sum(dim=0) for t in zip(*found, strict=True))
    grad_encoded = empty(tuple(encoded.shape), encoded)

    def image_of(band: Band) -> None:
        grad_encoded[band] = turned(with_halo(grad_convolved, band))

    map_tiles(image_of, bands, encoded.device)
    grads = (taps.view(3, 3, dim, dim).permute(2, 3, 0, 1), (products * weight).sum(dim=0), products * norm, biases)
    return grad_encoded, ProjectionParameters(*(g.to(encoded.dtype) for g in grads))


def _taps(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the convolution's nine taps: (n, W, D) and (n + 2, W + 2, D) to (9, D, D).

    It is nine products, because oneDNN's weight gradient takes up to five times as long for maps with channels last.
    The gradient is padded to the width of the rows, so that a shift of the rows is a slice of their pixels.
    """
    width = grad.shape[1]
    inner = F.pad(grad, (0, 0, 0, 2)).flatten(0, 1)[:-2]
    outer = rows.flatten(0, 1)
    starts = (down * (width + 2) + right for down in range(3) for right in range(3))
    return torch.stack([inner.T @ outer[start : start + len(inner)] for start in starts])
