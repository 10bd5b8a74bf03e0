"""The feature distance's Triton kernels, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

import pytest
import torch
from support.accuracy import assert_backend_accurate, output_and_gradients
from support.feature_distance_cases import SHAPES, assert_distances_accurate, measured, tensors_of
from support.mutations import mutate
from support.recipe import INTERPRETED
from torch import Tensor

from anyup.ops.feature_distance import feature_distance
from anyup.ops.feature_distance import operator as distance_operator

pytestmark = INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernels_obey_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_distances_accurate(SHAPES[name], dtype, backend="triton")


def test_the_target_may_be_of_another_dtype() -> None:
    prediction, target, places = tensors_of(SHAPES["windows that overlap"], torch.float16)
    assert_backend_accurate(measured(target, places), {"prediction": prediction.float()}, backend="triton")


def test_the_kernels_read_no_uninitialised_memory(poisoned_memory: None) -> None:
    assert_distances_accurate(SHAPES["windows that overlap"], backend="triton")


def test_strides_of_the_prediction_change_nothing() -> None:
    prediction, target, places = tensors_of(SHAPES["windows that overlap"])
    first, second = (
        output_and_gradients(measured(target, places), {"prediction": x}, "triton")
        for x in (prediction, prediction.contiguous())
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_are_those_of_the_reference() -> None:
    prediction, target, places = tensors_of(SHAPES["windows that overlap"])
    (_, expected), (_, found) = (
        distance_operator._forward(prediction, target, places, each, True) for each in ("reference", "triton")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_pixels_outside_every_window_have_no_gradient_whatever_they_are() -> None:
    prediction, target, _ = tensors_of(SHAPES["windows that overlap"])
    places = torch.zeros(2, 3, 2, dtype=torch.long)
    prediction[:, :, -1] = torch.inf
    found = output_and_gradients(measured(target, places), {"prediction": prediction}, "triton")
    assert found["output"].isfinite().all()
    grad = found["gradient of prediction"]
    assert not grad[:, :, 5:].any() and not grad[..., 6:].any() and grad[:, :, :5, :6].all()


@pytest.mark.parametrize("backend", ["triton"])
def test_pixels_of_zeros_have_finite_distances_and_gradients(backend: str) -> None:
    prediction, target, _ = tensors_of(SHAPES["whole maps"])
    prediction[:, :, 0], target[:, :, 1] = 0, 0
    found = output_and_gradients(measured(target, None), {"prediction": prediction}, backend)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_a_config_changes_the_last_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import feature_distance as kernels

    for config in (kernels.CONFIGS[1], kernels.DistanceConfig(64, 16, 8)):
        monkeypatch.setattr(kernels, "CONFIGS", (config,))
        assert_distances_accurate(SHAPES["windows that overlap"], backend="triton")


@pytest.mark.parametrize("values", [{"pixels": 3}, {"block": 0}, {"num_warps": 6}])
def test_a_config_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    from anyup.kernels.feature_distance import DistanceConfig

    with pytest.raises(ValueError, match=next(iter(values))):
        DistanceConfig(**{"pixels": 16, "block": 64, "num_warps": 4, **values})


MUTATIONS = {
    "rows for columns": ("forward", "(top + row) * prediction_row_stride", "(top + column) * prediction_row_stride"),
    "a window's corner": ("forward", "left + column) * prediction_column_stride", "column) * prediction_column_stride"),
    "the prediction's span": ("forward", 'tl.where(here, t, float("-inf"))', 'tl.where(here, p, float("-inf"))'),
    "no smallest": ("forward", "largest - smallest", "largest"),
    "pixels beyond the window": ("forward", "tl.where(exists, 1.0 - cosine, 0.0)", "1.0 - cosine"),
    "first channels alone": ("forward", "tl.range(0, channels, BLOCK)", "tl.range(0, 1, BLOCK)"),
    "windows of the next image": ("backward", "image * windows + each", "each"),
    "the last window alone": ("backward", "total += tl.where", "total = tl.where"),
    "half a gradient": ("backward", "* 2.0 * scale", "* scale"),
    "no part along the prediction": ("backward", "p * (of_cosine * slope)[:, None] - t", "-t"),
    "channels of the first block": ("backward", "tl.program_id(1) * BLOCK + ", ""),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(
    mutation: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """What a kernel leaves unwritten is no right number of an earlier test's."""
    kernel, *change = MUTATIONS[mutation]
    mutate(monkeypatch, "feature_distance", f"_feature_distance_{kernel}_kernel", *change)
    prediction, target, places = tensors_of(SHAPES["windows that overlap"]._replace(channels=130))
    with pytest.raises(AssertionError, match="error"):
        assert_backend_accurate(measured(target, places), {"prediction": prediction}, backend="triton")


@pytest.mark.parametrize("which", ["prediction", "target"])
@pytest.mark.parametrize(("dtype", "message"), [(torch.float64, "float64"), (torch.bfloat16, "bfloat16, .*interp")])
def test_what_the_kernels_do_not_take_is_a_reason(dtype: torch.dtype, message: str, which: str) -> None:
    given: dict[str, Tensor] = {name: torch.zeros(1, 2, 3, 3) for name in ("prediction", "target")}
    given[which] = given[which].to(dtype)
    with pytest.raises(NotImplementedError, match=f"the {which} is {message}"):
        feature_distance(**given, backend="triton")
