"""Window attention: every backend against the reference, and what any backend must hold to."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.accuracy import (
    BACKENDS,
    DTYPES,
    assert_backend_accurate,
    assert_backend_accurate_over_draws,
    assert_close_enough,
    output_and_gradients,
)
from support.allocations import LargestTensor
from support.recipe import ATTENTION_SHAPES, AttentionShape, attention_tensors, parts_of
from torch import Tensor

from anyup.ops import explain_backends, window_attention
from anyup.ops.window_attention import eager, segments
from anyup.window import CellWindow, Part, RatioWindow, axis_bounds, part_bounds


def attention(shape: AttentionShape, **settings: Any) -> Any:
    """The operator for a shape's window, as the error rule calls it."""

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        chosen = {} if backend == "reference" else settings
        return window_attention(query, key, value, window=shape.window, backend=backend, **chosen)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_torch_backend_obeys_the_error_rule(name: str, dtype: torch.dtype) -> None:
    shape = ATTENTION_SHAPES[name]
    assert_backend_accurate_over_draws(attention(shape), lambda seed: attention_tensors(shape, seed, dtype))


@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell", "no window"])
def test_torch_backend_reads_no_uninitialised_memory(name: str, poisoned_memory: None) -> None:
    shape = ATTENTION_SHAPES[name]
    assert_backend_accurate(attention(shape), attention_tensors(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_saturated_logits_obey_the_error_rule(size: float, dtype: torch.dtype) -> None:
    shape = ATTENTION_SHAPES["prime"]
    tensors = attention_tensors(shape, dtype=dtype)
    tensors["query"] = tensors["query"] * math.sqrt(size)
    tensors["key"] = tensors["key"] * math.sqrt(size)
    # Half precision overflows in the reference's logits at the larger size.
    if dtype == torch.float16 and size > 100:
        assert window_attention(**tensors, window=shape.window, backend="torch").isfinite().all()
    else:
        assert_backend_accurate(attention(shape), tensors)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_half_queries_and_keys_with_wide_values_obey_the_error_rule(half: torch.dtype, wide: torch.dtype) -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = attention_tensors(shape)
    tensors = {name: t.to(wide if name == "value" else half) for name, t in tensors.items()}
    out = output_and_gradients(attention(shape), tensors, "torch")
    assert {name: t.dtype for name, t in out.items()} == {
        "output": wide,
        "gradient of query": half,
        "gradient of key": half,
        "gradient of value": wide,
    }
    if wide == torch.float64:  # the rule would ask for float64's precision of half-precision weights
        same, exact = (
            output_and_gradients(attention(shape), {k: t.to(d) for k, t in tensors.items()}, "reference")
            for d in (half, torch.float64)
        )
        for name in out:
            assert_close_enough(out[name].to(half), same[name], exact[name], name)
    else:
        assert_backend_accurate(attention(shape), tensors)


def test_wide_queries_and_keys_with_half_values_obey_the_error_rule() -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = attention_tensors(shape)
    assert_backend_accurate(attention(shape), {**tensors, "value": tensors["value"].bfloat16()})


@pytest.mark.parametrize("name", ["odd", "batch 2", "keys finer than pixels"])
def test_strides_change_nothing(name: str) -> None:
    shape = ATTENTION_SHAPES[name]
    tensors = attention_tensors(shape)
    expected = output_and_gradients(attention(shape), tensors, "torch")
    orders = {"query": (0, 3, 4, 1, 2), "key": (0, 4, 3, 2, 1), "value": (3, 0, 2, 1)}
    for order_of in (
        lambda t, o: t.permute(o).contiguous().permute([o.index(n) for n in range(len(o))]),
        lambda t, o: torch.stack((t, t + 1), dim=2)[:, :, 0],
    ):
        moved = {k: order_of(t, orders[k]) for k, t in tensors.items()}
        assert not any(t.is_contiguous() for t in moved.values())
        actual = output_and_gradients(attention(shape), moved, "torch")
        for key in expected:
            assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_contiguous_in_the_value_s_dtype(backend: str) -> None:
    tensors = attention_tensors(ATTENTION_SHAPES["odd"])
    tensors["value"] = tensors["value"].bfloat16().permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    out = window_attention(**tensors, window=RatioWindow(0.1), backend=backend)
    assert out.is_contiguous() and out.dtype == torch.bfloat16


def random_shape(rng: random.Random) -> AttentionShape:
    window = rng.choice([RatioWindow, CellWindow])(rng.choice([0.0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8]))
    return AttentionShape(
        output=(rng.randint(1, 48), rng.randint(1, 48)),
        grid=(rng.randint(1, 16), rng.randint(1, 16)),
        channels=rng.randint(1, 40),
        window=rng.choice([window, window, window, None]),
        batch=rng.randint(1, 2),
        heads=rng.choice([1, 2, 3, 8]),
        head_dim=rng.choice([1, 2, 8]),
    )


def draw(shape: AttentionShape, dtype: torch.dtype, seed: int, n: int) -> dict[str, Tensor]:
    """The n-th of three draws of the inputs."""
    return attention_tensors(shape, 3 * seed + n, dtype)


@pytest.mark.parametrize("count", [25, pytest.param(75, marks=pytest.mark.slow)])
def test_random_shapes_obey_the_error_rule(count: int) -> None:
    rng = random.Random(count)
    for seed in range(count):
        shape, dtype = random_shape(rng), rng.choice(DTYPES)
        run = attention(shape, max_queries=rng.choice([None, None, 1, 7, 100]))
        try:
            assert_backend_accurate_over_draws(run, partial(draw, shape, dtype, seed))
        except AssertionError as error:
            raise AssertionError(f"{shape}, {dtype}, seed {seed}") from error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [RatioWindow(0.2), CellWindow(0.2), None])
def test_gradients_are_those_of_finite_differences(window: Any, backend: str) -> None:
    shape = AttentionShape((4, 3), (3, 2), channels=2, window=window, heads=2, head_dim=2)
    tensors = attention_tensors(shape, dtype=torch.float64)
    run = attention(shape)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, backend=backend), inputs)


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_a_gradient_wanted_alone_is_the_one_wanted_with_others(wanted: str) -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = attention_tensors(shape)
    expected = output_and_gradients(attention(shape), tensors, "torch")[f"gradient of {wanted}"]

    def run(*, backend: str, **leaf: Tensor) -> Tensor:
        return attention(shape)(**{**{k: t.detach() for k, t in tensors.items()}, **leaf}, backend=backend)

    assert torch.equal(output_and_gradients(run, {wanted: tensors[wanted]}, "torch")[f"gradient of {wanted}"], expected)


# A part of a map: the windows are those of the whole.


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["odd", "prime", "batch 2", "keys finer than pixels", "cell", "no window"])
def test_a_part_of_a_map_is_what_the_whole_map_has_there(name: str, backend: str) -> None:
    shape = ATTENTION_SHAPES[name]
    tensors = {key: tensor.double() for key, tensor in attention_tensors(shape).items()}
    height, width = shape.output
    whole = attention(shape)(**tensors, backend="reference")
    for rows, columns in parts_of(shape.output):
        part = Part(rows.start, columns.start, height, width)
        query = tensors["query"][:, rows, columns]
        actual = window_attention(**{**tensors, "query": query}, window=shape.window, backend=backend, part=part)
        expected = whole[:, rows, columns]
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-12 * whole.abs().max()


def test_a_part_outside_the_map_and_its_gradient_are_refused() -> None:
    shape = ATTENTION_SHAPES["odd"]
    tensors = attention_tensors(shape)
    for part in (Part(1, 0, *shape.output), Part(0, -1, 99, 99), Part(0, 0, 35, 20)):
        with pytest.raises(ValueError, match="part: expected 35 x 21 pixels at .* to lie inside"):
            window_attention(**tensors, window=shape.window, part=part)
    tensors["key"].requires_grad_()
    with pytest.raises(NotImplementedError, match="part: .*no_grad"):
        window_attention(**tensors, window=shape.window, part=Part(0, 0, 99, 99))


# Mutations: what the error rule must notice.


@pytest.fixture
def patch_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace the bounds that the torch backend sees by a function of the right ones."""

    def patch(change: Any) -> None:
        def wrong(window: Any, queries: int, keys: int, first: int, total: int) -> tuple[tuple[int, ...], ...]:
            pairs = zip(*part_bounds(window, queries, keys, first, total), strict=True)
            start, stop = zip(*(change(a, b, keys) for a, b in pairs), strict=True)
            return start, stop

        monkeypatch.setattr(segments, "part_bounds", wrong)
        segments.axis_segments.cache_clear()

    yield patch
    segments.axis_segments.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a, b, keys: (max(a - 1, 0), b), id="one key more at the start"),
        pytest.param(lambda a, b, keys: (a, min(b + 1, keys)), id="one key more at the end"),
        pytest.param(lambda a, b, keys: (min(a + 1, b - 1), b), id="one key less at the start"),
        pytest.param(lambda a, b, keys: (a, max(b - 1, a + 1)), id="one key less at the end"),
    ],
)
def test_a_window_one_key_too_wide_or_too_narrow_fails(change: Any, name: str, patch_bounds: Any) -> None:
    shape = ATTENTION_SHAPES[name]
    patch_bounds(lambda a, b, keys: (a, b))
    assert_backend_accurate(attention(shape), attention_tensors(shape, dtype=torch.bfloat16))
    patch_bounds(change)
    for dtype in DTYPES:
        with pytest.raises(AssertionError, match="output: error"):
            assert_backend_accurate(attention(shape), attention_tensors(shape, dtype=dtype))


# Memory and chunks.


@pytest.mark.parametrize("chunk", [1, 2, 13, 64, 1000, 10**9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_does_not_depend_on_the_chunk(chunk: int, backend: str) -> None:
    shape = ATTENTION_SHAPES["odd"]

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        name, limit = (settings["backend"], chunk) if backend == "torch" else ("reference", None)
        return window_attention(query, key, value, window=shape.window, backend=name, max_queries=limit)

    settings = {"backend": backend}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_backend_accurate(run, attention_tensors(shape, dtype=dtype))


@pytest.mark.parametrize("window", [RatioWindow(0.1), CellWindow(0.1)])
def test_no_tensor_grows_with_pixels_times_keys(window: Any, threads: None) -> None:
    torch.set_num_threads(1)  # the tiles of other threads are not seen
    shape = AttentionShape((144, 144), (36, 36), channels=8, window=window, heads=2, head_dim=4)
    tensors = attention_tensors(shape)
    every = 144 * 144 * 36 * 36
    with LargestTensor() as seen:
        out, lse = eager.forward(**tensors, window=window, scale=0.5, save_lse=True)
    assert 144 * 144 * 8 <= seen.largest < every / 30
    with LargestTensor() as seen:
        eager.backward(torch.ones_like(out), **tensors, lse=lse, window=window, scale=0.5)
    assert seen.largest < every / 30
    for chunk in (16, 256):
        with LargestTensor() as seen:
            eager.forward(
                **{**tensors, "value": tensors["value"][..., :1]}, window=window, scale=0.5, max_queries=chunk
            )
        assert seen.largest <= max(chunk * 2 * 36 * 36, tensors["query"].numel())


def test_nothing_is_kept_in_inference() -> None:
    shape = ATTENTION_SHAPES["odd"]
    leaves = {k: t.requires_grad_() for k, t in attention_tensors(shape).items()}
    with torch.no_grad():
        out = window_attention(**leaves, window=shape.window)
    assert out.grad_fn is None
    _, lse = eager.forward(**{k: t.detach() for k, t in leaves.items()}, window=shape.window, scale=1.0)
    assert lse.numel() == 0


@pytest.mark.parametrize("threads_now", [1, 2, 5])
def test_result_does_not_depend_on_the_number_of_threads(threads_now: int, threads: None) -> None:
    shape = ATTENTION_SHAPES["several tiles"]
    torch.set_num_threads(threads_now)
    assert_backend_accurate(attention(shape), attention_tensors(shape))


def test_tables_made_in_inference_mode_serve_training() -> None:
    shape = ATTENTION_SHAPES["odd"]
    segments.axis_segments.cache_clear()
    axis_bounds.cache_clear()
    with torch.inference_mode():
        window_attention(**attention_tensors(shape), window=shape.window)
    assert_backend_accurate(attention(shape), attention_tensors(shape))


# A caller's mistakes.


def arguments(**changed: Any) -> dict[str, Any]:
    return {**attention_tensors(AttentionShape((4, 4), (2, 2))), "window": RatioWindow(0.1), **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"query": torch.ones(1, 4, 4, 8)},
            ValueError,
            r"query: expected \(B, H, W, heads, head_dim\), got .*\(1, 4, 4, 8\)",
        ),
        ({"key": torch.ones(2, 2, 2, 2, 4)}, ValueError, r"key: .*batch 1.*\(2, 2, 2, 2, 4\)"),
        ({"key": torch.ones(1, 2, 2, 2, 8)}, ValueError, r"key: .*heads of 4.*\(1, 2, 2, 2, 8\)"),
        ({"key": torch.ones(1, 2, 2, 2, 4).half()}, TypeError, r"key: .*float32.*float16"),
        ({"value": torch.ones(1, 3, 2, 5)}, ValueError, r"value: .*\(1, 2, 2\), got \(1, 3, 2\)"),
        ({"value": torch.ones(1, 2, 2, 5).int()}, TypeError, r"value: .*floating-point.*int32"),
        ({"value": torch.ones(1, 2, 2, 5, device="meta")}, ValueError, r"value: .*cpu.*meta"),
        ({"value": torch.ones(1, 2, 2, 0)}, ValueError, r"value: .*at least 1"),
        ({"value": [1.0]}, TypeError, r"value: expected a tensor.*list"),
        ({"window": 0.1}, TypeError, r"window: .*float"),
        ({"window": RatioWindow(math.nan)}, ValueError, r"window: .*finite.*nan"),
        ({"max_queries": 0}, ValueError, r"max_queries: .*0"),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of .*'cuda'"),
        ({"backend": ()}, ValueError, r"backend: .*empty"),
        ({"backend": ["torch", 3]}, TypeError, r"backend: .*int"),
    ],
)
def test_a_mistake_is_named_before_any_work(
    changed: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("worked before checking")

    monkeypatch.setattr(eager, "forward", work)
    with pytest.raises(error, match=message):
        window_attention(**arguments(**changed))


def test_explanation_names_the_chosen_backend() -> None:
    explanation = explain_backends(**arguments())
    assert explanation.chosen == "torch"
    assert [c.name for c in explanation.candidates][-2:] == ["torch", "reference"]
    assert "4 x 4 from 2 x 2" in str(explanation)
