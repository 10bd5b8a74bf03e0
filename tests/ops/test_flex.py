"""The flex backend of the window attention: its geometry, its results, and what it says when it cannot."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate, assert_close_enough
from support.recipe import ATTENTION_SHAPES, AttentionShape, attention_tensors, parts_of
from torch import Tensor
from torch._dynamo.utils import counters

from anyup.ops import window_attention
from anyup.ops.dispatch import BackendFailure
from anyup.ops.window_attention import blocks, flex, reference
from anyup.ops.window_attention.arguments import WindowAttentionProblem
from anyup.ops.window_attention.operator import OPERATION
from anyup.window import CellWindow, Part, RatioWindow, axis_bounds, part_bounds

FOUR = {"heads": 4, "head_dim": 16}
PROBLEM = WindowAttentionProblem(
    batch=1,
    output_size=(32, 32),
    grid_size=(8, 8),
    heads=4,
    head_dim=32,
    channels=384,
    query_dtype=torch.float32,
    value_dtype=torch.float32,
    device=torch.device("cpu"),
    window=RatioWindow(0.1),
    needs_gradient=False,
)


def compiled(test: Any) -> Any:
    """A test of the compiled kernel: of 4 heads of 16 and slices of 16 channels, so that one kernel serves them all."""
    reasons = flex.unsupported(PROBLEM)
    test = pytest.mark.usefixtures("narrow_slices")(test)
    return pytest.mark.slow(pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))(test))


def attention(shape: AttentionShape) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query, key, value, window=shape.window, backend=backend)

    return run


def assert_accurate(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> None:
    tensors = attention_tensors(shape, dtype=dtype)
    assert_backend_accurate(attention(shape), tensors, backend="flex", gradients=False)


@pytest.fixture
def narrow_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 16 channels, so that one kernel serves any number of channels."""
    monkeypatch.setattr(flex, "_SLICE", 16)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as torch runs it uncompiled: the mask function on all pairs, whatever the lists of blocks."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attend)
    monkeypatch.setattr("torch.nn.attention.flex_attention._WARNINGS_SHOWN", {"flex_attention_performance"})
    monkeypatch.setattr(flex, "unsupported", lambda problem: [])


# Geometry, without FlexAttention.


def random_shape(rng: random.Random) -> AttentionShape:
    window = rng.choice([RatioWindow, CellWindow])(rng.choice([0.0, 0.01, 0.1, 0.3, 0.8]))
    return AttentionShape(
        output=(rng.randint(1, 70), rng.randint(1, 70)),
        grid=(rng.randint(1, 40), rng.randint(1, 40)),
        window=rng.choice([window, window, None]),
    )


SHAPES = {**ATTENTION_SHAPES, **{f"random {n}": random_shape(random.Random(n)) for n in range(30)}}


def listed(count: Tensor, index: Tensor) -> Tensor:
    """The blocks in FlexAttention's lists as a (T, K) mask."""
    mask = torch.zeros(index.shape, dtype=torch.bool)
    for row, (n, places) in enumerate(zip(count.tolist(), index.long(), strict=True)):
        assert len(set(places[:n].tolist())) == n
        mask[row, places[:n]] = True
    return mask


def numbered(size: tuple[int, int], tile: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """For each tile its positions in the row-major order of a (H, W) map, -1 beyond it: (tiles, tile)."""
    numbers = torch.full((tiles[0] * tile[0], tiles[1] * tile[1]), -1)
    numbers[: size[0], : size[1]] = torch.arange(size[0] * size[1]).view(size)
    numbers = numbers.unflatten(1, (tiles[1], tile[1])).unflatten(0, (tiles[0], tile[0]))
    return numbers.transpose(1, 2).flatten(2).flatten(0, 1)


def inside(bounds: Tensor, positions: Tensor) -> Tensor:
    """Whether a key lies in a pixel's bounds: (4, T, QUERIES), (2, K, KEYS) -> (T, QUERIES, K, KEYS)."""
    first_row, last_row, first_column, last_column = bounds[..., None, None]
    rows, columns = positions
    return (rows >= first_row) & (rows < last_row) & (columns >= first_column) & (columns < last_column)


def pairs(shape: AttentionShape) -> tuple[blocks.Tiling, Tensor, Tensor, Tensor]:
    """A tiling, and for each pair of tile and block (T, K): is it visited, is it full, and which pairs of pixel and
    key in it see each other (T, K, QUERIES, KEYS); -1 where either is padding."""
    tiling = blocks.blocks_of(shape.window, shape.output, shape.grid)
    every = (slice(0, tiling.rows.tiles), slice(0, tiling.columns.tiles))
    lists = tiling.blocks(*every)
    pixels = numbered(shape.output, blocks.QUERY_TILE, (tiling.rows.tiles, tiling.columns.tiles))
    keys = numbered(shape.grid, blocks.KEY_BLOCK, (tiling.rows.blocks, tiling.columns.blocks))
    seen = reference.window_mask(shape.window, shape.output, shape.grid).long()
    seen = torch.nn.functional.pad(seen, (0, 1, 0, 1), value=-1)  # at index -1
    partial = listed(lists.partial_count, lists.partial_index)
    full = listed(lists.full_count, lists.full_index)
    assert not (partial & full).any()
    return tiling, partial | full, full, seen[pixels[:, None, :, None], keys[None, :, None, :]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_tile_visits_every_block_that_holds_a_key_of_its_pixels(name: str) -> None:
    _, visited, _, seen = pairs(SHAPES[name])
    assert visited[(seen == 1).flatten(2).any(dim=2)].all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_pixel_of_a_tile_sees_every_key_of_a_full_block(name: str) -> None:
    tiling, _, full, seen = pairs(SHAPES[name])
    padding = (tiling.positions() < 0).any(dim=0)  # (K, KEYS)
    assert not (full & padding.any(dim=1)).any()
    assert not (seen == 0).flatten(2).any(dim=2)[full].any()


def test_a_full_block_occurs() -> None:
    assert pairs(AttentionShape((64, 64), (64, 64), window=RatioWindow(0.3)))[2].any()
    assert pairs(AttentionShape((16, 16), (16, 16), window=None))[2].all()


@pytest.mark.parametrize("name", SHAPES)
def test_bounds_and_positions_say_what_the_window_holds(name: str) -> None:
    shape = SHAPES[name]
    tiling, _, _, seen = pairs(shape)
    lists = tiling.blocks(slice(0, tiling.rows.tiles), slice(0, tiling.columns.tiles))
    sees = inside(lists.bounds, tiling.positions()).transpose(1, 2)
    assert torch.equal(sees[seen >= 0], seen[seen >= 0] == 1)
    assert not sees[((tiling.positions() < 0).any(dim=0))[None, :, None, :].expand_as(sees)].any()


@pytest.mark.parametrize("most", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", ["several tiles", "tall", "wide", "one pixel", "odd scale"])
def test_rectangles_cover_the_tiles_and_all_have_one_size(name: str, most: int) -> None:
    shape = SHAPES[name]
    tiling = blocks.blocks_of(shape.window, shape.output, shape.grid)
    covered = torch.zeros(tiling.rows.tiles, tiling.columns.tiles, dtype=torch.bool)
    sizes = set()
    for rows, columns in tiling.rectangles(most):
        covered[rows, columns] = True
        sizes.add((rows.stop - rows.start, columns.stop - columns.start))
    assert covered.all() and len(sizes) == 1
    ((high, wide),) = sizes
    assert 2 <= high * wide <= max(2, most)


@pytest.mark.parametrize(
    ("size", "keys", "own", "most"),
    [(448, 32, 49, 174), (1024, 64, 169, 393), (2048, 128, 637, 1010)],
)
def test_a_tile_visits_few_keys_beyond_a_window(size: int, keys: int, own: int, most: int) -> None:
    window = RatioWindow(0.1)
    start, stop = axis_bounds(window, size, keys)
    assert round((sum(stop) - sum(start)) ** 2 / size**2) == own
    tiling = blocks.blocks_of(window, (size, size), (keys, keys))
    visits = tiling.rows.visited.sum() * tiling.columns.visited.sum() / (tiling.rows.tiles * tiling.columns.tiles)
    assert own < visits * blocks.KEYS <= most


# Results without compiling: the mask function, the tiles, the lists of blocks, the slices, the dtypes.


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FlexAttention by its definition; lists how many values the outputs of the heads have in each call."""
    calls: list[int] = []

    def attend(
        queries: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, positions: Tensor, *rest: Any
    ) -> tuple[Tensor, None]:
        partial_count, partial_index, full_count, full_index, scale, _ = rest
        partial, full = listed(partial_count, partial_index), listed(full_count, full_index)
        visible = partial[:, None, :, None] & inside(bounds, positions) | full[:, None, :, None]
        visible = visible.flatten(2).flatten(0, 1)
        logits = queries.flatten(1, 2) @ keys.flatten(1, 2).mT * scale
        logits = logits.masked_fill(~visible, -math.inf)
        calls.append(queries[..., 0].numel() * values.shape[2])
        out = torch.softmax(logits, dim=2).to(values.dtype) @ values.flatten(0, 1)
        return out.mean(dim=0, dtype=torch.float32), None

    monkeypatch.setattr(flex, "_compiled", lambda: attend)
    monkeypatch.setattr(flex, "unsupported", lambda problem: [])
    return calls


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_and_lists_give_what_the_error_rule_asks(name: str, emulated: list[int]) -> None:
    assert_accurate(SHAPES[name])


# How FlexAttention is called depends on the numbers of tiles and images: a window comes as bounds, whatever its kind.
# The tests above have all shapes.
@pytest.mark.parametrize("name", ["several tiles", "batch 2"])
def test_uncompiled_flex_obeys_the_error_rule(name: str, dense: None) -> None:
    assert_accurate(ATTENTION_SHAPES[name])


@pytest.mark.parametrize("name", ["odd", "batch 2"])
def test_a_part_of_a_map_obeys_the_error_rule(name: str, dense: None) -> None:
    shape = ATTENTION_SHAPES[name]
    for rows, columns in parts_of(shape.output):
        assert_part_accurate(shape, rows, columns)


def assert_part_accurate(shape: AttentionShape, rows: slice, columns: slice) -> None:
    part = Part(rows.start, columns.start, *shape.output)

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query[:, rows, columns], key, value, window=shape.window, backend=backend, part=part)

    assert_backend_accurate(run, attention_tensors(shape), backend="flex", gradients=False)


@pytest.mark.parametrize("change", [(-1, 0), (0, 1), (1, 0), (0, -1)])
def test_a_window_one_key_off_is_found_out(
    change: tuple[int, int], dense: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*axis: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        start, stop = part_bounds(*axis)
        return tuple(n + change[0] for n in start), tuple(n + change[1] for n in stop)

    monkeypatch.setattr(blocks, "part_bounds", shifted)
    monkeypatch.setattr(flex, "blocks_of", blocks.blocks_of.__wrapped__)
    with pytest.raises(AssertionError, match="output: error"):
        assert_accurate(ATTENTION_SHAPES["several tiles"])


@pytest.mark.parametrize(
    ("queries", "values"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_any_two_dtypes_obey_the_error_rule(queries: torch.dtype, values: torch.dtype, dense: None) -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = {k: t.to(values if k == "value" else queries) for k, t in attention_tensors(shape).items()}
    assert window_attention(**tensors, window=shape.window, backend="flex").dtype == values
    assert_backend_accurate(attention(shape), tensors, backend="flex", gradients=False)


@pytest.mark.parametrize("name", ["odd scale", "batch 2"])
def test_slices_and_rectangles_stay_in_the_budget_and_change_nothing(
    name: str, emulated: list[int], narrow_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ATTENTION_SHAPES[name]._replace(channels=40)
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend="reference")
    tile = shape.heads * flex._SLICE * blocks.QUERIES
    for most, tiles in ((1, 2), (300, 2), (500, 3), (None, 4)):
        monkeypatch.setattr(flex, "_BUDGET", 4 * tile)
        emulated.clear()
        out = window_attention(**tensors, window=shape.window, backend="flex", max_queries=most)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert len(emulated) % (3 * shape.batch) == 0
        assert max(emulated) <= tiles * tile


@pytest.mark.parametrize("name", ["odd", "batch 2"])
def test_the_statistics_are_the_log_sum_exp_of_the_logits(name: str, dense: None) -> None:
    shape = ATTENTION_SHAPES[name]
    tensors = attention_tensors(shape)
    (_, lse), (_, expected), (_, exact) = (
        backend.forward(**{k: t.to(dtype) for k, t in tensors.items()}, window=shape.window, scale=0.5, save_lse=True)
        for backend, dtype in ((flex, torch.float32), (reference, torch.float32), (reference, torch.float64))
    )
    assert_close_enough(lse, expected, exact, "lse")
    assert flex.forward(**tensors, window=shape.window, scale=0.5)[1].shape == (0,)


# Results, compiled.

COMPILED = {
    "ratio": AttentionShape((80, 72), (20, 18), channels=24, **FOUR),
    "batch 2, odd": AttentionShape((35, 21), (7, 5), channels=7, batch=2, **FOUR),
    "cell": AttentionShape((33, 25), (11, 14), channels=40, window=CellWindow(0.3), **FOUR),
    "no window": AttentionShape((20, 18), (9, 17), channels=5, window=None, **FOUR),
    "one pixel of one key": AttentionShape((1, 1), (1, 1), **FOUR),
    "full blocks": AttentionShape((48, 40), (40, 33), window=RatioWindow(0.4), **FOUR),
    "keys finer than pixels": AttentionShape((8, 7), (60, 54), **FOUR),
    "empty batch": AttentionShape((18, 20), (6, 5), batch=0, **FOUR),
}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@compiled
def test_one_kernel_serves_every_size_window_batch_and_number_of_channels() -> None:
    torch._dynamo.reset()
    before = graphs()
    for shape in COMPILED.values():
        assert_accurate(shape)
        assert graphs() == before + 1


@compiled
def test_parts_of_a_map_need_no_other_kernel_and_a_nan_stays_in_its_windows() -> None:
    shape = COMPILED["ratio"]
    tensors = attention_tensors(shape)
    window_attention(**tensors, window=shape.window, backend="flex")
    before = graphs()
    for rows, columns in parts_of(shape.output):
        assert_part_accurate(shape, rows, columns)
        part = Part(rows.start, columns.start, *shape.output)
        tensors["key"][0, 10, 9] = math.nan
        query = tensors["query"][:, rows, columns]
        out = window_attention(query, tensors["key"], tensors["value"], window=shape.window, backend="flex", part=part)
        sees = reference.window_mask(shape.window, shape.output, shape.grid)[:, 10 * shape.grid[1] + 9]
        assert torch.equal(out[0].isnan().all(dim=2), sees.view(shape.output)[rows, columns])
    assert graphs() == before


@compiled
def test_inference_mode_and_leaves_need_no_other_kernel() -> None:
    shape = COMPILED["ratio"]
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend="flex")
    before = graphs()
    with torch.inference_mode():
        fresh = {name: t.clone() for name, t in tensors.items()}
        assert torch.equal(window_attention(**fresh, window=shape.window, backend="flex"), expected)
    with torch.no_grad():
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        assert torch.equal(window_attention(**leaves, window=shape.window, backend="flex"), expected)
    assert graphs() == before


@compiled
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_it_runs_inside_a_compiled_graph(compiler: str) -> None:
    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * window_attention(query * 1, key, value, window=RatioWindow(0.1), backend="flex")

    run = torch.compile(twice, fullgraph=True, dynamic=True, backend=compiler)
    for mode in (torch.no_grad, torch.inference_mode):
        for name in ("ratio", "batch 2, odd"):
            tensors = attention_tensors(COMPILED[name])
            with mode():
                out = run(**tensors)
            expected = window_attention(**tensors, window=RatioWindow(0.1), backend="reference")
            torch.testing.assert_close(out, 2 * expected, rtol=1e-5, atol=1e-6)


@compiled
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", ["ratio", "cell", "keys finer than pixels"])
def test_a_key_outside_the_window_changes_nothing(name: str, bad: float) -> None:
    shape = COMPILED[name]
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend="flex")
    rows, columns = shape.grid
    for key in ((0, 0), (rows // 2, columns // 2), (rows - 1, 0)):
        sees = reference.window_mask(shape.window, shape.output, shape.grid)[:, key[0] * columns + key[1]]
        sees = sees.view(shape.output)
        changed = tensors["key"].clone()
        changed[0, key[0], key[1]] = bad
        out = window_attention(tensors["query"], changed, tensors["value"], window=shape.window, backend="flex")
        assert torch.equal(out[0][~sees], expected[0][~sees])
        assert not math.isnan(bad) or out[0][sees].isnan().all()


@compiled
def test_a_nan_in_a_query_reaches_its_pixel_alone() -> None:
    shape = COMPILED["batch 2, odd"]
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend="flex")
    tensors["query"][1, 3, 4, 2, 5] = math.nan
    out = window_attention(**tensors, window=shape.window, backend="flex")
    assert out[1, 3, 4].isnan().all()
    out[1, 3, 4] = expected[1, 3, 4]
    assert torch.equal(out, expected)


@compiled
def test_a_block_that_is_missing_from_the_lists_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = blocks._listed

    def shorter(which: Tensor) -> tuple[Tensor, Tensor]:
        count, index = listed(which)
        return (count - 1).clamp(min=0), index

    monkeypatch.setattr(blocks, "_listed", shorter)
    with pytest.raises(AssertionError, match="output: error"):
        assert_accurate(COMPILED["ratio"])


@compiled
def test_memory_that_nobody_wrote_is_never_read(poisoned_memory: None) -> None:
    assert_accurate(COMPILED["batch 2, odd"])


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_obeys_the_error_rule(dtype: torch.dtype) -> None:
    assert_accurate(COMPILED["ratio"], dtype)


@pytest.mark.parametrize("compiles", [True, False])
def test_what_cannot_be_compiled_is_a_failure_of_the_backend(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what runs out of memory is not."""
    from torch._inductor.exc import InductorError

    monkeypatch.setattr(flex, "unsupported", lambda problem: [])
    inner = RuntimeError("PassManager::run failed") if compiles else torch.OutOfMemoryError("out of memory")

    def broken(*_: Any) -> Any:
        raise InductorError(inner, first_useful_frame=None)

    monkeypatch.setattr(flex, "_compiled", lambda: broken)
    monkeypatch.setattr(OPERATION, "_failures", {})
    shape = ATTENTION_SHAPES["odd"]
    tensors = attention_tensors(shape)
    expected: Any = BackendFailure if compiles else InductorError
    with pytest.raises(expected, match="PassManager::run failed" if compiles else "out of memory"):
        window_attention(**tensors, window=shape.window, backend="flex")
    if compiles:
        with pytest.warns(UserWarning, match="'flex' failed on cpu .*RuntimeError: PassManager::run failed"):
            window_attention(**tensors, window=shape.window, backend=["flex", "torch"])


# Which problems it takes.


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"query_dtype": torch.float64}, "query is float64, FlexAttention takes float16, bfloat16, float32"),
        ({"value_dtype": torch.float64}, "value is float64, "),
        ({"head_dim": 129}, "head_dim is 129, at most 128 "),
        ({"needs_gradient": True}, "a gradient is wanted, .*no_grad"),
        ({"device": torch.device("mps")}, "device is mps, flex runs on cuda and cpu"),
    ],
)
def test_a_reason_names_the_limit_and_the_value(changed: dict[str, Any], reason: str) -> None:
    reasons = set(flex.unsupported(replace(PROBLEM, **changed))) - set(flex.unsupported(PROBLEM))
    (found,) = reasons
    assert re.match(reason, found)


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with neither triton nor a C++ compiler."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    flex._lacking_on_cpu.cache_clear()
    yield
    flex._lacking_on_cpu.cache_clear()


def test_what_is_not_installed_is_a_reason(bare_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++-of-mine")
    assert any("no C++ compiler 'c++-of-mine'" in reason for reason in flex.unsupported(PROBLEM))
    on_gpu = replace(PROBLEM, device=torch.device("cuda"))
    assert any("triton is not installed" in reason for reason in flex.unsupported(on_gpu))


def test_compilation_switched_off_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert any("TORCHDYNAMO_DISABLE" in reason for reason in flex.unsupported(PROBLEM))


def test_an_explicit_request_that_cannot_be_met_lists_the_reasons() -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = {k: t.requires_grad_() for k, t in attention_tensors(shape, dtype=torch.float64).items()}
    with pytest.raises(NotImplementedError) as error:
        window_attention(**tensors, window=shape.window, backend="flex")
    for reason in ("query is float64", "value is float64", "a gradient is wanted"):
        assert f"not flex: {reason}" in str(error.value)
    assert window_attention(**tensors, window=shape.window, backend=["flex", "torch"]).requires_grad


def test_nobody_gets_it_on_a_cpu_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "unsupported", lambda problem: [])
    assert OPERATION.choose(PROBLEM).__name__.endswith("eager")
    explanation = OPERATION.explain(PROBLEM)
    assert explanation.chosen == "torch"
    assert "flex: can, only by name: on a CPU it compiles" in str(explanation)
    assert OPERATION.explain(PROBLEM, "flex").chosen == "flex"
    assert flex.discouraged(replace(PROBLEM, device=torch.device("cuda"))) == []


def test_a_gpu_gets_it_before_torch_and_after_triton() -> None:
    names = [candidate.name for candidate in OPERATION.explain(PROBLEM).candidates]
    assert names.index("flex") == names.index("torch") - 1
    assert "triton" not in names[names.index("flex") :]
