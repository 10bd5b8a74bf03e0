"""What a call on a card asks of the host, counted without one; `pytest benchmarks -k host` times it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from support.processes import in_a_process

COUNTS = """
import json, sys
import torch
from anyup import repetition
from benchmarks import host, stand_in_card
from support.standin_driver import stand_in

stand_in()
stand_in_card.compile_nothing()
lines, function, devices, found = [], repetition.Line.function, repetition.DEVICES, {}
repetition.Line.function = lambda self: lines.append(self.source) or function(self)
for dtype in sys.argv[1:]:
    lines.clear()
    repetition.DEVICES = devices
    with torch.inference_mode(), host.decided_as_on_a_card():
        upsampler, image, features = host.made(getattr(torch, dtype), 448, 4, 48)
        counts = host.count(lambda: upsampler(image, features))
        chosen = upsampler.explain(image, features).chosen
        repetition.DEVICES = ("cpu",)
        for _ in range(3):
            upsampler(image, features)
    (line,) = lines
    repeated = {"launches": line.count(".packed_metadata"), "statements": line.count("\\n") - line.count("    del ")}
    found[dtype] = {"chosen": chosen, **counts, "repeated": repeated}
print(json.dumps(found))
"""

# By dtype: torch's operations, and the statements of a call that is repeated, line for line.
MOST = {"bfloat16": (0, 43), "float32": (0, 43)}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_call_asks_a_card_for_no_more_than_it_did() -> None:
    counted = in_a_process(COUNTS, *MOST)
    for dtype, (operations, statements) in MOST.items():
        found = counted[dtype]
        assert set(found["chosen"].values()) == {"triton"}, found["chosen"]
        assert found["launches"] <= 24, found["kernels"]
        assert found["operations"] <= operations, found["torch"]
        assert found["allocations"] <= 50
        assert found["waits"] == 0
        assert found["repeated"]["launches"] == found["launches"]
        assert found["repeated"]["statements"] <= statements, found["repeated"]
