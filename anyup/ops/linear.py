"""Matrix products over pixels, as fast as the CPU's libraries allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_PIXELS_OF_A_SUM = 64
_MOST_SUMS = 64  # partial sums in memory at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for contiguous (n, Cin) pixels and a (Cout, Cin) weight."""
    if not goes_through_convolution(x):
        return F.linear(x, weight, bias)
    # With AVX-512, oneDNN's convolution is up to twice as fast as the BLAS behind F.linear; with AVX2 it is a tenth
    # slower. Dilation changes nothing for a 1x1 kernel, but without it torch picks a slower algorithm on one thread.
    image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
    result = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return result.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])


def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` (n, Cin) and of the weight (Cout, Cin), for a contiguous gradient (n, Cout)."""
    # For narrow maps oneDNN sums the pixels one by one, with four times the error of the BLAS.
    if not goes_through_convolution(x) or min(weight.shape) < 128:
        return grad @ weight, sum_of_outer_products(grad, x)
    image, outer = (t.view(1, 1, *t.shape).permute(0, 3, 1, 2) for t in (x, grad))
    one, two, none = (1, 1), (2, 2), (0, 0)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        outer, image, weight[:, :, None, None], None, one, none, two, False, none, 1, (True, True, False)
    )
    return grad_x.permute(0, 2, 3, 1).reshape(x.shape), grad_weight.flatten(1)


def sum_of_outer_products(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right for (n, M) and (n, N), as the sum of products over a few pixels each.

    The gradient of a normalisation's input is orthogonal to a constant and to the map, so that these sums nearly
    cancel: the rounding of one long sum would be large beside the result.
    """
    some = max(_PIXELS_OF_A_SUM, -(-left.shape[0] // _MOST_SUMS))
    whole = left.shape[0] - left.shape[0] % some
    if not whole:
        return left.T @ right
    parts = left[:whole].unflatten(0, (-1, some)).mT @ right[:whole].unflatten(0, (-1, some))
    return parts.sum(dim=0).addmm_(left[whole:].T, right[whole:])


def grouped_product(
    x: Tensor, weight: Tensor, empty: Callable[[tuple[int, ...], Tensor], Tensor] | None = None
) -> Tensor:
    """x[:, g] @ weight[g] for each group g: contiguous (n, G, K) pixels and (G, K, N) weights to (n, G, N).

    The result is stored pixel by pixel or group by group. `empty(shape, like)` allocates it, where the library accepts
    an output tensor.
    """
    pixels, groups, width = x.shape
    if not goes_through_convolution(x):
        shape = groups, pixels, weight.shape[2]
        out = x.new_empty(shape) if empty is None else empty(shape, x)
        return torch.bmm(x.transpose(0, 1), weight, out=out).transpose(0, 1)
    # As in `linear`; a transposed convolution takes the weights in the order that they have here.
    image = x.view(1, 1, pixels, groups * width).permute(0, 3, 1, 2)
    result = F.conv_transpose2d(image, weight.reshape(groups * width, -1, 1, 1), groups=groups, dilation=2)
    return result.permute(0, 2, 3, 1).reshape(pixels, groups, -1)


def goes_through_convolution(x: Tensor) -> bool:
    """Whether oneDNN's convolution is the fastest product for this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and _convolution_is_faster()


@lru_cache(maxsize=1)
def _convolution_is_faster() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
