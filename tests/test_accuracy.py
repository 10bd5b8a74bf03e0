"""The error rule itself."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_backend_accurate, assert_backend_accurate_over_draws, assert_close_enough
from torch import Tensor


def test_an_error_beyond_twice_the_reference_s_own_and_a_rounding_fails() -> None:
    exact = torch.linspace(-1, 1, 100, dtype=torch.float64)
    reference = (exact + 1e-5).float()
    bound = 2 * (reference.double() - exact).abs().max() + 2 * torch.finfo(torch.float32).eps
    assert_close_enough((exact + 0.99 * bound).float(), reference, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough((exact + 1.02 * bound).float(), reference, exact)


def test_in_float64_a_relative_error_of_1e_minus_11_fails() -> None:
    exact = torch.linspace(-3, 3, 10, dtype=torch.float64)
    assert_close_enough(exact * (1 + 5e-13), exact, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough(exact * (1 + 1e-11), exact, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_nan_fails(dtype: torch.dtype) -> None:
    exact = torch.ones(10, dtype=torch.float64)
    actual = exact.to(dtype)
    actual[3] = torch.nan
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough(actual, exact.to(dtype), exact)


def test_other_shapes_and_dtypes_fail() -> None:
    exact = torch.ones(10, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes"):
        assert_close_enough(exact.float()[None], exact.float(), exact)
    with pytest.raises(AssertionError, match="dtypes"):
        assert_close_enough(exact, exact.float(), exact)


def test_a_backend_with_a_wrong_gradient_fails() -> None:
    def run(x: Tensor, *, backend: str) -> Tensor:
        return x * x if backend == "reference" else x * x.detach() + 0.0 * x

    with pytest.raises(AssertionError, match="gradient of x"):
        assert_backend_accurate(run, {"x": torch.ones(4)})
    assert_backend_accurate(run, {"x": torch.ones(4)}, gradients=False)


@pytest.mark.parametrize("draws", [1, 48])
def test_a_backend_that_is_wrong_for_some_draw_fails(draws: int) -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        return {"x": torch.full((3,), float(seed))}

    def wrong(x: Tensor, *, backend: str) -> Tensor:
        return x if backend == "reference" or x[0] >= draws else x + 0.1

    with pytest.raises(AssertionError, match="output: error"):
        assert_backend_accurate_over_draws(wrong, draw)
