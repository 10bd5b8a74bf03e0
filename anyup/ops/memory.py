"""Fresh memory for large maps.

A new map of a hundred megabytes in pages of 4 KiB costs more time in page faults than in work. Linux gives huge pages
to programs that ask for them: a first pass over new CPU memory is then several times as fast. Within `reuse` a new map
takes the pages of a freed map of the same size.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

PIXELS_AT_A_TIME = 2**18
"""Of a map on a GPU that is worked on in pieces: so many fill it, and bound the scratch memory."""

# Bytes. The allocator reuses its memory for smaller tensors, which is faster than new pages.
_LARGE = 2**23


# glibc returns the free end of its heap to the system once it is larger than twice the largest block ever freed (up to
# 32 MiB). The buffers of a tile are that large, so each tile would cause the page faults anew. To free one block of
# this size raises the threshold.
_LARGEST_FREED = 2**25 - 2**16


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next tile: allocate and free one large block, once."""
    if sys.platform == "linux":
        torch.empty(_LARGEST_FREED, dtype=torch.uint8)


Mapping = tuple[mmap.mmap, weakref.ref[memoryview]]
"""Pages, and a weak reference that is dead once the tensor on them is freed."""


class _Kept(threading.local):
    """The mappings of this thread's `reuse` block."""

    mappings: list[Mapping] | None = None


_kept = _Kept()


def reuse() -> contextlib.AbstractContextManager[None]:
    """Keep the memory of maps made within the block until its end, for later maps of the same size.

    Nothing while a call is compiled: the compiler plans its memory itself.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _reuse()


@contextlib.contextmanager
def _reuse() -> Iterator[None]:
    before = _kept.mappings
    _kept.mappings = [] if before is None else before
    try:
        yield
    finally:
        _kept.mappings = before


class Pages:
    """Memory that the maps of one block leave to the maps of the next block, for equal calls one after the other."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []

    @contextlib.contextmanager
    def reuse(self) -> Iterator[None]:
        """As `reuse`, but keep the pages of this block's maps for the next block, and free unused older pages."""
        before, _kept.mappings = _kept.mappings, self._mappings
        # Reused pages get a new entry. `earlier` holds the old entries, so that no new entry can have the id of one.
        earlier = {id(mapping): mapping for mapping in self._mappings}
        try:
            yield
        finally:
            _kept.mappings = before
            self._mappings = [each for each in self._mappings if id(each) not in earlier or each[1]() is not None]


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor in the dtype and on the device of `like`."""
    count = math.prod(shape)
    if like.device.type != "cpu" or count * like.element_size() < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    # The tensor keeps the view alive, and the view the mapping.
    tensor = torch.frombuffer(_view(count * like.element_size()), dtype=like.dtype, count=count).view(shape)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        tensor.fill_(math.nan)
    return tensor


def _view(size: int) -> memoryview:
    mappings = [] if _kept.mappings is None else _kept.mappings
    unused = [entry for entry in mappings if len(entry[0]) == size and entry[1]() is None]
    if unused:
        mappings.remove(unused[0])
        pages = unused[0][0]
    else:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # Linux without huge pages: normal pages serve as well
            pages.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(pages)
    mappings.append((pages, weakref.ref(view)))
    return view
