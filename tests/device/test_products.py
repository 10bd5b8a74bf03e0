"""Products of float32 in three of the matrix units' own."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_close_enough
from torch import Tensor

pytestmark = pytest.mark.gpu

INNER = 64


def factors(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two factors and a sum whose magnitudes spread over some powers of two."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        powers = spread * (torch.rand(shape, generator=generator) - 0.5)
        return torch.randn(shape, generator=generator) * powers.exp2()

    return some(32, INNER), some(INNER, 32), some(32, 32)


def run(left: Tensor, right: Tensor, total: Tensor | None, precision: str) -> Tensor:
    from support.product_kernel import product

    if torch.version.hip is not None:
        pytest.skip("AMD's matrix units multiply float32 itself")
    out = torch.empty(32, 32, device="cuda")
    given = [None if tensor is None else tensor.to("cuda") for tensor in (left, right, total)]
    product[(1,)](*given, out, INNER=INNER, KNOWN=True, PRECISION=precision)
    return out.cpu()


# A number of float16x3 loses bits where its row, or the matrix, has numbers that are more than 2^17 times larger.
@pytest.mark.parametrize(
    ("precision", "spread"), [("tf32x3", 0.0), ("tf32x3", 40.0), ("float16x3", 0.0), ("float16x3", 16.0)]
)
@pytest.mark.parametrize("adds", [False, True])
def test_three_products_are_as_exact_as_one_of_float32(spread: float, adds: bool, precision: str) -> None:
    left, right, total = factors(spread)
    actual = run(left, right, total if adds else None, precision)
    before = total if adds else torch.zeros_like(total)
    exact = left.double() @ right.double() + before.double()
    narrow = left @ right + before
    assert_close_enough(actual, narrow, exact)
    # Each number of the result beside what it is the sum of, or a small one would count for nothing.
    size = left.double().abs() @ right.double().abs() + before.double().abs()
    errors = [(result.double() - exact).abs().div(size).max() for result in (actual, narrow)]
    assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(torch.float32).eps


def test_one_product_of_the_matrix_units_is_not_as_exact() -> None:
    left, right, total = factors(0.0)
    exact = left.double() @ right.double() + total.double()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_enough(run(left, right, total, "tf32"), left @ right + total, exact)


@pytest.mark.parametrize("precision", ["tf32x3", "float16x3"])
def test_an_infinity_or_a_nan_stays_in_its_row(precision: str) -> None:
    left, right, total = factors(0.0)
    left[3, 5], left[7, 1] = torch.inf, torch.nan
    actual = run(left, right, total, precision)
    assert actual[[3, 7]].isnan().all()
    others = [row for row in range(32) if row not in (3, 7)]
    assert actual[others].isfinite().all()
