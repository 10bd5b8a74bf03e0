"""A plugin of pytest's that rehearses the tests of a real card where ttsem pretends one: `-p rehearsal`.

Their code runs, on small sizes; what a card alone can tell (memory, capture, waiting, time) is made up. It shows that
the day a card is there is not spent on the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import card
import pytest
import torch
from torch.utils._pytree import tree_leaves

card.rehearsed = True


class _Graph:
    """A function whose results a replay makes again, in the tensors that it returned first."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function, self.results = function, function()

    def replay(self) -> None:
        """Make them again."""
        for old, new in zip(tree_leaves(self.results), tree_leaves(self._function()), strict=True):
            old.copy_(new)


def _captured(function: Callable[[], Any]) -> tuple[_Graph, Any]:
    graph = _Graph(function)
    return graph, graph.results


class _Clock:
    """Every call takes a millisecond."""

    def __init__(self, device: torch.device, budget: float = 0.1) -> None:
        assert device.type == "cuda" and budget > 0

    def __call__(self, call: Callable[[], object]) -> float:
        """Make the call, once."""
        call()
        return 1e-3


@pytest.fixture(autouse=True)
def _a_card_is_pretended() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        for name in ("memory_allocated", "max_memory_allocated", "get_sync_debug_mode"):
            patch.setattr(torch.cuda, name, lambda *_: 0)
        patch.setattr("test_on_a_card.captured", _captured)
        patch.setattr("anyup.bench.clock.CudaClock", _Clock)
        yield
