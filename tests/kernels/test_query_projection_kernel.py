"""The query projection's Triton kernel, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate, output_and_gradients
from support.mutations import mutate
from support.query_projection_cases import Shape, run, tensors_of
from support.recipe import INTERPRETED

from anyup.ops.query_projection import fused

pytestmark = INTERPRETED

SHAPES = {
    "whole rectangles": Shape((8, 16)),
    "partial rectangles": Shape((9, 18)),
    "one row": Shape((1, 31)),
    "one column": Shape((17, 1)),
    "one pixel": Shape((1, 1)),
    "batch 2": Shape((5, 7), batch=2),
    "empty batch": Shape((5, 7), batch=0),
    "a width that is no power of two": Shape((3, 5), dim=40),
    "fewer channels than a product takes": Shape((3, 5), dim=8),
    "a width of a piece and a half": Shape((3, 5), dim=24),
    "default width": Shape((3, 4), dim=128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    assert_backend_accurate(run, tensors_of(SHAPES[name], dtype), backend="triton")


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_length_of_the_encoded_vectors_hardly_matters(size: float) -> None:
    tensors = tensors_of(SHAPES["batch 2"])
    tensors["encoded"] = tensors["encoded"] * size
    assert_backend_accurate(run, tensors, backend="triton", gradients=False)


def test_the_kernel_reads_no_uninitialised_memory(poisoned_memory: None) -> None:
    assert_backend_accurate(run, tensors_of(SHAPES["partial rectangles"]), backend="triton", gradients=False)


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (0, 2, 1, 3)])
def test_strides_change_nothing(order: Any) -> None:
    tensors = tensors_of(SHAPES["batch 2"])
    expected = run(**tensors, backend="triton")
    moved = tensors["encoded"].permute(order).contiguous().permute([order.index(n) for n in range(4)])
    assert not moved.is_contiguous()
    assert torch.equal(run(**{**tensors, "encoded": moved}, backend="triton"), expected)


def test_a_config_changes_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import query_projection_forward as kernel

    for config in (kernel.ProjectionConfig(2, 8, 32, 16, 4, 1), kernel.ProjectionConfig(16, 4, 16, 32, 8, 3)):
        monkeypatch.setattr(kernel, "forward_configs", lambda *_, config=config, **__: [config])
        assert_backend_accurate(run, tensors_of(Shape((9, 7), dim=48)), backend="triton", gradients=False)


@pytest.mark.parametrize("values", [{"rows": 3}, {"piece": 8}, {"outputs": 8}, {"num_warps": 0}, {"num_stages": 0}])
def test_a_config_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    from anyup.kernels.query_projection_forward import ProjectionConfig

    config = {"rows": 8, "columns": 8, "piece": 16, "outputs": 16, "num_warps": 4, "num_stages": 1}
    with pytest.raises(ValueError, match=next(iter(values))):
        ProjectionConfig(**{**config, **values})


MUTATIONS = {
    "taps in columns": ("convolved", "down = tap // 3 - 1", "down = tap % 3 - 1"),
    "a tap too few": ("convolved", "9 * PIECES", "8 * PIECES"),
    "a border that is not zero": ("convolved", "mask=inside[:, None], other=0.0", "mask=inside[:, None], other=1.0"),
    "a mean over too many": ("_query_projection_forward_kernel", "axis=1) / DIM + eps", "axis=1) / (2 * DIM) + eps"),
    "no weight of the norm": ("_query_projection_forward_kernel", "* factor[None, :]", "* 1.0"),
    "no bias": ("_query_projection_forward_kernel", "result += tl.load", "result += 0 * tl.load"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "query_projection_forward", *MUTATIONS[mutation])
    with pytest.raises(AssertionError, match="output: error"):
        assert_backend_accurate(run, tensors_of(SHAPES["batch 2"]), backend="triton", gradients=False)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (Shape((2, 2)), torch.float64, "float64"),
        (Shape((2, 2)), torch.bfloat16, "bfloat16, .*interpreter"),
        (Shape((2, 2), dim=264), torch.float32, "264 channels, at most 256"),
    ],
)
def test_what_the_kernel_does_not_take_is_a_reason_with_the_value(
    shape: Shape, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        run(**tensors_of(shape, dtype), backend="triton")


BACKWARD_MUTATIONS = {
    "the length's part of a gradient": ("pixels_kernel", "back - x * along[:, None]", "back"),
    "a gradient that is not divided": ("pixels_kernel", "along[:, None]) * inverse[:, None]", "along[:, None])"),
    "no weight of the norm": ("pixels_kernel", "back *= tl.load", "back += 0 * tl.load"),
    "a tap beside its own": ("weights_kernel", "down * width + along", "down * width"),
    "pixels of the next run": ("weights_kernel", "(pixel < stop) & ", ""),
    "values beyond a border": ("weights_kernel", "(column >= 0) & ", ""),
    "a map that is not turned": ("map_kernel", "width * DIM, DIM, 1", "DIM, width * DIM, 1"),
}


@pytest.mark.parametrize("mutation", BACKWARD_MUTATIONS)
def test_a_mutated_backward_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 20)  # several runs of pixels
    kernel, *change = BACKWARD_MUTATIONS[mutation]
    mutate(monkeypatch, "query_projection_backward", f"_query_projection_backward_{kernel}", *change)
    with pytest.raises(AssertionError, match="gradient of .*: error"):
        assert_backend_accurate(run, tensors_of(SHAPES["batch 2"]), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_runs_of_pixels_add_up_alike_in_each_call(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 20)
    tensors = tensors_of(Shape((9, 18), batch=2, dim=24), dtype)
    assert_backend_accurate(run, tensors, backend="triton")
    first, second = (output_and_gradients(run, tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backward_config_changes_the_last_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import query_projection_backward as kernel

    monkeypatch.setattr(kernel, "pixels_configs", lambda *_, **__: [kernel.ProjectionConfig(2, 8, 32, 32, 4, 1)])
    monkeypatch.setattr(kernel, "weights_configs", lambda **_: [kernel.WeightsConfig(16, 32, 4, 1)])
    assert_backend_accurate(run, tensors_of(Shape((9, 7), dim=48)), backend="triton")


@pytest.mark.parametrize("values", [{"block": 8}, {"step": 24}, {"num_warps": 3}, {"num_stages": 0}])
def test_a_config_of_the_weights_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    from anyup.kernels.query_projection_backward import WeightsConfig

    with pytest.raises(ValueError, match=next(iter(values))):
        WeightsConfig(**{"block": 64, "step": 16, "num_warps": 4, "num_stages": 1, **values})
