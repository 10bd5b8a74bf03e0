"""The problem that a call of window attention poses, and the checks of its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyup.ops.dispatch import wants_gradient
from anyup.ops.precision import FLOATING, check_dense, dtype_name
from anyup.window import Part, Window, check_window


@dataclass(frozen=True)
class WindowAttentionProblem:
    """Everything a backend needs to know to say whether it can run a call."""

    batch: int
    output_size: tuple[int, int]
    grid_size: tuple[int, int]
    heads: int
    head_dim: int
    channels: int
    query_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    window: Window
    needs_gradient: bool
    part: Part | None = None
    """Where the pixels lie in the output; None: they are all of it."""
    points: int | None = None
    """How many single pixels of the output there are; None: a whole map or a part."""

    @property
    def whole_size(self) -> tuple[int, int]:
        """Height and width of the output, of which the pixels may be a part."""
        return self.output_size if self.part is None else (self.part.height, self.part.width)

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """What kernels are compiled for, beside the device. After a failure kernels for another value are tried."""
        known = (self.query_dtype, self.value_dtype, self.heads, self.head_dim, self.needs_gradient)
        return *known, self.points is not None

    def __str__(self) -> str:
        (height, width), (h, w) = self.output_size, self.grid_size
        where = "" if self.part is None else f" of {self.part.height} x {self.part.width}"
        pixels = "" if self.points is None else f"{self.points} points of "
        return (
            f"{pixels}{height} x {width}{where} from {h} x {w}, batch {self.batch}, "
            f"{self.heads} heads of {self.head_dim}, C = {self.channels}, "
            f"{dtype_name(self.query_dtype)}, {self.device.type}"
        )


def describe(
    query: Tensor, key: Tensor, value: Tensor, window: Window, needs_gradient: bool, part: Part | None = None
) -> WindowAttentionProblem:
    """The problem that these (checked) tensors pose."""
    batch, height, width, heads, head_dim = query.shape
    return WindowAttentionProblem(
        batch=batch,
        output_size=(height, width),
        grid_size=(key.shape[1], key.shape[2]),
        heads=heads,
        head_dim=head_dim,
        channels=value.shape[3],
        query_dtype=query.dtype,
        value_dtype=value.dtype,
        device=query.device,
        window=window,
        needs_gradient=needs_gradient,
        part=part,
    )


def check(query: Tensor, key: Tensor, value: Tensor, window: Window, part: Part | None = None) -> None:
    """Raise a ValueError or TypeError that names the argument unless the call makes sense."""
    _check_tensors(query, key, value, ("(B, H, W, heads, head_dim)", "(B, h, w, heads, head_dim)", "(B, h, w, C)"))
    if key.shape[0] != query.shape[0] or key.shape[3:] != query.shape[3:]:
        raise ValueError(
            f"key: expected batch {query.shape[0]}, {query.shape[3]} heads of {query.shape[4]}, "
            f"got shape {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected the keys' batch and grid {tuple(key.shape[:3])}, got {tuple(value.shape[:3])}"
        )
    if min(query.shape[1:]) < 1 or min(key.shape[1:3]) < 1 or value.shape[3] < 1:
        raise ValueError(
            f"query, key, value: expected grids, heads and channels of at least 1, got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_window(window)
    if part is None:
        return
    part.check(query.shape[1], query.shape[2])
    if wants_gradient(query, key, value):
        raise NotImplementedError("part: a part of a map has no backward pass: call under torch.no_grad()")


def check_points(query: Tensor, key: Tensor, value: Tensor, window: Window, size: tuple[int, int]) -> None:
    """The same for single pixels of an output of `size`."""
    _check_tensors(query, key, value, ("(N, heads, head_dim)", "(h, w, heads, head_dim)", "(h, w, C)"))
    if key.shape[2:] != query.shape[1:]:
        raise ValueError(f"key: expected {query.shape[1]} heads of {query.shape[2]}, got shape {tuple(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value: expected the keys' grid {tuple(key.shape[:2])}, got {tuple(value.shape[:2])}")
    if min(query.shape[1:]) < 1 or min(key.shape[:2]) < 1 or value.shape[2] < 1:
        raise ValueError(
            f"query, key, value: expected grids, heads and channels of at least 1, got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_window(window)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected the output's (H, W), both at least 1, got {tuple(size)}")


def check_positions(rows: Tensor, columns: Tensor, count: int, size: tuple[int, int]) -> None:
    """Raise a ValueError or TypeError unless `rows` and `columns` are `count` pixels of an output of `size`."""
    for name, positions, length in (("rows", rows, size[0]), ("columns", columns, size[1])):
        check_dense(name, positions)
        if positions.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {positions.dtype}")
        if positions.shape != (count,):
            raise ValueError(f"{name}: expected a position for each of {count} queries, got {tuple(positions.shape)}")
        least, most = (int(positions.min()), int(positions.max())) if count else (0, 0)
        if least < 0 or most >= length:
            raise ValueError(f"{name}: expected positions from 0 to {length - 1}, got from {least} to {most}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, layouts: tuple[str, str, str]) -> None:
    for name, tensor, layout in zip(("query", "key", "value"), (query, key, value), layouts, strict=True):
        check_dense(name, tensor)
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the query's device {query.device}, got {tensor.device}")
    if key.dtype != query.dtype:
        raise TypeError(f"key: expected the query's dtype {query.dtype}, got {key.dtype}")
