"""Frame after frame: what calls return, with memory and graphs that are kept from one to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.captured import Graph
from support.recipe import fill, wave
from torch import Tensor

from anyup import AnyUp, capture, frames, repetition
from anyup.ops import memory


@pytest.fixture
def model() -> AnyUp:
    return fill(AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3), 0).eval().requires_grad_(False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are captured, which are made up: a replay makes the call again, into the same tensor."""
    made: list[Graph] = []

    def graph_of(*arguments: Any) -> Graph:
        made.append(Graph(*arguments))
        return made[-1]

    def seen_before(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repetition, "DEVICES", ("cpu",))
            return repetition.seen_before(*arguments)

    monkeypatch.setattr(frames, "seen_before", seen_before)
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "graph_of", graph_of)
    return made


def frame(phase: int, width: int = 5, channels: int = 4) -> tuple[Tensor, Tensor]:
    return wave((1, 3, 6, width), phase, 0.8), wave((1, channels, 3, 2), phase + 4)


def test_frames_are_what_calls_return_and_stay(model: AnyUp) -> None:
    given: list[Any] = [*map(frame, range(4)), frame(4, width=7), list(frame(5)), (*frame(6), wave((1, 2, 3, 2), 7))]
    given.append((model.encode_image(given[0][0]), given[1][1]))
    expected = [model(*each[:2], values=each[2] if len(each) > 2 else None) for each in given]
    assert all(map(torch.equal, list(model.frames(given)), expected))
    (one,) = model.frames(given[:1], (4, 7), max_memory="1GB")
    torch.testing.assert_close(one, model(*given[0], (4, 7)))


def test_the_next_frame_is_asked_for_when_its_result_is(model: AnyUp) -> None:
    asked: list[int] = []

    def camera() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(9):
            asked.append(number)
            yield frame(number)

    for number, _ in zip(range(3), model.frames(camera()), strict=False):
        assert asked == [*range(number + 1)]


@pytest.mark.parametrize("large", [1, 10**9])
def test_memory_is_taken_for_the_first_frames_of_a_size_alone(
    model: AnyUp, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, real = [], memory.mmap.mmap

    def take(*arguments: Any, **named: Any) -> Any:
        taken.append(arguments[1])
        return real(*arguments, **named)

    monkeypatch.setattr(memory, "_LARGE", large)
    monkeypatch.setattr(memory.mmap, "mmap", take)
    counts = []
    for _ in model.frames(frame(number, width=5 if number < 5 else 7) for number in range(10)):
        counts.append(len(taken))
    # The loop holds a result while the next one is computed.
    assert counts[1] == counts[4] and counts[6] == counts[9]
    assert (counts[0] > 0) == (counts[5] > counts[4]) == (large == 1 and hasattr(memory.mmap, "MADV_HUGEPAGE"))


def test_frames_that_are_alike_are_made_by_one_graph(model: AnyUp, graphs: list[Graph]) -> None:
    given = [*map(frame, range(4)), *(frame(number, width=7) for number in range(3)), frame(7)]
    counts, results = [], []
    for result in model.frames(given):
        counts.append(len(graphs))
        results.append(result)
    assert counts == [0, 1, 1, 1, 1, 2, 2, 2]
    assert all(map(torch.equal, results, [model(*each) for each in given]))


def test_other_weights_and_windows_are_captured_again(model: AnyUp, graphs: list[Graph]) -> None:
    results = model.frames([frame(1)] * 6)
    for number in range(6):
        if number == 2:
            model.rope.freqs = torch.nn.Parameter(model.rope.freqs * 1.5, requires_grad=False)
        if number == 4:
            model.cross_decode.window_ratio = 0.5
        assert torch.equal(next(results), model(*frame(1)))
    assert len(graphs) == 3


def test_what_cannot_be_captured_is_called(model: AnyUp, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    list(model.frames([frame(1)] * 3, max_memory="1GB"))
    trained = model.requires_grad_()
    assert all(result.requires_grad for result in trained.frames([frame(1)] * 3))
    model.requires_grad_(False)
    assert graphs == []

    def refuse(*_: Any) -> None:
        raise NotImplementedError("the call cannot be captured")

    monkeypatch.setattr(capture, "graph_of", refuse)
    assert all(torch.equal(result, model(*frame(1))) for result in model.frames([frame(1)] * 3))


def test_a_graph_that_leaves_no_room_for_results_goes(
    model: AnyUp, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(_: Graph) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Graph, "__call__", replay)
    assert all(torch.equal(result, model(*frame(1))) for result in model.frames([frame(1)] * 4))
    assert len(graphs) == 1


def test_a_mistake_is_named(model: AnyUp) -> None:
    image, features = frame(1)
    for given, error, message in (
        (image, TypeError, r"frames: expected an iterable of \(image, features\), got Tensor"),
        (5, TypeError, "frames: expected an iterable"),
    ):
        with pytest.raises(error, match=message):
            model.frames(given)  # type: ignore[arg-type]
    for each, error, message in (
        (torch.cat([image, image]), TypeError, "of each, got Tensor"),
        ((image,), ValueError, "of each, got a tuple of 1"),
        ((image, features[0]), ValueError, r"features: expected \(B, C, height, width\)"),
    ):
        with pytest.raises(error, match=message):
            next(model.frames([each]))
