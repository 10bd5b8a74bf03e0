"""The Gaussian-derivative filters against stored banks."""

from __future__ import annotations

import pytest
import torch
from support.recipe import golden_arrays

from anyup import AnyUp
from anyup.gaussian_derivatives import gaussian_derivatives

BANKS = golden_arrays("gaussian_derivatives")


def bank_size(name: str) -> tuple[int, int]:
    """(filters, kernel size) of a bank's name."""
    count, size = name.replace("x", "_").split("_")[-2:]
    return int(count), int(size)


@pytest.mark.parametrize("name", BANKS)
def test_filters_are_the_stored_bank(name: str) -> None:
    count, size = bank_size(name)
    filters = gaussian_derivatives(count, size)
    expected = BANKS[name].reshape(count, 1, size, size)
    assert filters.dtype == torch.float32
    # The bank was computed in float32: polynomials of order 15 lose a digit.
    error, largest = (t.abs().amax(dim=(1, 2, 3)) for t in (filters - expected, expected))
    assert (error <= 5e-6 * largest).all()


@pytest.mark.parametrize("name", [name for name in BANKS if bank_size(name)[0] % 8 == 0])  # as a model's filters are
def test_a_model_starts_from_the_bank_where_asked_to(name: str) -> None:
    count, size = bank_size(name)
    model = AnyUp(qk_dim=16, num_heads=2, lfu_dim=count, kernel_size_lfu=size, init_gaussian_derivatives=True)
    assert torch.equal(model.key_features_encoder[0].basis, gaussian_derivatives(count, size))


def test_fewer_filters_are_the_first_of_more() -> None:
    assert torch.equal(gaussian_derivatives(7, 5), gaussian_derivatives(32, 5)[:7])


@pytest.mark.parametrize("size", [3, 5, 7])
def test_filters_are_finite(size: int) -> None:
    assert gaussian_derivatives(128, size).isfinite().all()


def test_a_filter_of_one_tap_has_no_derivatives() -> None:
    with pytest.raises(ValueError, match="kernel_size_lfu"):
        AnyUp(qk_dim=16, num_heads=2, kernel_size_lfu=1, init_gaussian_derivatives=True)


def test_random_filters_are_used_unless_asked() -> None:
    torch.manual_seed(0)
    basis = AnyUp(qk_dim=16, num_heads=2).key_features_encoder[0].basis
    assert basis.shape == (16, 1, 5, 5) and 0.8 < basis.std() < 1.2
