"""The feature unification: every backend against the reference, and the reference against its definition."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import (
    BACKENDS,
    DTYPES,
    assert_backend_accurate,
    assert_backend_accurate_over_draws,
    assert_close_enough,
    output_and_gradients,
)
from support.allocations import LargestTensor
from support.feature_unification_cases import SHAPES, Shape, tensors_of
from torch import Tensor

from anyup.ops.feature_unification import eager, explain_backends, unify_features


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_backend_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_backend_accurate_over_draws(unify_features, lambda seed: tensors_of(SHAPES[name], dtype, seed))


@pytest.mark.parametrize("name", ["several tiles", "odd, batch 2"])
def test_torch_backend_reads_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    assert_backend_accurate(unify_features, tensors_of(SHAPES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_softmax_obeys_the_error_rule(dtype: torch.dtype) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        tensors = tensors_of(SHAPES["odd, batch 2"], dtype, seed)
        return {**tensors, "features": tensors["features"] * 200}

    assert_backend_accurate_over_draws(unify_features, drawn)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd, batch 2", "seven channels", "smaller than the filter"])
def test_it_is_the_definition_tap_by_tap(name: str, backend: str) -> None:
    shape = SHAPES[name]
    tensors = tensors_of(shape, torch.float64)
    out = unify_features(**tensors, backend=backend)
    features, basis = tensors["features"].tolist(), tensors["basis"][:, 0].tolist()
    (h, w), channels, filters = shape.grid, shape.channels, shape.filters
    half = shape.kernel_size // 2
    for i, j in {(0, 0), (h - 1, w - 1), (h // 2, w // 2)}:
        inside = [
            (a, b)
            for a in range(shape.kernel_size)
            for b in range(shape.kernel_size)
            if 0 <= i + a - half < h and 0 <= j + b - half < w
        ]
        z = [
            sum(features[0][c][i + a - half][j + b - half] * basis[m][a][b] for a, b in inside) / len(inside)
            for c in range(channels)
            for m in range(filters)
        ]  # the flat list, channel-major
        value = [[z[o * channels + c] for c in range(channels)] for o in range(filters)]
        for o in range(filters):
            softmax = [
                math.exp(value[o][c]) / sum(math.exp(value[p][c]) for p in range(filters)) for c in range(channels)
            ]
            assert math.isclose(out[0, o, i, j].item(), sum(softmax) / channels, rel_tol=1e-12)


def test_the_paper_s_reading_of_the_maps_fails_the_error_rule() -> None:
    tensors = tensors_of(SHAPES["odd, batch 2"])

    def paper(features: Tensor, basis: Tensor) -> Tensor:
        batch, channels, h, w = features.shape
        pad = basis.shape[2] // 2
        z = torch.nn.functional.conv2d(features.reshape(-1, 1, h, w), basis, padding=pad)
        z = z / torch.nn.functional.conv2d(torch.ones_like(features[:1, :1]), torch.ones_like(basis[:1]), padding=pad)
        return z.view(batch, channels, -1, h, w).softmax(dim=2).mean(dim=1)

    exact = unify_features(**{k: t.double() for k, t in tensors.items()}, backend="reference")
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough(paper(**tensors), unify_features(**tensors, backend="reference"), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters_share_out_one(backend: str) -> None:
    out = unify_features(**tensors_of(SHAPES["odd, batch 2"]), backend=backend)
    torch.testing.assert_close(out.sum(dim=1), torch.ones(2, 7, 5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    tensors = tensors_of(Shape((3, 2), 5, filters=3, kernel_size=3), torch.float64)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda f, b: unify_features(f, b, backend=backend), inputs)


@pytest.mark.parametrize("memory", [torch.channels_last, "sliced"])
def test_strides_change_nothing(memory: Any) -> None:
    tensors = tensors_of(SHAPES["odd, batch 2"])
    expected = output_and_gradients(unify_features, tensors, "torch")
    features = tensors["features"]
    moved = (
        torch.stack((features, features), -1)[..., 0]
        if memory == "sliced"
        else features.contiguous(memory_format=memory)
    )
    actual = output_and_gradients(unify_features, {**tensors, "features": moved}, "torch")
    assert not moved.is_contiguous()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-6, atol=1e-7)


def draw(shape: Shape, dtype: torch.dtype, seed: int, n: int) -> dict[str, Tensor]:
    """The n-th of three draws of the inputs."""
    return tensors_of(shape, dtype, 3 * seed + n)


@pytest.mark.parametrize("count", [15, pytest.param(75, marks=pytest.mark.slow)])
def test_random_shapes_obey_the_error_rule(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        shape = Shape(
            (rng.randint(1, 20), rng.randint(1, 20)),
            rng.randint(1, 100),
            rng.choice([1, 8, 32, 128]),
            rng.choice([1, 3, 5, 7]),
            rng.randint(1, 2),
        )
        dtype = rng.choice(DTYPES)
        try:
            assert_backend_accurate_over_draws(unify_features, partial(draw, shape, dtype, seed))
        except AssertionError as error:
            raise AssertionError(f"{shape}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize("threads_now", [1, 2, 5])
def test_result_does_not_depend_on_the_number_of_threads(threads_now: int, threads: None) -> None:
    tensors = tensors_of(SHAPES["several tiles"])
    torch.set_num_threads(threads_now)
    assert_backend_accurate(unify_features, tensors)


def test_no_tensor_holds_filters_times_channels_times_positions(threads: None) -> None:
    torch.set_num_threads(1)  # the tiles of other threads are not seen
    shape = Shape((40, 40), 128, filters=128)
    tensors = tensors_of(shape)
    with LargestTensor() as seen:
        out = eager.forward(**tensors)
    assert seen.largest < 40 * 40 * 128 * 128 / 20
    with LargestTensor() as seen:
        eager.backward(out, **tensors)
    assert seen.largest < 40 * 40 * 128 * 128 / 4  # 25 taps instead of 128 filters


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": torch.ones(5, 4, 4)}, ValueError, r"features: .*\(5, 4, 4\)"),
        ({"features": torch.ones(1, 5, 4, 4).long()}, TypeError, r"features: .*int64"),
        ({"basis": torch.ones(8, 1, 4, 4)}, ValueError, r"basis: .*odd.*\(8, 1, 4, 4\)"),
        ({"basis": torch.ones(8, 2, 5, 5)}, ValueError, r"basis: .*\(8, 2, 5, 5\)"),
        ({"basis": torch.ones(8, 1, 5, 3)}, ValueError, r"basis: .*\(8, 1, 5, 3\)"),
        ({"basis": torch.ones(8, 1, 5, 5).half()}, ValueError, r"basis: .*float32.*float16"),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unify_features(**{**tensors_of(Shape((4, 4), 5)), **changed})


def test_explanation_names_the_chosen_backend() -> None:
    explanation = explain_backends(**tensors_of(SHAPES["square"]))
    assert explanation.chosen == "torch" and "8 x 8" in str(explanation)
