"""A convolution's weight with the map's channels before the result's, so that a product's operand is read in runs.

A launch that has other work takes this along: a launch of its own would take longer than the copy.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32


@triton.jit
def arrange_weight(weight, arranged, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """From (OUTPUTS, INPUTS, TAPS) to (TAPS, INPUTS, OUTPUTS), in squares that all programs share."""
    NUMBERS: tl.constexpr = INPUTS * TAPS
    SQUARES: tl.constexpr = (NUMBERS + BLOCK - 1) // BLOCK
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for square in tl.range(program, SQUARES * ((OUTPUTS + BLOCK - 1) // BLOCK), programs):
        output = square // SQUARES * BLOCK + tl.arange(0, BLOCK)
        number = square % SQUARES * BLOCK + tl.arange(0, BLOCK)
        mask = (output < OUTPUTS)[:, None] & (number < NUMBERS)[None, :]
        values = tl.load(weight + (output * NUMBERS)[:, None] + number[None, :], mask=mask)
        place = (number % TAPS * INPUTS + number // TAPS) * OUTPUTS
        tl.store(arranged + output[:, None] + place[None, :], values, mask=mask)


def arrangement(weights: tuple[Tensor, Tensor] | None, nothing: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments and the constants of a kernel that takes the copy along: OUTPUTS is 0 where it takes none.

    Args:
        weights: a convolution's (D, Cin, k, k), and (k, k, Cin, D) to which it is copied; contiguous, of one dtype.
        nothing: for pointers that are not followed.
    """
    weight, arranged = (nothing, nothing) if weights is None else weights
    outputs, inputs, size = (0, 0, 0) if weights is None else weight.shape[:3]
    constants = {"OUTPUTS": outputs, "INPUTS": inputs, "WEIGHT_TAPS": size * size, "BLOCK": _BLOCK}
    return {"weight": weight, "arranged_weight": arranged}, constants
