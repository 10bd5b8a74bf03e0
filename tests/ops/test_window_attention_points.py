"""The attention of single pixels: every backend against the reference, and the reference against that of a map."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.accuracy import DTYPES, assert_backend_accurate, assert_backend_accurate_over_draws, output_and_gradients
from support.point_cases import attention_at, some_pixels, tensors_of
from support.recipe import ATTENTION_SHAPES, attention_tensors

from anyup.ops.window_attention import attend_points, explain_points, gathered_points, window_attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_torch_obeys_the_error_rule_gradients_included(name: str, dtype: torch.dtype) -> None:
    shape = ATTENTION_SHAPES[name]
    assert_backend_accurate_over_draws(attention_at(shape), lambda seed: tensors_of(shape, dtype, seed=seed))


@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_the_reference_has_the_values_of_the_whole_output(name: str) -> None:
    shape = ATTENTION_SHAPES[name]._replace(batch=1)
    whole = attention_tensors(shape, dtype=torch.float64)
    rows, columns = some_pixels(shape, 12)
    expected = window_attention(**whole, window=shape.window, backend="reference")[0, rows, columns]
    found = attention_at(shape)(**tensors_of(shape, torch.float64), backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_groups_of_points_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ATTENTION_SHAPES["prime"]
    expected = output_and_gradients(attention_at(shape), tensors_of(shape), "torch")
    monkeypatch.setitem(gathered_points._BUDGET, "cpu", 1)
    for name, found in output_and_gradients(attention_at(shape), tensors_of(shape), "torch").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-7)


def test_no_uninitialised_memory_is_read(poisoned_memory: None) -> None:
    shape = ATTENTION_SHAPES["prime"]
    assert_backend_accurate(attention_at(shape), tensors_of(shape))


def test_no_points_are_allowed() -> None:
    shape = ATTENTION_SHAPES["prime"]
    for backend in ("torch", "reference"):
        found = output_and_gradients(attention_at(shape, 0), tensors_of(shape, count=0), backend)
        assert found["output"].shape == (0, shape.channels)
        assert not found["gradient of key"].any() and not found["gradient of value"].any()


def test_a_backend_without_points_says_so() -> None:
    shape = ATTENTION_SHAPES["prime"]
    with pytest.raises(NotImplementedError, match=r"12 points of 37 x 29.*\n.*not flex: single pixels are wanted"):
        attention_at(shape)(**tensors_of(shape), backend="flex")
    tensors = tensors_of(shape)
    explained = explain_points(**tensors, window=shape.window, size=shape.output, backend=("flex", "torch"))
    assert explained.chosen == "torch"


POINTS_MISTAKEN = [
    (
        {"query": torch.ones(1, 3, 2, 16)},
        ValueError,
        r"query: expected \(N, heads, head_dim\), got shape \(1, 3, 2, 16\)",
    ),
    ({"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
    ({"key": torch.ones(4, 5, 2, 8)}, ValueError, r"key: expected 2 heads of 16, got shape \(4, 5, 2, 8\)"),
    ({"key": torch.ones(4, 5, 2, 16).half()}, TypeError, "key: expected the query's dtype torch.float32"),
    ({"value": torch.ones(4, 4, 7)}, ValueError, r"value: expected the keys' grid \(4, 5\), got \(4, 4\)"),
    ({"value": torch.ones(4, 5, 0)}, ValueError, "query, key, value: expected grids, heads and channels of at least 1"),
    ({"value": torch.ones(4, 5, 7).int()}, TypeError, "value: expected a floating-point tensor .*int32"),
    ({"value": torch.ones(4, 5, 7, device="meta")}, ValueError, "value: expected the query's device cpu, got meta"),
    ({"rows": torch.tensor([0, 1])}, ValueError, r"rows: expected a position for each of 3 queries, got \(2,\)"),
    ({"rows": torch.tensor([0, 1, 9])}, ValueError, "rows: expected positions from 0 to 8, got from 0 to 9"),
    ({"columns": torch.tensor([0, -1, 8])}, ValueError, "columns: expected positions from 0 to 6, got from -1 to 8"),
    ({"columns": torch.ones(3)}, TypeError, "columns: expected int64, got torch.float32"),
    ({"size": (9, 0)}, ValueError, r"size: expected the output's \(H, W\), both at least 1, got \(9, 0\)"),
    ({"window": 0.1}, TypeError, "window"),
]


@pytest.mark.parametrize(("changed", "error", "message"), POINTS_MISTAKEN)
def test_a_mistake_is_named_before_any_work(changed: dict[str, Any], error: Any, message: str) -> None:
    given: dict[str, Any] = {
        "query": torch.ones(3, 2, 16), "key": torch.ones(4, 5, 2, 16), "value": torch.ones(4, 5, 7),
        "rows": torch.tensor([0, 8, 3]), "columns": torch.tensor([6, 0, 3]), "window": None, "size": (9, 7),
    }  # fmt: skip
    assert attend_points(**given).shape == (3, 7)
    with pytest.raises(error, match=message):
        attend_points(**{**given, **changed})
    if not changed.keys() & {"rows", "columns"}:
        with pytest.raises(error, match=message):
            explain_points(
                **{name: each for name, each in {**given, **changed}.items() if name not in ("rows", "columns")}
            )


def test_a_gradient_of_the_gradient_is_refused() -> None:
    shape = ATTENTION_SHAPES["prime"]
    leaves = [t.requires_grad_() for t in tensors_of(shape).values()]
    out = attention_at(shape)(*leaves, backend="torch")
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention_points_backward cannot be differentiated"):
        grads[0].sum().backward()


MEMORY = """
import sys
import torch
from anyup.bench.memory import measure_here
from anyup.ops.window_attention import attend_points
from anyup.window import RatioWindow

query, key, value = torch.randn(100, 4, 32), torch.randn(128, 128, 4, 32), torch.randn(128, 128, 384)
rows, columns = torch.randint(0, 2048, (2, 100))
differentiates = sys.argv[1] == "gradient"
def call(count):
    leaf = value.detach().requires_grad_(differentiates)
    out = attend_points(
        query[:count], key, leaf, rows[:count], columns[:count], window=RatioWindow(0.1), size=(2048, 2048)
    )
    if differentiates:
        out.sum().backward()
call(1)
print(measure_here(lambda: call(100)).peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a child's peak is asked of Linux")
@pytest.mark.parametrize("what", ["output", "gradient"])
def test_many_points_take_no_more_memory_than_a_few(what: str) -> None:
    """Windows of 27 x 27 keys of 384 channels: 112 MB, were they kept for all of the points.

    The gradients of keys and values are 8 and 25 MB, and twice as much where they are summed.
    """
    run = subprocess.run([sys.executable, "-c", MEMORY, what], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < {"output": 50e6, "gradient": 150e6}[what]
