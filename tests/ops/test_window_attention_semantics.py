"""What any backend of the window attention must hold to, whatever it computes in."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.accuracy import assert_close_enough
from support.recipe import ATTENTION_SHAPES, INTERPRETED, KERNEL_SHAPES, AttentionShape, attention_tensors
from torch import Tensor

from anyup.ops import linear, window_attention
from anyup.ops.window_attention import eager, reference
from anyup.window import RatioWindow, make_window


@pytest.fixture(params=["torch", "reference", pytest.param("triton", marks=INTERPRETED)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def shape_for(name: str, backend: str) -> AttentionShape:
    """A named shape, as a backend can take it in a reasonable time."""
    return (KERNEL_SHAPES if backend == "triton" else ATTENTION_SHAPES)[name]


SEMANTIC_SHAPES = ("several tiles", "odd", "cell", "no window", "keys finer than pixels")


@pytest.mark.parametrize("name", SEMANTIC_SHAPES)
def test_a_constant_value_comes_out_constant(name: str, backend: str) -> None:
    shape = shape_for(name, backend)
    tensors = attention_tensors(shape)
    tensors["value"] = torch.tensor([3.0, -7.0]).expand(shape.batch, *shape.grid, 2)
    out = window_attention(**tensors, window=shape.window, backend=backend)
    torch.testing.assert_close(out, torch.tensor([3.0, -7.0]).expand_as(out), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", SEMANTIC_SHAPES)
def test_weights_sum_to_one_and_none_is_negative(name: str, backend: str) -> None:
    shape = shape_for(name, backend)
    tensors = attention_tensors(shape)
    keys = shape.grid[0] * shape.grid[1]
    tensors["value"] = torch.eye(keys).view(1, *shape.grid, keys)
    weights = window_attention(**tensors, window=shape.window, backend=backend)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), rtol=2e-6, atol=0)
    seen = reference.window_mask(shape.window, shape.output, shape.grid).view(weights.shape)
    assert torch.equal(weights > 0, seen)


@pytest.mark.parametrize("name", SEMANTIC_SHAPES)
def test_permuted_channels_permute_the_output(name: str, backend: str) -> None:
    shape = shape_for(name, backend)._replace(channels=9)
    tensors = attention_tensors(shape)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    out = window_attention(**tensors, window=shape.window, backend=backend)
    tensors["value"] = tensors["value"][..., order]
    permuted = window_attention(**tensors, window=shape.window, backend=backend)
    torch.testing.assert_close(permuted, out[..., order], rtol=1e-6, atol=1e-6)


def test_a_constant_added_to_one_head_s_logits_changes_nothing(backend: str) -> None:
    shape = shape_for("odd", backend)
    tensors = attention_tensors(shape)
    # The last channel: 1 in the keys, the constant in the queries of one head.
    tensors["key"][..., -1] = 1
    tensors["query"][..., -1] = 0
    plain, shifted = tensors["query"], tensors["query"].clone()
    shifted[..., 0, -1] = 6.0
    key, value = tensors["key"], tensors["value"]
    a, b = (window_attention(q, key, value, window=shape.window, backend=backend) for q in (plain, shifted))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def outsiders(shape: AttentionShape, key: tuple[int, int]) -> Tensor:
    """The pixels (H, W) whose window does not hold a key."""
    position = key[0] * shape.grid[1] + key[1]
    return ~reference.window_mask(shape.window, shape.output, shape.grid)[:, position].view(shape.output)


@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell", "keys finer than pixels", "tiny ratio"])
def test_a_key_outside_the_window_changes_nothing(name: str, backend: str) -> None:
    shape = shape_for(name, backend)
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend=backend)
    rows, columns = shape.grid
    corner, middle = (0, 0), (rows // 2, columns // 2)
    for bad, key in ((math.inf, corner), (1e30, middle), (3e38, (rows - 1, 0)), (math.nan, corner), (math.nan, middle)):
        outside = outsiders(shape, key)
        changed = tensors["key"].clone()
        changed[0, key[0], key[1]] = bad
        out = window_attention(tensors["query"], changed, tensors["value"], window=shape.window, backend=backend)
        torch.testing.assert_close(out[0][outside], expected[0][outside], rtol=1e-6, atol=1e-6)
        assert not math.isnan(bad) or out[0][~outside].isnan().all()


@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell"])
def test_a_finite_value_outside_the_window_changes_nothing(name: str, backend: str) -> None:
    shape = shape_for(name, backend)
    tensors = attention_tensors(shape)
    expected = window_attention(**tensors, window=shape.window, backend=backend)
    tensors["value"][0, 0, 0] = 1e30
    outside = outsiders(shape, (0, 0))
    out = window_attention(**tensors, window=shape.window, backend=backend)
    torch.testing.assert_close(out[0][outside], expected[0][outside], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell"])
def test_a_nan_in_a_value_stays_in_the_tiles_that_hold_it(name: str) -> None:
    shape = ATTENTION_SHAPES[name]
    tensors = attention_tensors(shape)
    tensors["value"][0, 0, 0] = math.nan
    out = window_attention(**tensors, window=shape.window, backend="torch")
    assert out[0][~outsiders(shape, (0, 0))].isnan().all()
    touched = torch.zeros(shape.output, dtype=torch.bool)
    for batch in eager._batches(shape.window, tensors["query"], tensors["key"][0].transpose(0, 1), shape.channels):
        for first, first_key in zip(batch.columns.starts, batch.columns.key_starts, strict=True):
            if first_key == 0 and batch.rows.key_starts[0] == 0:
                row = batch.rows.starts[0]
                touched[row : row + batch.rows.length, first : first + batch.columns.length] = True
    assert not touched.all()
    assert not out[0][~touched].isnan().any()


def test_heads_are_averaged_after_their_softmax(backend: str) -> None:
    shape = shape_for("odd", backend)
    tensors = attention_tensors(shape)
    mask = reference.window_mask(shape.window, shape.output, shape.grid)
    query, key, value = (t.flatten(1, 2)[0].double() for t in tensors.values())
    logits = torch.einsum("qad,kad->aqk", query, key) * shape.head_dim**-0.5
    logits = logits.masked_fill(~mask, -math.inf)
    out = window_attention(**tensors, window=shape.window, backend=backend).flatten(1, 2)[0].double()
    right = logits.softmax(dim=-1).mean(dim=0) @ value
    assert (out - right).abs().max() < 1e-5
    for wrong in (logits.mean(dim=0).softmax(dim=-1), logits[0].softmax(dim=-1), logits.softmax(-1).sum(0)):
        with pytest.raises(AssertionError):
            assert_close_enough((wrong @ value).float(), right.float(), right)


def test_scale_defaults_to_the_root_of_the_head_width(backend: str) -> None:
    shape = shape_for("odd", backend)
    tensors = attention_tensors(shape)
    run = {"window": RatioWindow(0.1), "backend": backend}
    out = window_attention(**tensors, **run)
    assert torch.equal(out, window_attention(**tensors, **run, scale=shape.head_dim**-0.5))
    assert not torch.allclose(out, window_attention(**tensors, **run, scale=0.4))


def test_each_image_of_a_batch_is_on_its_own(backend: str) -> None:
    shape = shape_for("batch 2", backend)
    tensors = attention_tensors(shape)
    both = window_attention(**tensors, window=shape.window, backend=backend)
    for n in range(2):
        alone = {name: t[n : n + 1] for name, t in tensors.items()}
        out = window_attention(**alone, window=shape.window, backend=backend)
        torch.testing.assert_close(out[0], both[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("through_convolution", [True, False])
@pytest.mark.parametrize("name", ["several tiles", "odd scale", "cell"])
def test_products_by_either_library_give_the_same(
    name: str, through_convolution: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_convolution_is_faster", lambda: through_convolution)
    shape = ATTENTION_SHAPES[name]
    tensors = attention_tensors(shape)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    run = partial(window_attention, window=shape.window)
    expected = run(**tensors, backend="reference")
    assert_close_enough(run(**tensors, backend="torch"), expected, run(**wide, backend="reference"))


def test_rectangles_of_large_windows_are_flat() -> None:
    window = make_window("ratio", 0.1)
    sides = partial(eager._longest_sides, window, heads=4, longest=32)
    assert sides((448, 448), (32, 32), device_type="cpu") == (32, 16)
    rows, _ = sides((3072, 3072), (192, 192), device_type="cpu")
    assert 8 < rows < 32
    assert sides((6144, 6144), (384, 384), device_type="cpu") == (8, 16)
    assert sides((6144, 6144), (384, 384), device_type="cuda") == (32, 32)
