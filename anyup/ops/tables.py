"""Tables that are made once and stay on their device.

A copy from the host in every call would wait for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Tables = TypeVar("Tables")

_MOST = 256

_made: dict[tuple[Hashable, torch.device], Any] = {}

_read_by_graphs: dict[int, Any] = {}


def made_once(kind: Hashable, device: torch.device, make: Callable[[], Tables]) -> Tables:
    """What `make` makes on a device, which is made once for each `kind`: a name and all that the tables depend on."""
    found = _made.get((kind, device))
    if found is None:
        with torch.inference_mode(False):  # later calls outside inference mode use the tables too
            found = make()
        # What is made while a graph is captured is filled when the graph is replayed.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(_made) == _MOST:
                _made.clear()
            _made[kind, device] = found
    return kept_for_graphs(found, device)


def kept_for_graphs(tables: Tables, device: torch.device) -> Tables:
    """Return the tables; those that are used while a CUDA graph is captured are never freed.

    A replay reads their memory, but the graph holds no reference, so that a cache could free them.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _read_by_graphs[id(tables)] = tables
    return tables
