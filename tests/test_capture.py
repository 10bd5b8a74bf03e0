"""Captured calls, with a graph that is made up: a replay makes the call again, into the same tensor."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support.captured import Graph
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp, capture

GRID = (3, 2)
graph_of = capture.graph_of


@pytest.fixture(autouse=True)
def _graphs_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "graph_of", Graph)


@pytest.fixture
def model() -> AnyUp:
    return fill(AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3), 0).eval().requires_grad_(False)


def inputs(phase: int = 0) -> tuple[Tensor, Tensor]:
    return wave((1, 3, 6, 5), phase, 0.8), wave((1, 4, *GRID), phase + 4)


@pytest.mark.parametrize("grids", [None, [], [GRID]])
@pytest.mark.parametrize("with_values", [False, True])
def test_a_captured_call_returns_what_the_call_returns(model: AnyUp, grids: Any, with_values: bool) -> None:
    def given(phase: int) -> list[Any]:
        image, features = inputs(phase)
        context = image if grids is None else model.encode_image(image, grids=grids)
        return [context, features, *([wave((1, 2, *GRID), phase)] if with_values else [])]

    first, second = given(1), given(2)
    call = model.capture(*first[:2], values=first[2] if with_values else None)
    for arguments in (first, second):
        expected = model(*arguments[:2], values=arguments[2] if with_values else None)
        assert torch.equal(call(*arguments), expected)


def test_the_result_is_the_graph_s_and_the_inputs_are_the_caller_s(model: AnyUp) -> None:
    image, features = inputs()
    call = model.capture(image, features, (4, 7))
    first = call(image, features)
    assert call(*inputs(1)) is first and first.shape == (1, 4, 4, 7)
    before = call(image, features).clone()
    image.zero_()  # the caller's own
    assert torch.equal(call(inputs()[0], features), before)
    assert call.nbytes == 1000 + 4 * (image.numel() + features.numel())
    assert "(1, 3, 6, 5)" in repr(call) and "(4, 7)" in repr(call)


def test_what_is_written_into_the_weights_is_followed_and_other_weights_are_refused(model: AnyUp) -> None:
    call = model.capture(*inputs())
    model.rope.freqs.data.mul_(1.5)
    assert torch.equal(call(*inputs()), model(*inputs()))
    model.rope.freqs = torch.nn.Parameter(model.rope.freqs.clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match="weights have been replaced"):
        call(*inputs())


def test_a_call_captured_in_inference_mode_is_made_outside_of_it(model: AnyUp) -> None:
    with torch.inference_mode():
        call = model.capture(*inputs())
    assert torch.equal(call(*inputs(1)), model(*inputs(1)))


def test_another_window_is_refused(model: AnyUp) -> None:
    call = model.capture(*inputs())
    model.cross_decode.window_ratio = 0.4
    with pytest.raises(RuntimeError, match=r"window was RatioWindow\(ratio=0.1\) at the capture"):
        call(*inputs())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda image, features: (image[..., 1:], features), ValueError, r"image: .*\(1, 3, 6, 5\).*\(1, 3, 6, 4\)"),
        (lambda image, features: (image, features.double()), TypeError, "features: .*float32.*float64"),
        (lambda image, features: (image, features.tolist()), TypeError, "features: expected a tensor, got list"),
        (lambda image, features: (image, features, features), ValueError, "captured with image, features, got image,"),
        (lambda image, features: (None, features), TypeError, "image: "),
    ],
)
def test_what_is_not_like_the_capture_is_refused(
    model: AnyUp, change: Any, error: type[Exception], message: str
) -> None:
    call = model.capture(*inputs())
    with pytest.raises(error, match=message):
        call(*change(*inputs()))


def test_a_context_of_other_weights_or_in_an_image_s_place_is_refused(model: AnyUp) -> None:
    image, features = inputs()
    context = model.encode_image(image, grids=[GRID])
    with pytest.raises(TypeError, match="captured with an image, got ImageContext"):
        model.capture(image, features)(context, features)
    call = model.capture(context, features)
    with pytest.raises(TypeError, match="captured with a context of encode_image, got Tensor"):
        call(image, features)
    model.rope.freqs.mul_(1.5)
    with pytest.raises(ValueError, match="before its weights changed"):
        call(context, features)


def test_there_is_no_capture_on_a_cpu_nor_of_gradients_nor_in_too_little_memory(
    model: AnyUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, features = inputs()
    with pytest.raises(RuntimeError, match="does not differentiate"):
        model.capture(image, features.clone().requires_grad_())
    with pytest.raises(ValueError, match="features: expected"):
        model.capture(image, features[0])
    monkeypatch.setattr(capture, "limit_on", lambda device, max_memory: 300 * 10**6)
    large = torch.zeros(1, 3, 1500, 1500)
    with pytest.raises(ValueError, match="whole maps, which do not fit"):
        model.capture(large, features)
    monkeypatch.setattr(capture, "DEVICES", ("cuda",))
    with pytest.raises(RuntimeError, match="a CUDA graph needs a GPU, and the upsampler is on cpu"):
        model.capture(image, features)


def test_a_graph_is_captured_on_a_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own stream for captures lies on the device of its first capture, and another's launches are not there."""
    cuda, streams = MagicMock(), list[MagicMock]()
    cuda.memory_reserved.return_value, cuda.OutOfMemoryError = 0, torch.OutOfMemoryError
    cuda.Stream.side_effect = lambda: streams.append(MagicMock()) or streams[-1]
    monkeypatch.setattr(torch, "cuda", cuda)
    graph_of(lambda: torch.ones(1), torch.device("cuda", 1))
    assert cuda.device.call_args.args == (torch.device("cuda", 1),)
    assert cuda.graph.call_args.kwargs["stream"] is streams[0]
