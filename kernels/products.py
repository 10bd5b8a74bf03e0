"""Products on the matrix units, those of float32 included.

The matrix units take 11 bits of a float32 ("tf32"). "tf32x3" makes a product exact to float32's rounding in three of
theirs: each factor is the nearest tf32 and a rest. Triton's own way to it takes three times as many instructions for
the split, and two for each number of the result, which is what float32 kernels did most of the time.

"float16x3" is the same of float16, which has as many bits as a tf32, half of its bytes and products at twice the rate,
but not its exponents. So a factor is multiplied by a power of two, exactly, which brings its largest number to the
upper end of float16's. What is more than 2^17 times smaller than the largest number loses bits, to an error of 2^-39 of
the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Target

LOG2_E = tl.constexpr(1.4426950408889634)

_AT_ONCE = tl.constexpr(4096)


def in_float16(precision: str, target: Target) -> str:
    """That of `split_matmul` in the place of "tf32x3", on targets that its kernels have been compiled for."""
    return "float16x3" if precision == "tf32x3" and target.arch in (80, 86, 89, 90) else precision


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
def split_matmul(left, right, right_scale, total, PRECISION: tl.constexpr):
    """`mixed_matmul` whose PRECISION may be "float16x3" too: then an infinity gives NaN.

    Each row of `left` has its scale. `right_scale` is `scale_of` a matrix that `right` is a part of, or None.
    """
    if left.dtype != right.dtype:
        return mixed_matmul(left, right, total, PRECISION)
    elif PRECISION != "float16x3" or left.dtype != tl.float32:
        return matmul(left, right, total, PRECISION)
    else:
        if right_scale is None:
            right_scale = scale_of(tl.max(tl.max(tl.abs(right), axis=1), axis=0))
        row_scale = scale_of(tl.max(tl.abs(left), axis=1))
        left_high, left_rest = _float16_and_rest(left * row_scale[0][:, None])
        right_high, right_rest = _float16_and_rest(right * right_scale[0])
        # The rests first.
        product = tl.dot(left_rest, right_high)
        product = tl.dot(left_high, right_rest, product)
        product = tl.dot(left_high, right_high, product) * (row_scale[1] * right_scale[1])[:, None]
        return product if total is None else total + product


@triton.jit
def scale_of(largest):
    """The power of two that brings magnitudes of at most `largest`, float32, below 2^15; and what takes it back."""
    # Where all are smaller than 2^-112, both are still numbers. Infinities and NaN remain.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def matrix_scale(matrix, NUMBERS: tl.constexpr, PRECISION: tl.constexpr):
    """`scale_of` a contiguous matrix of NUMBERS float32, for `split_matmul` of its parts; 1 where that needs none."""
    if PRECISION != "float16x3":
        return 1.0, 1.0
    else:
        place = tl.arange(0, _AT_ONCE)
        largest = tl.zeros((_AT_ONCE,), tl.float32)
        for first in tl.range(0, NUMBERS, _AT_ONCE):
            number = tl.load(matrix + first + place, mask=first + place < NUMBERS, other=0.0)
            largest = tl.maximum(largest, tl.abs(number))
        return scale_of(tl.max(largest, axis=0))


@triton.jit
def _float16_and_rest(x):
    """The float16 nearest to each float32, and that nearest to the difference."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _tf32_and_rest(x):
    """The tf32 nearest to each float32, and the exact difference, of which the matrix units take 11 bits too."""
    bits = x.to(tl.int32, bitcast=True)
    tf32 = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tf32, x - tf32
