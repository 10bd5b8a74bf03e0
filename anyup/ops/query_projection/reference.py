"""The query projection as its definition reads: the oracle that every other backend is tested against.

A 3x3 convolution with zero padding, an RMS normalisation over the channels, a linear projection.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anyup.ops.ieee import in_ieee
from anyup.ops.pullback import pullback
from anyup.ops.query_projection.arguments import ProjectionParameters


def unsupported(problem: object) -> list[str]:
    """Nothing is unsupported."""
    return []


@in_ieee
def forward(encoded: Tensor, parameters: ProjectionParameters) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D)."""
    x = F.conv2d(encoded.permute(0, 3, 1, 2), parameters.convolution, padding=1).permute(0, 2, 3, 1)
    x = F.rms_norm(x, x.shape[3:], parameters.norm)
    return F.linear(x, parameters.weight, parameters.bias)


@in_ieee
def backward(grad: Tensor, encoded: Tensor, parameters: ProjectionParameters) -> tuple[Tensor, ProjectionParameters]:
    """The gradients of the encoded image and the parameters, by autograd through `forward`."""
    grad_encoded, grads = pullback(forward, (encoded, parameters), grad)
    return grad_encoded, ProjectionParameters(*grads)
