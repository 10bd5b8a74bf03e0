"""The keys' kernels, in Triton's interpreter, against float64; on a card's path, and in all dtypes, in `device/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_close_enough
from support.mutations import mutate
from support.recipe import INTERPRETED, fill, wave
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anyup import AnyUp
from anyup.ops.dispatch import BackendFailure
from anyup.ops.key_grid import fused
from anyup.ops.key_grid.operator import OPERATION

pytestmark = [INTERPRETED, pytest.mark.usefixtures("as_on_a_card")]

# Width, channels, grid, batch. A few cells of one image say little: what the normalisations divide by is small there.
SHAPES = {
    "a divisor of the channels": (16, 16, (4, 3), 3),
    "several runs of cells, batch 2": (16, 20, (5, 7), 2),
    "a width that is no power of two, one row": (24, 7, (1, 9), 1),
    "two rows, classes of outputs": (32, 80, (2, 5), 1),
}


def model(dim: int, backend: Any, **arguments: Any) -> AnyUp:
    return fill(AnyUp(qk_dim=dim, num_heads=1, kernel_size_lfu=3, backend=backend, **arguments), 0).eval()


def made(upsampler: AnyUp, image_keys: Tensor, features: Tensor) -> tuple[Tensor, Tensor] | None:
    return upsampler.keys_by_kernels(image_keys, features, torch.float32)


def assert_keys_accurate(name: str, dtype: torch.dtype) -> None:
    """Raise an AssertionError unless the keys obey the error rule, and the features are copied as they are."""
    dim, channels, grid, batch = SHAPES[name]
    image_keys, features = wave((batch, *grid, dim), 3).to(dtype), wave((batch, channels, *grid), 7).to(dtype)
    with torch.no_grad():
        found = made(model(dim, "triton").to(dtype), image_keys, features)
        assert found is not None
        reference, _ = model(dim, "reference").to(dtype).keys(image_keys, features)
        exact, _ = model(dim, "reference").to(dtype).double().keys(image_keys.double(), features.double())
    keys, copied = found
    assert_close_enough(keys, reference.to(dtype), exact)
    assert torch.equal(copied, features) and copied.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in SHAPES), ("a divisor of the channels", torch.bfloat16)]
)
def test_keys_obey_the_error_rule(name: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    assert_keys_accurate(name, dtype)


def test_features_whose_channels_come_last_are_not_copied() -> None:
    features = wave((1, 16, 3, 4), 7).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = made(model(16, "triton"), wave((1, 3, 4, 16), 3), features)
    assert found is not None and found[1] is features


def test_features_that_are_zero_have_keys() -> None:
    with torch.no_grad():
        found = made(model(16, "triton"), wave((1, 3, 4, 16), 3), torch.zeros(1, 16, 3, 4))
    assert found is not None and found[0].isfinite().all()


def test_the_whole_upsampler_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    image, features = wave((1, 3, 8, 7), 3, 0.8), wave((1, 16, 4, 3), 7)
    calls: list[int] = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    with torch.no_grad():
        actual, reference = (model(32, backend)(image, features) for backend in ("triton", "reference"))
        exact = model(32, "reference").double()(image.double(), features.double())
    assert calls == [1]
    assert_close_enough(actual, reference, exact)


def test_torch_s_counter_counts_them_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a convolution by products it misses those that are added in place.
    monkeypatch.setattr("anyup.ops.convolution.goes_through_convolution", lambda weight: True)
    image_keys, features = wave((2, 3, 4, 16), 3), wave((2, 20, 3, 4), 7)
    counts = []
    for backend in ("triton", "reference"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(16, backend).keys(image_keys, features)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


BY_STEPS = {
    "a gradient is wanted": ({}, True, torch.float32, "a gradient is wanted, the kernels have no backward pass"),
    "another width": ({"lfu_dim": 32}, False, torch.float32, "keys of 16 channels from 32 unified ones"),
    "float64": ({}, False, torch.float64, "keys are made in float64, the kernels make them in float32"),
    "the encoder elsewhere": ({"pixel_encoder": "torch"}, False, torch.float32, "the pixel_encoder runs on torch"),
    "the unification elsewhere": (
        {"feature_unification": "torch"}, False, torch.float32, "the feature_unification runs on torch",
    ),
}  # fmt: skip
"""What is asked of a model, whether a gradient is wanted, the keys' dtype, and why keys are made step by step."""


@pytest.mark.parametrize("name", BY_STEPS)
def test_where_they_are_not_for_a_call_there_are_none_and_explain_says_why(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gradient, dtype, reason = BY_STEPS[name]
    monkeypatch.setattr("anyup.network.key_dtype", lambda *_: dtype)
    widths = {key: value for key, value in asked.items() if key == "lfu_dim"}
    backend = {"pixel_encoder": ("triton", "torch"), "feature_unification": "triton"}
    backend |= {key: value for key, value in asked.items() if key != "lfu_dim"}
    upsampler, features = model(16, backend, **widths), wave((1, 16, 3, 4), 7)
    with torch.set_grad_enabled(gradient):
        assert upsampler.keys_by_kernels(wave((1, 3, 4, 16), 3), features, dtype) is None
        explanation = upsampler.explain(wave((1, 3, 8, 7), 3, 0.8), features)
    assert explanation.chosen["key_grid"] is None
    (told,) = (e for e in explanation.explanations if e.operation == "key_grid")
    assert str(told).endswith(f"step by step\n  not triton: {told.candidates[0].reasons[0]}")
    assert reason in told.candidates[0].reasons[0]
    explanation.require()  # no reason against the call


def test_explain_names_them() -> None:
    with torch.no_grad():
        explanation = model(16, "triton").explain(wave((1, 3, 8, 7), 3, 0.8), wave((1, 16, 3, 4), 7))
    assert explanation.chosen["key_grid"] == "triton"
    assert "\nkey_grid (3 x 4, batch 1, C = 16, 16 filters of 3 x 3, float32, cpu): triton\n" in str(explanation)


def test_where_a_kernel_fails_keys_are_made_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise BackendFailure("no such instruction")

    monkeypatch.setattr(OPERATION, "_failures", {})
    monkeypatch.setattr(fused, "forward", fail)
    image_keys, features = wave((1, 3, 4, 16), 3), wave((1, 16, 3, 4), 7)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="key_grid: backend 'triton' failed .*no such instruction"):
            keys, same = model(16, "triton").keys(image_keys, features)
        expected, _ = model(16, "torch").keys(image_keys, features)
        assert made(model(16, "triton"), image_keys, features) is None
    assert same is features
    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"), [({"cells": 8}, "cells"), ({"piece": 48}, "piece"), ({"num_stages": 0}, "num_stages")]
)
def test_a_cut_that_is_none_is_refused(change: dict[str, int], told: str) -> None:
    from anyup.kernels.key_grid_config import ConvolutionConfig

    with pytest.raises(ValueError, match=f"{told}: expected"):
        ConvolutionConfig(**{"cells": 16, "outputs": 16, "piece": 16, "num_warps": 1, **change})


MUTATIONS = {
    "a border that is repeated": ("key_grid_convolution", "_inside", "number < 0, 1", "number < 0, 0"),
    "a border that is repeated at the end": ("key_grid_convolution", "_inside", "length - 2", "length - 1"),
    "a cell's statistics twice": ("key_grid_convolution", "store_statistics", "counted, y, 0.0", "counted, y + y, 0.0"),
    "statistics of the unified features about zero": (
        "feature_unification_forward", "store_statistics", "- mean[None, :, None]", "",
    ),
    "a norm of one run of channels": (
        "feature_unification_patches", "_feature_unification_arrange_kernel", "tl.range(0, channels", "tl.range(0, 1",
    ),
    "a weight whose inputs lie otherwise": (
        "feature_unification_patches", "arrange_weight", "+ number // TAPS", "+ (INPUTS - 1 - number // TAPS)",
    ),
    "a mean of squares that is a sum": ("pixel_encoder_passes", "projected_keys", "squares / CHANNELS", "squares"),
    "no bias": ("pixel_encoder_passes", "projected_keys", "+ shift[None, :]", ""),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[mutation])
    name = "two rows, classes of outputs" if "run of channels" in mutation else "a divisor of the channels"
    with pytest.raises(AssertionError, match="error"):
        assert_keys_accurate(name, torch.float32)
