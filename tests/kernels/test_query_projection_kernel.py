"""The query projection's Triton kernel, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate
from support.mutations import mutate
from support.query_projection_cases import Shape, run, tensors_of
from support.recipe import INTERPRETED

from anyup.ops.query_projection import ProjectionParameters, explain_backends, project_queries

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
    assert_backend_accurate(run, tensors_of(SHAPES[name], dtype), backend="triton", gradients=False)


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
    "taps in columns": ("down = tap // 3 - 1", "down = tap % 3 - 1"),
    "a tap too few": ("9 * PIECES", "8 * PIECES"),
    "a border that is not zero": ("mask=inside[:, None], other=0.0", "mask=inside[:, None], other=1.0"),
    "a mean over too many": ("axis=1) / DIM + eps", "axis=1) / (2 * DIM) + eps"),
    "no weight of the norm": ("* factor[None, :]", "* 1.0"),
    "no bias": ("result += tl.load", "result += 0 * tl.load"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "query_projection_forward", "_query_projection_forward_kernel", *MUTATIONS[mutation])
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


def test_a_gradient_is_a_reason_before_any_work_and_torch_s_to_make() -> None:
    encoded, *parameters = tensors_of(SHAPES["one pixel"]).values()
    encoded.requires_grad_()
    with pytest.raises(NotImplementedError, match="a gradient is wanted"):
        project_queries(encoded, ProjectionParameters(*parameters), backend="triton")
    chosen = explain_backends(encoded, ProjectionParameters(*parameters), backend=("triton", "torch")).chosen
    assert chosen == "torch"
    project_queries(encoded, ProjectionParameters(*parameters), backend=("triton", "torch")).sum().backward()
    assert encoded.grad is not None
