"""The query projection in plain PyTorch, a band of rows at a time.

Each band is read with a halo of one row, convolved, normalised and projected while it is in the cache: one pass over
memory instead of six. The norm's weight is folded into the projection. On a CPU the convolution is Winograd's, whose
sums and differences of a band, four times its size, stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.convolution import Convolution
from anyup.ops.linear import linear, sum_of_outer_products
from anyup.ops.memory import empty
from anyup.ops.parallel import even_slices, map_tiles
from anyup.ops.precision import product_dtype, working_dtype
from anyup.ops.query_projection.arguments import ProjectionParameters
from anyup.ops.winograd import WinogradConvolution

Band = tuple[int, slice]
"""An image of the batch and some of its rows."""

# Pixels of a band: on a CPU as many as keep what Winograd's convolution makes of them in a core's cache.
_BAND_PIXELS = {"cpu": 1024}
_BAND_PIXELS_ELSEWHERE = 2**18


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D); float32 inside for half precision."""
    dim, width = encoded.shape[3], encoded.shape[2]
    wide, of_products = working_dtype(encoded.dtype), product_dtype(encoded.dtype, encoded.device)
    convolution, norm, weight, bias = (p.to(wide) for p in parameters)
    convolve = _convolution(convolution.to(of_products))
    weight, bias = (weight * norm).to(of_products), bias.to(of_products)
    out = empty(tuple(encoded.shape), encoded)

    def go(band: Band) -> None:
        image, rows = band
        x = convolve(_with_halo(encoded, band).to(of_products)).reshape(-1, dim).to(wide)
        x *= _inverse_rms(x)
        out[image, rows] = linear(x.to(of_products), weight, bias).view(-1, width, dim)

    map_tiles(go, _bands(encoded), encoded.device)
    return out


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
    convolve, turned = _convolution(convolution), _convolution(convolution.flip(2, 3).transpose(0, 1))
    back = (weight * norm).T.contiguous()
    grad_convolved = empty(tuple(encoded.shape), encoded.new_empty(0, dtype=wide))

    def parameters_of(band: Band) -> tuple[Tensor, Tensor, Tensor]:
        image, rows = band
        pixels = _with_halo(encoded, band).to(wide)
        x = convolve(pixels).reshape(-1, dim)
        inverse = _inverse_rms(x)
        x *= inverse
        outer = grad[image, rows].reshape(-1, dim).to(wide)
        product, grad_bias = sum_of_outer_products(outer, x), outer.sum(dim=0)
        outer = linear(outer, back)
        outer = torch.addcmul(outer, x, torch.linalg.vecdot(outer, x)[:, None], value=-1 / dim).mul_(inverse)
        outer = outer.view(-1, width, dim)
        grad_convolved[image, rows] = outer
        return _taps(outer, pixels), product, grad_bias

    bands = _bands(encoded)
    found = map_tiles(parameters_of, bands, encoded.device)
    taps, products, biases = (torch.stack(t).sum(dim=0) for t in zip(*found, strict=True))
    grad_encoded = empty(tuple(encoded.shape), encoded)

    def image_of(band: Band) -> None:
        grad_encoded[band] = turned(_with_halo(grad_convolved, band))

    map_tiles(image_of, bands, encoded.device)
    grads = (taps.view(3, 3, dim, dim).permute(2, 3, 0, 1), (products * weight).sum(dim=0), products * norm, biases)
    return grad_encoded, ProjectionParameters(*(g.to(encoded.dtype) for g in grads))


def _bands(encoded: Tensor) -> list[Band]:
    batch, height, width, _ = encoded.shape
    most = max(2, _BAND_PIXELS.get(encoded.device.type, _BAND_PIXELS_ELSEWHERE) // max(1, width))
    return [(image, rows) for image in range(batch) for rows in even_slices(height, most, encoded.device, 2)]


def _with_halo(maps: Tensor, band: Band) -> Tensor:
    """A band's n rows and those above and below, zero beyond the image on all sides: (n + 2, W + 2, D)."""
    image, rows = band
    inside = maps[image, max(rows.start - 1, 0) : rows.stop + 1]
    return F.pad(inside, (0, 0, 1, 1, rows.start == 0, rows.stop == maps.shape[1]))


def _convolution(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes rows (n + 2, W + 2, D) to their convolution (n, W, D)."""
    if weight.dtype == torch.bfloat16:  # Winograd's sums would be rounded; the library's are not
        weight = weight.contiguous(memory_format=torch.channels_last)
        return lambda rows: F.conv2d(rows.permute(2, 0, 1)[None], weight)[0].permute(1, 2, 0)
    if weight.device.type == "cpu":
        return WinogradConvolution(weight)
    convolve = Convolution(weight)
    return lambda rows: convolve(rows[None])[0]


def _inverse_rms(x: Tensor) -> Tensor:
    """One over the root mean square of each pixel (n, D): (n, 1)."""
    return torch.rsqrt(torch.linalg.vecdot(x, x)[:, None] / x.shape[1] + torch.finfo(x.dtype).eps)


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
