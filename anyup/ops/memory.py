"""Fresh memory for large maps.

A map of a hundred megabytes costs more in page faults than in work when it comes in pages of 4 KiB. Where Linux
gives huge pages to those who ask, asking makes a first pass over fresh CPU memory several times as fast; and within
`reuse` a map takes over the pages of one of its size that is gone.
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

# Below this the allocator reuses what it has, which is faster than any fresh page.
_LARGE = 2**23


# The C library's allocator gives freed memory back to the system, and takes page faults for it again, once more lies
# free at the end of its heap than twice the largest block that was ever freed (glibc, up to 32 MiB). A tile's
# buffers are as large: it would happen with each tile.
_LARGEST_FREED = 2**25 - 2**16


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let the C library keep what tiles free, for the next tile: frees a block, once, that was never touched."""
    if sys.platform == "linux":
        torch.empty(_LARGEST_FREED, dtype=torch.uint8)


Mapping = tuple[mmap.mmap, weakref.ref[memoryview]]
"""Pages, with a reference that dies with the tensor on them."""


class _Kept(threading.local):
    """The mappings of this thread's `reuse` block."""

    mappings: list[Mapping] | None = None


_kept = _Kept()


@contextlib.contextmanager
def reuse() -> Iterator[None]:
    """Keep the memory of maps made within the block until its end, for later maps of the same size."""
    before = _kept.mappings
    _kept.mappings = [] if before is None else before
    try:
        yield
    finally:
        _kept.mappings = before


class Pages:
    """Memory that the maps of a block leave to those of the next one: of calls that are alike."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []

    @contextlib.contextmanager
    def reuse(self) -> Iterator[None]:
        """As `reuse`; what this block's maps had stays when it ends, what only earlier ones had goes."""
        before, _kept.mappings = _kept.mappings, self._mappings
        # Whose pages are given away has a new entry then; the old ones are held here, or a new one might have their id.
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
        with contextlib.suppress(OSError):  # a kernel built without huge pages: the memory is as good as any
            pages.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(pages)
    mappings.append((pages, weakref.ref(view)))
    return view
