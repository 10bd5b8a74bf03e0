"""The window attention's Triton kernels, in Triton's interpreter, against float64; bfloat16 is tested in `device/`."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.accuracy import (
    assert_backend_accurate,
    assert_backend_accurate_over_draws,
    output_and_gradients,
)
from support.mutations import mutate
from support.recipe import INTERPRETED, KERNEL_SHAPES, AttentionShape, attention_tensors, parts_of
from torch import Tensor

from anyup.ops import configs, explain_backends, window_attention
from anyup.ops.dispatch import BackendFailure
from anyup.ops.window_attention import fused, operator
from anyup.window import CellWindow, Part, RatioWindow, Window, axis_bounds

pytestmark = INTERPRETED


def attention(shape: AttentionShape) -> Any:
    """The operator for a shape's window, as the error rule calls it."""

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query, key, value, window=shape.window, backend=backend)

    return run


@pytest.fixture(params=["resident", *(pytest.param(way, marks=pytest.mark.slow) for way in ("streamed", "kept"))])
def weights_live(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Configs with few programs, in each of the kernels' ways to have weights."""
    from anyup.kernels import window_attention_config

    def forward(most_keys: Any, **_: Any) -> list[Any]:
        blocks, tail = 0, 0
        if request.param == "resident":
            blocks = max(1, -(-(most_keys(8, 16) - 16) // 32))
            tail = 16 if most_keys(8, 16) > 32 * blocks else 0
        programs = 1 if request.param == "kept" else 0
        return [
            window_attention_config.ForwardConfig(
                8, 16, 32, blocks, 32, 2, 4, 1, tail_keys=tail, group_blocks=2, kept_programs=programs
            )
        ]

    def backward_query(most_keys: Any, **_: Any) -> list[Any]:
        blocks, tail = 0, 0
        if request.param == "resident":
            blocks = max(1, -(-(most_keys(8, 16) - 16) // 32))
            tail = 16 if most_keys(8, 16) > 32 * blocks else 0
        return [
            window_attention_config.BackwardQueryConfig(
                8, 16, 32, blocks, 32, num_warps=4, num_stages=1, tail_keys=tail, waiting_blocks=1
            )
        ]

    def backward_grid(*_: Any, **__: Any) -> list[Any]:
        parts = 1 if request.param == "resident" else 2
        return [
            window_attention_config.BackwardGridConfig(
                4, 8, 128, 32, 2, parts, num_warps=4, num_stages=1, tall=parts == 2
            )
        ]

    monkeypatch.setattr(window_attention_config, "forward_configs", forward)
    monkeypatch.setattr(window_attention_config, "backward_query_configs", backward_query)
    monkeypatch.setattr(window_attention_config, "backward_grid_configs", backward_grid)
    monkeypatch.setattr(
        window_attention_config, "backward_key_value_configs", lambda *_, **__: []
    )  # has tests of its own
    return request.param


@pytest.mark.parametrize("weights_live", ["resident"], indirect=True)
@pytest.mark.parametrize("name", KERNEL_SHAPES)
def test_kernels_obey_the_error_rule(name: str, weights_live: str) -> None:
    shape = KERNEL_SHAPES[name]
    assert_backend_accurate_over_draws(attention(shape), lambda seed: attention_tensors(shape, seed), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("odd", torch.float16),
        ("no window", torch.float32),
        ("cell", torch.float16),
        ("keys finer than pixels", torch.float32),
        ("batch 2", torch.float32),
        ("eight heads", torch.float16),
    ],
)
def test_all_ways_obey_the_error_rule_in_both_dtypes(name: str, dtype: torch.dtype, weights_live: str) -> None:
    shape = KERNEL_SHAPES[name]
    assert_backend_accurate_over_draws(
        attention(shape), lambda seed: attention_tensors(shape, seed, dtype), backend="triton"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["odd", "cell", "heads of the model"])
def test_shipped_configs_obey_the_error_rule(name: str, dtype: torch.dtype) -> None:
    shape = KERNEL_SHAPES[name]
    assert_backend_accurate(attention(shape), attention_tensors(shape, dtype=dtype), backend="triton")


def test_half_queries_and_keys_with_wide_values_obey_the_error_rule(weights_live: str) -> None:
    shape = KERNEL_SHAPES["odd"]
    tensors = attention_tensors(shape)
    tensors = {name: t if name == "value" else t.half() for name, t in tensors.items()}
    assert_backend_accurate(attention(shape), tensors, backend="triton")


def test_wide_queries_and_keys_with_half_values_obey_the_error_rule(weights_live: str) -> None:
    shape = KERNEL_SHAPES["odd"]
    tensors = attention_tensors(shape)
    assert_backend_accurate(attention(shape), {**tensors, "value": tensors["value"].half()}, backend="triton")


# A part of a map: the windows are those of the whole.


def attention_of(rows: slice, columns: slice, shape: AttentionShape) -> Any:
    """The operator for a part of a shape's output."""
    part = Part(rows.start, columns.start, *shape.output)

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query[:, rows, columns], key, value, window=shape.window, backend=backend, part=part)

    return run


def assert_parts_are_accurate(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> None:
    tensors = attention_tensors(shape, dtype=dtype)
    for rows, columns in parts_of(shape.output):
        assert_backend_accurate(attention_of(rows, columns, shape), tensors, backend="triton", gradients=False)


@pytest.mark.parametrize("name", ["odd", "batch 2", "keys finer than pixels", "cell", "no window"])
def test_a_part_of_a_map_obeys_the_error_rule(name: str, weights_live: str) -> None:
    assert_parts_are_accurate(KERNEL_SHAPES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["odd", "heads of the model"])
def test_a_part_of_a_map_obeys_the_error_rule_with_shipped_configs(name: str, dtype: torch.dtype) -> None:
    assert_parts_are_accurate(KERNEL_SHAPES[name], dtype)


def test_a_part_of_whole_tiles_is_bit_for_bit_the_whole_map_s_and_has_its_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from anyup.kernels.launch import Launch

    launch, constants = Launch.__call__, []

    def recorded(self: Launch) -> None:
        constants.append(self.constants)
        launch(self)

    monkeypatch.setattr(Launch, "__call__", recorded)
    # At the border of the map a tile sees fewer keys.
    shape = AttentionShape((40, 32), (20, 16), head_dim=16, window=RatioWindow(0.2))
    tensors = attention_tensors(shape, dtype=torch.float16)
    whole = window_attention(**tensors, window=shape.window, backend="triton")
    for rows, columns in ((slice(0, 8), slice(0, 8)), (slice(16, 32), slice(8, 32)), (slice(32, 40), slice(0, 16))):
        part = attention_of(rows, columns, shape)(**tensors, backend="triton")
        assert torch.equal(part, whole[:, rows, columns])
    assert all(of == constants[0] for of in constants) and constants[0]["RESIDENT_BLOCKS"] > 1


def test_the_log_sum_exp_of_a_part_is_that_of_the_whole(weights_live: str) -> None:
    from anyup.ops.window_attention import eager

    shape = KERNEL_SHAPES["odd"]
    tensors, settings = attention_tensors(shape), {"window": shape.window, "scale": 0.3, "save_lse": True}
    _, whole = eager.forward(**tensors, **settings)
    for rows, columns in parts_of(shape.output):
        part = Part(rows.start, columns.start, *shape.output)
        cropped = {**tensors, "query": tensors["query"][:, rows, columns]}
        torch.testing.assert_close(fused.forward(**cropped, **settings, part=part)[1], whole[:, rows, columns])


@pytest.mark.parametrize("window", ["ratio", "cell"])
def test_a_stream_runs_on_the_kernels(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.recipe import fill, wave

    from anyup import AnyUp
    from anyup.limited_memory import prediction
    from anyup.ops.window_attention import eager

    monkeypatch.setattr(prediction, "BAND_PIXELS", 7 * 28)
    image, features = wave((1, 3, 20, 28), 3, 0.8), wave((1, 20, 5, 7), 7)
    backend = {"window_attention": "triton"}
    model = fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, window=window, backend=backend), 0).eval()
    with torch.no_grad():
        expected = model(image, features)
        monkeypatch.setattr(eager, "forward", None)
        for rows, columns, piece in model.stream(image, features, tile=(9, 28)):
            torch.testing.assert_close(piece, expected[:, :, rows, columns], rtol=1e-4, atol=1e-4)


@pytest.fixture
def products_like_a_matrix_unit_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products round an element alike wherever in a tile it stands, as matrix units do.

    numpy's BLAS does not. The passes of the backward compute a logit in different tiles, and saturated weights show a
    rounding of logits in the hundreds.
    """
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right, total = a.data, b.data, d.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None].astype(total.dtype) * right[None, k].astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_saturated_logits_obey_the_error_rule(
    size: float, products_like_a_matrix_unit_s: None, weights_live: str
) -> None:
    shape = KERNEL_SHAPES["prime"]

    def draw(seed: int) -> dict[str, Tensor]:
        tensors = attention_tensors(shape, seed)
        return {n: t if n == "value" else t * math.sqrt(size) for n, t in tensors.items()}

    assert_backend_accurate_over_draws(attention(shape), draw, backend="triton")


def test_strides_change_nothing(weights_live: str) -> None:
    shape = KERNEL_SHAPES["batch 2"]
    tensors = attention_tensors(shape)
    expected = output_and_gradients(attention(shape), tensors, "triton")
    orders = {"query": (0, 3, 4, 1, 2), "key": (0, 4, 3, 2, 1), "value": (3, 0, 2, 1)}
    moved = {
        name: t.permute(orders[name]).contiguous().permute([orders[name].index(n) for n in range(t.dim())])
        for name, t in tensors.items()
    }
    assert not any(t.is_contiguous() for t in moved.values())
    actual = output_and_gradients(attention(shape), moved, "triton")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_kernels_read_no_uninitialised_memory(poisoned_memory: None, weights_live: str) -> None:
    shape = KERNEL_SHAPES["odd"]
    assert_backend_accurate(attention(shape), attention_tensors(shape), backend="triton")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale_gives_the_reference_s_result(
    scale: float, products_like_a_matrix_unit_s: None, weights_live: str
) -> None:
    shape = KERNEL_SHAPES["odd"]

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query, key, value, window=shape.window, backend=backend, scale=scale)

    assert_backend_accurate_over_draws(run, lambda seed: attention_tensors(shape, seed), backend="triton")


def test_the_log_sum_exp_is_that_of_the_other_backends(weights_live: str) -> None:
    from anyup.ops.window_attention import eager

    shape = KERNEL_SHAPES["cell"]
    tensors = attention_tensors(shape)
    settings = {"window": shape.window, "scale": 0.3, "save_lse": True}
    torch.testing.assert_close(fused.forward(**tensors, **settings)[1], eager.forward(**tensors, **settings)[1])


def test_gradients_are_bit_equal_from_run_to_run(weights_live: str) -> None:
    shape = KERNEL_SHAPES["odd"]
    tensors = attention_tensors(shape)
    first, second = (output_and_gradients(attention(shape), tensors, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_runs_on_the_kernels() -> None:
    from support.recipe import fill, wave

    from anyup import AnyUp

    image, features = wave((1, 3, 20, 28), 3, 0.8), wave((1, 20, 5, 7), 7)
    results = []
    for backend in ("triton", "torch"):
        model = fill(AnyUp(qk_dim=32, num_heads=2, lfu_dim=16, backend={"window_attention": backend}), 0)
        leaf = features.clone().requires_grad_()
        out = model(image, leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


# The window's rules inside a kernel.


if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from anyup.kernels.window_attention_tile import key_block, tile_keys
    from anyup.kernels.window_bounds import axis_bounds as kernel_bounds
    from anyup.kernels.window_bounds import axis_queries

    @triton.jit
    def _write_bounds(start, stop, number, cells, queries, ratio, QUERIES: tl.constexpr, WINDOW: tl.constexpr):
        query = tl.arange(0, QUERIES)
        keys, cell = tl.load(number + tl.program_id(0)), tl.load(cells + tl.program_id(0))
        first, last = kernel_bounds(query, queries, keys, ratio, cell, WINDOW)
        place = tl.program_id(0) * queries + query
        tl.store(start + place, first, mask=query < queries)
        tl.store(stop + place, last, mask=query < queries)

    @triton.jit
    def _write_all_bounds(start, stop, queries, ratio, SIDE: tl.constexpr, WINDOW: tl.constexpr):
        query = tl.arange(0, SIDE)[None, :]
        keys = tl.arange(0, SIDE)[:, None] + 1
        first, last = kernel_bounds(query, queries, keys, ratio, 0, WINDOW)
        place = (keys - 1) * SIDE + query
        tl.store(start + place, first)
        tl.store(stop + place, last)

    @triton.jit
    def _write_tile_keys(
        numbers, top, left, sizes, rule, WINDOW: tl.constexpr, SIDE: tl.constexpr, KEYS: tl.constexpr, FEW: tl.constexpr
    ):
        rectangle = tile_keys(top, left, sizes, rule, SIDE, SIDE, WINDOW)
        row, column, exists = key_block(0, rectangle, KEYS, FEW)
        tl.store(numbers + row * sizes[3] + column, tl.arange(0, KEYS), mask=exists)

    @triton.jit
    def _write_queries(out, first_key, last_key, queries, keys, ratio, cell, WINDOW: tl.constexpr):
        first, last = axis_queries(first_key, last_key, queries, keys, ratio, cell, WINDOW)
        tl.store(out, first)
        tl.store(out + 1, last)


def bounds_in_a_kernel(window: Window, queries: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Start and stop (len(keys), queries) of every query of an axis, for several numbers of keys."""
    start, stop = (torch.full((len(keys), queries), -1, dtype=torch.int32) for _ in range(2))
    rule = fused.window_rule(window, (3, 3))
    cell = [window.size(n) if isinstance(window, CellWindow) else 0 for n in keys.tolist()]
    sizes = torch.tensor(cell, dtype=torch.int32)
    most = triton.next_power_of_2(queries)
    _write_bounds[(len(keys),)](start, stop, keys.int(), sizes, queries, rule.ratio, QUERIES=most, WINDOW=rule.kind)
    return start, stop


def assert_bounds(window: Window, queries: int, keys: Tensor) -> None:
    start, stop = bounds_in_a_kernel(window, queries, keys)
    for row, number in enumerate(keys.tolist()):
        expected = axis_bounds(window, queries, number)
        assert (tuple(start[row].tolist()), tuple(stop[row].tolist())) == expected, (queries, number)


@pytest.mark.parametrize("window", [RatioWindow(0.1), CellWindow(0.1)])
def test_bounds_in_a_kernel_are_the_window_s(window: Window) -> None:
    for queries in (1, 2, 7, 35, 37, 105, 448):
        assert_bounds(window, queries, torch.tensor([1, 2, 7, 15, 16, 32, 37, 64, 100]))


@pytest.mark.parametrize("window", [RatioWindow(0.01), RatioWindow(0.5), RatioWindow(1.5), CellWindow(0.3), None])
def test_bounds_in_a_kernel_are_the_window_s_at_other_ratios(window: Window) -> None:
    for queries in (5, 35, 64):
        assert_bounds(window, queries, torch.tensor([1, 3, 7, 16, 60]))


@pytest.mark.slow
def test_bounds_in_a_kernel_are_the_window_s_for_every_axis_up_to_512() -> None:
    from anyup.kernels.window_bounds import RATIO

    window, every = RatioWindow(0.1), torch.arange(1, 513)[:, None]
    start, stop = (torch.empty(512, 512, dtype=torch.int32) for _ in range(2))
    for queries in range(1, 513):
        _write_all_bounds[(1,)](start, stop, queries, 0.1, SIDE=512, WINDOW=RATIO.value)
        first, last = window.bounds(queries, every)  # of all numbers of keys at once
        for keys in (1, 1 + queries * 7 % 512):
            alone = window.bounds(queries, keys)
            assert torch.equal(first[keys - 1], alone[0]) and torch.equal(last[keys - 1], alone[1])
        assert torch.equal(start[:, :queries].long(), first), queries
        assert torch.equal(stop[:, :queries].long(), last), queries


@pytest.mark.parametrize("window", [RatioWindow(0.1), RatioWindow(0.01), RatioWindow(0.6), CellWindow(0.2), None])
def test_the_queries_of_a_range_of_keys_are_those_that_see_one(window: Window) -> None:
    out = torch.empty(2, dtype=torch.int32)
    for queries, keys in ((35, 7), (9, 20), (1, 6), (30, 30), (64, 5)):
        start, stop = axis_bounds(window, queries, keys)
        rule = fused.window_rule(window, (keys, keys))
        for first_key in range(0, keys, 3):
            last_key = min(first_key + 2, keys - 1)
            _write_queries[(1,)](out, first_key, last_key, queries, keys, rule.ratio, rule.cell_rows, WINDOW=rule.kind
            )  # fmt: skip
            seen = [q for q in range(queries) if start[q] <= last_key and stop[q] > first_key]
            expected = list(range(seen[0], seen[-1] + 1)) if seen else []
            assert list(range(*out.tolist())) == expected == seen


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("window", [RatioWindow(0.1), RatioWindow(0.3), RatioWindow(0.01), CellWindow(0.2), None])
def test_a_tile_s_keys_are_numbered_once_each_and_those_that_all_pixels_see_first(window: Window, few: bool) -> None:
    for output, grid in (((35, 40), (9, 7)), ((9, 20), (14, 11)), ((6, 5), (12, 16)), ((64, 30), (1, 3))):
        axes = [axis_bounds(window, *each) for each in zip(output, grid, strict=True)]
        rule = fused.window_rule(window, grid)
        for top, left in ((0, 0), (output[0] // 8 * 8 - 8 if output[0] > 8 else 0, (output[1] - 1) // 8 * 8)):
            numbers = torch.full(grid, -1, dtype=torch.int32)
            arguments = ((*output, *grid), (rule.ratio, rule.cell_rows, rule.cell_columns))
            _write_tile_keys[(1,)](numbers, top, left, *arguments, WINDOW=rule.kind, SIDE=8, KEYS=256, FEW=few)
            sees = [
                torch.tensor(
                    [[start[q] <= key < stop[q] for key in range(keys)] for q in range(first, min(first + 8, n))]
                )
                for (start, stop), first, n, keys in zip(axes, (top, left), output, grid, strict=True)
            ]
            rectangle = sees[0].any(0)[:, None] & sees[1].any(0)
            core = sees[0].all(0)[:, None] & sees[1].all(0)
            # A tile's rectangle has no hole, even where no pixel sees a row or column in it.
            rows, columns = (side.nonzero().flatten() for side in (sees[0].any(0), sees[1].any(0)))
            rectangle[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            assert numbers[rectangle].sort().values.tolist() == list(range(int(rectangle.sum())))
            assert (numbers[~rectangle] == -1).all()
            assert numbers[core].sort().values.tolist() == list(range(int(core.sum())))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("channels", [21, 384, 1024])
def test_partial_sums_are_no_larger_than_the_gradient_of_the_queries(channels: int, half: bool) -> None:
    from anyup.kernels.launch import Target
    from anyup.kernels.window_attention_config import backward_grid_configs

    split = 0
    for side, grid in ((96, 7), (224, 8), (224, 16), (448, 14), (448, 32), (1024, 64), (2048, 128)):
        for config in backward_grid_configs(
            side**2, grid**2, channels, target=Target("cuda", 80), half=half, heads=4, head_dim=32
        ):
            split += config.partials > 1
            sums = 4 * config.partials * grid**2 * max(channels, 128)
            assert config.partials == 1 or sums <= side**2 * 128 * (2 if half else 4)
    assert split > 6


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_no_slice_of_channels_is_multiplied_that_holds_none(arch: int, half: bool) -> None:
    from anyup.kernels.launch import Target
    from anyup.kernels.window_attention_config import forward_configs

    longest = 0
    for channels in (1, 21, 64, 100, 384):
        for config in forward_configs(
            lambda rows, columns: 1000, target=Target("cuda", arch), half=half, heads=4, head_dim=32, channels=channels
        ):
            assert (config.slices - 1) * config.channel_slice < channels
            longest = max(longest, config.slices * config.channel_slice)
    assert longest >= 128


# Mutations: what the error rule must notice. Each is a change of a kernel's source.


TILE, RESIDENT = "window_attention_tile", "window_attention_resident"
FORWARD, KEPT = "window_attention_forward", "window_attention_kept"
BACKWARD, BACKWARD_RESIDENT = "window_attention_backward_query", "window_attention_backward_resident"

# By the way that weights are kept where the change is in a function of one of them.
MUTATIONS = {
    "a row too many": ("visibility", "row_stop - row_start", "row_stop - row_start + 1"),
    "a column too few": ("visibility", "column_stop - column_start", "column_stop - column_start - 1"),
    "no mask": ("visibility", "(beyond_row < rows[:, None]) &", "exists[None, :] |"),
    "a head too many in the mean": {
        "resident": ("resident_weights", "(l_i * HEADS)", "(l_i * (HEADS + 1))"),
        "otherwise": ("mean_weights", "* inv_l[head]", "* 1.5 * inv_l[head]"),
    },
    "one head's pivot for all": {
        "resident": ("resident_weights", "- pivot[:, None, :, None]", "- head"),
        "otherwise": ("mean_weights", "m_i[head]", "m_i[0]"),
    },
    "shares that keep their pivots": {
        "resident": ("resident_weights", "tl.math.exp2(pivots[group] - m_i[:, None])", "pivots[group] * 0 + 1"),
        "otherwise": ("head_statistics", "tl.math.exp2(m_i[head] - now[:, None])", "1"),
    },
}
PART_MUTATIONS = {
    "rows of the part for the map's": ("        row += first_row\n", ""),
    "columns of the part for the map's": ("        column += first_column\n", ""),
    "the part's height for the map's": (
        "first_row, first_column, height, width = part",
        "first_row, first_column, _, width = part",
    ),
    "the part's width for the map's": (
        "first_row, first_column, height, width = part",
        "first_row, first_column, height, _ = part",
    ),
}
BACKWARD_MUTATIONS = {
    "a delta that is not the head's": {
        "resident": (BACKWARD, "resident_gradients", "(means * HEADS)[:, None]", "means[:, None]"),
        "streamed": (BACKWARD, "_add_to_gradients", "deltas[head]", "deltas[0]"),
    },
    "no mask": {
        "resident": (BACKWARD_RESIDENT, "cut_off", "& 1) > 0", "& 1) >= 0"),
        "streamed": (BACKWARD, "visibility", "(beyond_row < rows[:, None]) &", "exists[None, :] |"),
    },
}


def assert_odd_shape_is_accurate() -> None:
    shape = KERNEL_SHAPES["odd"]
    assert_backend_accurate(attention(shape), attention_tensors(shape), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_forward_kernel_fails_the_error_rule(
    mutation: str, monkeypatch: pytest.MonkeyPatch, weights_live: str
) -> None:
    change: Any = MUTATIONS[mutation]
    change = change if isinstance(change, tuple) else change.get(weights_live, change["otherwise"])
    for module in (RESIDENT, FORWARD, KEPT, TILE):
        if hasattr(importlib.import_module(f"anyup.kernels.{module}"), change[0]):
            mutate(monkeypatch, module, *change)
    with pytest.raises(AssertionError, match="output: error"):
        assert_odd_shape_is_accurate()


def test_a_core_that_is_too_large_fails_the_error_rule(monkeypatch: pytest.MonkeyPatch, weights_live: str) -> None:
    shape = AttentionShape((24, 16), (12, 12), window=RatioWindow(0.5), heads=1, head_dim=16)
    tensors = attention_tensors(shape)
    assert_backend_accurate(attention(shape), tensors, backend="triton")
    module = RESIDENT if weights_live == "resident" else TILE
    mutate(monkeypatch, module, "core_keys", "rectangle.core.rows", "2 * rectangle.core.rows")
    with pytest.raises(AssertionError, match="output: error"):
        assert_backend_accurate(attention(shape), tensors, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", PART_MUTATIONS)
def test_a_mutated_window_of_a_part_fails_the_error_rule(
    mutation: str, monkeypatch: pytest.MonkeyPatch, weights_live: str
) -> None:
    for module in (FORWARD, KEPT):
        mutate(monkeypatch, module, "pixel_windows", *PART_MUTATIONS[mutation])
    with pytest.raises(AssertionError, match="output: error"):
        assert_parts_are_accurate(KERNEL_SHAPES["odd"])


@pytest.mark.slow
@pytest.mark.parametrize("weights_live", ["resident", "streamed"], indirect=True)
@pytest.mark.parametrize("mutation", BACKWARD_MUTATIONS)
def test_a_mutated_backward_kernel_fails_the_error_rule(
    mutation: str, monkeypatch: pytest.MonkeyPatch, weights_live: str
) -> None:
    module, *change = BACKWARD_MUTATIONS[mutation][weights_live]
    mutate(monkeypatch, module, *change)
    with pytest.raises(AssertionError, match="query: error"):
        assert_odd_shape_is_accurate()


# What the kernels do not take, and what a card does not.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.ones(1, 4, 4, 2, 24), "key": torch.ones(1, 2, 2, 2, 24)}, "heads are 24 wide"),
        ({"query": torch.ones(1, 4, 4, 2, 8), "key": torch.ones(1, 2, 2, 2, 8)}, "heads are 8 wide"),
        ({"query": torch.ones(1, 4, 4, 9, 16), "key": torch.ones(1, 2, 2, 9, 16)}, "9 heads, at most 8"),
        ({"value": torch.ones(1, 2, 2, 3).double()}, "values are float64"),
        ({"value": torch.ones(1, 2, 2, 3).bfloat16()}, "values are bfloat16, .*interpreter"),
    ],
)
def test_what_the_kernels_do_not_take_is_a_reason_with_the_value(changed: dict[str, Tensor], message: str) -> None:
    tensors = {**attention_tensors(AttentionShape((4, 4), (2, 2), head_dim=16)), **changed}
    with pytest.raises(NotImplementedError, match=message):
        window_attention(**tensors, window=RatioWindow(0.1), backend="triton")
    assert explain_backends(**tensors, window=RatioWindow(0.1)).chosen == "torch"


def test_the_interpreter_is_used_only_where_it_is_asked_for() -> None:
    explanation = explain_backends(**attention_tensors(KERNEL_SHAPES["odd"]), window=RatioWindow(0.1))
    assert explanation.chosen == "torch"
    assert explanation.candidates[0].name == "triton" and "interpreter" in explanation.candidates[0].discouraged[0]


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(99, 64, "shared memory")


# What a card may say, and how it is told.
REFUSALS: dict[str, Callable[[], Exception]] = {
    "OutOfResources: out of resource: shared memory": out_of_resources,
    "RuntimeError: PassManager::run failed": lambda: RuntimeError("PassManager::run failed"),
    "RuntimeError: Triton Error .CUDA.: too many resources": lambda: RuntimeError(
        "Triton Error [CUDA]: too many resources requested for launch"
    ),
}


@pytest.fixture
def card_refuses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let the first launches of the forward pass raise an error; returns the list of the configs that were tried."""
    from anyup.kernels.launch import Launch

    launch = Launch.__call__

    def refuse(launches: int, error: Callable[[], Exception] = out_of_resources) -> list[Any]:
        tried: list[Any] = []

        def launched(self: Launch) -> None:
            if "forward" in self.kernel.__name__:
                tried.append({**self.constants, **self.options})
                if len(tried) <= launches:
                    raise error()
            launch(self)

        monkeypatch.setattr(Launch, "__call__", launched)
        return tried

    monkeypatch.setattr(operator.OPERATION, "_failures", dict(operator.OPERATION._failures))
    monkeypatch.setattr(configs, "_refused", {})
    return refuse


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_config_that_the_card_refuses_gives_way_to_a_smaller_one(refusal: str, card_refuses: Any) -> None:
    shape = KERNEL_SHAPES["odd"]
    tried = card_refuses(1, REFUSALS[refusal])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_backend_accurate(attention(shape), attention_tensors(shape), backend="triton", gradients=False)
    first, second, *others = tried
    assert second["ROWS"] * second["COLUMNS"] <= first["ROWS"] * first["COLUMNS"] and second != first
    window_attention(**attention_tensors(shape), window=shape.window, backend="triton")
    assert tried[2:] == [*others, second], "the config that was refused was tried again"


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("compiles", [False, True])
def test_where_the_card_refuses_every_config_the_next_backend_runs(
    compiles: bool, refusal: str, card_refuses: Any
) -> None:
    tried = card_refuses(10**6, REFUSALS[refusal])
    tensors = attention_tensors(KERNEL_SHAPES["odd"])

    def run(**tensors: Tensor) -> Tensor:
        return window_attention(**tensors, window=RatioWindow(0.1), backend=("triton", "torch"))

    expected = window_attention(**tensors, window=RatioWindow(0.1), backend="torch")
    called = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
    with pytest.warns(UserWarning, match=f"'triton' failed on cpu .*{refusal}") as warned:
        results = [called(**tensors) for _ in range(2)]
    assert all(torch.equal(out, expected) for out in results)
    assert sum("failed on" in str(w.message) for w in warned) == 1
    assert len(tried) < 10


def test_what_fails_for_some_heads_is_still_used_for_others(card_refuses: Any) -> None:
    refused = attention_tensors(KERNEL_SHAPES["odd"])
    card_refuses(2)  # both configs
    settings: dict[str, Any] = {"window": RatioWindow(0.1), "backend": ("triton", "torch")}
    with pytest.warns(UserWarning, match="'triton' failed"):
        window_attention(**refused, **settings)
    chosen = {
        name: explain_backends(**tensors, **settings).chosen
        for name, tensors in (("same", refused), ("other", attention_tensors(KERNEL_SHAPES["one head"])))
    }
    assert chosen == {"same": "torch", "other": "triton"}


def test_by_name_a_refusal_is_an_error_with_every_reason(card_refuses: Any) -> None:
    card_refuses(10**6)
    with pytest.raises(BackendFailure, match="OutOfResources: out of resource: shared memory"):
        window_attention(**attention_tensors(KERNEL_SHAPES["odd"]), window=RatioWindow(0.1), backend="triton")


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    ],
    ids=["lost card", "out of memory"],
)
def test_what_is_no_refusal_is_raised_and_the_backend_stays(
    error: RuntimeError, compiles: bool, card_refuses: Any
) -> None:
    tried = card_refuses(1, lambda: error)
    tensors = attention_tensors(KERNEL_SHAPES["odd"])

    def run(**tensors: Tensor) -> Tensor:
        return window_attention(**tensors, window=RatioWindow(0.1), backend=("triton", "torch"))

    called = torch.compile(run, fullgraph=True, backend="aot_eager") if compiles else run
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(type(error), match=re.escape(str(error))):
            called(**tensors)
        called(**tensors)
    assert tried[0] == tried[1] and len(tried) == 2


# Under torch.compile and torch.export.


@pytest.mark.parametrize("direction", ["", "_backward"])
def test_operator_on_the_kernels_passes_torch_s_own_check(direction: str) -> None:
    shape = AttentionShape((9, 7), (4, 3), head_dim=16)
    tensors = attention_tensors(shape)
    if direction:
        out, lse = fused.forward(**tensors, window=shape.window, scale=0.25, save_lse=True)
        arguments = (torch.ones_like(out), *tensors.values(), lse, "ratio", 0.1, 0.25, "triton")
    else:
        leaves = (t.requires_grad_() for t in tensors.values())
        arguments = (*leaves, "ratio", 0.1, 0.25, "triton", 0, True)
    torch.library.opcheck(getattr(torch.ops.anyup, f"window_attention{direction}").default, arguments)
