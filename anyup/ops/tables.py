"""Lookup tables that the host makes once and stores on the device.

A copy from the host in every call would wait for the device, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Tables = TypeVar("Tables")

_read_by_graphs: dict[int, Any] = {}


def kept_for_graphs(tables: Tables, device: torch.device) -> Tables:
    """Return the tables; those that are used while a CUDA graph is captured are never freed.

    A replay reads their memory, but the graph holds no reference, so that a cache could free them.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _read_by_graphs[id(tables)] = tables
    return tables
