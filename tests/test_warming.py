"""Kernels that are compiled before they are needed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.processes import in_a_process
from support.recipe import fill

from anyup import AnyUp, warming

AHEAD = """
import json, threading, time
import torch
import triton.compiler
from support import standin_driver
from anyup.kernels.launch import compiled_ahead
from benchmarks import host, stand_in_card

standin_driver.stand_in()
stand_in_card.compile_nothing()
compile, lock, at_once, most, compiled, launched = triton.compiler.compile, threading.Lock(), 0, 0, [], 0

def compiles(src, **options):
    global at_once, most
    with lock:
        at_once += 1
        most = max(most, at_once)
        compiled.append(src.fn.__name__)
    time.sleep(0.05)
    try:
        return compile(src, **options)
    finally:
        with lock:
            at_once -= 1

def launches(launcher, *given):
    global launched
    launched += 1

triton.compiler.compile = compiles
standin_driver._NoLaunch.__call__ = launches
model, image, features = host.made(torch.bfloat16, 16, 4, 8)
with torch.inference_mode(), host.decided_as_on_a_card():
    with compiled_ahead():
        model(image, features)
    ahead = [len(compiled), launched, most]
    model(image, features)
print(json.dumps({"ahead": ahead, "after": [len(compiled), launched]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_side_by_side_and_a_call_compiles_none_of_them_again() -> None:
    found = in_a_process(AHEAD)
    compiled, launched, most = found["ahead"]
    assert compiled > 5 and launched == 0 and most > 1, found
    assert found["after"][0] == compiled and found["after"][1] > 20, found


def test_an_upsampler_warms_up_on_a_cpu_by_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3), 0).eval()
    seen: list[Any] = []
    forward = AnyUp.forward

    def told(self: AnyUp, image: torch.Tensor, features: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((tuple(image.shape), tuple(features.shape), args, kwargs["values"].shape[1], image.dtype))
        return forward(self, image, features, *args, **kwargs)

    monkeypatch.setattr(AnyUp, "forward", told)
    model.warm_up((6, 5), (3, 2), 4, output_size=(4, 7), values=2, batch=2, dtype=torch.float64)
    assert seen == [((2, 3, 6, 5), (2, 4, 3, 2), ((4, 7),), 2, torch.float64)] * 3
    for wrong in ({"channels": 0}, {"channels": 4, "batch": True}, {"channels": 4, "image_size": (6,)}):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            model.warm_up(**{"image_size": (6, 5), "feature_size": (3, 2), **wrong})


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_what_a_card_refuses_is_left_to_the_call_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.kernels import launch

    card, said = torch.device("cuda"), []
    monkeypatch.setattr(warming, "interprets", lambda: False)

    def refused() -> None:
        said.append("called")
        raise RuntimeError("PassManager::run failed")

    def lost() -> None:
        raise torch.OutOfMemoryError("made up")

    warming.compile_ahead(refused, card)
    assert said == ["called"] and not launch.compiles_ahead()
    with pytest.raises(torch.OutOfMemoryError):
        warming.compile_ahead(lost, card)
    assert not launch.compiles_ahead()
    warming.compile_ahead(lost, torch.device("cpu"))  # where nothing is compiled
