"""The operator on a card's path: the dispatcher chooses the kernels, launches them and hands back what they wrote."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from passes import channels_first
from support.accuracy import assert_backend_accurate
from support.card import in_dtypes
from support.recipe import AttentionShape, attention_tensors
from torch import Tensor

from anyup.ops import explain_backends, window_attention
from anyup.window import CellWindow, RatioWindow

pytestmark = pytest.mark.gpu

SHAPES = {
    "ratio window, batch 2": AttentionShape((9, 14), (4, 5), channels=21, batch=2, head_dim=16),
    "cell window, one channel": AttentionShape((11, 9), (5, 6), channels=1, window=CellWindow(0.2), head_dim=16),
    "no window": AttentionShape((7, 9), (3, 4), channels=33, window=None, heads=1, head_dim=32),
}


def attention(shape: AttentionShape, **settings: Any) -> Any:
    """The operator as the error rule calls it, its output in the layout that the model returns."""

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        out = window_attention(query, key, value, window=shape.window, backend=backend, **settings)
        return out.permute(0, 3, 1, 2)  # so that its gradient comes channels first

    return run


def on_device(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs as the model passes them: the values channels first."""
    tensors = {name: tensor.to("cuda") for name, tensor in attention_tensors(shape, dtype=dtype).items()}
    return {**tensors, "value": channels_first(tensors["value"])}


@pytest.mark.parametrize(("name", "dtype"), in_dtypes(SHAPES))
def test_operator_obeys_the_error_rule(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    shape = SHAPES[name]
    assert_backend_accurate(attention(shape), on_device(shape, dtype), backend="triton")
    together = any(name.startswith("backward_key_value") for name in launched)
    assert launched.total() == 4 - together and not (together and dtype == torch.float32)


def test_a_negative_scale_obeys_the_error_rule() -> None:
    shape = SHAPES["ratio window, batch 2"]._replace(batch=1)
    assert_backend_accurate(attention(shape, scale=-0.3), on_device(shape), backend="triton")


def test_without_gradients_no_statistics_are_stored(launched: Counter[str]) -> None:
    shape = SHAPES["ratio window, batch 2"]
    assert_backend_accurate(attention(shape), on_device(shape), backend="triton", gradients=False)
    assert launched.total() == 1


def test_the_kernels_are_chosen_where_nobody_asks_for_a_backend(launched: Counter[str]) -> None:
    shape = SHAPES["no window"]
    tensors = on_device(shape)
    assert explain_backends(**tensors, window=shape.window).chosen == "triton"
    chosen = window_attention(**tensors, window=shape.window)
    assert torch.equal(chosen, window_attention(**tensors, window=shape.window, backend="triton"))
    assert launched.total() == 2


def test_an_empty_batch_launches_nothing_and_has_gradients(launched: Counter[str]) -> None:
    shape = AttentionShape((9, 14), (4, 5), batch=0, head_dim=16)
    leaves = {name: tensor.requires_grad_() for name, tensor in on_device(shape).items()}
    out = window_attention(**leaves, window=RatioWindow(0.1))
    assert out.shape == (0, 9, 14, shape.channels)
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves.values()]
    assert launched.total() == 0
