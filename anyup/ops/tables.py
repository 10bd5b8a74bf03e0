"""Tables that the host makes once, for calls on any device to look things up in.

A copy from the host in a call would wait for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Tables = TypeVar("Tables")

_read_by_graphs: dict[int, Any] = {}


def kept_for_graphs(tables: Tables, device: torch.device) -> Tables:
    """The tables on a device; those that are used while a graph is captured stay for good.

    A replay reads their memory, and no reference in the graph keeps a cache from letting them go.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _read_by_graphs[id(tables)] = tables
    return tables
