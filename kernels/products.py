"""Products on the matrix units, those of float32 included.

The matrix units take 11 bits of a float32 ("tf32"). "tf32x3" makes a product exact to float32's rounding in three of
theirs: each factor is the nearest tf32 and a rest. Triton's own way to it takes three times as many instructions for
the split, and two for each number of the result, which is what float32 kernels did most of the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def padded(length: int) -> int:
    """Channels, filters or keys of a product's tile: a power of two that the matrix units take."""
    return max(16, 1 << (length - 1).bit_length())


@triton.jit
def matmul(left, right, total, PRECISION: tl.constexpr):
    """left @ right + total, float32; `total` None: without it. PRECISION is for factors of float32, as `tl.dot`'s.

    With "tf32x3" an infinity in a factor gives NaN.
    """
    if PRECISION == "tf32x3" and left.dtype == tl.float32:
        left_tf32, left_rest = _tf32_and_rest(left)
        right_tf32, right_rest = _tf32_and_rest(right)
        product = tl.dot(left_rest, right_tf32, input_precision="tf32")
        product = tl.dot(left_tf32, right_rest, product, input_precision="tf32")
        product = tl.dot(left_tf32, right_tf32, product, input_precision="tf32")
        # Added outside: the matrix units cut off what they add where others round.
        return product if total is None else total + product
    elif total is None:
        return tl.dot(left, right, input_precision=PRECISION)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def mixed_matmul(left, right, total, PRECISION: tl.constexpr):
    """`matmul` of factors of any floating dtypes, `total` a tensor or None.

    A factor of half precision is its own tf32: it has no rest.
    """
    if PRECISION != "tf32x3" or (left.dtype == tl.float32 and right.dtype == tl.float32):
        return matmul(left.to(tl.float32), right.to(tl.float32), total, PRECISION)
    elif left.dtype == right.dtype:
        return matmul(left, right, total, PRECISION)
    else:
        # The rest first, of the factor that has one.
        if left.dtype == tl.float32:
            left_tf32, left_rest = _tf32_and_rest(left)
            right_tf32 = right.to(tl.float32)
            product = tl.dot(left_rest, right_tf32, input_precision="tf32")
        else:
            left_tf32 = left.to(tl.float32)
            right_tf32, right_rest = _tf32_and_rest(right)
            product = tl.dot(left_tf32, right_rest, input_precision="tf32")
        product = tl.dot(left_tf32, right_tf32, product, input_precision="tf32")
        return product if total is None else total + product


@triton.jit
def _tf32_and_rest(x):
    """The tf32 nearest to each float32, and the exact difference, of which the matrix units take 11 bits too."""
    bits = x.to(tl.int32, bitcast=True)
    tf32 = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tf32, x - tf32
