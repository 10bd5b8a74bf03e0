"""The query projection of single pixels, whose neighbourhoods are given."""

from __future__ import annotations

import torch
from torch import Tensor

from anyup.ops.linear import linear
from anyup.ops.precision import working_dtype
from anyup.ops.query_projection.arguments import ProjectionParameters


def project_neighbourhoods(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(N, 3, 3, D), zero where there is no pixel, to (N, D); float32 inside for half precision."""
    dim = encoded.shape[3]
    wide = working_dtype(encoded.dtype)
    convolution, norm, weight, bias = (p.to(wide) for p in parameters)
    x = linear(encoded.to(wide).flatten(1), convolution.permute(0, 2, 3, 1).flatten(1))
    x = x * torch.rsqrt(torch.linalg.vecdot(x, x)[:, None] / dim + torch.finfo(wide).eps)
    return linear(x, weight * norm, bias).to(encoded.dtype)
