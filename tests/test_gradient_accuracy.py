"""Gradients under autocast against float64: no further from them than those of the published forward are."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from support.recipe import INTERPRETED, golden_arrays, golden_call, wave
from torch import Tensor

import anyup
from anyup import AnyUp
from anyup.bench.baseline import Published

MINI = {"anyup_mini, even": (64, 8), "anyup_mini, odd": (56, 7), "anyup_mini, fine": (48, 12)}
"""Side of the image and of the grid."""

CASES = (*sorted({name.partition("/")[0] for name in golden_arrays("grads")}), *MINI)

IN_TESTS = ("odd_scale", "square", "anyup_mini, odd")
"""The others are in docs/training.md, by `python tests/test_gradient_accuracy.py`."""

HALF = (torch.bfloat16, torch.float16)

Problem = tuple[AnyUp, Tensor, Tensor, tuple[int, int] | None]


def problem(name: str, backend: str) -> Problem:
    """A case of the golden recipe, or the shipped weights with a formula's image and features."""
    if name not in MINI:
        call = golden_call(name, backend)
        return call.model, call.image, call.features, call.output_size
    side, grid = MINI[name]
    model = anyup.load("anyup_mini", backend=backend).eval()
    return model, wave((1, 3, side, side), 3 + side, 0.8), wave((1, 64, grid, grid), 7 + side), None


def gradients(name: str, *, backend: str, dtype: torch.dtype | None, published: bool = False) -> Tensor:
    """Those of all parameters as one vector in float64, under autocast to a dtype, or in float64 (None)."""
    model, image, features, size = problem(name, backend)
    if dtype is None:
        model, image, features = model.double(), image.double(), features.double()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = Published(model)(image, features, None, size) if published else model(image, features, size)
    # Representable in every dtype.
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(out)
    wanted = [parameter for key, parameter in model.named_parameters() if "out_proj" not in key]
    found = torch.autograd.grad(out, wanted, grad)
    return torch.cat([each.double().flatten() for each in found])


@cache
def exact(name: str) -> Tensor:
    return gradients(name, backend="reference", dtype=None)


def error(name: str, *, backend: str, dtype: torch.dtype, published: bool = False) -> float:
    """The relative error of the vector of all gradients."""
    found = gradients(name, backend=backend, dtype=dtype, published=published)
    return ((found - exact(name)).norm() / exact(name).norm()).item()


def assert_as_near(ours: float, published: float) -> None:
    """Raise an AssertionError unless the first error is at most the second, where that is finite."""
    assert ours <= (published if math.isfinite(published) else 0.01), (ours, published)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "odd_scale" else pytest.mark.slow) for name in IN_TESTS]
)
def test_gradients_under_autocast_are_as_near_as_the_published_forward_s(name: str, dtype: torch.dtype) -> None:
    assert_as_near(error(name, backend="torch", dtype=dtype), error(name, backend="torch", dtype=dtype, published=True))


@pytest.mark.slow
@INTERPRETED
def test_gradients_of_the_kernels_in_float16_are_as_near_as_the_published_forward_s() -> None:
    name, half = "conv_guidance", torch.float16
    assert_as_near(error(name, backend="triton", dtype=half), error(name, backend="torch", dtype=half, published=True))


@pytest.mark.parametrize("published", [0.01, math.nan])
def test_a_larger_error_is_seen(published: float) -> None:
    for ours in (0.02, math.nan):
        with pytest.raises(AssertionError):
            assert_as_near(ours, published)


if __name__ == "__main__":
    print("| case | ours, bfloat16 | published, bfloat16 | ours, float16 | published, float16 |")
    for case in CASES:
        cells = [
            f"{error(case, backend='torch', dtype=dtype, published=published):.2%}"
            for dtype in HALF
            for published in (False, True)
        ]
        print(f"| {case} | {' | '.join(cells)} |")
