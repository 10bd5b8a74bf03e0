"""Matrix products over pixels: the same numbers by whichever library runs them."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_close_enough

from anyup.ops import linear as module
from anyup.ops.linear import grouped_product, linear, linear_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["convolution", "product"])
def through_convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_convolution_is_faster", lambda: request.param)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 3, 5), (200, 16, 9), (0, 4, 4)])
def test_linear_is_a_product_with_the_transposed_weight(
    sizes: tuple[int, int, int], dtype: torch.dtype, through_convolution: None
) -> None:
    pixels, inputs, outputs = sizes
    x, weight = randn(pixels, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    bias = randn(outputs, dtype=dtype)
    expected = torch.addmm(bias, x, weight.T)
    exact = torch.addmm(bias.double(), x.double(), weight.double().T)
    assert_close_enough(linear(x, weight, bias), expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (7, 3, 5, 2), (196, 4, 32, 64), (0, 2, 3, 4)])
def test_each_group_is_multiplied_by_its_own_weight(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, through_convolution: None
) -> None:
    pixels, groups, inputs, outputs = sizes
    x, weight = randn(pixels, groups, inputs, dtype=dtype), randn(groups, inputs, outputs, dtype=dtype)
    expected = torch.einsum("ngk,gkm->ngm", x, weight)
    exact = torch.einsum("ngk,gkm->ngm", x.double(), weight.double())
    assert_close_enough(grouped_product(x, weight), expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 3, 5), (200, 128, 160), (0, 4, 4)])
def test_gradients_of_linear_are_products_with_the_gradient(
    sizes: tuple[int, int, int], dtype: torch.dtype, through_convolution: None
) -> None:
    pixels, inputs, outputs = sizes
    x, weight = randn(pixels, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    grad = randn(pixels, outputs, dtype=dtype)
    grad_x, grad_weight = linear_backward(grad, x, weight)
    assert grad_x.is_contiguous()
    assert_close_enough(grad_x, grad @ weight, grad.double() @ weight.double())
    assert_close_enough(grad_weight, grad.T @ x, grad.double().T @ x.double())
