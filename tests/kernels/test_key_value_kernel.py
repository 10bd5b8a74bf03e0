"""The kernel of the gradients of keys and values at once, in Triton's interpreter, against float64.

The rule takes it for half precision and few heads; here it is made to run for every shape. See also `device/`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.accuracy import assert_backend_accurate, assert_backend_accurate_over_draws, output_and_gradients
from support.mutations import mutate
from support.recipe import INTERPRETED, KERNEL_SHAPES, AttentionShape, attention_tensors
from torch import Tensor

from anyup.kernels import launch, window_attention_config
from anyup.ops import configs, window_attention
from anyup.window import RatioWindow

pytestmark = [INTERPRETED, pytest.mark.slow]

CUT = window_attention_config.BackwardGridConfig(4, 8, 128, 32, 1, 1, num_warps=4, num_stages=1)
CONFIGS = {
    "whole": CUT,
    "in parts": replace(CUT, partials=3, tall=True, refetch=True),
    "keys in pieces": replace(CUT, load_once=False, piece=16),
}


def attention(shape: AttentionShape) -> Any:
    """The operator for a shape's window, as the error rule calls it."""

    def run(query: Tensor, key: Tensor, value: Tensor, *, backend: str) -> Tensor:
        return window_attention(query, key, value, window=shape.window, backend=backend)

    return run


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that run."""
    from anyup.kernels.launch import Launch

    names: list[str] = []
    launch = Launch.__call__

    def noted(self: Launch) -> None:
        names.append(self.kernel.__name__.strip("_"))
        launch(self)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


@pytest.fixture(params=CONFIGS)
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config for every problem."""
    monkeypatch.setattr(
        window_attention_config, "backward_key_value_configs", lambda *_, **__: [CONFIGS[request.param]]
    )
    return request.param


# Of the window's forms few: which keys a pixel sees is code of the two kernels too, and tested with these.
SHAPES = (
    *("odd", "one key", "one row of keys", "one pixel", "batch 2", "empty batch", "many channels", "no window", "cell"),
    *("keys finer than pixels", "ratio below 0", "one head", "eight heads", "wide heads", "heads of the model"),
)


@pytest.mark.parametrize("together", ["whole"], indirect=True)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_obey_the_error_rule(name: str, together: str, launched: list[str]) -> None:
    shape = KERNEL_SHAPES[name]
    assert_backend_accurate_over_draws(attention(shape), lambda seed: attention_tensors(shape, seed), backend="triton")
    assert "window_attention_backward_key_value_kernel" in launched
    assert not {"window_attention_backward_key_kernel", "window_attention_backward_value_kernel"} & set(launched)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("odd", torch.float16),
        ("cell", torch.float16),
        ("several tiles", torch.float32),
        ("heads of the model", torch.float32),
    ],
)
def test_every_config_obeys_it_in_both_dtypes(name: str, dtype: torch.dtype, together: str) -> None:
    shape = KERNEL_SHAPES[name]
    assert_backend_accurate_over_draws(
        attention(shape), lambda seed: attention_tensors(shape, seed, dtype), backend="triton"
    )


def test_strides_change_nothing_and_no_run_differs(together: str) -> None:
    shape = KERNEL_SHAPES["batch 2"]._replace(output=(9, 11))
    tensors = attention_tensors(shape)
    expected = output_and_gradients(attention(shape), tensors, "triton")
    moved = {name: t.movedim(-1, 1).contiguous().movedim(1, -1) for name, t in tensors.items()}
    assert not any(t.is_contiguous() for t in moved.values())
    for given in (tensors, moved):
        actual = output_and_gradients(attention(shape), given, "triton")
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


def test_it_reads_no_uninitialised_memory(poisoned_memory: None, together: str) -> None:
    shape = KERNEL_SHAPES["odd"]
    assert_backend_accurate(attention(shape), attention_tensors(shape), backend="triton")


# What the error rule must notice: changes of the kernel's source, and whose gradient they spoil.

MUTATIONS = {
    "a head too many in the mean": ("total / HEADS", "total / (HEADS + 1)", "value"),
    "one head's weights for the mean": ("total += weights[head]", "total += weights[0]", "value"),
    "one slice of the gradient for all": ("grad_offset, piece * SLICE,", "grad_offset, 0,", "key"),
    "one slice of the values for all": ("first = piece * SLICE +", "first =", "key"),
    "a product of the last slice alone": ("tl.trans(carried), product,", "tl.trans(carried), None,", "key"),
    "one head's delta for all": ("delta + entry + head", "delta + entry", "key"),
    "one head's queries for all": (
        "place = query_place + tl.full((), head, tl.int64) * query_head_stride\n            mean",
        "place = query_place\n            mean",
        "key",
    ),
    "keys by the values' scale": ("* PIECES + piece] * scale", "* PIECES + piece]", "key"),
}


@pytest.mark.parametrize("together", ["whole"], indirect=True)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_kernel_fails_the_error_rule(mutation: str, monkeypatch: pytest.MonkeyPatch, together: str) -> None:
    old, new, whose = MUTATIONS[mutation]
    shape = KERNEL_SHAPES["heads of the model"]
    name = "_window_attention_backward_key_value_kernel"
    mutate(monkeypatch, "window_attention_backward_key_value", name, old, new)
    with pytest.raises(AssertionError, match=f"{whose}: error"):
        assert_backend_accurate(attention(shape), attention_tensors(shape), backend="triton")


# Who gets it.


def rule(**changed: Any) -> list[window_attention_config.BackwardGridConfig]:
    """The rule's configs at 448 from 32, for other than the model's arguments where they are given."""
    usual = {"target": launch.Target("cuda", 80), "half": True, "heads": 4, "head_dim": 32}
    channels = changed.pop("channels", 384)
    return window_attention_config.backward_key_value_configs(448**2, 32**2, channels, **{**usual, **changed})


def test_it_is_for_half_precision_and_sums_that_stay_in_registers() -> None:
    assert rule() and rule(target=launch.Target("hip", "gfx942")) and rule(channels=21)
    for other in ({"half": False}, {"heads": 8}, {"head_dim": 64}, {"channels": 385}, {"channels": 100}):
        assert not rule(**other), other
    assert rule(target=launch.Target("cuda", 89), channels=192) and not rule(target=launch.Target("cuda", 89))
    assert rule(target=launch.Target("cuda", 90), channels=768)
    assert not rule(channels=0)


@pytest.mark.parametrize("channels", [16, 384])
def test_both_partial_sums_are_no_larger_than_the_gradient_of_the_queries(channels: int) -> None:
    split = 0
    for side, grid in ((96, 7), (224, 8), (224, 16), (448, 14), (448, 32), (1024, 64), (2048, 128)):
        known: dict[str, Any] = {
            "target": launch.Target("cuda", 80),
            "half": True,
            "heads": 4,
            "head_dim": 32,
        }
        for config in window_attention_config.backward_key_value_configs(side**2, grid**2, channels, **known):
            split += config.partials > 1
            assert config.partials == 1 or 4 * config.partials * grid**2 * (channels + 128) <= 2 * side**2 * 128
    assert split > 3


def test_a_device_that_refuses_it_runs_the_two_kernels(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    from anyup.kernels.launch import Launch

    launch, tried = Launch.__call__, []

    def refusing(self: Launch) -> None:
        if "key_value" in self.kernel.__name__:
            tried.append(self)
            raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch")
        launch(self)

    monkeypatch.setattr(Launch, "__call__", refusing)
    monkeypatch.setattr(configs, "_refused", {})
    shape = KERNEL_SHAPES["odd"]
    for _ in range(2):
        assert_backend_accurate(attention(shape), attention_tensors(shape, dtype=torch.float16), backend="triton")
    assert len(tried) == 1, "a config that was refused was tried again"
    kernels = [name for name in launched if "_key_" in name or "_value_" in name]
    assert kernels == ["window_attention_backward_key_kernel", "window_attention_backward_value_kernel"] * 2


def test_the_rule_s_config_is_launched_in_half_precision(launched: list[str]) -> None:
    tensors = attention_tensors(AttentionShape((18, 20), (6, 5), channels=48, heads=4, head_dim=32))
    for dtype, expected in ((torch.float16, True), (torch.float32, False)):
        launched.clear()
        narrow = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        window_attention(**narrow, window=RatioWindow(0.1), backend="triton").sum().backward()
        assert ("window_attention_backward_key_value_kernel" in launched) is expected
