"""What would make a worthless result without a word: NaN, infinities, numbers too large for a dtype."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import anyup
from anyup import AnyUp
from anyup.finite import check_map, not_finite, overflow

IMAGE = torch.zeros(1, 3, 8, 8)
LARGE = torch.full((1, 2, 4, 4), 1e5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3)


def test_the_first_bad_number_of_a_map_is_named_and_how_many_there_are() -> None:
    features = torch.zeros(2, 6, 4, 5)
    check_map(features, "f.npy")
    features[1, 4, 2, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"f\.npy: holds a NaN: image 1 of the batch, channel 4, row 2, column 3 \(1 of 240"
    ):
        check_map(features, "f.npy")
    features[0, 1] = float("-inf")
    with pytest.raises(ValueError, match=r"an infinity: image 0 .*, channel 1, row 0, column 0 \(21 of 240"):
        check_map(features, "f.npy")


def test_finite_maps_whose_sum_overflows_are_accepted() -> None:
    check_map(torch.full((1, 2, 3, 3), 1.7e308, dtype=torch.float64), "large")
    check_map(torch.full((1, 2, 300, 300), 6e4, dtype=torch.float16), "large")


def test_tensors_that_are_not_finite_are_named_with_how_many_numbers() -> None:
    good, bad = torch.ones(4), torch.tensor([1.0, float("nan"), float("inf")])
    assert not_finite({"a": good, "b": good.half()}) == ""
    assert not_finite({"a": good, "b": bad}) == "b (2 of 3 numbers)"
    assert (
        not_finite(dict.fromkeys("abcde", bad))
        == "a (2 of 3 numbers), b (2 of 3 numbers), c (2 of 3 numbers) and 2 more tensors"
    )


def test_a_dtype_holds_what_lies_within_its_range() -> None:
    assert overflow(LARGE, torch.float32) == overflow(LARGE, torch.bfloat16) == overflow(LARGE, torch.float64) == ""
    assert overflow(torch.full((1, 1, 2, 2), 65504.0), torch.float16) == ""
    assert "float16 holds numbers up to 65504, and what is upsampled reaches -2e+05" in overflow(-2 * LARGE, torch.half)
    assert "float32 holds" in overflow(LARGE.double() * 1e300, torch.float32)
    assert overflow(LARGE[:0], torch.float16) == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_named(
    model: AnyUp, suffix: str, value: float, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.aggregation[0].weight[0, 1] = value
    path = tmp_path / f"weights{suffix}"
    anyup.save(model, path)
    with pytest.raises(
        ValueError, match=rf"weights{suffix}' holds weights that are not finite: aggregation\.0\.weight \("
    ):
        anyup.load(path)


def test_weights_too_large_for_float32_are_refused(model: AnyUp, tmp_path: Path) -> None:
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    state["rope.freqs"] *= 1e300
    torch.save({"anyup": state, "config": model.config}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"not finite: rope\.freqs \("):
        anyup.load(tmp_path / "w.pth")


def test_a_stream_in_a_dtype_that_is_too_narrow_warns_and_holds_infinities(model: AnyUp) -> None:
    with torch.no_grad(), pytest.warns(UserWarning, match="float16 holds numbers up to 65504, .* becomes infinite"):
        ((_, _, piece),) = model.stream(IMAGE, LARGE, dtype=torch.float16)
    assert piece.isinf().all()


def test_a_result_in_an_array_that_is_too_narrow_warns(model: AnyUp) -> None:
    arrays = (torch.empty(1, 2, 8, 8, dtype=torch.float16), np.empty((1, 2, 8, 8), "float16"))
    for out in arrays:
        with torch.no_grad(), pytest.warns(UserWarning, match="float16 holds numbers up to 65504"):
            model(IMAGE, LARGE, out=out)
        with torch.no_grad(), pytest.warns(UserWarning, match="float16 holds numbers up to 65504"):
            model(IMAGE, LARGE / LARGE, values=-LARGE, out=out)


def test_what_fits_does_not_warn(model: AnyUp) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.stream(IMAGE, LARGE / 2, dtype=torch.float16))
        list(model.stream(IMAGE, LARGE, dtype=torch.bfloat16))
        model(IMAGE, LARGE, values=LARGE / LARGE, out=torch.empty(1, 2, 8, 8, dtype=torch.float16))
        model(IMAGE, LARGE, out=torch.empty(1, 2, 8, 8))


def test_values_on_another_device_are_not_waited_for(model: AnyUp) -> None:
    """On meta, whose tensors hold none, to look at one would be an error."""
    meta = model.to("meta")
    with torch.no_grad():
        meta.stream(IMAGE.to("meta"), LARGE.to("meta"), dtype=torch.float16)
