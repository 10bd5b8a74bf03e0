"""Fresh memory for large maps.

A map of a hundred megabytes costs more in page faults than in work when it comes in pages of 4 KiB. Where Linux
gives huge pages to those who ask, asking makes a first pass over fresh CPU memory several times as fast.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

# Below this the allocator reuses what it has, which is faster than any fresh page.
_LARGE = 2**23


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor in the dtype and on the device of `like`."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size * like.element_size() < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    pages = mmap.mmap(-1, size * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages: the memory is as good as any
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive, and unmaps it when it goes.
    tensor = torch.frombuffer(pages, dtype=like.dtype, count=size).view(shape)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(math.nan)
    return tensor
