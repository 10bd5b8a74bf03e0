"""The kernels' matrix product in a kernel of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from anyup.kernels.products import matmul


@triton.jit
def product(left, right, total, out, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """Write left (32, INNER) @ right (INNER, 32) + total (32, 32), without it where it is None."""
    row = tl.arange(0, 32)[:, None]
    column = tl.arange(0, 32)[None, :]
    inner = tl.arange(0, INNER)
    before = None
    if total is not None:
        before = tl.load(total + row * 32 + column)
    result = matmul(
        tl.load(left + row * INNER + inner[None, :]),
        tl.load(right + inner[:, None] * 32 + column),
        before,
        PRECISION,
    )
    tl.store(out + row * 32 + column, result)
