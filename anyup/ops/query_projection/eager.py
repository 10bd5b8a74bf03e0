"""The query projection in plain PyTorch, a band of rows at a time.

Each band is read with a halo of one row, convolved, normalised and projected while it is in the cache: one pass over
memory instead of six. The norm's weight is folded into the projection. On a CPU the convolution is Winograd's, whose
sums and differences of a band, four times its size, stay in the cache.
"""

from __future__ import annotations

from torch import Tensor

from anyup.ops.linear import linear
from anyup.ops.memory import empty
from anyup.ops.parallel import map_tiles
from anyup.ops.precision import product_dtype, working_dtype
from anyup.ops.query_projection.arguments import ProjectionParameters
from anyup.ops.query_projection.bands import Band, bands_of, convolution_of, inverse_rms, with_halo
from anyup.ops.query_projection.gradients import backward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported: this is the backend of last resort."""
    return []


def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D); float32 inside for half precision."""
    dim, width = encoded.shape[3], encoded.shape[2]
    wide, of_products = working_dtype(encoded.dtype), product_dtype(encoded.dtype, encoded.device)
    convolution, norm, weight, bias = (p.to(wide) for p in parameters)
    convolve = convolution_of(convolution.to(of_products))
    weight, bias = (weight * norm).to(of_products), bias.to(of_products)
    out = empty(tuple(encoded.shape), encoded)

    def go(band: Band) -> None:
        image, rows = band
        x = convolve(with_halo(encoded, band).to(of_products)).reshape(-1, dim).to(wide)
        x *= inverse_rms(x)
        out[image, rows] = linear(x.to(of_products), weight, bias).view(-1, width, dim)

    map_tiles(go, bands_of(encoded), encoded.device)
    return out
