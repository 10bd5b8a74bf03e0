"""The rotary embedding of a map: x cos(angle) + rotate_half(x) sin(angle).

An angle is the sum of a row's and a column's, so the cosines and sines of a map follow from two small tables.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from anyup.ops.precision import working_dtype
from anyup.ops.tables import made_once


class Rotation:
    """The rotation of a map of `size` (H, W) by `frequencies` (2, D), some whole rows at a time."""

    def __init__(self, size: tuple[int, int], frequencies: Tensor) -> None:
        self.width = size[1]
        self.frequencies = frequencies = frequencies.to(working_dtype(frequencies.dtype))
        self._rows, self._columns = coordinates(size, frequencies.dtype, frequencies.device).split(size)
        rows, columns = self._rows[:, :1] * frequencies[0], self._columns[:, 1:] * frequencies[1]
        self._row_cos, self._row_sin = rows.cos()[:, None], rows.sin()[:, None]  # (H, 1, D)
        self._column_cos, self._column_sin = columns.cos(), columns.sin()  # (W, D)

    def part(self, rows: slice, columns: slice) -> Rotation:
        """The rotation of a rectangle of the map, as a map of its own."""
        part = copy.copy(self)
        part._rows, part._columns = self._rows[rows], self._columns[columns]
        part._row_cos, part._row_sin = self._row_cos[rows], self._row_sin[rows]
        part._column_cos, part._column_sin = self._column_cos[columns], self._column_sin[columns]
        part.width = part._column_cos.shape[0]
        return part

    def at(self, rows: Tensor, columns: Tensor) -> Rotation:
        """The rotation of single pixels (P,) of the map, as of a map of one column."""
        at = copy.copy(self)
        at._rows, at._columns = self._rows[rows] + self._columns[columns], torch.zeros_like(self._columns[:1])
        across = self._column_cos[columns][:, None], self._column_sin[columns][:, None]
        at._row_cos, at._row_sin = _of_sum(self._row_cos[rows], self._row_sin[rows], *across)  # (P, 1, D)
        at._column_cos, at._column_sin = torch.ones_like(self._column_cos[:1]), torch.zeros_like(self._column_sin[:1])
        at.width = 1
        return at

    @property
    def coordinates(self) -> Tensor:
        """(H + W, 2): of the rows, then of the columns, as `coordinates` gives them of a whole map."""
        return torch.cat((self._rows, self._columns))

    def __call__(self, x: Tensor, pixels: slice) -> Tensor:
        """Rotate (n, D): these pixels of the map, in the dtype worked in."""
        return rotated(x, *self._cos_sin(pixels))

    def backward(self, grad: Tensor, x: Tensor, pixels: slice) -> tuple[Tensor, Tensor]:
        """From the gradient (..., n, D) of what these pixels became: that of `x`, and their part of the angles'."""
        cos, sin = self._cos_sin(pixels)
        dim = x.shape[-1]
        half = dim // 2
        # The rotation's transpose: the partner's sine, the other sign.
        grad_x = grad * cos
        grad_x[..., :half].addcmul_(grad[..., half:], sin[:, half:])
        grad_x[..., half:].addcmul_(grad[..., :half], sin[:, :half], value=-1)
        rows = self._rows[pixels.start // self.width : pixels.stop // self.width, :1]
        grad_angle = rotated(x, sin.neg_(), cos).mul_(grad).view(-1, len(rows), self.width, dim)
        grad_rows = (grad_angle.sum(dim=(0, 2)) * rows).sum(dim=0)
        grad_columns = (grad_angle.sum(dim=(0, 1)) * self._columns[:, 1:]).sum(dim=0)
        return grad_x, torch.stack((grad_rows, grad_columns))

    def _cos_sin(self, pixels: slice) -> tuple[Tensor, Tensor]:
        rows = slice(pixels.start // self.width, pixels.stop // self.width)
        cos, sin = _of_sum(self._row_cos[rows], self._row_sin[rows], self._column_cos, self._column_sin)
        return cos.flatten(0, 1), sin.flatten(0, 1)


def _of_sum(row_cos: Tensor, row_sin: Tensor, column_cos: Tensor, column_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the sum of a row's and a column's angles."""
    cos = (column_cos * row_cos).addcmul_(column_sin, row_sin, value=-1)
    return cos, (column_sin * row_cos).addcmul_(column_cos, row_sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, for (..., D)."""
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return result


def coordinates(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H + W, 2): of each row of a map (y, 0), then of each column (0, x), from 0 to 1; made once.

    A pixel's angles are the sum of its row's and its column's coordinates times the frequencies (2, D).
    """

    def make() -> Tensor:
        rows, columns = (torch.arange(n, dtype=dtype, device=device)[:, None] / max(n - 1, 1) for n in size)
        return torch.cat((F.pad(rows, (0, 1)), F.pad(columns, (1, 0))))

    return made_once(("coordinates", size, dtype), device, make)
