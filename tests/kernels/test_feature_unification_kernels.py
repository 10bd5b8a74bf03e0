"""The feature unification's Triton kernels, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import (
    assert_backend_accurate,
    assert_close_enough,
    output_and_gradients,
)
from support.allocations import LargestTensor
from support.feature_unification_cases import Shape, tensors_of
from support.mutations import mutate
from support.recipe import INTERPRETED
from torch import Tensor

from anyup.ops.feature_unification import explain_backends, reference, unify_features

pytestmark = INTERPRETED

# Few positions: each program of the interpreter takes a tenth of a second.
SHAPES = {
    "M divides C": Shape((2, 3), 32),
    "C one more than M": Shape((2, 2), 17),
    "C a prime, batch 2": Shape((1, 2), 37, batch=2),
    "C shares a factor with M": Shape((2, 3), 40),
    "fewer channels than filters": Shape((3, 2), 7),
    "one channel": Shape((3, 2), 1),
    "several squares": Shape((2, 6), 16, kernel_size=3),
    "one position": Shape((1, 1), 9),
    "one row": Shape((1, 5), 32),
    "one column": Shape((5, 1), 32),
    "smaller than the filter": Shape((2, 3), 16, kernel_size=7),
    "one tap": Shape((2, 2), 16, kernel_size=1),
    "one filter": Shape((2, 2), 6, filters=1),
    "filters that are no power of two": Shape((2, 3), 48, filters=24),
    "neither is a power of two": Shape((2, 3), 37, filters=24),
    "empty batch": Shape((7, 5), 16, batch=0),
    "rows of filters in several products": Shape((1, 2), 256, filters=128),
    "two classes of outputs": Shape((2, 3), 96, filters=64),
    "four classes, the first outputs out of order": Shape((1, 2), 48, filters=64),
    "four classes, one run, several squares": Shape((2, 5), 16, filters=64, kernel_size=3),
    "eight classes, batch 2": Shape((1, 1), 80, filters=128, batch=2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_obey_the_error_rule(name: str) -> None:
    assert_backend_accurate(unify_features, tensors_of(SHAPES[name]), backend="triton")


def test_an_odd_number_of_channels_obeys_the_error_rule_with_the_default_filters() -> None:
    tensors = tensors_of(Shape((1, 2), 131, filters=128))
    assert_backend_accurate(unify_features, tensors, backend="triton", gradients=False)
    assert_backend_accurate(unify_features, {name: t.half() for name, t in tensors.items()}, backend="triton")
    tensors["basis"].requires_grad_()
    with pytest.raises(NotImplementedError, match="a gradient is wanted for C = 131 and 128 filters, .* no divisor"):
        unify_features(**tensors, backend="triton")


@pytest.mark.parametrize(
    "name", ["M divides C", "C a prime, batch 2", "filters that are no power of two", "two classes of outputs"]
)
def test_kernels_obey_the_error_rule_in_half_precision(name: str) -> None:
    tensors = tensors_of(SHAPES[name], torch.float16)
    assert_backend_accurate(unify_features, tensors, backend="triton")


@pytest.mark.parametrize("name", ["M divides C", "C shares a factor with M", "two classes of outputs"])
def test_a_saturated_softmax_obeys_the_error_rule(name: str) -> None:
    tensors = tensors_of(SHAPES[name])
    assert_backend_accurate(unify_features, {**tensors, "features": tensors["features"] * 200}, backend="triton")


@pytest.mark.parametrize("name", ["M divides C", "C a prime, batch 2", "two classes of outputs"])
def test_kernels_read_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    assert_backend_accurate(unify_features, tensors_of(SHAPES[name]), backend="triton")


@pytest.mark.parametrize("name", ["M divides C", "C a prime, batch 2"])
@pytest.mark.parametrize("memory", ["channels last", "sliced"])
def test_strides_change_nothing(name: str, memory: str) -> None:
    tensors = tensors_of(SHAPES[name])
    expected = output_and_gradients(unify_features, tensors, "triton")
    features = tensors["features"]
    if memory == "sliced":
        moved = torch.stack((features, torch.full_like(features, torch.nan)), dim=-1)[..., 0]
    else:
        moved = features.contiguous(memory_format=torch.channels_last)
    assert not moved.is_contiguous()
    actual = output_and_gradients(unify_features, {**tensors, "features": moved}, "triton")
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


def test_a_strided_gradient_changes_nothing() -> None:
    from anyup.ops.feature_unification import fused

    tensors = tensors_of(SHAPES["M divides C"])
    grad = torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    moved = grad.contiguous(memory_format=torch.channels_last)
    assert not moved.is_contiguous()
    for actual, expected in zip(fused.backward(moved, **tensors), fused.backward(grad, **tensors), strict=True):
        assert torch.equal(actual, expected)


def test_gradients_are_bit_equal_from_run_to_run() -> None:
    tensors = tensors_of(SHAPES["C a prime, batch 2"])
    first, second = (output_and_gradients(unify_features, tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_the_size_of_a_gradient_does_not_matter(size: float) -> None:
    from anyup.ops.feature_unification import fused

    tensors = tensors_of(SHAPES["M divides C"])
    grad = torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    for actual, unit in zip(fused.backward(size * grad, **tensors), fused.backward(grad, **tensors), strict=True):
        torch.testing.assert_close(actual / size, unit, rtol=1e-5, atol=1e-5 * unit.abs().max().item())


def test_no_tensor_holds_filters_times_channels_times_positions() -> None:
    from anyup.ops.feature_unification import fused

    tensors = tensors_of(Shape((4, 4), 128, filters=64))
    # The features bordered by 2, and as many sums of the cells of one square; the interpreter copies them as bytes.
    least = 4 * 8 * 8 * 128
    assert 2 * least < 64 * 128 * 4 * 4
    with LargestTensor() as seen:
        out = fused.forward(**tensors)
    assert seen.largest <= least
    with LargestTensor() as seen:
        fused.backward(out, **tensors)
    assert seen.largest <= least


def run_in_planes(planes: int, tensors: dict[str, Tensor]) -> Tensor:
    """The forward kernels with float32 numbers split in planes of float16, which the interpreter multiplies right."""
    from anyup.kernels.feature_unification_config import forward_configs
    from anyup.kernels.feature_unification_forward import plan_forward
    from anyup.kernels.feature_unification_patches import allocate, plan_arrange

    features, basis = tensors["features"], tensors["basis"]
    arranged = allocate(features, basis, planes=planes, dtype=torch.float16)
    plan_arrange(features, basis, arranged)()
    out = features.new_empty(features.shape[0], basis.shape[0], *features.shape[2:])
    plan_forward(arranged, out, precision="ieee", config=forward_configs(arranged)[0])()
    return out


@pytest.mark.parametrize("name", ["M divides C", "C a prime, batch 2"])
def test_the_sum_of_three_planes_is_as_good_as_float32(name: str) -> None:
    tensors = tensors_of(SHAPES[name])
    exact = reference.forward(**{key: tensor.double() for key, tensor in tensors.items()})
    single = reference.forward(**tensors)
    assert_close_enough(run_in_planes(3, tensors), single, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_close_enough(run_in_planes(1, tensors), single, exact)


def test_a_channel_that_is_not_a_number_stays_in_its_patches() -> None:
    tensors = tensors_of(Shape((2, 9), 16))
    tensors["features"][0, 3, 1, 0] = torch.nan
    out = unify_features(**tensors, backend="triton")
    assert out[..., :3].isnan().all() and not out[..., 3:].isnan().any()


def test_a_config_changes_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import feature_unification_config as window_attention_config

    tensors = tensors_of(Shape((3, 5), 64, filters=32))
    for config in (
        window_attention_config.UnificationConfig(1, 16, 1, 1),
        window_attention_config.UnificationConfig(16, 32, 8, 3),
    ):
        monkeypatch.setattr(window_attention_config, "forward_configs", lambda *_, config=config: [config])
        assert_backend_accurate(unify_features, tensors, backend="triton")


@pytest.mark.parametrize("values", [{"positions": 3}, {"rows": 8}, {"num_warps": 0}, {"num_stages": 0}])
def test_a_config_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    from anyup.kernels.feature_unification_config import UnificationConfig

    with pytest.raises(ValueError, match=next(iter(values))):
        UnificationConfig(**{"positions": 8, "rows": 64, "num_warps": 4, **values})


# Mutations: what the error rule must notice. Each is a change of a kernel's source.


def assert_accurate(*shapes: Shape) -> None:
    for shape in shapes:
        assert_backend_accurate(unify_features, tensors_of(shape), backend="triton")


FORWARD, BACKWARD = "feature_unification_forward", "feature_unification_backward"
PATCHES = "feature_unification_patches"
MUTATIONS = {
    "a border counted as inside": (FORWARD, "taps_inside", "tl.maximum(row - HALF, 0)", "(row - HALF)"),
    "a tap too few": (PATCHES, "load_piece", "tap < SIZE * SIZE)", "tap < SIZE * SIZE - 1)"),
    "rows and columns of a patch swapped": (PATCHES, "load_piece", "tap // SIZE * (width", "tap % SIZE * (width"),
    "columns that are no filters": (FORWARD, "softmax_rows", "< FILTERS)[None, :]", "< FILTERS + 1)[None, :]"),
    "softmaxes that do not exist": (FORWARD, "softmax_rows", "tl.where(exists, 1.0", "tl.where(exists | True, 1.0"),
    "nothing turned": (FORWARD, "turned_logits", "row[:, None] + shift[None, :]", "row[:, None] + 0 * shift[None, :]"),
    "the paper's reading": (
        PATCHES, "_feature_unification_arrange_kernel",
        "(output * channels) // FILTERS + entry // COLUMNS", "output + entry // COLUMNS * FILTERS",
    ),
    "classes in order": (PATCHES, "output_of", "column // WIDTH * first_step", "column // WIDTH"),
    "the same filters for each class": (
        FORWARD, "_feature_unification_forward_kernel", "begin = (run + class_)", "begin = (run + 0 * class_)",
    ),
    "the same channels for each class": (
        FORWARD, "_feature_unification_forward_kernel", "(run + class_) // CLASSES", "run // CLASSES",
    ),
    "a softmax for each class": (FORWARD, "softmax_rows", "total += tl.sum(powers", "total += 0 * tl.sum(powers"),
    "one softmax's channels for the next": (
        FORWARD, "turned_logits", "row[:, None] >= shift[None, :]", "row[:, None] >= 0 * shift[None, :]",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[mutation])
    with pytest.raises(AssertionError, match="output: error"):
        assert_accurate(Shape((3, 4), 48, filters=24), Shape((2, 2), 37, filters=24), Shape((1, 2), 48, filters=64))


BACKWARD_MUTATIONS = {
    "the softmax's sum left out": ("logits_gradient", "- mean[:, None]", "- 0 * mean[:, None]"),
    "the sum of one class alone": ("logits_gradient", "mean += tl.sum", "mean += 0 * tl.sum"),
    "filters of another class": (
        "_feature_unification_backward_kernel", "begin = (run + class_)", "begin = (run + 0 * class_)",
    ),
    "runs of another class": ("_feature_unification_fold_kernel", "CLASSES - class_", "CLASSES - 0 * class_"),
    "cells of the wrong column": ("_shifted_filters", "cell % SIDE - across", "cell % SIDE - 0 * across"),
    "a gradient of another filter": ("turned_back", "row[:, None] - shift[None, :]", "row[:, None] + shift[None, :]"),
    "squares that do not overlap": (
        "_feature_unification_fold_kernel", "(EDGE + TILE - 1) // TILE", "(TILE + TILE - 1) // TILE",
    ),
    "one side alone": ("_feature_unification_fold_kernel", "static_range(CLASSES * SIDES)", "static_range(1)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", BACKWARD_MUTATIONS)
def test_a_mutated_backward_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, BACKWARD, *BACKWARD_MUTATIONS[mutation])
    with pytest.raises(AssertionError, match="gradient of .*: error"):
        assert_accurate(Shape((1, 5), 16), Shape((2, 1), 21), Shape((1, 2), 48, filters=64))


# What the kernels do not take.


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (Shape((2, 2), 5), torch.float64, "features are float64"),
        (Shape((2, 2), 5), torch.bfloat16, "bfloat16, .*interpreter"),
        (Shape((2, 2), 5, filters=300), torch.float32, "300 filters, at most 256"),
        (Shape((2, 2), 5, kernel_size=13), torch.float32, "13 x 13 taps, at most 128"),
    ],
)
def test_what_the_kernels_do_not_take_is_a_reason_with_the_value(
    shape: Shape, dtype: torch.dtype, message: str
) -> None:
    tensors = tensors_of(shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        unify_features(**tensors, backend="triton")
    assert explain_backends(**tensors).chosen == "torch"


def test_the_interpreter_is_used_only_where_it_is_asked_for() -> None:
    explanation = explain_backends(**tensors_of(SHAPES["M divides C"]))
    assert explanation.chosen == "torch"
    assert explanation.candidates[0].name == "triton" and "interpreter" in explanation.candidates[0].discouraged[0]
