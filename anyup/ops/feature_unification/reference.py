"""The feature unification as its definition reads: the oracle that every other backend is tested against.

Every channel is correlated with each of M filters (zero padding) and divided by the number of taps inside the map:
z[channel, filter]. The flat, channel-major list of these C*M maps is read again as (M, C); softmax over the first
of those, mean over the second. (The published weights are trained with this reinterpretation.)
It allocates several tensors of C*M*h*w values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from anyup.ops.ieee import in_ieee
from anyup.ops.precision import working_dtype
from anyup.ops.pullback import pullback


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


@in_ieee
def forward(features: Tensor, basis: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """(B, C, h, w), (M, 1, s, s) -> (B, M, h, w). The softmax runs in float32 for half precision."""
    out_dtype = out_dtype or features.dtype
    batch, channels, filters = *features.shape[:2], basis.shape[0]
    padding = basis.shape[2] // 2
    z = F.conv2d(features.flatten(0, 1)[:, None], basis, padding=padding)
    inside = F.conv2d(torch.ones_like(features[:1, :1]), torch.ones_like(basis[:1]), padding=padding)
    z = rearrange(z / inside, "(b c) m h w -> b (c m) h w", b=batch, c=channels)
    z = rearrange(z, "b (m c) h w -> b m c h w", m=filters, c=channels)  # read again
    wide = working_dtype(z.dtype)
    summed = torch.promote_types(out_dtype, wide)
    return torch.softmax(z, dim=1, dtype=wide).mean(dim=2, dtype=summed).to(out_dtype)


@in_ieee
def backward(grad: Tensor, features: Tensor, basis: Tensor) -> tuple[Tensor, ...]:
    """The gradients of features and basis, by autograd through `forward`."""
    return pullback(forward, (features, basis), grad)
