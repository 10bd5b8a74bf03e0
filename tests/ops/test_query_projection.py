"""The query projection: every backend against the reference, and the reference against its definition."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import (
    BACKENDS,
    DTYPES,
    assert_backend_accurate,
    assert_backend_accurate_over_draws,
    assert_close_enough,
    output_and_gradients,
)
from support.allocations import LargestTensor
from support.query_projection_cases import SHAPES, Shape, run, tensors_of
from torch import Tensor

from anyup.ops.query_projection import ProjectionParameters, eager, explain_backends, project_queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_backend_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_backend_accurate_over_draws(run, lambda seed: tensors_of(SHAPES[name], dtype, seed))


def test_torch_backend_reads_no_uninitialised_memory(poisoned_memory: None) -> None:
    assert_backend_accurate(run, tensors_of(SHAPES["several bands"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_convolution_then_norm_then_projection(backend: str) -> None:
    tensors = tensors_of(SHAPES["odd"], torch.float64)
    encoded, convolution, norm, weight, bias = tensors.values()
    padded = F.pad(encoded, (0, 0, 1, 1, 1, 1))
    x = sum(padded[:, a : a + 17, b : b + 23] @ convolution[:, :, a, b].T for a in range(3) for b in range(3))
    x = x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * norm
    torch.testing.assert_close(run(**tensors, backend=backend), x @ weight.T + bias)


def test_reflected_borders_fail_the_error_rule() -> None:
    tensors = tensors_of(SHAPES["odd"])
    encoded, convolution, norm, weight, bias = tensors.values()
    x = F.conv2d(F.pad(encoded.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect"), convolution).permute(0, 2, 3, 1)
    wrong = F.linear(F.rms_norm(x, (16,), norm), weight, bias)
    exact = run(**{k: t.double() for k, t in tensors.items()}, backend="reference")
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough(wrong, run(**tensors, backend="reference"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_length_of_the_encoded_vectors_hardly_matters(size: float, dtype: torch.dtype) -> None:
    tensors = tensors_of(SHAPES["odd"], dtype)
    tensors["encoded"] = tensors["encoded"] * size
    assert_backend_accurate(run, tensors, gradients=dtype in (torch.float64, torch.float32))


def test_a_map_of_zeros_becomes_the_bias() -> None:
    tensors = tensors_of(SHAPES["odd"])
    tensors["encoded"] = torch.zeros_like(tensors["encoded"])
    for backend in BACKENDS:
        assert torch.equal(run(**tensors, backend=backend), tensors["bias"].expand(1, 17, 23, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    tensors = tensors_of(Shape((3, 2), dim=4), torch.float64)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(
        lambda x, *p: project_queries(x, ProjectionParameters(*p), backend=backend), inputs, fast_mode=True
    )


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 2, 1, 3)])
def test_strides_change_nothing(order: Any) -> None:
    tensors = tensors_of(SHAPES["batch 2"])
    expected = output_and_gradients(run, tensors, "torch")
    back = [order.index(n) for n in range(4)]
    moved = tensors["encoded"].permute(order).contiguous().permute(back)
    actual = output_and_gradients(run, {**tensors, "encoded": moved}, "torch")
    assert not moved.is_contiguous()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)


def draw(shape: Shape, dtype: torch.dtype, seed: int, n: int) -> dict[str, Tensor]:
    """The n-th of three draws of the inputs."""
    return tensors_of(shape, dtype, 3 * seed + n)


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_random_shapes_obey_the_error_rule(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        shape = Shape((rng.randint(1, 60), rng.randint(1, 60)), rng.choice([8, 16, 40]), rng.randint(1, 2))
        dtype = rng.choice(DTYPES)
        try:
            assert_backend_accurate_over_draws(run, partial(draw, shape, dtype, seed))
        except AssertionError as error:
            raise AssertionError(f"{shape}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize("threads_now", [1, 2, 5])
def test_result_does_not_depend_on_the_number_of_threads(threads_now: int, threads: None) -> None:
    torch.set_num_threads(threads_now)
    assert_backend_accurate(run, tensors_of(SHAPES["several bands"]))


def test_no_tensor_is_larger_than_the_output(threads: None) -> None:
    torch.set_num_threads(1)  # the bands of other threads are not seen
    encoded, *parameters = tensors_of(Shape((160, 160))).values()
    with LargestTensor() as seen:
        eager.forward(encoded, ProjectionParameters(*parameters))
    assert seen.largest == encoded.numel()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"encoded": torch.ones(1, 4, 4, 8)}, ValueError, r"encoded: expected \(B, H, W, 16\), got .*\(1, 4, 4, 8\)"),
        ({"encoded": torch.ones(4, 4, 16)}, ValueError, r"encoded: .*\(4, 4, 16\)"),
        ({"norm": torch.ones(16).half()}, ValueError, r"norm: .*float16"),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**{**tensors_of(Shape((4, 4))), **changed}, backend="torch")


def test_explanation_names_the_chosen_backend() -> None:
    encoded, *parameters = tensors_of(SHAPES["odd"]).values()
    explanation = explain_backends(encoded, ProjectionParameters(*parameters))
    assert explanation.chosen == "torch" and "17 x 23" in str(explanation)
