"""What half precision costs from end to end."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp
from anyup.ops import precision


def wave_weights() -> AnyUp:
    return fill(AnyUp(), 0).eval()


def initial_weights() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp().eval()


WEIGHTS = {"wave": wave_weights, "initial": initial_weights}
EACH_WEIGHTS = pytest.mark.parametrize("weights", ["wave", pytest.param("initial", marks=pytest.mark.slow)])


def inputs(size: int = 112, grid: int = 8, channels: int = 96) -> tuple[Tensor, Tensor]:
    return wave((1, 3, size, size), 3, 0.8), wave((1, channels, grid, grid), 7)


@cache
def exact(weights: str) -> Tensor:
    """112 x 112 from 8 x 8, C = 96, in float64."""
    with torch.no_grad():
        return WEIGHTS[weights]().double()(*(t.double() for t in inputs()))


def relative_error(out: Tensor, weights: str) -> float:
    """Root mean square of the error over that of the float64 result."""
    expected = exact(weights)
    return ((out - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@EACH_WEIGHTS
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float32, 2e-5)])
def test_a_cast_model_is_as_exact_as_its_dtype_allows(dtype: torch.dtype, most: float, weights: str) -> None:
    with torch.no_grad():
        out = WEIGHTS[weights]().to(dtype)(*(t.to(dtype) for t in inputs()))
    assert relative_error(out, weights) < most


@EACH_WEIGHTS
def test_autocast_costs_no_more_than_a_cast_model(weights: str) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = WEIGHTS[weights]()(*inputs())
    assert out.dtype == torch.float32
    assert relative_error(out, weights) < 0.02


@EACH_WEIGHTS
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)])
def test_half_precision_obeys_the_error_rule(
    dtype: torch.dtype, units: bool, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda: units)
    image, features = (t.to(dtype) for t in inputs(40, 5, 48))
    outs = []
    for backend, wide in (("torch", dtype), ("reference", dtype), ("reference", torch.float64)):
        model = WEIGHTS[weights]().to(dtype).to(wide)
        again = AnyUp(**model.config, backend=backend).to(wide).eval()
        again.load_state_dict(model.state_dict())
        with torch.no_grad():
            outs.append(again(image.to(wide), features.to(wide)))
    assert_close_enough(*outs)


@EACH_WEIGHTS
def test_products_of_bfloat16_cost_little_of_its_accuracy(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = []
    for units in (True, False):
        monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda units=units: units)
        with torch.no_grad():
            outs.append(WEIGHTS[weights]().bfloat16()(*(t.bfloat16() for t in inputs())))
    assert not torch.equal(*outs)
    assert relative_error(outs[0], weights) < 1.2 * relative_error(outs[1], weights)


def test_large_features_do_not_overflow_in_half_precision() -> None:
    image, features = inputs(48, 6, 24)
    features = (features * 2e4).half()  # the sum of their squares leaves float16
    with torch.no_grad():
        out = wave_weights().half()(image.half(), features)
    assert out.isfinite().all()
    assert out.abs().max() <= features.abs().max()


def test_small_features_do_not_vanish_in_half_precision() -> None:
    image, features = inputs(48, 6, 24)
    small = (features * 1e-4).half()
    with torch.no_grad():
        model = wave_weights().half()
        out, expected = model(image.half(), small), wave_weights().double()(image.double(), small.double())
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()
