"""Window attention of single pixels that several test files run."""

from __future__ import annotations

from typing import Any

import torch
from support.recipe import AttentionShape, attention_tensors
from torch import Tensor

from anyup.ops.window_attention import attend_points


def some_pixels(shape: AttentionShape, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, (count,); the corners of the output come first, and one pixel twice."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(length, (count,), generator=generator) for length in shape.output)
    bottom, right = (length - 1 for length in shape.output)
    rows[:5] = torch.tensor([0, 0, bottom, bottom, bottom])[:count]
    columns[:5] = torch.tensor([0, right, 0, right, right])[:count]
    return rows, columns


def tensors_of(
    shape: AttentionShape, dtype: torch.dtype = torch.float32, count: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """Queries of `count` pixels, and the keys and values of one image."""
    tensors = attention_tensors(shape._replace(batch=1), seed, dtype)
    rows, columns = some_pixels(shape, count)
    return {"query": tensors["query"][0, rows, columns], "key": tensors["key"][0], "value": tensors["value"][0]}


def attention_at(shape: AttentionShape, count: int = 12) -> Any:
    """The operator at these pixels, as the error rule calls it."""
    rows, columns = some_pixels(shape, count)

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        place = {"rows": rows, "columns": columns}
        return attend_points(query, key, value, **place, window=shape.window, size=shape.output, backend=backend)

    return run
