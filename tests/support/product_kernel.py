"""The kernels' matrix products in a kernel of their own."""

from __future__ import annotations

import triton
import triton.language as tl

from anyup.kernels.products import matmul, matrix_scale, split_matmul


@triton.jit
def product(left, right, total, out, INNER: tl.constexpr, KNOWN: tl.constexpr, PRECISION: tl.constexpr):
    """Write left (32, INNER) @ right (INNER, 32) + total (32, 32), without it where it is None.

    KNOWN: with the scale of `right` known before.
    """
    row = tl.arange(0, 32)[:, None]
    column = tl.arange(0, 32)[None, :]
    inner = tl.arange(0, INNER)
    before = None
    if total is not None:
        before = tl.load(total + row * 32 + column)
    rows = tl.load(left + row * INNER + inner[None, :])
    columns = tl.load(right + inner[:, None] * 32 + column)
    if PRECISION == "float16x3":
        scale = matrix_scale(right, INNER * 32, PRECISION) if KNOWN else None
        result = split_matmul(rows, columns, scale, before, PRECISION)
    else:
        result = matmul(rows, columns, before, PRECISION)
    tl.store(out + row * 32 + column, result)
