"""Filters to start the feature unification from: products of Gaussian derivatives over rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_derivatives(count: int, size: int) -> Tensor:
    """The first `count` Gaussian-derivative filters (count, 1, size, size), by total order, float32.

    With z the tap's distance from the centre over sigma, the n-th derivative is (-1)^n He_n(z) g(z), He_n the
    probabilists' Hermite polynomials; sigma = (size // 2) / 1.645 leaves 90 % of the Gaussian inside.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"kernel_size_lfu: expected an odd number of at least 3 for Gaussian derivatives, got {size}")
    half = size // 2
    sigma = half / 1.645
    z = torch.arange(-half, half + 1, dtype=torch.float64) / sigma
    gaussian = torch.exp(-z.square() / 2) / (sigma * math.sqrt(2 * math.pi))
    hermite = [torch.ones_like(z), z]
    derivatives: list[Tensor] = []
    filters: list[Tensor] = []
    order = 0
    while len(filters) < count:
        while len(hermite) <= order:
            n = len(hermite) - 1
            hermite.append(z * hermite[n] - n * hermite[n - 1])
        derivatives.append((-1) ** order * hermite[order] * gaussian)
        filters += [torch.outer(derivatives[order - i], derivatives[i]) for i in range(order + 1)]
        order += 1
    return torch.stack(filters[:count])[:, None].float()
