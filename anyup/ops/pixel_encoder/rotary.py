"""The rotary embedding of a map: x cos(angle) + rotate_half(x) sin(angle).

An angle is the sum of a row's and a column's, so the cosines and sines of a map follow from two small tables.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from anyup.ops.precision import working_dtype


class Rotation:
    """The rotation of a map of `size` (H, W) by `frequencies` (2, D), some whole rows at a time."""

    def __init__(self, size: tuple[int, int], frequencies: Tensor) -> None:
        self.width = size[1]
        rows, columns = _angles(size, frequencies.to(working_dtype(frequencies.dtype)))
        self._row_cos, self._row_sin = rows.cos()[:, None], rows.sin()[:, None]  # (H, 1, D)
        self._column_cos, self._column_sin = columns.cos(), columns.sin()  # (W, D)

    def part(self, rows: slice, columns: slice) -> Rotation:
        """The rotation of a rectangle of the map, as a map of its own."""
        part = copy.copy(self)
        part._row_cos, part._row_sin = self._row_cos[rows], self._row_sin[rows]
        part._column_cos, part._column_sin = self._column_cos[columns], self._column_sin[columns]
        part.width = part._column_cos.shape[0]
        return part

    def __call__(self, x: Tensor, pixels: slice) -> Tensor:
        """Rotate (n, D): these pixels of the map, in the dtype worked in."""
        rows = slice(pixels.start // self.width, pixels.stop // self.width)
        row_cos, row_sin = self._row_cos[rows], self._row_sin[rows]
        cos = (self._column_cos * row_cos).addcmul_(self._column_sin, row_sin, value=-1)
        sin = (self._column_sin * row_cos).addcmul_(self._column_cos, row_sin)
        return rotated(x, cos.flatten(0, 1), sin.flatten(0, 1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, for (..., D)."""
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return result


def rotate_backward(grad: Tensor, x: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the input (B, H, W, D) and of the frequencies (2, D)."""
    wide = working_dtype(x.dtype)
    row_angle, column_angle = _angles((x.shape[1], x.shape[2]), frequencies.to(wide))
    angle = row_angle[:, None] + column_angle
    cos, sin = angle.cos(), angle.sin()
    grad, x, dtype = grad.to(wide), x.to(wide), x.dtype
    # The rotation's transpose: the partner's sine, the other sign.
    half = x.shape[-1] // 2
    swapped = torch.cat((sin[..., half:], sin[..., :half]), dim=-1)
    grad_x = rotated(grad, cos, -swapped)
    grad_angle = rotated(x, -sin, cos) * grad
    unit = torch.ones_like(frequencies, dtype=wide)
    row, column = _angles((x.shape[1], x.shape[2]), unit)
    grad_row = (grad_angle.sum(dim=(0, 2)) * row).sum(dim=0)
    grad_column = (grad_angle.sum(dim=(0, 1)) * column).sum(dim=0)
    return grad_x.to(dtype), torch.stack((grad_row, grad_column)).to(frequencies.dtype)


def _angles(size: tuple[int, int], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The angle of each row (H, D) and of each column (W, D), which add up; coordinates run from 0 to 1."""
    rows, columns = (
        torch.arange(n, device=frequencies.device, dtype=frequencies.dtype)[:, None] / max(n - 1, 1) for n in size
    )
    return rows * frequencies[0], columns * frequencies[1]
