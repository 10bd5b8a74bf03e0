"""The window rules against a slow restatement of their definition, and the segments that follow from them."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from anyup.ops.window_attention.segments import axis_segments
from anyup.window import (
    CellWindow,
    RatioWindow,
    axis_bounds,
    check_window,
    describe_window,
    make_window,
)

Bounds = list[tuple[int, int]]


def ratio_bounds(queries: int, keys: int, ratio: float, dtype: type = np.float32) -> Bounds:
    """The definition, one rounding after the other: each operation in `dtype`, in the published order."""
    one, zero, rho = dtype(1), dtype(0), dtype(np.float32(ratio))
    position = (np.arange(queries).astype(dtype) + dtype(0.5)) / dtype(queries)
    low = np.minimum(np.maximum(position - rho, zero), one) * dtype(keys)
    high = np.minimum(np.maximum(position + rho, zero), one) * dtype(keys)
    assert low.dtype == high.dtype == dtype
    bounds = []
    for a, b in zip(low.tolist(), high.tolist(), strict=True):
        start, stop = math.floor(a), math.ceil(b)
        bounds.append((start, stop if stop > start else start + 1))
    return bounds


def cell_bounds(queries: int, keys: int, ratio: float) -> Bounds:
    """The definition: the cell by exact rational arithmetic, the size in Python floats."""
    size = max(3, round(2 * ratio * keys))
    size += size % 2 == 0
    size = min(size, keys)
    bounds = []
    for i in range(queries):
        cell = math.floor((Fraction(i) + Fraction(1, 2)) * keys / queries)
        start = min(max(cell - size // 2, 0), keys - size)
        bounds.append((start, start + size))
    return bounds


def bounds_of(window: RatioWindow | CellWindow, queries: int, keys: int) -> Bounds:
    start, stop = window.bounds(queries, keys)
    assert start.dtype == stop.dtype == torch.int64 and start.shape == stop.shape == (queries,)
    return list(zip(start.tolist(), stop.tolist(), strict=True))


def samples(count: int, largest: int, seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(count)]


def test_ratio_window_is_the_definition_for_every_axis_up_to_96() -> None:
    for queries in range(1, 97):
        for keys in range(1, 97):
            assert bounds_of(RatioWindow(0.1), queries, keys) == ratio_bounds(queries, keys, 0.1), (queries, keys)


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.25, 0.3, 0.5, 0.9, 1.5, 1e-6])
def test_ratio_window_is_the_definition_on_sampled_axes(ratio: float) -> None:
    for queries, keys in [(35, 7), (105, 15), *samples(150, 2048, seed=round(1000 * ratio))]:
        assert bounds_of(RatioWindow(ratio), queries, keys) == ratio_bounds(queries, keys, ratio), (queries, keys)


@pytest.mark.parametrize(("queries", "keys"), [(35, 7), (105, 15)])
def test_float64_gives_other_windows_where_float32_is_asked_for(queries: int, keys: int) -> None:
    assert ratio_bounds(queries, keys, 0.1, np.float64) != ratio_bounds(queries, keys, 0.1)
    assert bounds_of(RatioWindow(0.1), queries, keys) != ratio_bounds(queries, keys, 0.1, np.float64)


def test_cell_window_is_the_definition_for_every_axis_up_to_64() -> None:
    for queries in range(1, 65):
        for keys in range(1, 65):
            assert bounds_of(CellWindow(0.1), queries, keys) == cell_bounds(queries, keys, 0.1), (queries, keys)


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.125, 0.3, 0.499])
def test_cell_window_is_the_definition_on_sampled_axes(ratio: float) -> None:
    for queries, keys in samples(40, 600, seed=round(1000 * ratio)):
        assert bounds_of(CellWindow(ratio), queries, keys) == cell_bounds(queries, keys, ratio), (queries, keys)


def test_cell_window_size_rounds_halves_to_even() -> None:
    start, stop = CellWindow(0.25).bounds(40, 13)  # 6.5 keys become 6, and 7 since a size is odd
    assert set((stop - start).tolist()) == {7}
    start, stop = CellWindow(0.25).bounds(40, 15)  # 7.5 become 8, and so 9
    assert set((stop - start).tolist()) == {9}


@pytest.mark.parametrize(
    "window", [RatioWindow(0.0), RatioWindow(-0.3), CellWindow(0.0), CellWindow(0.5), CellWindow(-1)]
)
def test_a_ratio_without_a_window_means_every_key(window: RatioWindow | CellWindow) -> None:
    assert bounds_of(window, 9, 5) == [(0, 5)] * 9
    assert axis_bounds(None, 9, 5) == ((0,) * 9, (5,) * 9)


@pytest.mark.parametrize(
    "window", [RatioWindow(1e-7), RatioWindow(0.1), RatioWindow(2.0), CellWindow(0.1), CellWindow(0.49)]
)
def test_no_window_is_empty_or_leaves_the_grid(window: RatioWindow | CellWindow) -> None:
    for queries, keys in samples(150, 300, seed=3):
        assert all(0 <= start < stop <= keys for start, stop in bounds_of(window, queries, keys)), (queries, keys)


def test_bounds_do_not_depend_on_the_default_device() -> None:
    for window in (RatioWindow(0.1), CellWindow(0.1), RatioWindow(0.0)):
        with torch.device("meta"):
            start, stop = window.bounds(31, 7)
        assert start.device.type == stop.device.type == "cpu"


def test_bounds_do_not_depend_on_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert bounds_of(RatioWindow(0.1), 35, 7) == ratio_bounds(35, 7, 0.1)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("window", [RatioWindow(0.1), CellWindow(0.2), None])
def test_a_window_survives_the_schema_of_an_operator(window: RatioWindow | CellWindow | None) -> None:
    assert make_window(*describe_window(window)) == window


def test_windows_of_different_kinds_are_different() -> None:
    assert RatioWindow(0.1) != CellWindow(0.1)
    assert axis_bounds(RatioWindow(0.1), 20, 10) != axis_bounds(CellWindow(0.1), 20, 10)


def test_a_window_that_is_none_of_them_is_refused() -> None:
    with pytest.raises(ValueError, match="window: .*'round'"):
        make_window("round", 0.1)
    with pytest.raises(TypeError, match="window: .*float"):
        check_window(0.1)  # type: ignore[arg-type]
    for ratio in (math.nan, math.inf):
        with pytest.raises(ValueError, match="window: .*finite"):
            check_window(RatioWindow(ratio))


@pytest.mark.parametrize("longest", [1, 5, 32])
@pytest.mark.parametrize("window", [RatioWindow(0.1), RatioWindow(0.01), RatioWindow(0.7), CellWindow(0.1), None])
def test_segments_cover_an_axis_once_and_show_each_query_its_window_alone(
    window: RatioWindow | CellWindow | None, longest: int
) -> None:
    for queries, keys in [(1, 1), (7, 1), (1, 9), (35, 7), (8, 31), *samples(25, 130, seed=9)]:
        start, stop = axis_bounds(window, queries, keys)
        seen: dict[int, set[int]] = {}
        for segments in axis_segments(window, queries, keys, longest):
            assert segments.length <= longest
            for n, (first, first_key) in enumerate(zip(segments.starts, segments.key_starts, strict=True)):
                assert 0 <= first_key and first_key + segments.keys <= keys
                for i in range(segments.length):
                    assert first + i not in seen
                    bias = [0.0] * segments.keys if segments.bias is None else segments.bias[n, i].tolist()
                    assert set(bias) <= {0.0, -math.inf}
                    seen[first + i] = {first_key + j for j, b in enumerate(bias) if b == 0.0}
        assert seen == {i: set(range(start[i], stop[i])) for i in range(queries)}, (queries, keys)
