"""Query projections that several test files run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyup.ops.query_projection import ProjectionParameters, project_queries


class Shape(NamedTuple):
    size: tuple[int, int]
    dim: int = 16
    batch: int = 1


SHAPES = {
    "square": Shape((16, 16)),
    "odd": Shape((17, 23)),
    "several bands": Shape((150, 131)),
    "one row a band": Shape((3, 9000), dim=8),
    "one row": Shape((1, 31)),
    "one column": Shape((31, 1)),
    "one pixel": Shape((1, 1)),
    "batch 2": Shape((9, 7), batch=2),
    "empty batch": Shape((9, 7), batch=0),
    "default width": Shape((9, 7), dim=128),
}


def tensors_of(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dim = shape.dim
    tensors = {
        "encoded": torch.randn(shape.batch, *shape.size, dim, generator=generator),
        "convolution": torch.randn(dim, dim, 3, 3, generator=generator) / (3 * dim**0.5),
        "norm": 1 + 0.2 * torch.randn(dim, generator=generator),
        "weight": torch.randn(dim, dim, generator=generator) / dim**0.5,
        "bias": 0.2 * torch.randn(dim, generator=generator),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def run(encoded: Tensor, *, backend: str, **parameters: Tensor) -> Tensor:
    return project_queries(encoded, ProjectionParameters(**parameters), backend=backend)
