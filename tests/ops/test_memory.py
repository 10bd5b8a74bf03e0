"""Fresh memory: pages are shared out again only when nobody holds them."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from anyup.ops import memory

LARGE = (memory._LARGE // 4,)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


def test_a_map_that_is_gone_leaves_its_pages_to_the_next() -> None:
    with memory.reuse():
        first = memory.empty(LARGE, torch.empty(0))
        address = first.data_ptr()
        del first
        assert memory.empty(LARGE, torch.empty(0)).data_ptr() == address


def test_pages_that_a_view_still_holds_are_not_given_away() -> None:
    with memory.reuse():
        view = memory.empty(LARGE, torch.empty(0)).fill_(1.0)[5:9]
        memory.empty(LARGE, torch.empty(0)).fill_(2.0)
        assert view.tolist() == [1.0] * 4


def test_a_map_outlives_the_block_that_made_it() -> None:
    with memory.reuse():
        kept = memory.empty(LARGE, torch.empty(0)).fill_(3.0)
    memory.empty(LARGE, torch.empty(0)).fill_(4.0)
    assert bool((kept == 3.0).all())


def test_another_size_gets_pages_of_its_own() -> None:
    with memory.reuse():
        memory.empty(LARGE, torch.empty(0))
        other = memory.empty((LARGE[0] * 2,), torch.empty(0)).fill_(5.0)
        assert other.numel() == 2 * LARGE[0]


def test_maps_keep_dtype_and_shape() -> None:
    made = memory.empty((2, memory._LARGE // 4), torch.empty(0, dtype=torch.bfloat16))
    assert made.dtype == torch.bfloat16
    assert made.shape == (2, memory._LARGE // 4)
    assert made.is_contiguous()


def test_asking_to_keep_freed_memory_takes_none() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    memory.keep_freed_memory.__wrapped__()
    assert resident() - before < memory._LARGEST_FREED / 8


def test_a_block_leaves_its_pages_to_the_next_and_no_others() -> None:
    pages = memory.Pages()
    addresses = []
    for _ in range(2):
        with pages.reuse(), memory.reuse():
            addresses.append(memory.empty(LARGE, torch.empty(0)).data_ptr())
    assert addresses[0] == addresses[1]
    with pages.reuse():
        held = memory.empty((LARGE[0] * 2,), torch.empty(0))
    assert [len(mapping) for mapping, _ in pages._mappings] == [4 * 2 * LARGE[0]]
    with pages.reuse():
        assert memory.empty((LARGE[0] * 2,), torch.empty(0)).data_ptr() != held.data_ptr()
