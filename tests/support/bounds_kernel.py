"""The window's bounds in a kernel of their own, for the compiler alone."""

from __future__ import annotations

import triton
import triton.language as tl

from anyup.kernels.window_bounds import axis_bounds


@triton.jit
def bounds(out, queries, keys, ratio):
    """Write both bounds of 32 queries of a ratio window."""
    query = tl.arange(0, 32)
    start, stop = axis_bounds(query, queries, keys, ratio, 0, 1)
    tl.store(out + query, start)
    tl.store(out + 32 + query, stop)
