"""The kernel of single pixels, in Triton's interpreter, against float64; bfloat16 is in `device/`."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate, assert_backend_accurate_over_draws
from support.mutations import mutate
from support.point_cases import attention_at, some_pixels, tensors_of
from support.recipe import INTERPRETED, KERNEL_SHAPES, AttentionShape, in_two_dtypes

from anyup.ops.window_attention import explain_points
from anyup.window import CellWindow, RatioWindow, axis_bounds

pytestmark = INTERPRETED


@pytest.mark.parametrize(("name", "dtype"), in_two_dtypes(KERNEL_SHAPES))
def test_the_kernel_obeys_the_error_rule_gradients_included(name: str, dtype: torch.dtype) -> None:
    shape = KERNEL_SHAPES[name]
    draw: Any = lambda seed: tensors_of(shape, dtype, seed=seed)  # noqa: E731
    assert_backend_accurate_over_draws(attention_at(shape), draw, backend="triton")


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_obey_the_error_rule(seed: int) -> None:
    rng = random.Random(seed)
    windows = [RatioWindow(rng.uniform(0.02, 0.6)), CellWindow(rng.uniform(0.05, 0.45)), None]
    shape = AttentionShape(
        output=(rng.randint(1, 90), rng.randint(1, 90)),
        grid=(rng.randint(1, 15), rng.randint(1, 15)),
        channels=rng.choice([1, 3, 16, 100, 600]),
        window=rng.choice(windows),
        heads=rng.randint(1, 8),
        head_dim=rng.choice([16, 32, 64]),
    )
    tensors = tensors_of(shape, rng.choice([torch.float32, torch.float16]), seed=seed)
    assert_backend_accurate(attention_at(shape), tensors, backend="triton", gradients=False)


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_saturated_logits_obey_the_error_rule(size: float) -> None:
    shape = KERNEL_SHAPES["prime"]
    tensors = tensors_of(shape)
    tensors["query"], tensors["key"] = tensors["query"] * math.sqrt(size), tensors["key"] * math.sqrt(size)
    assert_backend_accurate(attention_at(shape), tensors, backend="triton", gradients=False)


def test_values_may_have_another_dtype() -> None:
    shape = KERNEL_SHAPES["heads of the model"]
    tensors = tensors_of(shape)
    tensors["value"] = tensors["value"].half()
    assert_backend_accurate(attention_at(shape), tensors, backend="triton", gradients=False)


def test_strides_change_nothing() -> None:
    shape = KERNEL_SHAPES["heads of the model"]
    tensors = tensors_of(shape)
    expected = attention_at(shape)(**tensors, backend="triton")
    moved = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in moved.values())
    assert torch.equal(attention_at(shape)(**moved, backend="triton"), expected)


def test_a_key_outside_of_a_points_window_changes_nothing() -> None:
    shape = AttentionShape((40, 40), (12, 14), channels=3, head_dim=16)
    tensors = tensors_of(shape)
    expected = attention_at(shape)(**tensors, backend="triton")
    rows, columns = some_pixels(shape, 12)
    (row_start, row_stop), (column_start, column_stop) = (
        axis_bounds(shape.window, *sizes) for sizes in zip(shape.output, shape.grid, strict=True)
    )
    for point in range(12):
        seen = torch.zeros(shape.grid, dtype=torch.bool)
        row, column = int(rows[point]), int(columns[point])
        seen[row_start[row] : row_stop[row], column_start[column] : column_stop[column]] = True
        changed = {name: t.clone() for name, t in tensors.items()}
        changed["key"][~seen], changed["value"][~seen] = math.nan, math.inf
        assert torch.equal(attention_at(shape)(**changed, backend="triton")[point], expected[point])


def test_a_config_changes_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import window_attention_points as kernel

    shape = KERNEL_SHAPES["heads of the model"]
    for config in (kernel.PointsConfig(8, 16, 1), kernel.PointsConfig(64, 64, 4)):
        monkeypatch.setattr(kernel, "CONFIGS", (config,))
        assert_backend_accurate(attention_at(shape), tensors_of(shape), backend="triton", gradients=False)


def test_the_kernel_is_asked_for_by_name_alone_in_the_interpreter() -> None:
    shape = KERNEL_SHAPES["prime"]
    tensors = tensors_of(shape)
    for backend, chosen in ((None, "torch"), ("triton", "triton")):
        explained = explain_points(**tensors, window=shape.window, size=shape.output, backend=backend)
        assert explained.chosen == chosen


MUTATIONS = {
    "rows for columns": ("tl.load(pixels + 2 * point + 1)", "tl.load(pixels + 2 * point)"),
    "the first point's query": ("point * query_point_stride", "0 * query_point_stride"),
    "a block too few": ("tl.cdiv(count, BLOCK)", "count // BLOCK"),
    "a sum that forgets its pivot": ("l_i[head] * tl.math.exp2(m_i[head] - now)", "l_i[head]"),
    "places that have no pivot of their own": ("l_i[head] * tl.math.exp2(m_i[head] - pivot)", "l_i[head]"),
    "no mean over the heads": (" * HEADS),)", "),)"),
    "the first slice for all": ("first = tl.program_id(1) * SLICE", "first = 0 * tl.program_id(1)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(
    mutation: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    from anyup.kernels import window_attention_points as kernel

    monkeypatch.setattr(kernel, "CONFIGS", (kernel.PointsConfig(8, 16, 1),))
    mutate(monkeypatch, "window_attention_points", "_window_attention_points_kernel", *MUTATIONS[mutation])
    shape = AttentionShape((37, 29), (16, 17), channels=40, window=RatioWindow(0.3), head_dim=16)
    with pytest.raises(AssertionError, match="output: error"):
        assert_backend_accurate(attention_at(shape), tensors_of(shape), backend="triton", gradients=False)
