"""A plugin of pytest's that rehearses the tests of a real card where ttsem pretends one: `-p rehearsal`.

Their code runs, on small sizes; what a card alone can tell (memory, capture, waiting, time) is made up. It shows that
the day a card is there is not spent on the tests.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import card
from torch.utils._pytree import tree_leaves

from anyup.bench.timing import Time
from anyup.limited_memory import destinations

card.rehearsed = True


class _Graph:
    """A function whose results a replay makes again, in the tensors that it returned first."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function, self.results = function, function()
        self.held_bytes = 0

    def replay(self) -> None:
        """Make them again."""
        made = self._function()
        with torch.inference_mode():  # a real one writes whatever the tensors' mode
            for old, new in zip(tree_leaves(self.results), tree_leaves(made), strict=True):
                old.copy_(new)

    def __call__(self) -> Any:
        self.replay()
        return self.results


def _captured(function: Callable[[], Any]) -> tuple[_Graph, Any]:
    graph = _Graph(function)
    return graph, graph.results


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        """Nothing runs beside anything."""


class _Happened:
    def synchronize(self) -> None:
        """It has happened."""


class _EmptyGraph:
    def replay(self) -> None:
        """What was captured is there already."""


class _Clock:
    """Every call takes a millisecond."""

    def __init__(self, device: torch.device, budget: float = 0.1) -> None:
        assert device.type == "cuda" and budget > 0

    def once(self, call: Callable[[], object]) -> Time:
        """Make the call."""
        call()
        return Time(1e-3, host=2e-3)

    def __call__(self, call: Callable[[], object]) -> float:
        """Make the call."""
        return self.once(call).seconds


@contextlib.contextmanager
def pretended_card() -> Iterator[pytest.MonkeyPatch]:
    """What a card alone can tell is made up in this block."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "get_sync_debug_mode"):
            patch.setattr(torch.cuda, name, lambda *_: 0)
        patch.setattr(torch.cuda, "memory_stats", lambda *_: Counter())
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**36, 2**36))
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, _Stream)
        patch.setattr(torch.cuda, "CUDAGraph", _EmptyGraph)
        for name in ("graph", "stream"):
            patch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
        patch.setattr("anyup.bench.clock.CudaClock", _Clock)
        pinned = (lambda size, dtype: torch.empty(size, dtype=dtype), lambda device: _Happened())
        patch.setattr(destinations._Pinned.__init__, "__defaults__", pinned)
        yield patch


@pytest.fixture(autouse=True)
def _a_card_is_pretended() -> Iterator[None]:
    with pretended_card() as patch:
        patch.setattr("test_on_a_card.captured", _captured)
        for module in ("anyup.capture", "anyup.training.pass_graphs"):
            patch.setattr(f"{module}.graph_of", lambda call, device, pool=None: _Graph(call))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        yield
