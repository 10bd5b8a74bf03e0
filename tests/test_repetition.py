"""Calls that are repeated as a recorded line, on the CPU: kernels run in Triton's interpreter, or are not launched."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.interpreter import not_interpreted
from support.processes import in_a_process
from support.recipe import fill, wave
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyup import AnyUp, repetition
from benchmarks.host import decided_as_on_a_card

interpreted = pytest.mark.skipif(not_interpreted() is not None, reason=str(not_interpreted()))
SMALL: dict[str, Any] = {"qk_dim": 16, "num_heads": 1, "lfu_dim": 16, "kernel_size_lfu": 3}


@pytest.fixture(autouse=True)
def _as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(repetition, "DEVICES", ("cpu",))
    with decided_as_on_a_card():
        yield


REFERENCES = ("pixel_encoder", "feature_unification", "query_projection")


def small(*kernels: str) -> AnyUp:
    """With the attention's kernel, which the interpreter runs in no time, and some operations' more."""
    backends = {name: "triton" if name in kernels else "reference" for name in REFERENCES}
    return fill(AnyUp(**SMALL, backend={**backends, "window_attention": "triton"}), 0).eval()


def inputs(phase: int = 0, batch: int = 1) -> tuple[Tensor, Tensor]:
    return wave((batch, 3, 6, 5), phase, 0.8), wave((batch, 4, 3, 2), phase + 4)


def in_full(call: Callable[[], Tensor]) -> Tensor:
    """The call without what it would repeat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repetition, "DEVICES", ())
        return call()


def known(model: AnyUp) -> list[bool]:
    """Of the signatures that a model was called with, whether they are repeated."""
    return [each.is_known for each in repetition._calls[model]._known.values()]


def repeated(model: AnyUp, call: Callable[[], Tensor]) -> Tensor:
    """The call once it is repeated."""
    for _ in range(3):
        call()
    assert any(known(model)), "the call is not repeated"
    return repeated_once(call)


def repeated_once(call: Callable[[], Tensor]) -> Tensor:
    """The call; one that is made in full fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnyUp, "upsample_whole", None)
        return call()


@pytest.mark.slow
@interpreted
def test_launches_of_a_repeated_call_compute_what_those_in_full_compute() -> None:
    model, now = small(*REFERENCES), inputs()
    with torch.inference_mode():
        repeated(model, lambda: model(*now))
        for tensor in now:
            tensor.mul_(-0.5)
        assert torch.equal(repeated_once(lambda: model(*now)), in_full(lambda: model(*now)))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("what", ["image", "values", "batch", "output_size", "views"])
def test_a_repeated_call_returns_what_the_call_in_full_returns(what: str) -> None:
    model, arguments = small(), {}
    now = list(inputs(batch=2 if what == "batch" else 1))
    if what == "values":
        arguments["values"] = wave((1, 2, 3, 2), 9)
    elif what == "output_size":
        arguments["output_size"] = (4, 7)
    elif what == "views":
        now = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in now]

    def call() -> Tensor:
        return model(*now, **arguments)

    with torch.inference_mode():
        first = repeated(model, call)
        assert torch.equal(first, in_full(call))
        for tensor in now:
            tensor.mul_(-0.5)
        second = repeated(model, call)
        assert torch.equal(second, in_full(call)) and not torch.equal(first, second)
        assert second.stride() == in_full(call).stride()


@interpreted
def test_one_tensor_in_two_places_is_not_taken_for_two() -> None:
    model, (image, features) = small(), inputs()
    with torch.no_grad():
        for _ in range(4):
            model(image, features, values=features)
        other = features * 2
        assert torch.equal(model(image, features, values=other), in_full(lambda: model(image, features, values=other)))


@interpreted
def test_a_call_under_autocast_is_another_one() -> None:
    model, now = small(), inputs()
    with torch.no_grad():
        plain = repeated(model, lambda: model(*now))
        with torch.autocast("cpu", dtype=torch.float16):
            half = repeated(model, lambda: model(*now))
            assert torch.equal(half, in_full(lambda: model(*now))) and not torch.equal(half, plain)
        assert torch.equal(repeated_once(lambda: model(*now)), plain) and known(model) == [True, True]


@interpreted
@pytest.mark.parametrize("grids", [[], [(3, 2)]])
def test_calls_with_a_context_are_repeated_with_the_next_one(grids: list[tuple[int, int]]) -> None:
    model, (_, features) = small(), inputs()
    with torch.no_grad():
        contexts = [model.encode_image(inputs(phase)[0], grids=grids) for phase in range(5)]
        assert known(model) == [True]  # encode_image is repeated
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AnyUp, "queries_and_image_keys", None)
            again = model.encode_image(inputs(0)[0], grids=grids)
        for one, other in zip((contexts[0].queries, *contexts[0].image_keys.values()),
                              (again.queries, *again.image_keys.values()), strict=True):  # fmt: skip
            assert torch.equal(one, other)
        for context in contexts[:4]:
            out = model(context, features)
        assert known(model) == [True, True]
        assert torch.equal(out, in_full(lambda: model(contexts[3], features)))
        model.rope.freqs.mul_(2)
        with pytest.raises(ValueError, match="weights have changed"):
            model(contexts[4], features)


@interpreted
def test_weights_are_read_where_they_are_whoever_writes_to_them() -> None:
    model, now = small(), inputs()
    weight = model.image_encoder[0].weight

    def call() -> Tensor:
        return model(*now)

    with torch.no_grad():
        before = repeated(model, call)
        weight.data.mul_(2)  # of which torch's count of versions knows nothing
        after = repeated(model, call)
        assert torch.equal(after, in_full(call)) and not torch.equal(before, after)
        weight.data = weight.data * 2
        replaced = call()
        assert known(model) == [False] and torch.equal(replaced, in_full(call)) and not torch.equal(after, replaced)
        model.image_encoder[0].weight = torch.nn.Parameter(weight * 2)
        assert torch.equal(repeated(model, call), in_full(call))


@interpreted
def test_who_watches_or_differentiates_gets_the_call_in_full() -> None:
    class Mode(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    model, now = small(), inputs()
    with torch.no_grad():
        repeated(model, lambda: model(*now))
        with Mode() as mode:
            model(*now)
        assert mode.seen
        told: list[Any] = []
        hook = model.query_encoder.register_forward_hook(lambda *_: told.append(None))
        model(*now)
        assert told
        hook.remove()
        before = repeated(model, lambda: model(*now))
        model.cross_decode.window_ratio = 1.0
        after = repeated(model, lambda: model(*now))
        assert torch.equal(after, in_full(lambda: model(*now))) and not torch.equal(before, after)
        forward = model.query_encoder.forward
        model.query_encoder.forward = lambda *given, **named: told.clear() or forward(*given, **named)
        model(*now)
        assert not told
    for _ in range(4):
        assert fill(AnyUp(**SMALL), 0)(*now).requires_grad


@interpreted
def test_who_profiles_launches_or_lacks_memory_gets_the_call_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    model, now = small(), inputs()

    def is_made_in_full() -> bool:
        with pytest.raises(TypeError):  # nothing to call
            repeated_once(lambda: model(*now))
        return True

    with torch.no_grad():
        expected = repeated(model, lambda: model(*now))
        hook = lambda *_: None  # noqa: E731
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            assert is_made_in_full()
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert torch.equal(repeated_once(lambda: model(*now)), expected)
        with monkeypatch.context() as patch:
            patch.setattr(repetition, "has_room", lambda needed, device: False)
            assert is_made_in_full()

        def fails(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("made up")

        for each in repetition._calls[model]._known.values():
            monkeypatch.setattr(each, "_repeat", fails)
        assert is_made_in_full() and torch.equal(model(*now), expected)


@interpreted
def test_what_is_kept_goes_with_the_upsampler() -> None:
    def repeats() -> weakref.ref[AnyUp]:
        model, now = small(), inputs()
        with torch.no_grad():
            repeated(model, lambda: model(*now))
        return weakref.ref(model)

    gone = repeats()
    gc.collect()
    assert gone() is None


@interpreted
def test_a_caller_s_mistake_is_met_after_any_number_of_calls() -> None:
    model, (image, features) = small(), inputs()
    with torch.no_grad():
        repeated(model, lambda: model(image, features, (6, 5)))
        for size in ((6.0, 5), (6,), (6, 5, 4)):
            with pytest.raises((TypeError, ValueError), match="output_size"):
                model(image, features, size)
        with pytest.raises(ValueError, match="features: expected"):
            model(image, features[0])
        with pytest.raises(TypeError, match="q_chunk_size"):
            model(image, features, (6, 5), q_chunk_size=True)
        for wrong in ({"image": None}, {"values": [1]}, {"features": None}):
            with pytest.raises(TypeError, match=next(iter(wrong))):
                model(**{"image": image, "features": features, **wrong})


def test_threads_repeat_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def light(
        self: AnyUp, image: Tensor, features: Tensor, *_: Any, **__: Any
    ) -> Tensor:  # the interpreter is for one thread
        return F.interpolate(features, image.shape[2:]) * image.mean() * self.image_encoder[0].weight.sum()

    monkeypatch.setattr(AnyUp, "upsample_whole", light)
    model = small()
    with torch.no_grad():
        expected = [in_full(lambda phase=phase: model(*inputs(phase))) for phase in range(3)]
    found: dict[int, list[Tensor]] = {}

    def work(phase: int) -> None:
        with torch.no_grad():
            found[phase] = [model(*inputs(phase)) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(phase,)) for phase in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known(model) == [True]
    assert all(torch.equal(out, expected[phase]) for phase in range(3) for out in found[phase])


def test_a_call_that_reads_a_number_or_writes_to_an_input_is_no_line() -> None:
    tensor = torch.ones(3)
    with repetition.Recorder([tensor]), torch.no_grad():
        with pytest.raises(repetition.Unrecordable, match="numbers"):
            (tensor + 1).sum().item()
        with pytest.raises(repetition.Unrecordable, match="writes"):
            tensor.add_(1)


def test_what_is_made_where_no_one_sees_it_is_no_line() -> None:
    """A tensor that the call has found must be the same one the next time."""

    def line() -> repetition.Line:
        tensor = torch.ones(3)
        unseen = torch.ones(3)
        with torch.no_grad(), repetition.Recorder([tensor]) as recorder:
            result = tensor + unseen
        return recorder.line((result,))

    weight, tensor = torch.ones(3, 3), torch.ones(3)

    def another() -> repetition.Line:
        with torch.no_grad(), repetition.Recorder([tensor]) as recorder:
            result = weight[1:2] * tensor + torch.zeros(1)
            unread = result * 2
            del unread
        return recorder.line((result,))

    def of_copies() -> repetition.Line:
        below_autograd = torch._C._AutoDispatchBelowAutograd()  # as an operator's body runs
        with below_autograd, repetition.Recorder([tensor]) as recorder:
            result = weight.t().contiguous().to(torch.float64) * tensor
        return recorder.line((result,))

    copied = of_copies().function()
    (before,) = copied(0, tensor)
    weight.mul_(2)
    assert torch.equal(copied(0, tensor)[0], before * 2)  # what is made of a weight is made again
    weight.div_(2)
    assert not line().is_like(line())
    one, other = another(), another()
    assert one.is_like(other)
    assert torch.equal(one.function()(0, tensor * 3)[0], torch.full((1, 3), 3.0))
    # A view of a weight is there already, and what nobody reads is left out.
    assert one.source.count("= f") == 3, one.source


def test_what_is_read_at_the_same_time_lies_in_different_places() -> None:
    def step(made: str, *read: str, launch: str = "direct", fresh: int = 0) -> repetition.Step:
        return repetition.Step([made] if made else [], list(read), "f", [], "" if made else launch, fresh)

    large = repetition._LARGE
    sizes = {"t1": 1000, "t2": 500, "t3": 1000, "t4": large, "t5": 8, "t6": 8, "t7": 8}
    steps = [
        *(step(name, fresh=size) for name, size in sizes.items()),
        step("", "t1", "t2", "t5"),
        step("", "t2", "t3"),
        step("", "t3", "t4", "t6"),
        step("t8", "t6"),  # torch wants a tensor
        step("", "t7"),
    ]
    places, size = repetition._scratch(steps, ["t7"])
    assert places.keys() == {"t1", "t2", "t3", "t5"} and size == 2048, places
    assert places["t1"] == places["t3"] and len({places[name] for name in ("t1", "t2", "t5")}) == 3
    ends = {name: places[name] + (1024 if name in ("t1", "t3") else 512) for name in places}
    for one, other in (("t1", "t2"), ("t1", "t5"), ("t2", "t5"), ("t2", "t3")):
        assert ends[one] <= places[other] or ends[other] <= places[one], places


@interpreted
def test_an_upsampler_that_repeats_is_copied_and_so_many_signatures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repetition, "_MOST_SIGNATURES", 2)
    model, now = small(), inputs()
    with torch.no_grad():
        out = repeated(model, lambda: model(*now))
        other = copy.deepcopy(model)
        assert torch.equal(other(*now), out) and known(other) == [False]
        for columns in (3, 4, 5):
            model(now[0][..., :columns], now[1])
        assert len(known(model)) == 2


LAUNCHES = """
import json
import torch
from support import standin_driver
from anyup import repetition
from benchmarks import host, stand_in_card

standin_driver.stand_in()
stand_in_card.compile_nothing()
repetition.DEVICES = ("cpu",)
stream, seen = 0, []
standin_driver._StandIn.get_current_stream = lambda self, device: stream

def told(launcher, *given):
    seen.append((launcher, given[:5], given[9:]))

def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value

def same(full, repeated, known):
    # An argument: of a tensor that is there before the call its address, of the call's own one that is as aligned.
    if isinstance(full, torch.Tensor) and full.data_ptr() not in known:
        return address(repeated) not in known and address(repeated) % 16 == full.data_ptr() % 16 == 0
    return address(full) == address(repeated) and (isinstance(full, torch.Tensor) or type(full) is type(repeated))

standin_driver._NoLaunch.__call__ = told
model = host.AnyUp(qk_dim=16, num_heads=1, lfu_dim=16, kernel_size_lfu=3).bfloat16().eval()
alike = []
with torch.inference_mode(), host.decided_as_on_a_card():
    for offset in (0, 1):
        features = torch.zeros(1 + 4 * 4 * 4, dtype=torch.bfloat16)[offset:][: 4 * 4 * 4].view(1, 4, 4, 4)
        inputs = [torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16), features]
        for stream in (0, 7):
            repetition.DEVICES = ()
            model(*inputs)
            seen.clear()
            model(*inputs)
            full = list(seen)
            repetition.DEVICES = ("cpu",)
            for _ in range(3):
                model(*inputs)
            seen.clear()
            host.AnyUp.upsample_whole, upsample = None, host.AnyUp.upsample_whole
            model(*inputs)
            host.AnyUp.upsample_whole = upsample
            known = {tensor.data_ptr() for tensor in (*inputs, *model.parameters())}
            alike.append([
                len(full),
                len(seen) == len(full) and all(
                    one[:2] == other[:2] and len(one[2]) == len(other[2])
                    and all(same(*pair, known) for pair in zip(one[2], other[2]))
                    for one, other in zip(full, seen)
                ),
                {launch[1][3] for launch in seen} == {stream},
            ])
print(json.dumps({"alike": alike, "signatures": len(repetition._calls[model]._known)}))
"""


@pytest.mark.slow
@interpreted
def test_a_repeated_call_launches_the_same_kernels_with_the_same_arguments() -> None:
    """Misaligned features are another signature; a stream is none."""
    found = in_a_process(LAUNCHES)
    assert found["signatures"] == 2
    assert all(count > 20 and same and stream for count, same, stream in found["alike"]), found
